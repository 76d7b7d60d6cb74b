"""The kernels as operators that PyTorch knows: ``torch.ops.refreekv.*``.

On CUDA they run in Triton, anywhere else in plain torch. As operators with declared shapes
and mutations they stay whole inside torch.compile and CUDA graphs. Triton is imported when the
first CUDA tensor arrives.
"""

import torch
from torch import Tensor

from refreekv.core import reductions


@torch.library.custom_op("refreekv::probe_reductions", mutates_args=())
def probe_reductions_op(
    query: Tensor,
    key: Tensor,
    query_columns: Tensor,
    columns: Tensor | None,
    valid: Tensor | None,
    query_real: Tensor | None,
    scaling: float,
    distance: int,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`core.reductions.probe_reductions` as an operator."""
    peak, mean, squares = reductions.probe_reductions(
        query,
        key,
        query_columns=query_columns,
        columns=columns,
        valid=valid,
        query_real=query_real,
        scaling=scaling,
        distance=distance,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    return peak, mean, squares


@probe_reductions_op.register_kernel("cuda")
def _(query, key, *rest):
    from refreekv.kernels.probe import launch_probe_reductions

    return launch_probe_reductions(query, key, *rest)


@probe_reductions_op.register_fake
def _(query, key, *rest):
    shape = key.shape[:3]
    return tuple(key.new_empty(shape, dtype=torch.float32) for _ in range(3))
