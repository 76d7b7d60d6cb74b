"""Host memory for what leaves a device: buffers under one limit, pinned where a GPU copies, and a copy stream a device.

Tensors go out and come back in the background: `Parked.put` and `Parked.fetch` return at once, copies run on the
device's copy stream, and who reads what came waits for it on the device (`Coming.tensors`), not on the host. Where
there is no GPU the same calls copy in ordinary memory.
"""

import functools
import itertools
import math
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SLAB = 2**24
"""Bytes of a piece of pinned memory: pinning is slow, so that pieces of one size are pinned once and used again."""

SHARE = 0.25
"""Of the host memory that is free, what is used if nobody says otherwise."""


class NoRoomError(MemoryError):
    """More than the limit would be held, or the system gives no more memory."""


def available_memory() -> int:
    """Host memory in bytes that can be taken without swapping, at most what a container allows; 4 GiB if unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        most, now = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        if most.isdecimal():
            found.append(max(int(most) - int(now), 0))
    except (OSError, ValueError):
        pass
    return min(found, default=2**32)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which a GPU copies to and from host memory."""
    return torch.cuda.Stream(device)


class HostMemory:
    """Host memory of which at most ``limit`` bytes are handed out at a time. Safe to be asked by several threads.

    Parameters
    ----------
    limit : int
        Bytes of buffers at most. Lowering it later takes nothing back.
    pinned : bool
        Whether GPUs copy to and from it while they compute. Such memory is pinned in pieces of `SLAB` bytes, which
        stay with this object when their buffer is gone; others are given back to the system.
    """

    def __init__(self, limit: int, *, pinned: bool):
        self.limit, self.pinned = limit, pinned
        self._lock = threading.Lock()
        self._used = 0
        # Pinned pieces that no buffer has, each with the copies that were under way when it was given back.
        self._free: list[tuple[Tensor, tuple[torch.cuda.Event, ...]]] = []
        self._owned = 0
        # What is given back when Python collects a buffer, which may be anywhere, so that no lock can be waited for.
        self._returned: deque[tuple[list[Tensor], int, list[torch.cuda.Event]]] = deque()

    @property
    def used(self) -> int:
        """Bytes of buffers that are in use; pinned ones in whole pieces."""
        with self._lock:
            self._collect()
            return self._used

    @property
    def held(self) -> int:
        """Bytes that are taken from the system: those in use, and pinned pieces that wait for a next buffer."""
        return max(self.used, self._owned)

    def size_of(self, size: int) -> int:
        """Bytes that a buffer of ``size`` bytes counts."""
        return -(-size // SLAB) * SLAB if self.pinned else size

    def take(self, size: int) -> "Buffer":
        """A buffer of ``size`` bytes, which is given back when nobody refers to it any more.

        Raises
        ------
        NoRoomError
            The limit would be exceeded, or the system has no more memory.
        """
        counted = self.size_of(size)
        with self._lock:
            self._collect()
            if self._used + counted > self.limit:
                raise NoRoomError(f"{size:,} bytes are wanted, and {self._used:,} of {self.limit:,} are in use")
            self._used += counted
        try:
            parts = self._pinned(counted // SLAB) if self.pinned else [_allocated(size, pinned=False)]
        except NoRoomError:
            with self._lock:
                self._used -= counted
            raise
        return Buffer(self, parts, size)

    def prepare(self, size: int) -> None:
        """Pin pieces for buffers of ``size`` bytes in all that are going to be asked for, in a thread of its own."""
        if not self.pinned:
            return

        def pin() -> None:
            while True:
                with self._lock:
                    wanted = min(size, self.limit - self._used)
                    if len(self._free) * SLAB >= wanted:
                        return
                try:
                    part = _allocated(SLAB, pinned=True)
                except NoRoomError:
                    return  # who asks for it will be told
                with self._lock:
                    self._free.append((part, ()))
                    self._owned += SLAB

        threading.Thread(target=pin, name="refreekv-pin", daemon=True).start()

    def _pinned(self, count: int) -> list[Tensor]:
        with self._lock:
            reused = [self._free.pop() for _ in range(min(count, len(self._free)))]
        for _, events in reused:
            for event in events:
                event.synchronize()
        parts = [part for part, _ in reused]
        try:
            while len(parts) < count:
                parts.append(_allocated(SLAB, pinned=True))
                with self._lock:
                    self._owned += SLAB
        except NoRoomError:
            with self._lock:
                self._free += [(part, ()) for part in parts]
            raise
        return parts

    def _collect(self) -> None:
        while self._returned:
            parts, counted, events = self._returned.popleft()
            self._used -= counted
            if self.pinned:
                self._free += [(part, tuple(events)) for part in parts]


def _allocated(size: int, *, pinned: bool) -> Tensor:
    try:
        # Not in inference mode: what is made there cannot be written outside of it.
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:  # also what CUDA says when nothing can be pinned
        raise NoRoomError(f"the system gives no {size:,} bytes of {'pinned ' if pinned else ''}host memory") from error


class Buffer:
    """So many bytes of host memory, in one or several parts.

    Attributes
    ----------
    size : int
        Bytes that were asked for.
    """

    def __init__(self, memory: HostMemory, parts: list[Tensor], size: int):
        self.size = size
        self._parts = parts
        self._events: list[torch.cuda.Event] = []
        back = parts, memory.size_of(size), self._events
        weakref.finalize(self, memory._returned.append, back).atexit = False

    def spans(self, start: int, stop: int) -> Iterator[Tensor]:
        """The bytes from ``start`` to ``stop`` as parts, uint8, in order."""
        for part in self._parts:
            if start < len(part) and stop > 0:
                yield part[max(start, 0) : stop]
            start, stop = start - len(part), stop - len(part)

    def busy(self, event: torch.cuda.Event) -> None:
        """Note that bytes are copied until an event."""
        self._events[:] = [earlier for earlier in self._events if not earlier.query()] + [event]

    def wait(self) -> None:
        """Wait until nothing is copied any more."""
        while self._events:
            self._events.pop().synchronize()


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in a buffer, and what it was."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Parked:
    """Tensors that were copied to host memory. They do not change any more: copies of it share them.

    Attributes
    ----------
    nbytes : int
        Bytes of the tensors.
    """

    def __init__(self, buffer: Buffer, places: Mapping[str, _Place]):
        self._buffer, self._places = buffer, dict(places)
        self.nbytes = buffer.size

    @classmethod
    def put(cls, memory: HostMemory, tensors: Mapping[str, Tensor]) -> "Parked":
        """Begin to copy tensors, of one device or of the host, to host memory.

        They must stay as they are until the copies are done, which `until_read` waits for on their device; freed they
        may be at once. Strided ones are copied run by run, without a copy on the device.

        Raises
        ------
        NoRoomError
            There is no room for all of them; nothing is copied then.
        """
        places, at = {}, 0
        for name, tensor in tensors.items():
            places[name] = _Place(at, tensor.shape, tensor.dtype)
            at += -(-places[name].size // 16) * 16
        parked = cls(memory.take(at), places)
        with _copying(list(tensors.values()), parked._buffer):
            for name, tensor in tensors.items():
                _copy(parked._buffer, places[name].start, tensor, out=True)
        return parked

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self._places)

    def like(self, name: str, device: torch.device) -> Tensor:
        """An uninitialised tensor on ``device`` of the shape and type of one that is parked."""
        place = self._places[name]
        with torch.inference_mode(False):
            return torch.empty(place.shape, dtype=place.dtype, device=device)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor."""
        return self._places[name].dtype

    def copy_into(self, into: Mapping[str, Tensor]) -> None:
        """Begin to copy tensors, by name, to others of the same shape and type, which may be strided."""
        for name, tensor in into.items():
            place = self._places[name]
            if tensor.shape != place.shape or tensor.dtype != place.dtype:
                raise ValueError(
                    f"{name} was parked as {place.dtype} {list(place.shape)} and is to be copied to {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
        if _device_of(into.values()) is None:
            self._buffer.wait()
        with _copying(list(into.values()), self._buffer):
            for name, tensor in into.items():
                _copy(self._buffer, self._places[name].start, tensor, out=False)

    def fetch(self, device: torch.device, names: Sequence[str] | None = None) -> "Coming":
        """Begin to copy tensors, all of them or those of some names, to a device."""
        found = {name: self.like(name, device) for name in (self.names if names is None else names)}
        self.copy_into(found)
        return Coming(found, device)

    def on_host(self) -> dict[str, Tensor]:
        """Copies of all tensors in ordinary host memory; waits for them."""
        return self.fetch(torch.device("cpu")).tensors()

    def until_read(self, device: torch.device) -> None:
        """Let what a device computes from now on wait until the tensors have been copied."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(copy_stream(device))

    def __deepcopy__(self, memo: object) -> "Parked":
        return self


class Coming:
    """Tensors on their way to a device."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device):
        self._tensors, self._device = tensors, device
        self._event = copy_stream(device).record_event() if device.type == "cuda" else None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, for what is computed from now on: the device waits for them, the host does not."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        return self._tensors


@contextmanager
def _copying(tensors: Collection[Tensor], buffer: Buffer) -> Iterator[None]:
    """Within, copies of tensors run on the copy stream of their device, if that is a GPU, after what made them."""
    device = _device_of(tensors)
    if device is None:
        yield
        return
    stream = copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    for tensor in tensors:
        tensor.record_stream(stream)
    buffer.busy(stream.record_event())


def _device_of(tensors: Collection[Tensor]) -> torch.device | None:
    """The GPU that tensors are on; None: they are on the host."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors of several devices cannot be copied together: {sorted(map(str, devices))}")
    return next((device for device in devices if device.type == "cuda"), None)


def _copy(buffer: Buffer, start: int, tensor: Tensor, *, out: bool) -> None:
    """Copy a tensor to a buffer's bytes from ``start`` on, or from there."""
    for run in _runs(tensor):
        at = 0
        for part in buffer.spans(start, start + len(run)):
            mine = run[at : at + len(part)]
            if out:
                part.copy_(mine, non_blocking=True)
            else:
                mine.copy_(part, non_blocking=True)
            at += len(part)
        start += len(run)


def _runs(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor in order, as views of runs without a gap."""
    if not tensor.numel():
        return
    inner, expected = tensor.dim(), 1
    # A dimension of one element may have any stride.
    while inner and (tensor.stride(inner - 1) == expected or tensor.shape[inner - 1] == 1):
        inner -= 1
        expected *= tensor.shape[inner]
    for place in itertools.product(*(range(n) for n in tensor.shape[:inner])):
        yield tensor[place].reshape(-1).view(torch.uint8)  # a view where the last dimension has no gaps
