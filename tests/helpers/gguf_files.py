"""Small .gguf files with random weights and a tokenizer of single characters."""

from pathlib import Path

import gguf
import numpy as np

from refreekv.core.weight_blocks import FORMATS


def random_blocks(name: str, rows: int, columns: int, draw: np.random.Generator, scale: float = 0.02) -> np.ndarray:
    """Random blocks of a format as a file has them: ``[rows, bytes]``, of weights about as large as ``scale``."""
    stored = FORMATS[name]
    data = draw.integers(0, 256, (rows, columns // stored.weights, stored.bytes), dtype=np.uint8)
    # Scales are numbers, not any bits. K-quants multiply them by others, of up to 63 or 127.
    halves = {"Q6_K": [208]}.get(name, [0] if stored.form.offset or name == "Q8_0" else [0, 2])
    least = scale / {4: 5, 5: 9, 6: 18, 8: 74}[stored.form.bits] / (32 if name.endswith("_K") else 1)
    for index, start in enumerate(halves):
        sizes = least * np.exp(draw.normal(0, 0.3, data.shape[:2]))
        if index == 1:  # what is taken off, or added
            sizes = sizes * (8 if name.endswith("_K") else -8) * (2 if stored.form.bits == 5 else 1)
        data[:, :, start : start + 2] = sizes.astype(np.float16)[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def write_model(
    path: Path, kind: str = "Q8_0", *, architecture: str = "llama", hidden: int = 64, inner: int = 128, heads: int = 4,
    kv_heads: int = 2, layers: int = 2, context: int = 4096, tied: bool = False, vocabulary: int = 96,
    leave_out: str = "", plain: str = "", seed: int = 0,
) -> Path:  # fmt: skip
    """Write a model whose matrices are in one format; of two tensors the names are given.

    ``leave_out`` is missing, and ``plain`` is in float16.
    """
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    tokens = [chr(33 + index) for index in range(vocabulary - 4)] + ['!"', "#$", "Ġ", "<end>"]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (vocabulary - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(['! "', "# $"])
    writer.add_bos_token_id(vocabulary - 1)
    writer.add_eos_token_id(vocabulary - 1)
    writer.add_chat_template("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}assistant:")

    def matrix(name: str, rows: int, columns: int) -> None:
        if name == plain:
            writer.add_tensor(f"{name}.weight", draw.normal(0, 1 / columns**0.5, (rows, columns)).astype(np.float16))
        elif name != leave_out:
            # Small, so that attention stays soft: with four times as much, bfloat16 alone moved logits by 12 %.
            data = random_blocks(kind, rows, columns, draw, scale=0.5 / columns**0.5)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def vector(name: str, size: int, mean: float) -> None:
        writer.add_tensor(name, (mean + draw.normal(0, 0.1, size)).astype(np.float32))

    matrix("token_embd", vocabulary, hidden)
    if not tied:
        matrix("output", vocabulary, hidden)
    vector("output_norm.weight", hidden, 1)
    kv = kv_heads * hidden // heads
    for layer in range(layers):
        block = f"blk.{layer}"
        for name, rows, columns in (("attn_q", hidden, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden),
                                    ("attn_output", hidden, hidden), ("ffn_gate", inner, hidden),
                                    ("ffn_up", inner, hidden), ("ffn_down", hidden, inner)):  # fmt: skip
            matrix(f"{block}.{name}", rows, columns)
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                vector(f"{block}.{name}.bias", rows, 0)
        vector(f"{block}.attn_norm.weight", hidden, 1)
        vector(f"{block}.ffn_norm.weight", hidden, 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
