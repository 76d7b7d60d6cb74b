"""Linear layers of 4 bits, bitsandbytes', where memory is short: some rows of a matrix are unpacked at a time.

The library unpacks all of them for more than a few tokens, which is up to half a gigabyte beside everything else. Its
own function does so for rows as well, with the same numbers: see `core.slices`. That costs time, and prompts that fit
with whole matrices are read with these: see `fitting`.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from refreekv.core import slices
from refreekv.core.four_bits import FourBits
from refreekv.engines.transformers import four_bits

HIGH_BANDWIDTH = (9, 10)
"""Major compute capabilities of which bitsandbytes unpacks for more than 64 tokens; for others from 513 on at least."""
TOKENS, TOKENS_ELSEWHERE = 64, 512


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Within, products with many tokens unpack a slice at a time; others are the library's.

    Only instances are changed, and for the length of a call: threads that run the model meanwhile get the same
    numbers, up to rounding.
    """
    forwards = {module: functools.partial(_forward, module) for module in model.modules() if _is_library_s(module)}
    try:
        for module, forward in forwards.items():
            module.__dict__.setdefault("forward", forward)
        yield
    finally:
        for module, forward in forwards.items():
            if module.__dict__.get("forward") is forward:  # else it is somebody else's by now
                del module.__dict__["forward"]


def is_known(module: Any) -> bool:
    """Whether a module is bitsandbytes' layer of 4 bits, computes by the library's code, and holds what we can read."""
    return _is_library_s(module) and four_bits.held(module) is not None


def _is_library_s(module: Any) -> bool:
    library = sys.modules.get("bitsandbytes")
    if library is None or not isinstance(module, library.nn.Linear4bit):
        return False
    return type(module).forward is library.nn.Linear4bit.forward and "forward" not in module.__dict__


def _forward(linear: Any, x: Tensor) -> Tensor:
    """The library's forward in slices, where these save anything."""
    # What it holds is looked at each time: weights may have been moved or replaced.
    coded = four_bits.held(linear) if _is_worth_it(linear, x) else None
    if coded is None:
        own: Tensor = type(linear).forward(linear, x)
        return own
    return product(linear, x, coded)


def _is_worth_it(linear: Any, x: Tensor) -> bool:
    """Whether the library would unpack more for this input than a slice is, and nobody wants gradients."""
    count, size = linear.out_features, linear.in_features
    tokens = x.numel() // size
    return (
        x.is_cuda
        and x.device == linear.weight.device
        and x.shape[-1] == size
        and tokens > _most_tokens(x.device)
        and count > slices.slice_rows(count, size, tokens)
        and linear.compute_type_is_set
        and not torch.is_autocast_enabled(x.device.type)
        and not (
            torch.is_grad_enabled() and (x.requires_grad or (linear.bias is not None and linear.bias.requires_grad))
        )
    )


@functools.cache
def _most_tokens(device: torch.device) -> int:
    """Tokens up to which the library may multiply with codes as they are."""
    return TOKENS if torch.cuda.get_device_capability(device)[0] in HIGH_BANDWIDTH else TOKENS_ELSEWHERE


def product(linear: Any, x: Tensor, coded: FourBits) -> Tensor:
    """What the library's forward computes of ``[..., K]``, its weights unpacked in slices, one where the last was."""
    from bitsandbytes.functional import dequantize_blockwise

    state, (count, size) = linear.weight.quant_state, coded.shape
    kind = x.dtype if linear.compute_dtype is None else linear.compute_dtype
    factors = coded.factors
    if state.state2 is not None:
        factors = dequantize_blockwise(factors, state.state2).add_(state.offset)
    rows = slices.slice_rows(count, size, x.numel() // size)
    codes, parts = coded.codes[:, None].split(rows * size // 2), factors.split(rows * size // coded.block)
    made = torch.empty(rows, size, dtype=kind, device=x.device)

    def unpack(index: int) -> Tensor:
        some = made[: count - index * rows]
        # As `dequantize_4bit` calls it, without what that does around it: at most prompts the host is what waits.
        torch.ops.bitsandbytes.dequantize_4bit.out(
            codes[index], parts[index], coded.block, state.quant_type, some.shape, kind, out=some
        )
        return some

    if linear.bias is not None and linear.bias.dtype != kind:
        linear.bias.data = linear.bias.data.to(kind)  # for good, as the library does: a model's biases stay of one type
    bias = None if linear.bias is None else linear.bias.detach()
    return slices.product(x.to(kind), count, rows, unpack, bias).to(x.dtype)
