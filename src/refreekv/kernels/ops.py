"""The kernels as operators that PyTorch knows: ``torch.ops.refreekv.*``.

On CUDA they run in Triton, anywhere else in plain torch. As operators with declared shapes
and mutations they stay whole inside torch.compile and CUDA graphs. Triton is imported when the
first CUDA tensor arrives.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refreekv.core import reductions
from refreekv.kernels import reference
from refreekv.kernels.table import Format


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
    sums: bool,
    logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`core.reductions.probe_reductions` as an operator; a mean that is not asked for is empty."""
    given = reductions.Probes(
        query_columns, columns, valid, query_real, scaling, distance, softcap, sink_logits, sums, logsumexp
    )
    found = reductions.probe_reductions(query, key, given)
    return found.peak, key.new_empty(0, dtype=torch.float32) if found.mean is None else found.mean


@probe_reductions_op.register_kernel("cuda")
def probe_reductions_on_cuda(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`probe_reductions_op` in Triton, without the operator around it."""
    from refreekv.kernels.probe_launch import launch_probe_reductions

    return launch_probe_reductions(query, key, reductions.Probes(*rest))


@probe_reductions_op.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    peak, mean = (
        key.new_empty(shape, dtype=torch.float32) for shape in (key.shape[:3], key.shape[:3] if rest[-2] else (0,))
    )
    return peak, mean


@torch.library.custom_op("refreekv::append", mutates_args=("table",))
def append(
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    sizes: Sequence[int],
    key_type: torch.dtype,
    value_type: torch.dtype,
) -> None:
    """`kernels.append`. The memory behind the table changes as well: who reads it, reads the table."""
    reference.append(keys, values, table, _format(sizes, key_type, value_type))


@append.register_kernel("cuda")
def _(keys: Tensor, values: Tensor, table: Tensor, *form: Any) -> None:
    append_on_cuda(keys, values, table, _format(*form))


def append_on_cuda(keys: Tensor, values: Tensor, table: Tensor, form: Format) -> None:
    """`append` in Triton, without the operator around it."""
    from refreekv.kernels.storage import launch_append

    launch_append(keys, values, table, form)


@torch.library.custom_op("refreekv::gather", mutates_args=("table",))
def gather(
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    spans: Tensor,
    end: int,
    longest: int,
    sizes: Sequence[int],
    key_type: torch.dtype,
    value_type: torch.dtype,
) -> None:
    """`kernels.gather`."""
    reference.gather(keys, values, table, spans, end, _format(sizes, key_type, value_type))


@gather.register_kernel("cuda")
def _(keys: Tensor, values: Tensor, table: Tensor, spans: Tensor, end: int, longest: int, *form: Any) -> None:
    gather_on_cuda(keys, values, table, spans, end, longest, _format(*form))


def gather_on_cuda(
    keys: Tensor, values: Tensor, table: Tensor, spans: Tensor, end: int, longest: int, form: Format
) -> None:
    """`gather` in Triton, without the operator around it."""
    from refreekv.kernels.storage import launch_gather

    launch_gather(keys, values, table, spans, end, longest, form)


@torch.library.custom_op("refreekv::move", mutates_args=("target",))
def move(source: Tensor, target: Tensor, key_bytes: int, value_bytes: int, longest: int) -> None:
    """`kernels.move`."""
    reference.move(source, target, key_bytes, value_bytes)


@move.register_kernel("cuda")
def move_on_cuda(source: Tensor, target: Tensor, key_bytes: int, value_bytes: int, longest: int) -> None:
    """`move` in Triton, without the operator around it."""
    from refreekv.kernels.storage import launch_move

    launch_move(source, target, key_bytes, value_bytes, longest)


@torch.library.custom_op("refreekv::ragged_decode", mutates_args=())
def ragged_decode(
    query: Tensor,
    table: Tensor,
    sizes: Sequence[int],
    key_type: torch.dtype,
    value_type: torch.dtype,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`kernels.ragged_decode`."""
    form = _format(sizes, key_type, value_type)
    return reference.ragged_decode(query, table, form, scaling, softcap, sinks)


@ragged_decode.register_kernel("cuda")
def _(
    query: Tensor,
    table: Tensor,
    sizes: Sequence[int],
    key_type: torch.dtype,
    value_type: torch.dtype,
    *settings: Any,
) -> Tensor:
    form = _format(sizes, key_type, value_type)
    from refreekv.kernels.decode import launch_ragged_decode

    return launch_ragged_decode(query, table, form, *settings)


@ragged_decode.register_fake
def _(query: Tensor, table: Tensor, sizes: Sequence[int], *rest: Any) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], sizes[1])


def _format(sizes: Sequence[int], key_type: torch.dtype, value_type: torch.dtype) -> Format:
    """A format out of what operators are able to take."""
    return Format((sizes[0], sizes[1]), key_type, value_type)
