"""Tiny random models of every type that transformers' auto classes know, for the sweep over all of them."""

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

CAUSAL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TEXT = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(CAUSAL))

VOCAB = 128
MOST_PARAMETERS = 20_000_000


class CannotBuildError(Exception):
    """Why no tiny model of a type can be made; the text is the reason."""


def _all(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_SMALL: dict[str, Any] = {
    **_all(VOCAB, "vocab_size vocab_size_per_layer_input audio_vocab_size decoder_vocab_size unpadded_vocab_size"),
    **_all(64, "hidden_size d_model n_embd embedding_size embed_dim emb_dim word_embed_proj_dim lru_width "),
    **_all(64, "attention_hidden_size input_embedding_size output_embedding_size embedding_dim backbone_hidden_size"),
    **_all(
        64, "text_hidden_size out_hidden_size output_hidden_size projection_dim vision_output_dim hidden_size_global"
    ),
    **_all(64, "hc_lowrank ple_embed_dim qformer_hidden_size encoder_hidden_size text_embed_dim"),
    **_all(96, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff n_inner dff dim_ff ffn_hidden_size"),
    **_all(96, "feed_forward_size d_inner intermediate_size_mlp dense_intermediate_size shared_intermediate_size"),
    **_all(96, "prefix_dense_intermediate_size ffn_intermediate_size mlp_dim"),
    **_all(4, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"),
    # As many as decoders have: the length of a cache is read off either.
    **_all(4, "encoder_layers num_encoder_layers"),
    **_all(2, "depth num_global_layers"),
    **_all(8, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    **_all(8, "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    **_all(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    **_all(8, "head_dim swa_head_dim d_head dim_head kv_channels attention_head_size"),
    **_all(512, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions"),
    **_all(28, "image_size"),
    **_all(14, "patch_size"),
    # Weights large enough that what is evicted shows.
    **_all(0.25, "initializer_range init_std initializer_factor embed_init_std"),
    **_all(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_all(2, "num_experts_per_tok moe_topk moe_k top_k_experts"),
    **_all(32, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    **_all(32, "shared_experts_intermediate_size expert_ffn_hidden_size expert_hidden_size"),
    **_all(1, "n_group topk_group"),
    **_all(24, "q_lora_rank"),
    **_all(16, "kv_lora_rank qk_head_dim index_head_dim indexer_head_dim o_lora_rank"),
    **_all(8, "qk_nope_head_dim qk_rope_head_dim"),
    **_all(12, "v_head_dim"),
    # Sparse attention over blocks, fewer than a prompt has.
    **_all(4, "index_n_heads indexer_n_heads index_block_size indexer_compress_ratio"),
    **_all(16, "index_topk indexer_budget"),
    **_all(2, "index_topk_blocks o_groups"),
    **_all(1, "indexer_kv_heads"),
    # Windows shorter than the prompt.
    **_all(16, "sliding_window sliding_window_size attention_chunk_size window_size attention_window_size"),
    **_all(16, "local_attention keep_window_size rel_extent"),
    # Recurrent layers.
    **_all(2, "linear_num_key_heads n_groups mamba_ngroups"),
    **_all(4, "linear_num_value_heads"),
    **_all(8, "linear_key_head_dim linear_value_head_dim linear_head_dim linear_num_heads mamba_d_state mamba_n_heads"),
    **_all(8, "mamba_chunk_size state_size mamba_num_heads ssm_state_size n_mamba_heads chunk_size"),
    **_all(16, "mamba_d_head mamba_head_dim mamba_headdim"),
    "mamba_dt_rank": 4,
    "mamba_d_ssm": 128,
    "use_mamba_kernels": False,
    # Special tokens inside the vocabulary, and none that ends an answer.
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    **_all(VOCAB - 1, "image_token_id image_token_index"),
    **_all(VOCAB - 2, "video_token_id video_token_index audio_token_id audio_token_index"),
    **_all(VOCAB - 3, "vision_start_token_id boi_token_id boi_token_index"),
    **_all(VOCAB - 4, "vision_end_token_id eoi_token_id eoi_token_index"),
}
"""What fields of configurations are set to, where a configuration has them."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_EVERY_SECOND = ["linear_attention", "full_attention"] * 2
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": _EVERY_SECOND},
    "dots1": {"n_shared_experts": 1},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 16},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": VOCAB},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2, "lsh_attn_chunk_length": 16,
                 "local_attn_chunk_length": 16, "num_buckets": 8},
    "xmod": {"default_language": "en_XX"},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1,
                           "loop_layer_index_end": 3},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 16, "attn_layer_period": 2, "attn_layer_offset": 1,
              "num_key_value_heads": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"num_heads": 4, "chunk_size": 64},
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm46v_text", "glm_ocr_text", "paddleocr_vl_text"), _MROPE
    ),
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}},
    "moshi": {"sliding_window": 16},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
}  # fmt: skip
"""What single types need beside that."""


def tiny(kind: str, *, seed: int = 0, attention: str | None = None) -> PreTrainedModel:
    """A tiny random model of a type, in evaluation mode.

    Raises
    ------
    CannotBuildError
        The type has no configuration of its own, or none that is small.
    """
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if kind in CAUSAL else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    try:
        config = small_config(CONFIG_MAPPING[kind], kind)
        cls = mapping[type(config)]
        cls = cls[0] if isinstance(cls, tuple) else cls
        if not isinstance(config, cls.config_class):
            config = config.get_text_config(decoder=True)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(config).parameters())
    except Exception as error:
        raise CannotBuildError(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error
    if size > MOST_PARAMETERS:
        raise CannotBuildError(f"{size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, attn_implementation=attention) if attention else cls._from_config(config)
        for parameter in model.parameters():
            if parameter.dim() >= 2 and parameter.is_floating_point():
                torch.nn.init.normal_(parameter, std=0.2)
            elif parameter.is_floating_point():
                # Gates that let nothing through, slopes of nothing and the like would hide what is behind them.
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model.float().eval()


def small_config(cls: type[PreTrainedConfig], kind: str) -> PreTrainedConfig:
    """A configuration with everything small that the class has a field for."""
    names = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in _SMALL.items() if name in names}
    try:
        usual = cls()
    except Exception:  # a configuration without defaults: the class says less
        usual = None
    for name in cls.sub_configs:
        part = getattr(usual, name, None)
        if name in names and isinstance(part, PreTrainedConfig):
            values[name] = small_config(type(part), part.model_type)
    if "kv_lora_rank" in names:  # heads have keys of their own there
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "is_decoder" in names:
        values["is_decoder"] = True
    rope = getattr(usual, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        values["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
    values.update(_SPECIAL.get(kind, {}))
    config = cls(**values)
    kinds = getattr(config, "layer_types", None)
    if kinds and len(set(kinds)) == 1 and "layer_types" in names and "layer_types" not in values:
        # The last layer of each of its kinds may be the first that four layers do not have.
        found = list(dict.fromkeys(getattr(usual, "layer_types", None) or []))
        if len(found) > 1:
            config = cls(**values, layer_types=[found[index % len(found)] for index in range(len(kinds))])
    elif "sliding_window" in values and _slides(config):
        # Only windows: with none there is something to prune.
        config = cls(**{**values, "sliding_window": None})
    return config


def _slides(config: PreTrainedConfig) -> bool:
    kinds = getattr(config, "layer_types", None)
    return kinds is None or set(kinds) == {"sliding_attention"}
