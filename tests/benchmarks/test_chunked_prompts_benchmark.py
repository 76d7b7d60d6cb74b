"""``benchmarks/chunked_prompts.py`` in small."""

import torch
from transformers import DynamicCache

import chunked_prompts
from helpers.models import build, prompts


@torch.no_grad()
def test_prompts_read_over_their_codes():
    """Not coded they are the full cache; fewer bits are further off; means of the whole prompt change little."""
    model = build("llama", attention="sdpa", head_dim=64)
    prompt = prompts((400,), seed=1)[0]
    tokens, wanted, means = chunked_prompts.answer(model, prompt, 4)
    off = {}
    for kind in (None, "int8", "int8:means", "int4", "int4:end"):
        got = chunked_prompts.read(model, prompt, tokens, kind, 100, "full", means)
        assert got.shape == wanted.shape
        off[kind] = float((got - wanted).norm() / wanted.norm())
    assert off[None] < 1e-5 < off["int8"] < off["int4"]
    assert off["int8"] != off["int8:means"] < off["int4"]
    assert off[None] < off["int4:end"] < off["int4"]
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    full, held = chunked_prompts.held_bytes(cache.layers, 4000, "int8:means")
    assert full == 4 * 2 * 2 * 64 * 2 * 4000
    assert 0.5 < held / full < 0.6
    assert chunked_prompts.held_bytes(cache.layers, 4000, None) == (full, full)
