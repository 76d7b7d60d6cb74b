"""The kernels over packed lines as operators that PyTorch knows, as `kernels.ops` has those over exact entries.

Operators take no objects: formats come as the ten integers of `PackedFormat.numbers`, maps as their tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refreekv.kernels import packed_host, packed_reference
from refreekv.kernels.packed_calls import PackedKV, Transfer


@torch.library.custom_op("refreekv::pack_lines", mutates_args=("table",))
def pack_lines(
    keys: Tensor,
    values: Tensor,
    source: Tensor | None,
    table: Tensor,
    form: Sequence[int],
    maps: Sequence[Tensor],
    spans: Tensor,
    end: int,
    longest: int,
    starts: Tensor | None,
) -> None:
    """`kernels.pack_lines`. The memory behind the table changes: who reads it, reads the table."""
    packed_reference.pack(Transfer.of(keys, values, source, table, form, maps, spans, end, longest, starts))


@pack_lines.register_kernel("cuda")
def _(*flat: Any) -> None:
    pack_lines_on_cuda(Transfer.of(*flat))


def pack_lines_on_cuda(given: Transfer, more: Sequence[Transfer] = ()) -> None:
    """`pack_lines` in Triton, without the operator around it; ``more`` to other lines, in the same launch."""
    from refreekv.kernels.packed_storage import launch_pack

    launch_pack(given, more)


@torch.library.custom_op("refreekv::unpack_lines", mutates_args=("keys", "values"))
def unpack_lines(
    keys: Tensor,
    values: Tensor,
    target: Tensor | None,
    table: Tensor,
    form: Sequence[int],
    maps: Sequence[Tensor],
    spans: Tensor,
    end: int,
    longest: int,
    starts: Tensor | None,
) -> None:
    """`kernels.unpack_lines`. With ``target`` the memory behind that changes, which is the keys' and values'."""
    packed_reference.unpack(Transfer.of(keys, values, target, table, form, maps, spans, end, longest, starts))


@unpack_lines.register_kernel("cuda")
def _(*flat: Any) -> None:
    unpack_lines_on_cuda(Transfer.of(*flat))


def unpack_lines_on_cuda(given: Transfer) -> None:
    """`unpack_lines` in Triton, without the operator around it."""
    from refreekv.kernels.packed_unpack import launch_unpack

    launch_unpack(given)


@torch.library.custom_op("refreekv::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor,
    exact: Tensor,
    tables: Sequence[Tensor],
    forms: Sequence[int],
    maps: Sequence[Tensor],
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`kernels.packed_attention`."""
    return packed_host.packed_attention(query, PackedKV.of(exact, tables, forms, maps), scaling, softcap, sinks)


@packed_attention.register_kernel("cuda")
def _(query: Tensor, *rest: Any) -> Tensor:
    from refreekv.kernels.packed_launch import launch_packed_attention

    return launch_packed_attention(query, PackedKV.of(*rest[:4]), *rest[4:])


@packed_attention.register_fake
def _(
    query: Tensor, exact: Tensor, tables: Sequence[Tensor], forms: Sequence[int], maps: Sequence[Tensor], *rest: Any
) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], maps[3].shape[-1])
