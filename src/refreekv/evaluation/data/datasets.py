"""Public datasets: where their rows are, how they are read, and which of lm-eval's tasks scores them.

Rows come from local JSONL files or from the Hugging Face hub, and go through the same readers.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refreekv.evaluation.data.readers import Item, Reader, Row

PUNKT = "tokenizers/punkt_tab"
"""A requirement: data that nltk downloads on first use."""


class DataMissing(FileNotFoundError):  # noqa: N818 - named for what is the case
    """A dataset is neither in the folder given nor on the hub."""


def _unchanged(rows: Sequence[Row]) -> Sequence[Row]:
    return rows


@dataclass(frozen=True)
class LmEval:
    """A dataset as a task of lm-eval, whose prompts, few-shot examples, answer extraction and metrics it has."""

    # lm-eval's task, with the folder it is in before a slash; empty where lm-eval has none that can be used, and
    # ``config`` is all
    base: str
    metric: str  # Of lm-eval's results the one that tables show; ``metric,filter`` where the task has filters
    # puts the rows of a dataset's files into the form that lm-eval's task expects
    rows: Callable[..., Iterable[Row]] = _unchanged
    # where they are others than the dataset's: JSONL files that hold it in a data directory
    files: tuple[str, ...] = ()
    split: str = "test"  # split that ``base`` evaluates
    config: Mapping[str, Any] = field(default_factory=dict)  # what differs from ``base``
    scale: float = 1.0  # factor that brings the metric to 0 … 1
    chat: bool = True  # whether the prompt suits a chat template: no few-shot prompt, no text to be gone on with
    hub: bool = True  # whether it can come from the hub
    requires: str = ""  # `PUNKT`, or nothing
    # from a row and its prompt to where the text ends that a question is asked about, so that the question can come
    # after the text was compressed; None where there is no such place
    context_end: Callable[[Row, str], int] | None = None
    executes_code: bool = False  # whether scoring runs what the model wrote


@dataclass(frozen=True)
class Dataset:
    """One dataset of the catalogue."""

    summary: str  # one line
    files: tuple[str, ...]  # JSONL files that hold it in a data directory; all are needed
    # called with the rows of each file and the parameters; None where it serves as a task of lm-eval only
    read: Reader | None = None
    hub: tuple[str, str | None, str] | None = None  # dataset, configuration and split on the hub
    max_new_tokens: int = 128  # tokens that an answer needs
    # name of a metric of our own (`scoring`); empty where there is none, or where the scores are lm-eval's
    metric: str = ""
    parameters: Mapping[str, int] = field(default_factory=dict)  # what may be set, with defaults
    splits: bool = False  # whether items have a question apart, so that it can come after the text
    task: LmEval | None = None  # how lm-eval scores it

    def items(self, data_dir: Path | None, **parameters: int | float) -> list[Item]:
        """All items.

        Raises
        ------
        DataMissing
            No data; the message says what is missing.
        ValueError
            A file that holds something else.
        """
        assert self.read is not None
        rows = [self._from_hub()] if data_dir is None else [_json_lines(data_dir, name) for name in self.files]
        return _read(self.files, self.read, rows, {**self.parameters, **parameters})

    def _from_hub(self) -> list[Row]:
        needed = " and ".join(self.files)
        if self.hub is None or len(self.files) > 1:
            raise DataMissing(f"this dataset is not on the hub in this form: give --data-dir with {needed}")
        try:
            datasets = importlib.import_module("datasets")  # optional, and slow to import
        except ImportError as error:
            raise DataMissing(
                f"reading from the hub needs the package datasets (pip install 'refreekv[eval]'), "
                f"or give --data-dir with {needed}"
            ) from error
        path, config, split = self.hub
        try:
            return [dict(row) for row in datasets.load_dataset(path, config, split=split)]
        except Exception as error:  # the hub's many ways to be out of reach
            reason = " ".join(str(error).split())[:200]
            raise DataMissing(
                f"{path} could not be read from the hub ({type(error).__name__}: {reason}); "
                f"give --data-dir with {needed}"
            ) from error


def local_rows(data_dir: Path, files: Sequence[str], read: Callable[..., Iterable[Row]]) -> list[Row]:
    """Rows of JSONL files as a reader gives them; raises what `Dataset.items` raises."""
    return _read(files, read, [_json_lines(data_dir, name) for name in files], {})


def _read(
    files: Sequence[str], read: Callable[..., Iterable[Any]], rows: Sequence[list[Row]], parameters: Mapping[str, Any]
) -> list[Any]:
    needed = " and ".join(files)
    try:
        found = list(read(*rows, **parameters))
    except KeyError as error:
        raise ValueError(f"a row of {needed} has no field {error}: not the expected dataset") from error
    if not found:
        raise DataMissing(f"{needed} holds no sample")
    return found


def _json_lines(data_dir: Path, name: str) -> list[Row]:
    path = data_dir / name
    if not path.is_file():
        raise DataMissing(f"{data_dir} has no {name}")
    rows: list[Row] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return rows
