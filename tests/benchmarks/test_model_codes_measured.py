"""Codes of a model's own, from the pass that copy scores come from: against keys and queries read off the model."""

import pytest
import torch

from helpers.models import build, prompts
from model_codes import SHARES, calibrated, model_codes
from refreekv import ReFreeKVCache
from refreekv.core.quantisation import SINKS
from refreekv.engines.transformers.copy_scores import copy_scores
from refreekv.pruning.copy_scores import tokens_said_twice


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt_oss"])
@torch.no_grad()
def test_means_are_those_of_the_pass(name):
    model = build(name, max_position_embeddings=600)
    held = ReFreeKVCache(model, "full")
    codes = model_codes(model, [0])
    ids, _ = tokens_said_twice(model.config)
    model(torch.tensor([ids]), past_key_values=held)
    assert len(codes) == len(held.pruned_layers)
    for own, layer in zip(codes, held.pruned_layers, strict=True):
        keys, values = layer.dense
        torch.testing.assert_close(own.keys.centre, keys[0, :, SINKS:].mean(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(own.value_centre, values[0, :, SINKS:].mean(1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_pass_gives_copy_scores_too():
    model = build("llama", attention="sdpa")
    with_cache = ReFreeKVCache(model, "full")
    scores, codes = calibrated(model)
    for mine, known in zip(scores, copy_scores(model), strict=True):
        torch.testing.assert_close(mine, known, atol=1e-5, rtol=1e-4)
    again = calibrated(model)[1]
    assert all(torch.equal(a.keys.spread, b.keys.spread) for a, b in zip(codes, again, strict=True))
    del with_cache


@torch.no_grad()
def test_offsets_reach_into_the_context():
    model = build("llama", attention="sdpa")
    with_cache = ReFreeKVCache(model, "full")
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model_codes(model)
    handle.remove()
    firsts = seen[0][:, 0].tolist()
    assert firsts == sorted({int(share * 4096) for share in SHARES})
    short = build("llama", attention="sdpa", max_position_embeddings=300)
    other_cache = ReFreeKVCache(short, "full")
    assert len(model_codes(short)) == 4
    del with_cache, other_cache


@torch.no_grad()
def test_coded_keys_are_near_on_other_text():
    model = build("qwen2", attention="sdpa")
    held = ReFreeKVCache(model, "full")
    codes = model_codes(model)
    model(prompts((200,), seed=3)[0], past_key_values=held)
    for own, layer in zip(codes, held.pruned_layers, strict=True):
        keys = layer.dense[0][0, :, SINKS:]
        back = own.keys.round_trip(keys, 8)
        assert (back - keys).square().mean() < 0.01 * keys.var()
