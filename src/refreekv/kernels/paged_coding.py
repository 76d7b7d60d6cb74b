"""Coding a prompt's entries on their way to private pages, layer by layer, a segment for each rung and head."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.packed_lines import FACTOR_BYTES, PackedFormat, PackedMaps
from refreekv.kernels.packed_calls import Transfer
from refreekv.kernels.paged import Pool, upload


class Chosen(NamedTuple):
    """Which entries of some layers are coded in which rung, and where their codes are before they go to pages.

    Attributes
    ----------
    counts : Tensor
        int64 ``[layers, H_kv, R]``, in host memory.
    tables, spans : Tensor
        int64 ``[layers, R, H_kv, 4]`` and ``[layers, R, H_kv, 3]``: as `kernels.pack_lines` is told.
    lines, factors : tuple of Tensor
        Of each rung, room for the layer that has most.
    listed : Tensor
        int32 ``[layers, R, H_kv, n]``: the entries, which the spans name.
    """

    counts: Tensor
    tables: Tensor
    spans: Tensor
    lines: tuple[Tensor, ...]
    factors: tuple[Tensor, ...]
    listed: Tensor

    @classmethod
    def of(cls, listed: Tensor, counts: Tensor, forms: Sequence[PackedFormat]) -> "Chosen":
        """The first ``counts`` entries of each list, in these formats; everything is told the device at once."""
        assert listed.is_contiguous()
        layers, rungs, heads, length = listed.shape
        device = listed.device
        most = counts.sum(1).amax(0).tolist() if layers else [0] * rungs
        lines = tuple(
            torch.empty(count, form.line_bytes, dtype=torch.uint8, device=device)
            for count, form in zip(most, forms, strict=True)
        )
        factors = tuple(torch.empty(count, FACTOR_BYTES, dtype=torch.uint8, device=device) for count in most)
        by_rung = counts.transpose(1, 2)  # [layers, R, H_kv]
        begins = by_rung.cumsum(-1) - by_rung
        at = [torch.tensor([part.data_ptr() for part in parts])[:, None] for parts in (lines, factors)]
        each = torch.tensor([form.line_bytes for form in forms])[:, None]
        numbered = torch.arange(layers * rungs * heads).view(layers, rungs, heads)
        address = listed.data_ptr() + numbered * length * listed.element_size()
        told = torch.stack(
            [at[0] + begins * each, at[1] + begins * FACTOR_BYTES, by_rung, by_rung, address, by_rung, 0 * by_rung], -1
        )
        there = upload(told, device)
        tables, spans = there[..., :4].contiguous(), there[..., 4:].contiguous()
        return cls(counts, tables, spans, lines, factors, listed)


def code_to_pages(
    pool: Pool,
    forms: Sequence[PackedFormat],
    maps: PackedMaps,
    keys: Tensor,
    values: Tensor,
    chosen: Chosen,
    layer: int,
    firsts: Sequence[int],
    pages: Tensor,
) -> None:
    """Code entries of one layer and write them to coded lines, one head's behind the other's.

    Parameters
    ----------
    pool : Pool
        The cache.
    forms, maps : sequence of PackedFormat, PackedMaps
        Of the lines of each rung, and into code space.
    keys, values : Tensor
        ``[1, H_kv, n, D]``.
    chosen, layer : Chosen, int
        Which entries, and which of its layers this is.
    firsts : sequence of int
        The layer's first line in each rung, counted in lines of the rung.
    pages : Tensor
        int32 ``[.]``: the private blocks.
    """
    counts = chosen.counts[layer]  # [H_kv, R]
    totals, most = counts.sum(0).tolist(), counts.amax(0).tolist()
    if not any(totals):
        return
    tables, spans, end = chosen.tables[layer], chosen.spans[layer], keys.shape[2]
    rungs = zip(forms, tables, spans, most, strict=True)
    kernels.pack_rungs(
        [Transfer(keys, values, None, table, form, maps, some, end, n, None) for form, table, some, n in rungs]
    )
    for rung, (form, first, total) in enumerate(zip(forms, firsts, totals, strict=True)):
        if not total:
            continue
        lines, factors = chosen.lines[rung][:total], chosen.factors[rung][:total]
        if pool.cache.is_cuda:
            from refreekv.kernels.paged_storage import launch_spread

            launch_spread(lines, factors, pool, form, first, pages)
        else:
            from refreekv.kernels import paged_reference

            paged_reference.spread(lines, factors, pool, form, first, pages)
