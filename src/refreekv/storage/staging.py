"""Bringing entries from host memory to a device ahead of their use: two buffers, one layer ahead.

Layers are used one after the other. While one is used, the entries of the next one come in on a copy stream, into the
buffer that the one before it has left. All is told through tables, so that a CUDA graph of it serves whatever the
tables say when it runs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.kernels.table import CAPACITY, KEY, LENGTH, VALUE
from refreekv.storage.arena import KVArena, on_device
from refreekv.storage.runs import flat

ALIGNMENT = 256
"""Bytes that the parts of a buffer begin at a multiple of."""


class Copies(Protocol):
    """Where copies run beside what is computed."""

    def start(self, work: Callable[[], None]) -> object:
        """Run work after all that was launched before, beside what is launched from now on; what `finish` takes."""

    def finish(self, started: object) -> None:
        """Let what is launched from now on wait until work is done."""

    def note(self, buffer: Tensor) -> None:
        """Say that work writes to a buffer, which may be given up while it does."""


@functools.cache
def _stream(device: torch.device, *, captured: bool) -> torch.cuda.Stream:
    """A stream that nothing else copies on: what another thread launches on it during a capture would be captured."""
    return torch.cuda.Stream(device)


class StreamCopies:
    """Copies on a stream of their own; in a capture they become a branch of the graph.

    ``captured``: whether they are for captures, which have a stream to themselves.
    """

    def __init__(self, device: torch.device, *, captured: bool = False):
        self._device, self._stream = device, _stream(device, captured=captured)

    def start(self, work: Callable[[], None]) -> torch.cuda.Event:
        """See `Copies`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
            event: torch.cuda.Event = self._stream.record_event()
        return event

    def finish(self, started: object) -> None:
        """See `Copies`."""
        assert isinstance(started, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(started)

    def note(self, buffer: Tensor) -> None:
        """See `Copies`."""
        buffer.record_stream(self._stream)


class DirectCopies:
    """Copies at once, where there is no stream to run them on."""

    def start(self, work: Callable[[], None]) -> None:
        """See `Copies`."""
        work()

    def finish(self, started: object) -> None:
        """See `Copies`."""

    def note(self, buffer: Tensor) -> None:
        """See `Copies`."""


def copies_on(device: torch.device, *, captured: bool = False) -> Copies:
    """What copies run on for a device; ``captured`` as in `StreamCopies`."""
    return StreamCopies(device, captured=captured) if device.type == "cuda" else DirectCopies()


class Lines(NamedTuple):
    """Segments in host memory, of entries that are copied as they are.

    Attributes
    ----------
    table : Tensor
        See `kernels.table`, on the device.
    capacities : sequence of int
        Entries that there may be in each segment.
    key_bytes, value_bytes : int
        Of an entry.
    """

    table: Tensor
    capacities: Sequence[int]
    key_bytes: int
    value_bytes: int

    @classmethod
    def of(cls, arena: KVArena) -> "Lines":
        """Those of an arena."""
        return cls(arena.table, flat(arena.capacities), *arena.line_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of a buffer that they need."""
        return sum(_aligned(sum(self.capacities) * size) for size in (self.key_bytes, self.value_bytes))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Staging:
    """Two buffers that layers' entries pass through in turn.

    Parameters
    ----------
    device : device
        Where entries are needed.
    layers : sequence of sequence of Lines
        Of each layer, in the order of their use, the segments to bring. Nothing comes before `aim` made room for it.
    copies : Copies, optional
        What copies run on; by default a stream of the device.

    Attributes
    ----------
    tables : list of tuple of Tensor
        Of each layer, tables of where its entries are when `use` has returned.
    """

    def __init__(self, device: torch.device, layers: Sequence[Sequence[Lines]], copies: Copies | None = None):
        self._device = device
        self._copies = copies_on(device) if copies is None else copies
        self._layers = [tuple(lines) for lines in layers]
        with torch.inference_mode(False):
            self.tables = [tuple(torch.zeros_like(each.table) for each in lines) for lines in layers]
        self._buffers: list[Tensor] = []
        # Of each buffer the layer that was brought last; and what `Copies.finish` takes of those under way.
        self._brought = [-1, -1]
        self._under_way: dict[int, object] = {}
        # Of each layer where its tables point to, so that they are not said again.
        self._aims: list[object] = [None] * len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def aim(self, layers: Sequence[Sequence[Lines]]) -> None:
        """Make room for segments of these capacities; their tables are those that were told of in the beginning."""
        self.rest()
        self._layers = [tuple(lines) for lines in layers]
        size = max((sum(each.nbytes for each in lines) for lines in self._layers), default=0)
        if any(len(buffer) < size for buffer in self._buffers) or not self._buffers:
            self._buffers = []  # before others are asked for
            with torch.inference_mode(False):
                count = min(2, len(self._layers))
                self._buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(count)]
            for buffer in self._buffers:
                self._copies.note(buffer)
        for place, lines in enumerate(self._layers):
            at = self._buffers[place % 2].data_ptr()
            aims = at, [list(each.capacities) for each in lines]
            if aims == self._aims[place]:
                continue
            self._aims[place] = aims
            for each, table in zip(lines, self.tables[place], strict=True):
                table.copy_(on_device(_places(each, at), self._device))
                at += each.nbytes

    def begin(self, place: int = 0) -> None:
        """Begin to bring two layers' entries; what was brought before may have changed meanwhile."""
        self.rest()
        for number in (place, place + 1):
            self._start(number)

    def rest(self) -> None:
        """Wait for what is under way, on the device, and forget what was brought."""
        while self._under_way:
            self._copies.finish(self._under_way.popitem()[1])
        self._brought = [-1, -1]

    def use(self, place: int) -> tuple[Tensor, ...]:
        """The tables of a layer's entries, for what is launched until the next layer is used."""
        # The next one's buffer was that of the layer before, with which all that was launched so far is done.
        for number in (place, place + 1):
            self._start(number)
        if place in self._under_way:
            self._copies.finish(self._under_way.pop(place))
        return self.tables[place]

    def _start(self, place: int) -> None:
        """Begin to bring a layer's entries, if there is such a layer and they are not there or under way."""
        if place >= len(self._layers) or self._brought[place % 2] == place:
            return
        lines, tables = self._layers[place], self.tables[place]

        def work() -> None:
            for each, table in zip(lines, tables, strict=True):
                kernels.fetch(each.table, table, key_bytes=each.key_bytes, value_bytes=each.value_bytes)

        self._brought[place % 2] = place
        self._under_way[place] = self._copies.start(work)


def _places(lines: Lines, address: int) -> list[list[int]]:
    """A table of segments one behind the other from an address on, which hold nothing yet."""
    found, value_address = [], address + _aligned(sum(lines.capacities) * lines.key_bytes)
    for capacity in lines.capacities:
        line = [0] * 4
        line[KEY], line[VALUE], line[LENGTH], line[CAPACITY] = address, value_address, 0, capacity
        found.append(line)
        address += capacity * lines.key_bytes
        value_address += capacity * lines.value_bytes
    return found
