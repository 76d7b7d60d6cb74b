"""Results files: JSON lines that survive a kill, with the settings they belong to in front.

The first line says what the run's settings are; then come, in any order, lines that say
what a policy's specification stands for, and one line for each (sample, policy). A file is
only ever appended to, a sample at a time. A line without its line break was being written
when the process died: it is cut off when the file is opened again, and measured again.
"""

import contextlib
import gzip
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, Self, TypeVar

from refreekv.evaluation.records import FidelityRecord, Key, Record

SETUP, POLICIES = "refreekv_setup", "refreekv_policies"
"""Keys of the lines that are no records."""


R = TypeVar("R", bound=Record)


@dataclass
class Results(Generic[R]):
    """What a results file holds."""

    # the run's settings; ``"environment"`` in it is for the reader only
    setup: dict[str, Any] = field(default_factory=dict)
    policies: dict[str, str] = field(default_factory=dict)  # specifications to policies with all their parameters
    records: list[R] = field(default_factory=list)  # each (family, sample, policy) once

    @property
    def keys(self) -> set[Key]:
        """What was measured."""
        return {record.key for record in self.records}


def read(path: Path, record: type[R] = FidelityRecord) -> Results[R]:  # type: ignore[assignment]
    """Read a results file of one kind of record, may be gzipped; a last line that was not finished is left out.

    Raises
    ------
    ValueError
        The file is not one of refreekv's, or one of another kind.
    """
    return _parse(path, contents(path), record)[0]


def contents(path: Path) -> bytes:
    """What a results file holds; its name ends in ``.gz`` if it is gzipped."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _parse(path: Path, content: bytes, kind: type[R]) -> tuple[Results[R], int]:
    """What a file holds, and the length of its finished lines."""
    results: Results[R] = Results()
    seen: set[Key] = set()
    whole = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            data = json.loads(line)
            if not isinstance(data, dict) or (number == 1) != (SETUP in data):
                raise ValueError("not a line of a results file")
            if SETUP in data:
                results.setup = data[SETUP]
            elif POLICIES in data:
                results.policies |= data[POLICIES]
            else:
                record = kind.from_dict(data)
                if record.key not in seen:
                    seen.add(record.key)
                    results.records.append(record)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a results file of this kind ({error})") from error
    return results, whole


class RecordFile(Generic[R]):
    """A results file that is open for more; a context manager.

    Parameters
    ----------
    path : Path
        Made if it does not exist.
    setup : dict
        Settings of this run. All but ``"environment"`` must be those of the file.
    policies : dict
        Specifications to policies with all their parameters.
    record : type
        What a line is: `FidelityRecord` or `TaskRecord`.

    Attributes
    ----------
    results : Results
        What the file holds, what is appended included.

    Raises
    ------
    ValueError
        The file holds results of other settings, or is no results file.
    BlockingIOError
        Another process is writing it.
    """

    def __init__(self, path: Path, setup: Mapping[str, Any], policies: Mapping[str, str], record: type[R]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b")
        try:
            _lock(self._file, path)
            self._file.seek(0)
            self.results, whole = _parse(path, self._file.read(), record)
            self._held = self.results.keys
            if self.results.setup:
                self._check(setup, policies)
            self._file.truncate(whole)
            lines: list[dict[str, Any]] = []
            if not self.results.setup:
                self.results.setup = dict(setup)
                lines.append({SETUP: self.results.setup})
            new = {spec: full for spec, full in policies.items() if spec not in self.results.policies}
            if new:
                self.results.policies |= new
                lines.append({POLICIES: new})
            self._write(lines)
        except BaseException:
            self._file.close()
            raise

    def _check(self, setup: Mapping[str, Any], policies: Mapping[str, str]) -> None:
        held = self.results.setup
        compared = sorted((held.keys() | setup.keys()) - {"environment"})
        other = [f"{key} = {held.get(key)!r}" for key in compared if held.get(key) != setup.get(key)]
        now = [f"{key} = {setup.get(key)!r}" for key in compared if held.get(key) != setup.get(key)]
        for spec, full in policies.items():
            if self.results.policies.get(spec, full) != full:
                other.append(f"{spec} is {self.results.policies[spec]}")
                now.append(f"{spec} is {full}")
        if other:
            raise ValueError(
                f"{self.path} holds results of other settings ({'; '.join(other)}; now {'; '.join(now)}): "
                "results of different settings are not mixed in one file; choose another file, or the same settings"
            )

    def append(self, records: Iterable[R]) -> None:
        """Add the records of a sample, in one write that has reached the disk on return."""
        new = [record for record in records if record.key not in self._held]
        self._write([record.to_dict() for record in new])
        self._held |= {record.key for record in new}
        self.results.records += new

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        content = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        if content:
            self._file.write(content.encode("utf-8", "backslashreplace"))
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep a second writer out, where the system can; the lock goes with the process."""
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{path} is being written by another process") from error
        except OSError:  # a file system without locks
            return
