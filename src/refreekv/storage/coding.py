"""How the entries of a layer are coded, and what comes back of those that are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
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
        forms = ladder.forms([part.shape[-1] for part in centres], sorted_keys=codes is not None)
        return cls(forms, maps_of(centres, dtype, codes), ladder.recent, ladder.generated, codes)

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


def maps_of(centres: Pair, dtype: torch.dtype, codes: KeyCodes | None) -> PackedMaps:
    """The maps that take means ``[B, H_kv, D]`` out of entries in ``dtype``, by codes of the model's own if given."""
    with torch.inference_mode(False):
        # Copies, as the prompt's own may be of inference mode.
        keys, values = (part.to(torch.float32, copy=True) for part in centres)
        return PackedMaps.rotated(keys, values, dtype) if codes is None else codes.maps(keys, values, dtype)
