"""Attention over exact entries and packed lines together, in Triton: three kernels, one after the other."""

from typing import Any

from torch import Tensor

from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.packed_calls import PackedKV
from refreekv.kernels.packed_decode import launch_packed_decode
from refreekv.kernels.packed_join import launch_packed_join, launch_prepare


@on_its_device
def launch_packed_attention(
    query: Tensor, held: PackedKV, scaling: float, softcap: float | None, sinks: Tensor | None, **settings: Any
) -> Tensor:
    """Run all kernels; parameters as in `kernels.packed_attention`. ``settings`` are `launch_packed_decode`'s."""
    held.check(query, sinks)
    exact, tables, forms, maps = held
    # Here and not where it is needed: a copy has to live until the kernels that begin early have waited.
    query = query if query.stride(-1) == 1 else query.contiguous()
    prepared = launch_prepare(query, maps.key_mean, maps.key_dual, maps.key_bound, scaling, softcap)
    found = launch_packed_decode(
        query, prepared, exact, tables, forms, maps.value_mean.shape[-1], scaling, softcap, **settings
    )
    early = settings.get("early", True)
    return launch_packed_join(query, found, forms, maps.value_mean, maps.value_back, sinks, early=early)
