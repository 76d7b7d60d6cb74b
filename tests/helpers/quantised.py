"""Weights in few bits: layers as libraries make them, made up here, and those of the libraries themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes around 128, and a scale for each row."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round().add(128).to(torch.uint8), scale


class Bytes(nn.Linear):
    """A subclass of Linear whose weight is a column of bytes with scales as an attribute, as bitsandbytes has it."""

    calls = 0

    def __init__(self, linear: nn.Linear):
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, self.scale = _codes(linear.weight.detach())
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        Bytes.calls += 1
        weight = (self.weight.view(self.out_features, -1).float() - 128) * self.scale
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


class Blocks(nn.Module):
    """No Linear at all, with a weight of bytes, as transformers' modules for .gguf files."""

    calls = 0

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = _codes(linear.weight.detach())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        Blocks.calls += 1
        return nn.functional.linear(x, ((self.weight.float() - 128) * self.scales).to(x.dtype), self.bias)


class Disguised(Tensor):
    """A weight that says it is of the model's type, while its memory holds bytes, as torchao's tensors."""

    calls = 0

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> "Disguised":
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.dtype

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].dtype)
        Disguised.calls += 1
        plain = [((a.codes.float() - 128) * a.scale).to(a.dtype) if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))


def disguised(linear: nn.Linear) -> nn.Linear:
    """A Linear as it was, with a weight that is another kind of tensor."""
    codes, scale = _codes(linear.weight.detach())
    linear.weight = nn.Parameter(Disguised(codes, scale, linear.weight.dtype), requires_grad=False)
    return linear


MADE_UP: dict[str, tuple[Callable[[nn.Linear], nn.Module], Any]] = {
    "bytes": (Bytes, Bytes),
    "blocks": (Blocks, Blocks),
    "disguised": (disguised, Disguised),
}
"""Names to what makes such a layer, and what counts its calls."""


def _nf4(linear: nn.Linear) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4",
        compute_dtype=linear.weight.dtype, compress_statistics=True,
    )  # fmt: skip
    made.load_state_dict(linear.state_dict())
    return made.to(linear.weight.device)


def _int8(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


LIBRARIES = {"bitsandbytes-nf4": _nf4, "torchao-int8": _int8}


def quantise(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> int:
    """Replace all linear layers but the last one of the model; how many there were."""
    found = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"]
    for name, linear in found:
        model.set_submodule(name, make(linear))
    return len(found)
