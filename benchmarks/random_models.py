"""Models of a shape with random weights, made where they are to run and in the form that they are to have.

A model of 70 billion parameters in 4 bits is never there in 16: it is built without data, and each matrix gets random
codes and scales in its place. With bitsandbytes these are its own NF4 layers (blocks of 64 with a float32 scale each,
as `refreekv plan` counts them). Without it they are `FourBits`, a layer made up here for the memory alone: it takes
the same bytes and computes with what it unpacks, some rows at a time, so that its speed says nothing.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from refreekv.engines.transformers import fingerprint

BLOCK = 64
"""Weights that share a scale."""
SPREAD = 0.02
"""Standard deviation of weights."""
UNPACKED = 2**24
"""Elements that `FourBits` unpacks at a time."""

_LONG = {"max_position_embeddings": 2**20, "tie_word_embeddings": False, "eos_token_id": None}
SHAPES: dict[str, PreTrainedConfig] = {
    "llama-3-70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, **_LONG,
    ),
    "qwen2.5-32b": Qwen2Config(
        hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
        num_key_value_heads=8, vocab_size=152064, **_LONG,
    ),
    "llama-3-8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, **_LONG,
    ),
    "tiny": LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, **_LONG,
    ),
}  # fmt: skip

FORMS = ("bf16", "int4", "int4-made-up")
"""What matrices are in; ``int4``: bitsandbytes' NF4 where it is installed."""


class FourBits(nn.Module):
    """A linear layer of random 4-bit codes, two a byte, with a float32 scale for each `BLOCK` of a row."""

    def __init__(self, in_features: int, out_features: int, bias: bool, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", _bytes(out_features, in_features // 2, device=device))
        scales = torch.full((out_features, in_features // BLOCK), SPREAD / 4.6, device=device)
        self.register_buffer("scales", scales)  # 16 levels from -7.5 to 7.5 have a standard deviation of 4.6
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply with the unpacked weights."""
        rows = max(1, UNPACKED // self.in_features)
        parts = [
            x @ self._unpacked(slice(start, start + rows), x.dtype).T for start in range(0, self.out_features, rows)
        ]
        out = torch.cat(parts, dim=-1)
        return out if self.bias is None else out + self.bias

    def _unpacked(self, rows: slice, dtype: torch.dtype) -> Tensor:
        codes = self.codes[rows]
        levels = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).to(dtype) - 7.5  # [rows, in]
        scales = self.scales[rows].to(dtype)
        return (levels.unflatten(1, (-1, BLOCK)) * scales[..., None]).flatten(1)


def build(config: PreTrainedConfig, form: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model in evaluation mode.

    Raises
    ------
    ValueError
        Unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"weights must be one of {', '.join(FORMS)}, got {form!r}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head and form != "bf16":
            model.set_submodule(name, _packed(module, form, device, dtype))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(_random(parameter, device), requires_grad=False))
    # What is computed from the configuration: rotary frequencies.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model.eval()


def form_of(model: Any) -> str:
    """What the matrices of a model are, in words."""
    kinds = {type(module).__name__ for module in model.model.layers.modules() if hasattr(module, "in_features")}
    names = {"Linear": "bf16", "Linear4bit": "NF4 of bitsandbytes", "FourBits": "4 bits, made up: speeds mean nothing"}
    return ", ".join(sorted(names.get(kind, kind) for kind in kinds))


def weight_parts(model: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors that hold weights, scales and code books included, by parameter or buffer."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for part in fingerprint.parts(tensor):
            yield name, part


def weight_bytes(model: Any, *, read: bool = False) -> int:
    """Bytes of the weights; ``read``: of those that one token reads, of which the embedding is a line."""
    embedding = {id(part) for _, part in weight_parts(model.get_input_embeddings())} if read else set()
    sizes = {part.data_ptr(): part.nbytes for _, part in weight_parts(model) if id(part) not in embedding}
    return sum(sizes.values())


def _random(like: Tensor, device: torch.device) -> Tensor:
    if like.dim() == 1:
        return torch.ones(like.shape, device=device, dtype=like.dtype)
    made = torch.empty(like.shape, device=device, dtype=like.dtype)
    return made.normal_(std=SPREAD)


def _bytes(*shape: int, device: torch.device) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def _packed(linear: nn.Linear, form: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    sizes = linear.in_features, linear.out_features
    biased = linear.bias is not None
    if form == "int4-made-up" or importlib.util.find_spec("bitsandbytes") is None:
        return FourBits(*sizes, biased, device, dtype)
    import bitsandbytes
    from bitsandbytes.functional import QuantState, get_4bit_type

    with torch.device("meta"):
        made = bitsandbytes.nn.Linear4bit(
            *sizes, bias=biased, compute_dtype=dtype, quant_type="nf4", compress_statistics=False
        )
    count = linear.in_features * linear.out_features
    # NF4's levels have a standard deviation of about 0.55 if all are as frequent.
    state = QuantState(
        absmax=torch.full((count // BLOCK,), SPREAD / 0.55, device=device),
        shape=torch.Size((linear.out_features, linear.in_features)),
        code=get_4bit_type("nf4", device=str(device)),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    made.weight = bitsandbytes.nn.Params4bit(
        _bytes(count // 2, 1, device=device), requires_grad=False, quant_state=state, blocksize=BLOCK,
        compress_statistics=False, quant_type="nf4", module=made, bnb_quantized=True,
    )  # fmt: skip
    made.quant_state = state
    return made
