"""Where conversations' pasts are kept: host memory under a limit, then files, then nowhere; the oldest go first."""

import contextlib
import shutil
import tempfile
import threading
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from refreekv.core import spelling
from refreekv.storage.files import Summed, write_summed
from refreekv.storage.host import SHARE, Coming, HostMemory, NoRoomError, Parked, available_memory

LEAST_FREE = 2**30
"""Bytes of a disk that are left free."""

_UNITS = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def _own(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of a part of another one: a file takes no two that share memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class Filed:
    """Tensors in a file, which is removed when nobody refers to it any more: as `Parked`, but on disk.

    Raises
    ------
    OSError
        It cannot be written.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]):
        on_host = {name: _own(tensor.detach().to("cpu").contiguous()) for name, tensor in tensors.items()}
        self.nbytes = sum(tensor.nbytes for tensor in on_host.values())
        if shutil.disk_usage(folder).free < self.nbytes + LEAST_FREE:
            raise OSError(f"{folder} would have less than {LEAST_FREE:,} bytes left")
        self._like = {name: (tensor.shape, tensor.dtype) for name, tensor in on_host.items()}
        self.path = folder / f"{uuid.uuid4().hex}.safetensors"
        write_summed(self.path, on_host)
        weakref.finalize(self, self.path.unlink, missing_ok=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self._like)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""
        return self._like[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor."""
        return self._like[name][1]

    def check(self) -> None:
        """Raise DamagedError unless all is as it was written."""
        Summed(self.path).check()

    def fetch(self, device: torch.device) -> Coming:
        """All tensors, on a device."""
        file = Summed(self.path)
        with torch.inference_mode(False):
            return Coming({name: file.tensor(name).to(device) for name in self.names}, device)

    def on_host(self) -> dict[str, Tensor]:
        """All tensors in ordinary memory."""
        return self.fetch(torch.device("cpu")).tensors()

    def __deepcopy__(self, memo: object) -> "Filed":
        return self


Stored = Parked | Filed


class Stays(Protocol):
    """A conversation's past, as the store that it is in sees it."""

    busy: bool

    @property
    def parked_bytes(self) -> int:
        """Bytes in host memory."""

    @property
    def file_bytes(self) -> int:
        """Bytes in files."""

    def to_files(self, folder: Path) -> None:
        """Move all of it to files."""

    def drop(self, reason: str) -> None:
        """Let go of all of it."""


class HostStore:
    """Host memory, and a folder if there is one, for what the caches of one or many conversations evict.

    Parameters
    ----------
    limit : int, optional
        Bytes of host memory at most. None: a quarter of what is free when the first conversation comes; on a CPU with
        a folder none, as nothing would be saved.
    folder : path, optional
        Where conversations go that find no room: to a folder of the store's own in there, which only its owner can
        read and which is removed at the end; what a process left that was killed is removed by the next one.

    Raises
    ------
    ValueError
        A limit under 0, or a folder that is not there.
    """

    def __init__(self, limit: int | None = None, folder: str | Path | None = None):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ValueError(f"limit is a number of bytes from 0 on, got {limit!r}")
        self.limit = limit
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no folder to keep conversations in")
        self._memory: HostMemory | None = None
        self._own: Path | None = None
        self._pasts: list[weakref.ref[Any]] = []  # the least recently used first
        self.lock = threading.RLock()

    @classmethod
    def parse(cls, value: "str | HostStore | None") -> "HostStore | None":
        """From ``"host"``, or with parameters ``"host:limit=8GiB,folder=/tmp"``; a store and None stay what they are.

        Raises
        ------
        ValueError
            Something else, or an unknown parameter.
        TypeError
            Neither a text nor a store.
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise TypeError(f"keep_evicted must be 'host', a HostStore or None, got {value!r}")
        kind, items = spelling.parts(value)
        given = dict(items)
        if kind != "host" or set(given) - {"limit", "folder"} or None in given.values():
            raise ValueError(f"keep_evicted must be 'host' or such as 'host:limit=8GiB,folder=/tmp', got {value!r}")
        limit = given.get("limit")
        return cls(None if limit is None else _bytes(limit), given.get("folder"))

    # -- what pasts call ------------------------------------------------------------------------

    def memory(self, device: torch.device) -> HostMemory:
        """The host memory for what comes from a device; that of the first one that asks serves all."""
        with self.lock:
            if self._memory is None:
                if self.limit is None:
                    saves = device.type != "cpu" or self.folder is None
                    self.limit = int(SHARE * available_memory()) if saves else 0
                self._memory = HostMemory(self.limit, pinned=device.type == "cuda")
            return self._memory

    def put(self, owner: Stays, tensors: Mapping[str, Tensor], device: torch.device) -> Stored:
        """Keep tensors of one device for a conversation, in memory or in a file.

        Raises
        ------
        NoRoomError
            There is neither.
        OSError
            A file cannot be written.
        """
        with self.lock:
            memory = self.memory(device)
            while True:
                try:
                    return Parked.put(memory, tensors)
                except NoRoomError:
                    if not self._make_room(owner):
                        if self.folder is None:
                            raise
                        return Filed(self._place(), tensors)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes that conversations take of host memory and of files; what several of them share may count for each."""
        with self.lock:
            pasts = [past for one in self._pasts if (past := one()) is not None]
            memory = 0 if self._memory is None else self._memory.used
            return memory, sum(past.file_bytes for past in pasts)

    def used(self, past: Stays) -> None:
        """Note that a conversation goes on: it is the last one to go."""
        with self.lock:
            self._pasts = [one for one in self._pasts if one() is not None and one() is not past] + [weakref.ref(past)]

    def _make_room(self, owner: Stays) -> bool:
        """Move the least recently used conversation out of memory; False if there is no other."""
        for past in [one() for one in self._pasts]:
            if past is None or past is owner or past.busy or not past.parked_bytes:
                continue
            if self.folder is None:
                past.drop("other conversations needed the memory")
            else:
                past.to_files(self._place())
            return True
        return False

    def _place(self) -> Path:
        if self._own is None:
            assert self.folder is not None
            _sweep(self.folder)
            self._own = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.folder))
            lock = _locked(self._own / _LOCK)
            weakref.finalize(self, _leave, self._own, lock)
        return self._own

    def __deepcopy__(self, memo: object) -> "HostStore":
        return self


_PREFIX, _LOCK = "refreekv-past-", "lock"


def _locked(path: Path) -> Any:
    """An open file that others cannot lock; None if somebody holds it, or this system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _sweep(folder: Path) -> None:
    """Remove what processes have left that were killed: nobody holds the locks of their folders any more."""
    for left in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if (left / _LOCK).exists() and (lock := _locked(left / _LOCK)) is not None:
                _leave(left, lock)


def _leave(folder: Path, lock: Any) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        lock.close()


def _bytes(text: str) -> int:
    """A number of bytes such as ``8GiB``, ``500M`` or ``4096``."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        found = float(number.removesuffix(unit)) * 2 ** _UNITS[unit]
        if not 0 <= found < 2**63:
            raise ValueError
    except ValueError:
        raise ValueError(f"limit is a number of bytes such as 8GiB, got {text!r}") from None
    return int(found)
