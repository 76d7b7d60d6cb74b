"""Ragged K/V storage that can grow: what CUDA decodes from.

`RaggedKV` is exact and immutable: each new token copies the layer. Here each segment has
spare lines after its entries, new ones are written in place, and lengths live on the device too, in a
table that kernels and CUDA graphs read. When these are used up the layer moves once, to storage
with about 2.5% more of them.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from refreekv import kernels
from refreekv.kernels.table import CAPACITY, KEY, LENGTH, VALUE
from refreekv.storage.base import FlatKV, Piece
from refreekv.storage.columns import Columns, Levels
from refreekv.storage.members import Array, Counts, Lengths
from refreekv.storage.ragged import RaggedKV, kept_of_rows
from refreekv.storage.token_rows import in_rows, in_turn

LEAST_GROWTH = 16
"""Entries that a segment can always take before its layer has to move."""

GROWTH_SHARE = 40
"""A segment gets room for one more entry for this many that the layer's segments hold on average."""

Span = tuple[int, int, int]
"""A line of ``spans`` in `kernels.gather`."""


class KVArena(FlatKV):
    """Keys and values of one layer, one growing segment per (row, KV head).

    Invariants: segment ``s`` has ``capacities[s]`` lines of the flat tensors, in order, and its entries
    are the first ``lengths[s]`` of them; the table says the same on the device. A row that was freed has
    no lines and takes nothing. Methods that change rows or lengths return a new arena, as those of
    `RaggedKV` do; `append`, `drop` and `free_rows` change this one.

    Attributes
    ----------
    keys, values : Tensor
        ``[lines, D]`` and ``[lines, Dv]``, allocated room included.
    table : Tensor
        ``[segments, 4]`` int64 on the device of the keys; see `kernels.table`. Always the same tensor,
        until `lend_table` or wider entries put another in its place.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        lengths: Sequence[tuple[int, ...]],
        growth: Sequence[int],
        *,
        told: bool = True,
    ):
        self.keys, self.values = keys, values
        self._freed = np.array([extra < 0 for extra in growth])
        self._hold(np.array(lengths), np.array(capacities_of(lengths, growth)))
        self._ready(told=told)

    def _hold(self, lengths: Array, capacities: Array) -> None:
        """Note what is held from now on, and what there is room for."""
        # Never changed in place. Arrays, as the lists of all layers are more than the host can go through at a token.
        self._lengths, self._capacities, self._appended = lengths, capacities, 0
        room = (capacities - lengths)[~self._freed]
        # What any segment has room for, and what all have, of rows that were not freed.
        self._widest, self._left = (int(room.max()), int(room.min())) if room.size else (0, LEAST_GROWTH)

    def _ready(self, *, told: bool = True) -> None:
        """Make what belongs to this process and device only; a table that is not ``told`` of follows with others."""
        if told:
            self.table = on_device(self._lines(), self.device)
        self._lock = threading.RLock()
        self._stream: torch.cuda.Stream | None = None

    # -- making one -------------------------------------------------------------------------

    @classmethod
    def like(
        cls,
        keys: Tensor,
        values: Tensor,
        lengths: Sequence[tuple[int, ...]],
        growth: int | None = None,
        freed: Sequence[bool] | None = None,
        *,
        told: bool = True,
    ) -> Self:
        """An arena of these lengths whose entries are still to be written, of the type of ``keys`` and ``values``.

        Rows that are ``freed`` hold nothing, whatever their length. One that is not ``told`` of has no table until
        `tell`.
        """
        freed = [False] * len(lengths) if freed is None else freed
        lengths = [(0,) * len(row) if gone else row for row, gone in zip(lengths, freed, strict=True)]
        rest = growth_for(lengths) if growth is None else growth
        growths = [-1 if gone else rest for gone in freed]
        storages = [allocated(capacities_of(lengths, growths), part) for part in (keys, values)]
        return cls(storages[0], storages[1], lengths, growths, told=told)

    @classmethod
    def gathered(
        cls,
        keys: Tensor,
        values: Tensor,
        lengths: Sequence[tuple[int, ...]],
        spans: Sequence[Span],
        end: int,
    ) -> Self:
        """Chosen entries of dense ``[B, H_kv, n, D]``, copied once, straight to where they belong.

        ``spans`` has a line for each segment; it and ``end`` are explained at `kernels.gather`.
        """
        arena = cls.like(keys, values, lengths, growth_within(keys, lengths))
        arena.fill(keys, values, on_device([list(span) for span in spans], keys.device), end)
        return arena

    def fill(self, keys: Tensor, values: Tensor, spans: Tensor, end: int) -> None:
        """Write all entries, from dense ``[B, H_kv, n, D]``; ``spans`` and ``end`` as in `kernels.gather`."""
        longest = int(self.counts.max())
        kernels.gather(keys, values, self.table, spans, self.form, end=end, longest=longest)

    @classmethod
    def of(cls, exact: RaggedKV) -> Self:
        """A copy of what an exact storage holds."""
        return cls.like(exact.keys, exact.values, exact.lengths)._copied(exact)

    # -- what every storage has --------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device whose kernels read and write the entries, where the table is."""
        return self.keys.device

    @property
    def form(self) -> kernels.Format:
        """What kernels are told of entries behind the table."""
        return kernels.Format(self.sizes, *self.types)

    @property
    def lengths(self) -> list[tuple[int, ...]]:  # type: ignore[override]  # nobody sets them
        """Entries of each row's KV heads."""
        return as_lists(self.counts)

    @property
    def counts(self) -> Array:
        """The same, int64 ``[B, H_kv]``, not to be changed."""
        if self._appended:
            self._lengths, self._appended = self._lengths + self._appended * ~self._freed[:, None], 0
        return self._lengths

    @property
    def batch(self) -> int:
        """Rows. Does not wait for lengths, either."""
        return len(self._freed)

    @property
    def kv_heads(self) -> int:
        """KV heads of each row. Does not wait for lengths: it is asked for at each token."""
        return int(self._lengths.shape[1])

    @property
    def tables(self) -> "tuple[KVArena, ...]":
        return (self,)

    def full(self) -> RaggedKV:
        held = [self.segments(row) for row in range(len(self.lengths))]
        return RaggedKV.from_pieces([[keys] for keys, _ in held], [[values] for _, values in held])

    def attend(self, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
        with self.table_in_turn() as table:
            return kernels.ragged_decode(query, table, self.form, scaling=scaling, softcap=softcap, sinks=sinks)

    def attend_each(self, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
        with self.table_in_turn() as table:
            found = [
                kernels.ragged_decode(rows, own[0], self.form, scaling=scaling, softcap=softcap, sinks=sinks)[:count]
                for count, rows, own in in_rows(query, [table])
            ]
        return in_turn(found)

    @property
    def freed(self) -> list[bool]:
        return [bool(freed) for freed in self._freed]

    @property
    def capacities(self) -> list[tuple[int, ...]]:
        """Lines of each row's KV heads."""
        return as_lists(self._capacities)

    @property
    def uniform(self) -> bool:
        """Whether all segments have one length and one capacity, so that `stacked` is a view."""
        return all((counts == counts.flat[0]).all() for counts in (self.counts, self._capacities))

    def row_nbytes(self, row: int) -> int:
        return sum(self.capacities[row]) * sum(self.line_bytes)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All rows as ``[B, kv_heads, L, D]`` views; only where `uniform`."""
        length = self.lengths[0][0]
        shape = (self.batch, self.kv_heads, int(self._capacities[0, 0]), -1)
        return self.keys.view(shape)[:, :, :length], self.values.view(shape)[:, :, :length]

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Each row as ``[kv_heads, L, D]``: views where heads are even, else copies padded on the left."""
        result = []
        for row, lengths in enumerate(self.lengths):
            keys, values = self.segments(row)
            result.append((_rectangular(keys, max(lengths)), _rectangular(values, max(lengths))))
        return result

    def segments(self, row: int) -> tuple[Piece, Piece]:
        """One row's keys and values as parts, without copying or padding."""
        capacities = self.capacities
        start = sum(sum(lines) for lines in capacities[:row])
        stop = start + sum(capacities[row])
        keys, values = self.keys[start:stop], self.values[start:stop]
        if self.even(row) and len(set(capacities[row])) == 1:
            length, shape = self.lengths[row][0], (self.kv_heads, capacities[row][0], -1)
            if stop == start:
                return keys.view(self.kv_heads, 0, keys.shape[-1]), values.view(self.kv_heads, 0, values.shape[-1])
            return keys.view(shape)[:, :length], values.view(shape)[:, :length]
        parts = [
            [head[:length] for head, length in zip(flat.split(capacities[row]), self.lengths[row], strict=True)]
            for flat in (keys, values)
        ]
        return parts[0], parts[1]

    def append(self, keys: Tensor, values: Tensor) -> Self:
        """Write ``[B, kv_heads, q, D]`` new entries behind the segments' last ones, in place.

        Entries of a wider type than those stored widen these first, as in any other storage.
        """
        with self.table_in_turn():
            self.widen(keys.dtype, values.dtype)
            self.reserve(keys.shape[2])
            kernels.append(keys, values, self.table, self.form)
            self.note_appended(keys.shape[2])
        return self

    def widen(self, *brought: torch.dtype) -> None:
        """Store keys and values in types that hold those ``brought``, too: a copy if they do not yet."""
        wider = [torch.promote_types(*pair) for pair in zip(self.types, brought, strict=True)]
        if tuple(wider) == self.types:
            return
        with torch.inference_mode(False):
            self.keys, self.values = self.keys.to(wider[0]), self.values.to(wider[1])
            # Another table: whoever borrowed this one reads and writes entries of the old types.
            self.table = on_device(self._lines(), self.table.device)

    def select_rows(self, indices: Sequence[int]) -> Self:
        freed = [self.freed[row] for row in indices]
        chosen = self._alike([self.lengths[row] for row in indices], freed)
        heads = self.kv_heads
        lines = torch.tensor([row * heads + head for row in indices for head in range(heads)])
        with self.table_in_turn() as own:
            chosen._take(own.index_select(0, lines.to(own.device)))
        return chosen

    def truncate(self, lengths: Sequence[Sequence[int]]) -> Self:
        shorter = self._alike([tuple(row) for row in lengths], self.freed)
        with self.table_in_turn() as own:
            shorter._take(own)
        return shorter

    def keep(self, kept: Sequence[Columns], after: int, levels: Sequence[Levels] | None = None) -> Self:
        return self.holding(kept_of_rows(self.rows(), kept, after))

    def taken(self, index: Tensor, lengths: Sequence[tuple[int, ...]]) -> Self:
        """A new arena of some entries, so many for each segment, by their numbers among all of all segments."""
        everything = self.full()
        return self.holding(RaggedKV(everything.keys[index], everything.values[index], lengths))

    def picked(self, lines: Tensor, lengths: Sequence[tuple[int, ...]]) -> Self:
        """A new arena of some entries, so many for each segment, by their lines in the flat tensors."""
        with self.table_in_turn():
            return self.holding(RaggedKV(self.keys[lines], self.values[lines], lengths))

    def holding(self, exact: RaggedKV) -> Self:
        """A new arena like this one that holds what an exact storage does."""
        return self._alike(exact.lengths, self.freed)._copied(exact)

    def _alike(self, lengths: Sequence[tuple[int, ...]], freed: Sequence[bool]) -> Self:
        """Another arena that stores entries as this one does."""
        return self.like(self.keys, self.values, lengths, freed=freed)

    def _copied(self, exact: RaggedKV) -> Self:
        """The same, after it took what an exact storage holds."""
        self._take(KVArena(exact.keys, exact.values, exact.lengths, [0] * len(exact.lengths)).table)
        return self

    # -- growing and freeing, in place ---------------------------------------------------------

    def reserve(self, tokens: int) -> bool:
        if self._left >= tokens:
            return False
        self._reallocate(self.counts, growth_for(self.counts) + tokens)
        return True

    @property
    def left(self) -> int:
        """Entries that every segment of a row that was not freed has room for."""
        return self._left

    def note_appended(self, tokens: int) -> None:
        self._appended += tokens
        self._left -= tokens

    def drop(self, tokens: int, due: int = 0) -> bool:
        """Take the last entries of all segments back, in place; False if more room than is due would be left.

        Every segment of a row that was not freed must hold as many. ``due`` is growth that is due at least.
        """
        if self._left + tokens > max(growth_for(self.lengths), due) + LEAST_GROWTH:
            return False
        with self.table_in_turn() as own:
            own[:, LENGTH] -= tokens * (own[:, CAPACITY] > 0)
            self.note_appended(-tokens)
        return True

    def free_rows(self, rows: Sequence[int]) -> None:
        gone = {row for row in rows if not self.freed[row]}
        if not gone:
            return
        room = self._capacities - self.counts
        self._freed = self._freed.copy()
        self._freed[list(gone)] = True
        self._reallocate(self.counts * ~self._freed[:, None], room)

    def make_room(self, counts: Array, growth: int = 0) -> None:
        """Have room for so many more entries of each segment; where there is none, all get ``growth`` more, or 2.5%."""
        longer = self.counts + counts
        if (longer > self._capacities).any():
            self._reallocate(self.counts, counts + max(2 * LEAST_GROWTH, growth, growth_for(longer)))

    def note_changed(self, counts: Array) -> None:
        """Count entries that somebody added through the table, or took out, where numbers are negative."""
        self._hold(self.counts + counts, self._capacities)

    def take_out(self, firsts: Array, counts: Array) -> None:
        """Have the device take so many entries out of each segment, from the first ones on; see `note_changed`."""
        key, value = self.line_bytes
        with self.table_in_turn() as own:
            told = on_device([firsts.ravel().tolist(), counts.ravel().tolist()], own.device)
            kernels.take_out(own, told, key_bytes=key, value_bytes=value)

    def trim(self, growth: int) -> None:
        """Give memory back where a segment has more than twice the room of ``growth``, or of 2.5%: all get that."""
        growth = max(growth, growth_for(self.counts))
        if self._widest > 2 * growth:
            self._reallocate(self.counts, growth)

    @contextmanager
    def table_in_turn(self) -> Iterator[Tensor]:
        """The table, which stays what it is within, unless wider entries come.

        A thread that takes a captured step over gives the table back unasked, and puts its own there.
        """
        with self._lock:
            if self.device.type == "cuda":
                stream = torch.cuda.current_stream(self.device)
                if self._stream is not None and self._stream != stream:
                    stream.wait_stream(self._stream)
                self._stream = stream
            yield self.table

    def lend_table(self, table: Tensor) -> None:
        """Move the table to memory that somebody else reads, such as a CUDA graph."""
        with self.table_in_turn() as own:
            table.copy_(own)
            self.table = table

    def take_table_back(self) -> None:
        """Go on with a table of its own."""
        with self.table_in_turn() as own, torch.inference_mode(False):
            self.table = own.clone()

    def _reallocate(self, lengths: Array, growth: Array | int) -> None:
        """Move what stays to memory for segments of these lengths that are to grow by so much; not for freed rows."""
        with self.table_in_turn():
            self._move_to(lengths, (lengths + growth) * ~self._freed[:, None])

    def _move_to(self, lengths: Array, capacities: Array) -> None:
        old, old_storages = self.table.clone(), (self.keys, self.values)
        self.keys, self.values = (self._new(capacities, storage) for storage in old_storages)
        self._hold(lengths, capacities)
        self.table.copy_(on_device(self._lines(), self.table.device))
        self._take(old)

    def _new(self, capacities: Array, like: Tensor) -> Tensor:
        """Memory for entries like others."""
        return allocated(capacities, like)

    def _take(self, source: Tensor, target: Tensor | None = None) -> None:
        """Copy the entries of a table's segments to this arena's, or to those of ``target``, a part of this arena."""
        (key, value), longest = self.line_bytes, int(self.counts.max())
        if longest:
            target = self.table if target is None else target
            kernels.move(source, target, key_bytes=key, value_bytes=value, longest=longest)

    def _lines(self) -> list[list[int]]:
        """The table, as the host knows it."""
        capacities, steps = self._capacities.ravel(), self.line_bytes
        starts = capacities.cumsum() - capacities
        lines = np.empty((len(starts), 4), dtype=np.int64)
        lines[:, KEY] = self.keys.data_ptr() + starts * steps[0]
        lines[:, VALUE] = self.values.data_ptr() + starts * steps[1]
        lines[:, LENGTH], lines[:, CAPACITY] = self.counts.ravel(), capacities
        found: list[list[int]] = lines.tolist()
        return found

    # -- copies: addresses do not travel --------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("table", "_lock", "_stream")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ready()


def as_lists(counts: Array) -> Lengths:
    """Numbers ``[B, H_kv]`` as lists."""
    return [tuple(row) for row in counts.tolist()]


def growth_for(lengths: Counts | Array) -> int:
    """Entries that each segment of a layer gets room for, beyond those it holds."""
    counts = np.asarray(lengths)
    return max(LEAST_GROWTH, int(counts.sum()) // max(counts.size, 1) // GROWTH_SHARE)


def growth_within(keys: Tensor, lengths: Sequence[Sequence[int]]) -> int:
    """The same for what stays of ``[B, H_kv, n, D]``: no prompt comes to hold more than all of its entries."""
    evicted = keys.shape[2] - sum(map(sum, lengths)) // max(sum(map(len, lengths)), 1)
    return min(growth_for(lengths), max(LEAST_GROWTH, evicted))


def capacities_of(lengths: Counts, growth: Sequence[int]) -> list[tuple[int, ...]]:
    """Capacities of segments of these lengths, where those of each row can grow by so much; -1: they hold nothing."""
    return [
        tuple(length + extra if extra >= 0 else 0 for length in row) for row, extra in zip(lengths, growth, strict=True)
    ]


def allocated(capacities: Counts | Array, like: Tensor, *, pinned: bool = False) -> Tensor:
    """Memory for segments of so many entries each: on the device of ``like``, or pinned on the host."""
    # Not in inference mode: what is made there cannot be changed in place outside of it.
    with torch.inference_mode(False):
        lines = int(np.asarray(capacities).sum())
        return torch.empty(
            lines, like.shape[-1], dtype=like.dtype, device="cpu" if pinned else like.device, pin_memory=pinned
        )


def on_device(lines: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers on a device; the host does not wait for it."""
    with torch.inference_mode(False):
        # In pinned memory from the start: a copy to it costs the host as much as all the rest.
        table = torch.tensor(lines, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        return table.to(device, non_blocking=True)


def tell(arenas: Sequence[KVArena], others: Sequence[Sequence[Sequence[int]]] = ()) -> list[Tensor]:
    """Give arenas that have none their tables, in one copy: each costs the host as much as some launches.

    ``others`` are as in `together`, and come with them: they are kept as long as the tables.
    """
    told = together([*(arena._lines() for arena in arenas), *others], arenas[0].device)
    for arena, table in zip(arenas, told, strict=False):
        arena.table = table
    return told[len(arenas) :]


def together(parts: Sequence[Sequence[Sequence[int]]], device: torch.device) -> list[Tensor]:
    """Several lists of equally long lines of integers on a device, in one copy and one storage."""
    flat, where = list[int](), []
    for lines in parts:
        start = len(flat)
        flat += chain.from_iterable(lines)
        where.append((start, len(flat), len(lines)))
        flat += [0] * (len(flat) % 2)  # whatever kernels read begins at a multiple of 16 bytes, as tensors do
    with torch.inference_mode(False):
        (one,) = on_device([flat], device)
        return [one[start:stop].view(lines, -1) for start, stop, lines in where]


def _rectangular(heads: Piece, longest: int) -> Tensor:
    """One row's segments as ``[kv_heads, L, D]``: a view if they have one length, else padded on the left."""
    if isinstance(heads, Tensor):
        return heads
    return torch.stack([torch.nn.functional.pad(head, (0, 0, longest - len(head), 0)) for head in heads])
