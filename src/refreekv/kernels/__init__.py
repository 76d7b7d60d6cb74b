"""Triton kernels, each beside a plain torch version that CPUs use and tests compare with.

The functions here pick by device: CUDA tensors go to Triton, others to the reference. On machines
without Triton the references serve CUDA tensors, too.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from refreekv.core import reductions
from refreekv.core.reductions import ProbeReductions
from refreekv.kernels import ops

__all__ = ["ProbeReductions", "available", "probe_reductions"]


@functools.cache
def available() -> bool:
    """Whether Triton is installed and a CUDA device is there to run its kernels."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def probe_reductions(
    query: Tensor,
    key: Tensor,
    *,
    query_columns: Tensor,
    columns: Tensor | None = None,
    valid: Tensor | None = None,
    query_real: Tensor | None = None,
    scaling: float | None = None,
    distance: int = 0,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> ProbeReductions:
    """Per-position peak, mean and sum of squares of the probes' attention, ``[B, H_kv, n]`` float32 each.

    Parameters, results and errors are those of `core.reductions.probe_reductions`, which this is on
    the CPU. On CUDA two kernels read the keys once each, and no row is ever written out: memory is
    the three results and one float32 a query, head and split of the keys.
    """
    reductions.check_heads(query.shape[1], key.shape[1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    extra = (columns, valid, query_real, scaling, distance, softcap, sink_logits)
    if key.is_cuda and available():
        return ProbeReductions(*ops.probe_reductions_op(query, key, query_columns, *extra))
    return reductions.probe_reductions(
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
