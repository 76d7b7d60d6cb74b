"""Public benchmark datasets, from local JSONL files or from the Hugging Face hub.

Both sources go through the same reader (`readers`).
"""

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from refreekv.evaluation.data import readers
from refreekv.evaluation.data.readers import Item, Reader, Row


class DataMissing(FileNotFoundError):  # noqa: N818 - named for what is the case
    """A family's data is neither in the folder given nor on the hub."""


@dataclass(frozen=True)
class Dataset:
    """Where a family's rows are and how to read one.

    Attributes
    ----------
    summary : str
        One line.
    files : tuple of str
        JSONL files that hold it in a data directory; all are needed.
    hub : tuple or None
        Dataset, configuration and split on the hub.
    read : Reader
        Called with the rows of each file and the family's parameters.
    metric : str
        Name of the task metric; empty where there is none, or where the scores are lm-eval's (`benchmarks`).
    max_new_tokens : int
        Room that an answer needs.
    parameters : dict
        What may be set, with defaults.
    splits : bool
        Whether items have a question apart, so that it can come after the text.
    """

    summary: str
    files: tuple[str, ...]
    hub: tuple[str, str | None, str] | None
    read: Reader
    metric: str = ""
    max_new_tokens: int = 128
    parameters: dict[str, int] = field(default_factory=dict)
    splits: bool = False

    def items(self, data_dir: Path | None, **parameters: int | float) -> list[Item]:
        """All items.

        Raises
        ------
        DataMissing
            No data; the message says what is missing.
        ValueError
            A file that holds something else.
        """
        rows = [local_rows(data_dir, name) for name in self.files] if data_dir is not None else [self._from_hub()]
        try:
            return list(self.read(*rows, **{**self.parameters, **parameters}))
        except KeyError as error:
            raise ValueError(
                f"a row of {' or '.join(self.files)} has no field {error}: not the expected dataset"
            ) from error

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


def local_rows(data_dir: Path, name: str) -> list[Row]:
    """Rows of a JSONL file; `DataMissing` if it is not there, ValueError if it is no JSONL."""
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


# -- the list -----------------------------------------------------------------------------

_LONGBENCH = "Xnhyacinth/LongBench"


def _longbench(summary: str, name: str, read: Reader, new: int, *, file: str = "", split: bool = True) -> Dataset:
    return Dataset(
        summary, (file or f"longbench_{name}.jsonl",), (_LONGBENCH, name, "test"), read, "", new, splits=split
    )


def _ruler_set(task: str, summary: str, new: int) -> Dataset:
    return Dataset(summary, (f"ruler4k_{task}.jsonl",), None, readers.ruler, "", new, splits=True)


_QASPER, _QMSUM = readers.long(readers.ARTICLE, "Article"), readers.long(readers.MEETING, "Transcript", "Query")
_TWO_WIKI = readers.long(readers.PASSAGES, "Passages")

DATASETS: dict[str, Dataset] = {
    "gsm8k": Dataset(
        "GSM8K test: grade school mathematics",
        ("gsm8k.jsonl",),
        ("openai/gsm8k", "main", "test"),
        readers.gsm8k,
        "",
        320,
    ),
    "theoremqa": Dataset(
        "TheoremQA without the rows that need a picture",
        ("theoremqa.jsonl",),
        ("TIGER-Lab/TheoremQA", None, "test"),
        readers.theoremqa,
        "theoremqa",
        384,
    ),
    "truthfulqa": Dataset(
        "TruthfulQA, generation",
        ("truthfulqa.jsonl",),
        ("truthfulqa/truthful_qa", "generation", "validation"),
        readers.truthfulqa,
        "",
        64,
    ),
    "humaneval": Dataset(
        "HumanEval: a function from its docstring",
        ("humaneval.jsonl",),
        ("openai/openai_humaneval", None, "test"),
        readers.humaneval,
        "",
        384,
    ),
    "mt-bench": Dataset(
        "MT-Bench, the second turn after the first was compressed; no score",
        ("mt_bench.jsonl",),
        ("HuggingFaceH4/mt_bench_prompts", None, "train"),
        readers.mt_bench,
        max_new_tokens=256,
    ),
    "qasper": _longbench("LongBench Qasper: questions about papers", "qasper", _QASPER, 128),
    "qasper-e": _longbench(
        "LongBench-E Qasper (local files: up to 4k words)",
        "qasper_e",
        _QASPER,
        128,
        file="longbench_e_qasper.jsonl",
    ),
    "2wikimqa": _longbench("LongBench 2WikiMQA: questions over several passages", "2wikimqa", _TWO_WIKI, 32),
    "2wikimqa-e": _longbench(
        "LongBench-E 2WikiMQA (local files: up to 4k words)",
        "2wikimqa_e",
        _TWO_WIKI,
        32,
        file="longbench_e_2wikimqa.jsonl",
    ),
    "qmsum": _longbench("LongBench QMSum: queries about meetings", "qmsum", _QMSUM, 256),
    "narrativeqa": _longbench(
        "LongBench NarrativeQA: questions about stories",
        "narrativeqa",
        readers.long(readers.STORY, "Story"),
        64,
    ),
    "multi-news": _longbench(
        "LongBench MultiNews: a summary of several articles",
        "multi_news",
        readers.long(readers.NEWS, "News", "Summary"),
        384,
    ),
    "triviaqa": _longbench("LongBench TriviaQA, few-shot", "triviaqa", readers.few_shot, 32),
    "lcc": _longbench("LongBench LCC: the next line of code", "lcc", readers.code_context, 64, split=False),
    "qmsum-meetings": Dataset(
        "QMSum test as published: whole meetings, general and specific queries",
        ("qmsum_meetings.jsonl", "qmsum_queries.jsonl"),
        None,
        readers.qmsum_meetings,
        "",
        256,
        splits=True,
    ),
    "musique": Dataset(
        "MuSiQue as published (not LongBench's rows): questions over 20 passages",
        ("musique_original.jsonl",),
        ("dgslibisey/MuSiQue", None, "validation"),
        readers.musique,
        "",
        32,
        splits=True,
    ),
    "hotpotqa": Dataset(
        "HotpotQA as published (not LongBench's rows), with distractor passages",
        ("hotpotqa_original.jsonl",),
        ("hotpotqa/hotpot_qa", "distractor", "validation"),
        readers.musique,
        "",
        32,
        splits=True,
    ),
    "ruler-vt": _ruler_set("vt", "RULER at 4k: variable tracking", 48),
    "ruler-cwe": _ruler_set("cwe", "RULER at 4k: the ten most common words", 96),
    "ruler-fwe": _ruler_set("fwe", "RULER at 4k: the three most frequent coded words", 48),
    "ruler-niah-multikey-2": _ruler_set("niah_multikey_2", "RULER at 4k: one of very many keys", 32),
    "ruler-niah-multikey-3": _ruler_set("niah_multikey_3", "RULER at 4k: one of very many UUIDs", 64),
    **{
        f"kv-retrieval-{pairs}": Dataset(
            f"JSON key-value retrieval among {pairs} pairs of UUIDs",
            (f"kv_retrieval_{pairs}.jsonl",),
            None,
            readers.kv_retrieval,
            "share_found",
            128,  # a sentence around a UUID, of a token a digit
            splits=True,
        )
        for pairs in (75, 140)
    },
    "pg19": Dataset(
        "PG-19: pieces of books and how they go on",
        ("pg19.jsonl",),
        ("emozilla/pg19-test", None, "test"),
        readers.books,
        max_new_tokens=256,
        parameters={"chars": 16_000, "following": 1_000},
    ),
    "wikitext2": Dataset(
        "WikiText-2 test: starts of articles and how they go on",
        ("wikitext2.jsonl",),
        ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
        readers.articles,
        max_new_tokens=256,
        parameters={"chars": 12_000, "following": 600},
    ),
}
