"""How the entries of a layer are coded, and what comes back of those that are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import FLUSH, Ladder
from refreekv.storage.arena import growth_for
from refreekv.storage.members import Counts

Pair = tuple[Tensor, Tensor]
"""Of keys and of values."""

ROOM = 4 * FLUSH
"""Generated entries that each segment gets room for, at most when a prompt ends, and at least where lines have to move
for them: all lines of the rung do, and as much memory is asked for."""


def room_for(counts: Counts) -> int:
    """Generated entries that each segment can take when a prompt ends: whole blocks, of 2.5% of what is coded."""
    return min(growth_for(counts), ROOM) // FLUSH * FLUSH


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
    codes : KeyCodes or None
        The model's own for keys, which ``maps`` then come from; None: keys are rotated as values are.
    """

    forms: tuple[PackedFormat, ...]
    maps: PackedMaps
    recent: int
    generated: int
    codes: KeyCodes | None = None

    @classmethod
    def of(cls, ladder: Ladder, centres: Pair, dtype: torch.dtype, codes: KeyCodes | None = None) -> "Coding":
        """That of a ladder for entries in ``dtype``; ``centres`` are the means ``[B, H_kv, D]`` to take out."""
        return cls.by(ladder, maps_of(centres, dtype, codes), codes)

    @classmethod
    def by(cls, ladder: Ladder, maps: PackedMaps, codes: KeyCodes | None = None) -> "Coding":
        """That of a ladder by maps that there are."""
        sizes = [part.shape[-1] for part in (maps.key_mean, maps.value_mean)]
        forms = ladder.forms(sizes, sorted_keys=codes is not None)
        return cls(forms, maps, ladder.recent, ladder.generated, codes)

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


def maps_of(centres: Pair, dtype: torch.dtype, codes: KeyCodes | None, offsets: Pair | None = None) -> PackedMaps:
    """The maps that take means ``[B, H_kv, D]`` out of entries in ``dtype``, by codes of the model's own if given.

    ``offsets`` are these means in code space, if they are known: then nothing is computed, and all four are taken as
    they are.
    """
    with torch.inference_mode(False):
        shared = _shared(centres[0].shape[1:], centres[1].shape[1:], centres[0].device, dtype, codes)
        # Copies, as the prompt's own may be of inference mode.
        own = (*centres, *offsets) if offsets is not None else kernels.mapped_means(centres, shared.matrices)
        return replace(shared, **dict(zip(("key_mean", "value_mean", "key_offset", "value_offset"), own, strict=True)))


@lru_cache(maxsize=256)
def _shared(
    key: torch.Size, value: torch.Size, device: torch.device, dtype: torch.dtype, codes: KeyCodes | None
) -> PackedMaps:
    """The maps of means of 0 ``[H_kv, D]``: all but what depends on means is that of others."""
    keys, values = (torch.zeros(1, *shape, device=device) for shape in (key, value))
    return PackedMaps.rotated(keys, values, dtype) if codes is None else codes.maps(keys, values, dtype)
