"""Which rung each coded entry is in: two bits an entry, in the order of the tokens."""

from collections.abc import Sequence
from operator import add
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refreekv.storage.runs import each, flat, numbers, runs, spread, starts_of

Counts = Sequence[Sequence[int]]
"""A number for each row's KV heads."""

Lengths = list[tuple[int, ...]]
"""The same, as storages give it out."""

Array: TypeAlias = NDArray[np.int64]
"""The same, as storages hold it: ``[B, H_kv]``."""

EACH = 4
"""Entries of a byte."""


class Members:
    """Rungs of the first coded entries of each segment, packed; never changed in place.

    Attributes
    ----------
    packed : Tensor
        uint8, segment by segment in whole bytes: of four entries, the first in the lowest bits.
    counts : list of tuple of int
        Entries of each row's KV heads whose rungs are here.
    """

    def __init__(self, packed: Tensor, counts: Counts):
        self.packed, self.counts = packed, [tuple(row) for row in counts]

    @classmethod
    def of(cls, rungs: Tensor, counts: Counts) -> "Members":
        """From rungs ``[entries]`` uint8, one segment after the other."""
        each = flat(counts)
        if len(set(each)) == 1:
            # [segments * entries] -> [segments, entries], each filled up to whole bytes
            rungs = torch.nn.functional.pad(rungs.view(len(each), -1), (0, -each[0] % EACH))
        elif any(n % EACH for n in each):
            padded = rungs.new_zeros(sum(n + -n % EACH for n in each))
            padded[_shifted(each, rungs.device)] = rungs
            rungs = padded
        four = rungs.reshape(-1, EACH)  # [bytes, entries of a byte]
        with torch.inference_mode(False):
            places = numbers(0, 8, rungs.device, torch.uint8)[:: 8 // EACH]
            return cls((four << places).sum(1, dtype=torch.uint8), counts)

    @classmethod
    def joined(cls, packed: Sequence[Tensor], counts: Counts) -> "Members":
        """From rungs of each segment that are packed already, in the first bytes of a tensor."""
        with torch.inference_mode(False):
            return cls(torch.cat([own[: -(-n // EACH)] for own, n in zip(packed, flat(counts), strict=True)]), counts)

    @classmethod
    def none(cls, counts: Counts, device: torch.device) -> "Members":
        """Of segments like these, of which nothing is here."""
        return cls(torch.empty(0, dtype=torch.uint8, device=device), [(0,) * len(row) for row in counts])

    @classmethod
    def extended(cls, rungs: Tensor, counts: Counts, more: Tensor, by: Counts) -> "Members":
        """Of rungs of entries, so many of each segment, and others behind each segment's."""
        both = each(add, counts, by)
        found, starts = rungs.new_empty(len(rungs) + len(more)), starts_of(flat(both))
        found[runs(starts, flat(counts), rungs.device)] = rungs
        behind = [start + n for start, n in zip(starts, flat(counts), strict=True)]
        found[runs(behind, flat(by), rungs.device)] = more
        return cls.of(found, both)

    def rungs(self) -> Tensor:
        """All that are here: uint8 ``[entries]``, one segment after the other."""
        each = flat(self.counts)
        shifts = numbers(0, 8, self.packed.device, torch.uint8)[::2]
        fields = (self.packed[:, None] >> shifts & 3).flatten()  # [bytes, 4] -> [bytes * 4]
        return fields if len(fields) == sum(each) else fields[_shifted(each, fields.device)]

    def of_rows(self, rows: Sequence[int]) -> "Members":
        """Those of some rows, in that order."""
        starts, counts = starts_of(flat(self.counts)), [self.counts[row] for row in rows]
        heads = len(self.counts[0])
        chosen = [starts[row * heads + head] for row in rows for head in range(heads)]
        return Members.of(self.rungs()[runs(chosen, flat(counts), self.packed.device)], counts)

    def truncated(self, counts: Counts) -> "Members":
        """The first so many of each segment."""
        if list(counts) == self.counts:
            return self
        return Members.of(self.rungs()[runs(starts_of(flat(self.counts)), flat(counts), self.packed.device)], counts)

    def counted(self, most: int) -> list[list[tuple[int, ...]]]:
        """How many of each segment's are in each of ``most`` rungs: by rung, row and KV head."""
        return counted(self.rungs(), self.counts, most)

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self.packed.untyped_storage().nbytes()

    def row_nbytes(self, row: int) -> int:
        """Bytes of one row's."""
        return sum(-(-n // EACH) for n in self.counts[row])


def _shifted(counts: Sequence[int], device: torch.device) -> Tensor:
    """Where entries are that lie one beside the other, once each segment begins at a whole byte."""
    starts, at = [], 0
    for n in counts:
        starts.append(at)
        at += -(-n // EACH) * EACH
    return runs(starts, counts, device)


def counted(rungs: Tensor, counts: Counts, most: int, segment: Tensor | None = None) -> list[list[tuple[int, ...]]]:
    """How many of each segment's entries are in each of ``most`` rungs: by rung, row and KV head.

    ``rungs`` are those of all entries, one segment after the other, and ``segment`` the number of each one's, if that
    is known.
    """
    segments, heads = sum(map(len, counts)), len(counts[0])
    if segment is None:
        segment = spread(range(segments), flat(counts), rungs.device)
    places = segment * most + rungs
    # Without `bincount`, which asks the device for the largest number first.
    found = torch.zeros(segments * most, dtype=torch.int64, device=rungs.device)
    found.index_add_(0, places, numbers(1, 2, rungs.device).expand_as(places))
    # [segments * rungs] -> [rungs, rows, KV heads]
    by_rung = found.view(-1, heads, most).permute(2, 0, 1).tolist()
    return [[tuple(row) for row in rows] for rows in by_rung]
