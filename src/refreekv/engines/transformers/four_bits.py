"""Linear layers with weights of 4 bits as bitsandbytes has them, recognised by what they hold."""

from typing import Any

import torch
from torch import Tensor

from refreekv.core.four_bits import NESTED_BLOCK, FourBits, readable


def held(linear: Any) -> FourBits | None:
    """The matrix of a layer, in its own memory; None if it is not one of 4 bits that the kernels can read."""
    weight = getattr(linear, "weight", None)
    state = getattr(weight, "quant_state", None)
    # On CPUs the library may put codes in another order, and then says so.
    if state is None or not isinstance(weight, Tensor) or getattr(state, "packing_format_for_cpu", False):
        return None
    try:
        shape = int(linear.out_features), int(linear.in_features)
        if tuple(state.shape) != shape or not weight.is_contiguous():
            return None
        codes, nested = weight.data.view(-1).view(torch.uint8), None if state.state2 is None else _nested(state)
        made = FourBits(codes, state.code, state.absmax, nested, state.blocksize, shape)
        return made if _as_expected(made) else None
    except (AttributeError, TypeError, RuntimeError):  # it was something else
        return None


def form(weights: FourBits) -> tuple[Any, ...]:
    """What matrices share for which one comparison is enough."""
    return weights.shape, weights.block, weights.nested is not None, tuple(weights.book.tolist())


def of_one_kind(weights: list[FourBits]) -> bool:
    """Whether one launch can read all of them."""
    return len({(one.shape[1], form(one)[1:]) for one in weights}) == 1


def _nested(state: Any) -> tuple[Tensor, Tensor, Tensor]:
    if state.state2.blocksize != NESTED_BLOCK:
        raise TypeError(f"factors are coded in blocks of {state.state2.blocksize}")
    return state.state2.code, state.state2.absmax, state.offset


def _as_expected(weights: FourBits) -> bool:
    """Whether tensors have the types and sizes that the kernels count on."""
    count, size = weights.shape
    blocks = -(-count * size // weights.block)
    wanted: list[tuple[Tensor, torch.dtype, int]] = [
        (weights.codes, torch.uint8, count * size // 2),
        (weights.book, torch.float32, 16),
        (weights.factors, torch.float32 if weights.nested is None else torch.uint8, blocks),
    ]
    if weights.nested is not None:
        sizes = 256, -(-blocks // NESTED_BLOCK), 1
        wanted += [(part, torch.float32, n) for part, n in zip(weights.nested, sizes, strict=True)]
    return (
        readable(weights)
        and weights.codes.data_ptr() % 16 == 0
        and all(part.dtype == kind and part.numel() == n and part.is_contiguous() for part, kind, n in wanted)
        and len({part.device for part, _, _ in wanted}) == 1
    )
