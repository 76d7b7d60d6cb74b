"""How the entries of a layer are coded, and what comes back of those that are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refreekv.core.autocast import without_autocast
from refreekv.core.packed_lines import PackedFormat, PackedMaps
from refreekv.core.quantisation import Ladder

Pair = tuple[Tensor, Tensor]
"""Of keys and of values."""


@dataclass(frozen=True)
class Coding:
    """How the entries of a layer are coded.

    Attributes
    ----------
    forms : tuple of PackedFormat
        Of the lines of each rung.
    maps : PackedMaps
        What takes keys, values and queries to code space, which all rungs share; the means are the rows' own, fixed
        for good.
    recent : int
        Newest entries of each KV head that stay exact.
    generated : int
        The rung of entries that nobody gave one.
    """

    forms: tuple[PackedFormat, ...]
    maps: PackedMaps
    recent: int
    generated: int

    @classmethod
    def of(cls, ladder: Ladder, centres: Pair, dtype: torch.dtype) -> "Coding":
        """That of a ladder for entries in ``dtype``; ``centres`` are the means ``[B, H_kv, D]`` to take out."""
        sizes = centres[0].shape[-1], centres[1].shape[-1]
        with torch.inference_mode(False):
            maps = PackedMaps.rotated(centres[0].clone(), centres[1].clone(), dtype)
            return cls(ladder.forms(sizes), maps, ladder.recent, ladder.generated)

    def of_rows(self, rows: Sequence[int]) -> "Coding":
        """The same for some rows, in that order."""
        return replace(self, maps=self.maps.of_rows(rows))

    def of_type(self, dtype: torch.dtype) -> "Coding":
        """The same for entries in ``dtype``."""
        return self if self.maps.key_sum.dtype == dtype else replace(self, maps=self.maps.of_type(dtype))

    @property
    def means(self) -> tuple[Tensor, ...]:
        """What the rows have of their own."""
        return self.maps.key_mean, self.maps.value_mean, self.maps.key_offset, self.maps.value_offset


def decoded(
    coded: Pair, coding: Coding, counts: Sequence[Sequence[int]], types: tuple[torch.dtype, torch.dtype]
) -> Pair:
    """Keys and values ``[entries, D]`` in code space, so many of each row's KV heads, as entries of ``types``."""
    sides = [torch.empty_like(part, dtype=kind) for part, kind in zip(coded, types, strict=True)]
    at = 0
    with without_autocast(coded[0].device):
        for row, heads in enumerate(counts):
            for head, count in enumerate(heads):
                if count:
                    keys, values = (part[at : at + count] for part in coded)
                    for side, found in zip(sides, coding.maps.entries(keys, values, row, head), strict=True):
                        side[at : at + count] = found
                at += count
    return sides[0], sides[1]
