"""Host memory for what leaves a device: buffers under one limit, pinned where a GPU copies, and a copy stream a device.

Tensors go out and come back in the background: `Parked.put` and `Parked.fetch` return at once, copies run on the
device's copy stream, and who reads what came waits for it on the device (`Coming.tensors`), not on the host. Where
there is no GPU the same calls copy in ordinary memory.
"""

import contextlib
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
"""Bytes that are pinned at a time: pinning is slow, so that what is pinned stays so and is used again."""

PAGE = 2**16
"""Bytes of pinned memory that a buffer takes at a time."""

APART = 2**18
"""Bytes without a gap from which on a copy of their own is worth it."""

RUNS = 16
"""Runs without a gap of a tensor up to which each is put where it goes; else a copy of the tensor is."""

ALIGNED = 16
"""What the bytes begin at a multiple of."""

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


def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which a GPU copies to and from host memory."""
    return _copy_stream(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _copy_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


@dataclass
class _Extent:
    """Free pages of a slab, and the copies that were under way when they were given back."""

    slab: int
    start: int
    stop: int
    events: tuple[torch.cuda.Event, ...] = ()


class HostMemory:
    """Host memory of which at most ``limit`` bytes are handed out at a time. Safe to be asked by several threads.

    Parameters
    ----------
    limit : int
        Bytes of buffers at most. Lowering it later takes nothing back.
    pinned : bool
        Whether GPUs copy to and from it while they compute. Such memory is pinned in slabs of `SLAB` bytes, which stay
        with this object when their buffers are gone; other memory is given back to the system.
    """

    def __init__(self, limit: int, *, pinned: bool):
        self.limit, self.pinned = limit, pinned
        self._lock = threading.Lock()
        self._used = 0
        self._slabs: list[Tensor] = []
        self._free: list[_Extent] = []  # ascending, and those that touch are one
        # What is given back when Python collects a buffer, which may be anywhere, so that no lock can be waited for.
        self._returned: deque[tuple[list[_Extent], int, list[torch.cuda.Event]]] = deque()

    @property
    def used(self) -> int:
        """Bytes of buffers that are in use; pinned ones in whole pages."""
        with self._lock:
            self._collect()
            return self._used

    @property
    def held(self) -> int:
        """Bytes that are taken from the system: those in use, and pinned ones that wait for a next buffer."""
        return max(self.used, len(self._slabs) * SLAB)

    def size_of(self, size: int) -> int:
        """Bytes that a buffer of ``size`` bytes counts."""
        return -(-size // PAGE) * PAGE if self.pinned else size

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
        taken: list[_Extent] = []
        try:
            if self.pinned:
                self._take_pages(counted // PAGE, taken)
                parts = [self._slabs[one.slab][one.start * PAGE : one.stop * PAGE] for one in taken]
            else:
                parts = [_allocated(size, pinned=False)]
        except NoRoomError:
            self._returned.append((taken, counted, []))
            raise
        return Buffer(parts, size, self._returned, taken, counted)

    def prepare(self, size: int) -> None:
        """Pin memory for buffers of ``size`` bytes that are going to be asked for, in a thread of its own."""
        if not self.pinned:
            return
        target = min(self.used + size, self.limit)

        def pin() -> None:
            with contextlib.suppress(NoRoomError):  # who asks for it will be told
                while len(self._slabs) * SLAB < target:
                    self._add_slab()

        if len(self._slabs) * SLAB < target:
            threading.Thread(target=pin, name="refreekv-pin", daemon=True).start()

    def _add_slab(self) -> None:
        slab = _allocated(SLAB, pinned=True)
        with self._lock:
            self._slabs.append(slab)
            self._free.append(_Extent(len(self._slabs) - 1, 0, SLAB // PAGE))

    def _take_pages(self, count: int, taken: list[_Extent]) -> None:
        """Take free pages, in as few pieces as may be without a search, and pin more where there are none."""
        while count:
            with self._lock:
                fits = next((one for one in self._free if one.stop - one.start >= count), None)
                chosen = fits or max(self._free, key=lambda one: one.stop - one.start, default=None)
                if chosen is not None:
                    size = min(count, chosen.stop - chosen.start)
                    taken.append(_Extent(chosen.slab, chosen.start, chosen.start + size))
                    chosen.start += size
                    count -= size
                    if chosen.start == chosen.stop:
                        self._free.remove(chosen)
            if chosen is None:
                self._add_slab()
                continue
            for event in chosen.events:
                event.synchronize()

    def _collect(self) -> None:
        while self._returned:
            extents, counted, events = self._returned.popleft()
            self._used -= counted
            self._free += [_Extent(one.slab, one.start, one.stop, tuple(events)) for one in extents]
            joined: list[_Extent] = []
            for one in sorted(self._free, key=lambda one: (one.slab, one.start)):
                if joined and (joined[-1].slab, joined[-1].stop) == (one.slab, one.start):
                    joined[-1].stop = one.stop
                    joined[-1].events = _under_way((*joined[-1].events, *one.events))
                else:
                    joined.append(one)
            self._free = joined


def _under_way(events: tuple[torch.cuda.Event, ...]) -> tuple[torch.cuda.Event, ...]:
    return tuple(event for event in dict.fromkeys(events) if not event.query())


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

    def __init__(
        self,
        parts: list[Tensor],
        size: int,
        returned: "deque[tuple[list[_Extent], int, list[torch.cuda.Event]]]",
        extents: list[_Extent],
        counted: int,
    ):
        self.size = size
        self._parts = parts
        self._events: list[torch.cuda.Event] = []
        weakref.finalize(self, returned.append, (extents, counted, self._events)).atexit = False

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
        may be at once. What is small, or has small gaps, is put together on the device first: a copy costs the host
        as much as a launch, whatever it copies.

        Raises
        ------
        NoRoomError
            There is no room for all of them; nothing is copied then.
        """
        places: dict[str, _Place] = {}
        at = 0
        apart = [name for name, tensor in tensors.items() if _is_apart(tensor)]
        for name in (*apart, *(name for name in tensors if name not in apart)):
            places[name] = _Place(at, tensors[name].shape, tensors[name].dtype)
            at += -(-places[name].size // ALIGNED) * ALIGNED
        parked = cls(memory.take(at), places)
        copied = [(places[name].start, tensors[name]) for name in apart]
        if together := [name for name in places if name not in apart]:
            copied.append((places[together[0]].start, _beside([tensors[name] for name in together])))
        with _copying([tensor for _, tensor in copied], parked._buffer):
            for start, tensor in copied:
                _copy(parked._buffer, start, tensor, out=True)
        return parked

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self._places)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor."""
        return self._places[name].dtype

    def fetch(self, device: torch.device) -> "Coming":
        """Begin to copy all tensors to a device, in as few copies as there are pieces; they share memory there."""
        with torch.inference_mode(False):
            every = torch.empty(self._buffer.size, dtype=torch.uint8, device=device)
            if device.type != "cuda":
                self._buffer.wait()
            with _copying([every], self._buffer):
                _copy(self._buffer, 0, every, out=False)
            found = {
                name: every[place.start : place.start + place.size].view(place.dtype).view(place.shape)
                for name, place in self._places.items()
            }
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


def _beside(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors, one behind the other, each from a multiple of `ALIGNED` on: a copy in one launch."""
    gap = torch.empty(ALIGNED, dtype=torch.uint8, device=tensors[0].device)
    parts = []
    for tensor in tensors:
        runs = list(itertools.islice(_runs(tensor.detach()), RUNS + 1))
        parts += runs if len(runs) <= RUNS else [tensor.detach().contiguous().reshape(-1).view(torch.uint8)]
        if short := -tensor.nbytes % ALIGNED:
            parts.append(gap[:short])
    return torch.cat(parts)


def _is_apart(tensor: Tensor) -> bool:
    """Whether each run without a gap is worth a copy of its own; so is what copies nothing."""
    return not tensor.nbytes or (tensor.nbytes >= APART and all(run.nbytes >= APART for run in _runs(tensor)))


def _runs(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor in order, as views of runs without a gap."""
    if not tensor.numel():
        return
    if tensor.is_contiguous():
        yield tensor.reshape(-1).view(torch.uint8)
        return
    inner, expected = tensor.dim(), 1
    # A dimension of one element may have any stride.
    while inner and (tensor.stride(inner - 1) == expected or tensor.shape[inner - 1] == 1):
        inner -= 1
        expected *= tensor.shape[inner]
    for place in itertools.product(*(range(n) for n in tensor.shape[:inner])):
        yield tensor[place].reshape(-1).view(torch.uint8)  # a view where the last dimension has no gaps
