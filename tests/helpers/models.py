"""Small random-weight models of every architecture the tests cover.

The weights are larger than real initialisations: attention is then peaked enough that
policies evict a good part of a prompt, and every evicted entry shows in the logits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"

VOCAB = 128
PAD = 0
LAYERS = 4

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}

_HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_SHAPE, **changes}))


def _mistral(**changes: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**_SHAPE, "sliding_window": None, **changes}))


def _qwen2(**changes: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**_SHAPE, "num_key_value_heads": 1, **changes}))


def _qwen3(**changes: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**_SHAPE, "head_dim": 16, **changes}))


def _gemma3(**changes: Any) -> PreTrainedModel:
    # A scaling that is not that of the head size, as in the larger Gemma 3.
    special = {"head_dim": 16, "query_pre_attn_scalar": 40, "sliding_window": 16, "layer_types": _HYBRID}
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**_SHAPE, **special, **changes}))


def _phi3(**changes: Any) -> PreTrainedModel:
    # Phi-3 small and medium have grouped queries, mini has none: none here.
    return Phi3ForCausalLM(Phi3Config(**{**_SHAPE, "num_key_value_heads": 8, "sliding_window": None, **changes}))


def _gpt_oss(**changes: Any) -> PreTrainedModel:
    special = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(**{**_SHAPE, **special, "rope_parameters": rope, "layer_types": _HYBRID, **changes})
    return GptOssForCausalLM(config)


def _mixtral(**changes: Any) -> PreTrainedModel:
    special = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**{**_SHAPE, **special, **changes}))


def _qwen3_moe(**changes: Any) -> PreTrainedModel:
    special = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_SHAPE, **special, **changes}))


ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt_oss": _gpt_oss,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}
"""Names to builders; a builder takes changes to the configuration."""

HAS_SDPA = [name for name in ARCHITECTURES if name != "gpt_oss"]
"""GPT-OSS computes its learned sinks in eager attention only."""


def build(name: str, *, attention: str = "eager", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model in evaluation mode, the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[name](attn_implementation=attention, **changes)
    for module in model.modules():
        if hasattr(module, "sinks"):
            # Learned sinks of the size of real logits, so that leaving one out would show.
            module.sinks.data.mul_(8)
    return model.eval()


def with_key_bias(size: int, **changes: Any) -> PreTrainedModel:
    """A Qwen2 whose keys hold large constants in few channels, those that rotary positions turn least."""
    model = build(
        "qwen2",
        attention="sdpa",
        hidden_size=4 * size,
        num_attention_heads=4,
        initializer_range=0.6 / (4 * size) ** 0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **changes,
    )
    for block in model.model.layers:
        bias = block.self_attn.k_proj.bias.data
        bias.zero_()
        # Channel c and c + size/2 turn together; the last pairs hardly turn at all.
        bias[size // 2 - 1], bias[size - 1], bias[size - 2] = 150.0, -90.0, 60.0
    return model


IMAGE = 127
"""The token that stands for an image of `build_mllama`'s model."""


def build_mllama(*, attention: str = "sdpa", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A Llama-3.2-Vision, whose second and fourth layer look at an image and at no text; ``changes`` are the text's."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 56,
        "patch_size": 8,
        "max_num_tiles": 1,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**_SHAPE, "cross_attention_layers": [1, 3], "rope_parameters": rope, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
        model = MllamaForConditionalGeneration._from_config(config, attn_implementation=attention)
        for name, parameter in model.named_parameters():
            if "gate" in name:  # closed at first: images would not show
                parameter.data.fill_(0.7)
            elif parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def image_prompts(rows: int = 1, length: int = 40, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random prompts of one image each (50 states) and ``length`` tokens, as `build_mllama`'s model takes them."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2, IMAGE, (rows, length - 1), generator=generator)
    return {
        "input_ids": torch.cat([torch.full((rows, 1), IMAGE), words], 1),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "pixel_values": torch.randn(rows, 1, 1, 3, 56, 56, generator=generator),
        "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(rows, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(rows, length, 1, 1, dtype=torch.long),
    }


def save_with_characters(folder: Path) -> None:
    """A Llama and a tokenizer whose tokens are characters, to load from a folder."""
    build("llama", attention="sdpa").save_pretrained(folder)
    characters().save_pretrained(folder)


def characters(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are characters, of as many words as the models here."""
    vocabulary = {"<pad>": 0, "<s>": 1} | {chr(code): code for code in range(2, 128)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")
    fast.chat_template = template
    return fast


def full_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the full-attention layers."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [index for index, kind in enumerate(kinds) if kind == "full_attention"]


def prompts(lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of these lengths in one left-padded batch: ids and mask ``[B, longest]``."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(2, VOCAB, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return ids.where(mask, PAD), mask.long()
