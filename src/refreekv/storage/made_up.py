"""Made-up entries that are stored as those of a layer will be, for kernels to be compiled for and tried on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.quantisation import Ladder, centre_of
from refreekv.storage.columns import Columns, Levels
from refreekv.storage.leveled import LeveledKV


@dataclass(frozen=True)
class MadeUpEntries:
    """What entries of a layer will be like, where, and how they will be coded.

    Attributes
    ----------
    device : torch.device
        Where entries will be.
    dtype : torch.dtype
        Of the entries.
    heads, sizes : int, pair of int
        KV heads, and the elements of a key and of a value.
    ladder, codes : Ladder, KeyCodes or None
        How they will be coded.
    attends : bool
        Whether a token's attention reads them as they are; else they are decoded first.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    sizes: tuple[int, int]
    ladder: Ladder
    codes: KeyCodes | None = None
    attends: bool = True

    def drawn(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[1, H_kv, n, D]``, and a query ``[1, H, 1, D]`` of two heads for each of theirs."""
        generator = torch.Generator().manual_seed(0)
        keys, values = (torch.randn(1, self.heads, length, size, generator=generator) + 0.5 for size in self.sizes)
        query = torch.randn(1, 2 * self.heads, 1, self.sizes[0], generator=generator)
        keys, values, query = (part.to(self.device, self.dtype) for part in (keys, values, query))
        return keys, values, query

    def stored(self, keys: Tensor, values: Tensor, levels: Levels | None = None) -> LeveledKV:
        """Store entries that were drawn, each in the format that ``levels`` say."""
        kept = [Columns.of_ranges((0, keys.shape[2]))]
        means = centre_of(keys), centre_of(values)
        given = None if levels is None else [levels]
        return LeveledKV.gathered(keys, values, kept, 0, self.ladder, means, given, self.codes)
