"""Attention over exact entries and packed lines together, in Triton: what is launched one after the other."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat, PackedMaps
from refreekv.kernels import pdl
from refreekv.kernels.decode import _decode_kernel, multiprocessors
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.packed_decode import launch_packed_decode
from refreekv.kernels.packed_join import Part, launch_packed_join, launch_prepare


@on_its_device
def launch_packed_attention(
    query: Tensor,
    exact: Tensor,
    tables: Sequence[Tensor],
    forms: Sequence[PackedFormat],
    maps: PackedMaps,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    **settings: Any,
) -> Tensor:
    """Run all kernels; parameters as in `kernels.packed_attention`. ``settings`` are `launch_packed_decode`'s."""
    asked, scales, shifts = launch_prepare(query, maps.key_mean, maps.key_dual, maps.key_bound, scaling, softcap)
    found = [exact_part(query, exact, maps.value_mean.shape[-1], scaling, softcap)]
    for table, form in zip(tables, forms, strict=True):
        parts, denominators, programs, block = launch_packed_decode(
            asked, scales, shifts, table, form, softcap, query, **settings
        )
        found.append(Part(table, parts, denominators, programs, block))
    return launch_packed_join(query, found, forms, maps.value_mean, maps.value_back, sinks)


def exact_part(query: Tensor, table: Tensor, value_size: int, scaling: float, softcap: float | None) -> Part:
    """Each program's part of the attention over exact entries, which are few: small blocks."""
    batch, heads, _, size = query.shape
    segments = table.shape[0]
    group = heads * batch // segments
    block, programs = 32, 2 * multiprocessors(query.device)
    if query.stride(-1) != 1:
        query = query.contiguous()
    parts = torch.empty(programs + segments, group, value_size, dtype=torch.float32, device=query.device)
    denominators = torch.empty(programs + segments, group, dtype=torch.float32, device=query.device)
    _decode_kernel[(programs,)](
        query, table, parts, denominators, segments, segments // batch, group, 0, scaling,
        1.0 if softcap is None else softcap, query.stride(0), query.stride(1),
        HEAD=size, VALUE=value_size, BLOCK_D=max(16, triton.next_power_of_2(size)),
        BLOCK_V=max(16, triton.next_power_of_2(value_size)), BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK=block, BLOCK_S=triton.next_power_of_2(max(segments, 2)), HAS_CAP=softcap is not None,
        num_warps=4, num_stages=2, **pdl.options(batch, query),
    )  # fmt: skip
    return Part(table, parts, denominators, programs, block)
