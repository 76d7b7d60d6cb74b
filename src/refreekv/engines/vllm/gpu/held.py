"""How much a request keeps, and how many pages hold it: numbers on the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat
from refreekv.kernels.paged import Pool


class Held(NamedTuple):
    """What a request keeps of its prompt.

    Attributes
    ----------
    counts : Tensor
        int64 ``[L, H_kv]``: entries.
    metrics : tuple of (float or None)
        The layers' criteria.
    rungs : Tensor
        int64 ``[L, H_kv, R]``: those of them that are coded in each rung; ``R`` is 0 where nothing is.
    """

    counts: Tensor
    metrics: tuple[float | None, ...]
    rungs: Tensor

    @classmethod
    def of(cls, numbers: Tensor, layers: int, heads: int, rungs: int) -> "Held":
        """Read `KeptPrompt.numbers`."""
        counts, metrics, coded = numbers.split([layers * heads, layers, layers * heads * rungs])
        return cls(
            counts.long().view(layers, heads),
            tuple(None if number != number else number for number in metrics.tolist()),
            coded.long().view(layers, heads, rungs),
        )

    def of_heads(self, rank: int, ranks: int) -> "Held":
        """The heads of one tensor-parallel rank."""
        own = slice(rank * self.counts.shape[1] // ranks, (rank + 1) * self.counts.shape[1] // ranks)
        return Held(self.counts[:, own], self.metrics, self.rungs[:, own])

    @property
    def coded(self) -> Tensor:
        """Entries that are coded, in whatever rung: int64 ``[L, H_kv]``."""
        return self.rungs.sum(-1)

    def places(self, pool: Pool, forms: Sequence[PackedFormat]) -> tuple[list[int], int]:
        """The first page of each rung, and pages in all; entries as they are come first."""
        pages, starts = pool.pages_for(int((self.counts - self.coded).sum())), []
        for form, count in zip(forms, self.rungs.sum((0, 1)).tolist(), strict=True):
            starts.append(pages)
            pages += -(-count // pool.coded_lines(form))
        return starts, pages

    def share_of_bytes(self, pool: Pool, prompt: int, forms: Sequence[PackedFormat]) -> float:
        """Bytes of what is kept, in the formats that it is stored in, as a share of the whole prompt's."""
        entry = 2 * pool.size * pool.cache.element_size()
        each = torch.tensor([form.entry_bytes - entry for form in forms], dtype=torch.int64)
        less = int((self.rungs.sum((0, 1)) * each).sum()) if len(forms) else 0
        return (int(self.counts.sum()) * entry + less) / (self.counts.numel() * prompt * entry)


def begins(counts: Tensor) -> Tensor:
    """Where each of ``[L, H_kv]`` parts begins that lie one behind the other."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view(counts.shape)
