"""Which logical columns a pruned row still holds.

A row that lost one range needs two pairs of numbers, not an index as long as what it
keeps: most policies' rows stay without any tensor here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv.storage.base import Piece

Range = tuple[int, int]


@dataclass(frozen=True)
class Columns:
    """Ascending entries of one row: ranges that all KV heads share, or indices.

    Attributes
    ----------
    ranges : tuple of (int, int) or None
        Half-open ranges.
    heads : tuple of Tensor
        Where ``ranges`` is None: an int32 index for all KV heads together, or one for each;
        these may differ in length.
    """

    ranges: tuple[Range, ...] | None = None
    heads: tuple[Tensor, ...] = ()

    @classmethod
    def of_ranges(cls, *ranges: Range) -> "Columns":
        """Ascending ranges, less the empty ones; those that touch are one."""
        joined: list[Range] = []
        for start, stop in ranges:
            if joined and stop > start == joined[-1][1]:
                joined[-1] = joined[-1][0], stop
            elif stop > start:
                joined.append((start, stop))
        return cls(tuple(joined))

    @property
    def counts(self) -> tuple[int, ...]:
        """Entries: one number for all KV heads together, or one for each."""
        if self.ranges is not None:
            return (sum(stop - start for start, stop in self.ranges),)
        return tuple(len(head) for head in self.heads)

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """As int32 indices on ``device``, one for all KV heads or one for each."""
        if self.ranges is None:
            return tuple(head.to(device) for head in self.heads)
        parts = [torch.arange(start, stop, dtype=torch.int32, device=device) for start, stop in self.ranges]
        return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device=device),)

    def padded(self, device: torch.device) -> Tensor:
        """As one int32 index ``[G, L]``, shorter heads filled up on the left with column 0."""
        heads = self.tensors(device)
        longest = max(self.counts)
        return torch.stack([torch.nn.functional.pad(head, (longest - len(head), 0)) for head in heads])

    def as_ranges(self) -> tuple[tuple[Range, ...], ...]:
        """As half-open ranges, one tuple for all KV heads together or one for each."""
        if self.ranges is not None:
            return (self.ranges,)
        return tuple(_runs(head) for head in self.heads)

    def for_heads(self, kv_heads: int) -> tuple[int, ...]:
        """Entries of each of ``kv_heads`` KV heads."""
        return self.counts * kv_heads if len(self.counts) == 1 else self.counts

    def owned(self) -> "Columns":
        """The same with int32 indices in storage of their own, one for all heads."""
        if not self.heads:
            return self
        together = torch.cat([head.to(torch.int32) for head in self.heads])
        return Columns(heads=together.split([len(head) for head in self.heads]))

    def extended(self, start: int, stop: int) -> "Columns":
        """With the range ``start .. stop - 1`` behind."""
        if self.ranges is not None:
            return Columns.of_ranges(*self.ranges, (start, stop))
        tail = torch.arange(start, stop, dtype=torch.int32, device=self.heads[0].device)
        return Columns(heads=tuple(torch.cat([head, tail]) for head in self.heads))

    def take(self, kept: "Columns", device: torch.device) -> "Columns":
        """What remains when only the entries ``kept`` (counted within the `padded` row) stay."""
        if self.ranges is not None and kept.ranges is not None:
            return Columns.of_ranges(*_compose(self.ranges, kept.ranges))
        known, index = self.padded(device), kept.tensors(device)
        groups = max(len(known), len(index))
        return Columns(heads=tuple(known[g % len(known)][index[g % len(index)]] for g in range(groups)))

    def below(self, limit: int) -> "Columns":
        """What remains of the columns under ``limit``."""
        if self.ranges is not None:
            return Columns.of_ranges(*((start, min(stop, limit)) for start, stop in self.ranges))
        return Columns(heads=tuple(head[head < limit] for head in self.heads))


@dataclass(frozen=True)
class Levels:
    """Which rung of a ladder each of a row's kept entries goes to.

    Attributes
    ----------
    heads : tuple of Tensor
        uint8, a number for each of the row's `Columns`, in their order: for all KV heads together, or for each.
    counts : tuple of tuple of int
        For each of ``heads`` and each rung, how many of the entries that are coded at the end of the prompt go there.
    """

    heads: tuple[Tensor, ...]
    counts: tuple[tuple[int, ...], ...]

    def for_heads(self, kv_heads: int, rung: int) -> tuple[int, ...]:
        """How many entries of each of ``kv_heads`` KV heads are coded in a rung at the end of the prompt."""
        return tuple(self.counts[head % len(self.counts)][rung] for head in range(kv_heads))


def pieces(entries: Tensor, kept: Columns) -> list[Piece]:
    """The kept entries of one row ``[kv_heads, n, D]``, as parts in order.

    Ranges are views and cost nothing before they are copied to where they go.
    """
    if kept.ranges is not None:
        return [entries[:, start:stop] for start, stop in kept.ranges]
    if len(kept.heads) == 1:
        return [entries.index_select(1, kept.heads[0])]
    return [[head.index_select(0, index) for head, index in zip(entries, kept.heads, strict=True)]]


def _runs(index: Tensor) -> tuple[Range, ...]:
    """The runs of an ascending index."""
    columns = index.cpu().long()
    if not len(columns):
        return ()
    breaks = (columns.diff() > 1).nonzero().flatten()
    starts = columns[torch.cat([breaks.new_zeros(1), breaks + 1])]
    stops = columns[torch.cat([breaks, breaks.new_tensor([len(columns) - 1])])] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def _compose(outer: Sequence[Range], inner: Sequence[Range]) -> list[Range]:
    """Ranges ``inner``, which count the entries of ``outer``, in the terms of ``outer``."""
    result: list[Range] = []
    offset = 0
    for start, stop in outer:
        size = stop - start
        for low, high in inner:
            low, high = max(low - offset, 0), min(high - offset, size)
            if high > low:
                result.append((start + low, start + high))
        offset += size
    return result
