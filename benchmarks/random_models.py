"""Models of a shape with random weights, made where they are to run and in the form that they are to have.

A model of 70 billion parameters in 4 bits is never there in 16: it is built without data, and each matrix gets random
codes and scales in its place. Two kinds, both of 4.5 bits a weight, as `refreekv plan` counts: bitsandbytes' NF4
(blocks of 64 with a float32 scale each), and our own blocks, those of a .gguf file in Q4_0 (32 with a float16 scale).
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from refreekv.core.weight_blocks import FORMATS, WeightBlocks
from refreekv.engines.transformers import fingerprint
from refreekv.engines.transformers.packed_weights import PackedLinear

BLOCK = 64
"""Weights of NF4 that share a scale."""
SPREAD = 0.02
"""Standard deviation of weights."""
BLOCKS = FORMATS["Q4_0"].form

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

FORMS = ("bf16", "int4", "int4-nf4", "int4-blocks")
"""What matrices are in; ``int4``: bitsandbytes' NF4 where that is installed, and our blocks elsewhere."""


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
    names = {"Linear": "bf16", "Linear4bit": "NF4 (bitsandbytes)", "PackedLinear": "Q4_0"}
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
    if form == "int4-blocks" or (form == "int4" and importlib.util.find_spec("bitsandbytes") is None):
        count, size = linear.weight.shape
        # Codes from -8 to 7 have a standard deviation of 4.6, and scales are halves of a power of two.
        scales = torch.full((count, size // BLOCKS.group), 0.5, dtype=torch.float16, device=device)
        rows = torch.full((count,), 2 * SPREAD / 4.6, device=device)
        low, none = _bytes(count, size // 2, device=device), torch.empty(0, dtype=torch.uint8, device=device)
        blocks = WeightBlocks(BLOCKS, low, none, scales, scales[:0], rows)
        return PackedLinear(blocks, torch.zeros(count, device=device, dtype=dtype) if biased else None)
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
