"""Which logical columns a pruned row still holds.

A row that lost one range needs two pairs of numbers: most policies' rows stay without any tensor here. Where others
are kept for long, a bit for each column of the prompt says whether it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv.kernels import kept_first
from refreekv.storage.members import Counts, Members
from refreekv.storage.runs import numbers, sent, spread

Range = tuple[int, int]


@dataclass(frozen=True)
class Columns:
    """Ascending entries of one row: ranges that all KV heads share, indices, or bits.

    Attributes
    ----------
    ranges : tuple of (int, int) or None
        Half-open ranges.
    heads : tuple of Tensor
        Where ``ranges`` is None: an int32 index for all KV heads together, or one for each;
        these may differ in length.
    bits : Tensor or None
        In the place of both: uint8 ``[G, bytes]``, a bit for each column, the first in the lowest bit.
    held : tuple of int
        How many of the bits of each group are set; beside ``heads`` their lengths, where somebody knows them.
    marks : Tensor or None
        Beside ``heads``: the same as bits, where these are at hand.
    listed, aligned : Tensor or None
        Beside ``heads``: lines int32 ``[G, L]`` that these begin, or end, where they are views of some.
    """

    ranges: tuple[Range, ...] | None = None
    heads: tuple[Tensor, ...] = ()
    bits: Tensor | None = None
    held: tuple[int, ...] = ()
    marks: Tensor | None = None
    listed: Tensor | None = None
    aligned: Tensor | None = None

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
        return self.held or tuple(len(head) for head in self.heads)

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """As int32 indices on ``device``, one for all KV heads or one for each."""
        if self.bits is not None:
            order, *_ = kept_first(self._fields(device).bool())
            return tuple(own[:n] for own, n in zip(order, self.held, strict=True))
        if self.ranges is None:
            return tuple(head.to(device) for head in self.heads)
        parts = [numbers(start, stop, device, torch.int32) for start, stop in self.ranges]
        return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device=device),)

    def _fields(self, device: torch.device) -> Tensor:
        """The bits, each in a byte of its own: uint8 ``[G, columns]``."""
        assert self.bits is not None
        fields = self.bits.to(device)[..., None] >> numbers(0, 8, device, torch.uint8) & 1
        return fields.flatten(1)  # [G, bytes, 8] -> [G, columns]

    def padded(self, device: torch.device) -> Tensor:
        """As one int32 index ``[G, L]``, shorter heads filled up on the left with any column."""
        if self.aligned is not None:
            return self.aligned.to(device)
        heads = self.tensors(device)
        longest = max(self.counts)
        return torch.stack([torch.nn.functional.pad(head, (longest - len(head), 0)) for head in heads])

    def as_ranges(self) -> tuple[tuple[Range, ...], ...]:
        """As half-open ranges, one tuple for all KV heads together or one for each."""
        if self.ranges is not None:
            return (self.ranges,)
        return tuple(_runs(head) for head in self.tensors(torch.device("cpu")))

    def for_heads(self, kv_heads: int) -> tuple[int, ...]:
        """Entries of each of ``kv_heads`` KV heads."""
        return self.counts * kv_heads if len(self.counts) == 1 else self.counts

    def extended(self, start: int, stop: int) -> "Columns":
        """With the range ``start .. stop - 1`` behind."""
        if self.ranges is not None:
            return Columns.of_ranges(*self.ranges, (start, stop))
        if self.bits is not None and self.bits.shape[1] == -(-start // 8):
            return self._extended_bits(start, stop)
        device = (self.heads[0] if self.bits is None else self.bits).device
        tail = numbers(start, stop, device, torch.int32)
        return Columns(heads=tuple(torch.cat([head, tail]) for head in self.tensors(device)))

    def _extended_bits(self, start: int, stop: int) -> "Columns":
        """`extended`, of bits for the columns up to ``start``: all heads at once, as views of lines."""
        assert self.bits is not None
        device = self.bits.device
        fields = torch.nn.functional.pad(self._fields(device)[:, :start], (0, stop - start), value=1)
        order, *_ = kept_first(fields.bool())
        counts = [n + stop - start for n in self.held]
        longest = max(counts)
        if min(counts) == longest:
            lines = order[:, :longest]
        else:
            at = numbers(0, longest, device) - sent([longest - n for n in counts], device)[:, None]
            lines = order.gather(1, at.clamp_min(0))  # what fills up is a head's first one
        heads = tuple(line[longest - n :] for line, n in zip(lines, counts, strict=True))
        return Columns(heads=heads, held=tuple(counts), aligned=lines)

    def take(self, kept: "Columns", device: torch.device) -> "Columns":
        """What remains when only the entries ``kept`` (counted within the `padded` row) stay."""
        if self.ranges is not None and kept.ranges is not None:
            return Columns.of_ranges(*_compose(self.ranges, kept.ranges))
        known = self.padded(device)
        if kept.listed is not None and len(kept.listed) in (1, len(known)):
            lines = known.gather(1, kept.listed.to(device).long().expand(len(known), -1))
            counts = kept.for_heads(len(known))
            heads = tuple(line[:n] for line, n in zip(lines, counts, strict=True))
            return Columns(heads=heads, held=counts, listed=lines)
        index = kept.tensors(device)
        groups = max(len(known), len(index))
        return Columns(heads=tuple(known[g % len(known)][index[g % len(index)]] for g in range(groups)))

    def below(self, limit: int) -> "Columns":
        """What remains of the columns under ``limit``."""
        if self.ranges is not None:
            return Columns.of_ranges(*((start, min(stop, limit)) for start, stop in self.ranges))
        device = (self.heads[0] if self.bits is None else self.bits).device
        return Columns(heads=tuple(head[head < limit] for head in self.tensors(device)))


def lasting(rows: Sequence[Columns], end: int) -> list[Columns]:
    """The same columns, all under ``end``, in as few bytes as may be and in a storage of their own."""
    lists = [head for row in rows for head in row.heads]
    if not lists:
        return list(rows)
    counts, size = [len(head) for head in lists], -(-end // 8)
    if 4 * sum(counts) <= size * len(lists):
        parts = iter(torch.cat(lists).int().split(counts))
        return [Columns(heads=tuple(next(parts) for _ in row.heads)) if row.heads else row for row in rows]
    known = [row.marks for row in rows if row.heads]
    if all(part is not None and part.shape[-1] == size for part in known):
        with torch.inference_mode(False):
            own = torch.cat([part for part in known if part is not None])
        groups = iter(own.split([len(row.heads) for row in rows if row.heads]))
        return [Columns(bits=next(groups), held=row.counts) if row.heads else row for row in rows]
    marks = torch.zeros(len(lists) * size * 8, dtype=torch.uint8, device=lists[0].device)
    starts = range(0, len(marks), size * 8)
    # Not by assignment, which copies its number from the host and waits for the device.
    marks.index_fill_(0, torch.cat(lists) + spread(starts, counts, marks.device), 1)
    # [lists * bytes * 8] -> [lists, bytes]
    weights = 1 << numbers(0, 8, marks.device, torch.uint8)
    packed = (marks.view(-1, 8) * weights).sum(1, dtype=torch.uint8).view(-1, size)
    groups = iter(packed.split([len(row.heads) for row in rows if row.heads]))
    return [Columns(bits=next(groups), held=row.counts) if row.heads else row for row in rows]


@dataclass(frozen=True)
class Levels:
    """Which rung of a ladder each of a row's kept entries goes to.

    Attributes
    ----------
    heads : tuple of Tensor
        uint8, a number for each of the row's `Columns`, in their order: for all KV heads together, or for each.
    counts : tuple of tuple of int
        For each of ``heads`` and each rung, how many of the entries that are coded at the end of the prompt go there.
    listed, packed : tuple of Tensor
        For each of ``heads`` what `kernels.leveled` says of these entries, if it was asked: the columns, by rung, and
        the rungs, by column.
    """

    heads: tuple[Tensor, ...]
    counts: tuple[tuple[int, ...], ...]
    listed: tuple[Tensor, ...] = ()
    packed: tuple[Tensor, ...] = ()

    def for_heads(self, kv_heads: int, rung: int) -> tuple[int, ...]:
        """How many entries of each of ``kv_heads`` KV heads are coded in a rung at the end of the prompt."""
        return tuple(self.counts[head % len(self.counts)][rung] for head in range(kv_heads))

    def at_most(self, rung: int) -> "Levels":
        """The same with that rung in place of higher ones, which are no longer listed by rung then."""
        if rung == len(self.counts[0]) - 1:
            return self
        counts = tuple((*own[:rung], sum(own[rung:]), *[0] * (len(own) - rung - 1)) for own in self.counts)
        return Levels(tuple(head.clamp(max=rung) for head in self.heads), counts)


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


def rungs_asked(levels: Sequence[Levels], counts: Counts, after: int, widest: int) -> Tensor:
    """The rung that each chosen entry is to have: uint8 ``[entries]``; the ``after`` last ones stay where they are."""
    tail = torch.full((after,), widest, dtype=torch.uint8, device=levels[0].heads[0].device)
    parts = []
    for row, own in zip(levels, counts, strict=True):
        for head in range(len(own)):
            parts += [row.heads[head % len(row.heads)], tail]
    return torch.cat(parts)


def listed_by_rung(
    levels: Sequence[Levels], columns: Sequence[Tensor], sinks: Counts, coded: Counts
) -> tuple[list[Tensor], Members]:
    """The ``columns`` int32 ``[coded]`` of each segment, those of the first rung first, and all rungs by column."""
    heads = range(len(coded[0]))
    if all(row.listed for row in levels):
        listed, packed = (
            [own[head % len(own)] for own in parts for head in heads]
            for parts in ([row.listed for row in levels], [row.packed for row in levels])
        )
        return listed, Members.joined(packed, coded)
    rungs = [
        row.heads[head % len(row.heads)][first : first + n]
        for row, firsts, own in zip(levels, sinks, coded, strict=True)
        for head, (first, n) in enumerate(zip(firsts, own, strict=True))
    ]
    by_rung = [some[own.argsort(stable=True)] for some, own in zip(columns, rungs, strict=True)]
    return by_rung, Members.of(torch.cat(rungs), coded)
