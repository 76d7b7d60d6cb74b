"""Attention over exact entries and packed lines together, in Triton: three kernels, one after the other."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from refreekv.core.packed_lines import PackedFormat, PackedMaps
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.packed_decode import launch_packed_decode
from refreekv.kernels.packed_join import launch_packed_join, launch_prepare
from refreekv.kernels.packed_reference import check_attention


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
    check_attention(query, exact, tables, forms, maps, sinks)
    # Here and not where it is needed: a copy has to live until the kernels that begin early have waited.
    query = query if query.stride(-1) == 1 else query.contiguous()
    prepared = launch_prepare(query, maps.key_mean, maps.key_dual, maps.key_bound, scaling, softcap)
    found = launch_packed_decode(
        query, prepared, exact, tables, forms, maps.value_mean.shape[-1], scaling, softcap, **settings
    )
    early = settings.get("early", True)
    return launch_packed_join(query, found, forms, maps.value_mean, maps.value_back, sinks, early=early)
