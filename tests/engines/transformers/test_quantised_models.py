"""Whole models over coded K/V: large key biases, capped logits and learned sinks, drafts, batches."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from helpers.driving import greedy, prefill
from helpers.models import build, prompts, with_key_bias
from refreekv import KVDtype, ReFreeKVCache, kernels
from refreekv.core import quantisation
from refreekv.engines.transformers import layer as layers

LENGTH = 180


@torch.no_grad()
def divergence(model, kv_dtype) -> float:
    """KL between the full cache's next tokens and those read over coded entries, in nats, on average."""
    found = []
    for cache in (ReFreeKVCache(model, "full"), ReFreeKVCache(model, "full", kv_dtype=kv_dtype)):
        ids, _ = prompts((LENGTH,), seed=4)
        model(ids, past_key_values=cache)
        fed, _ = prompts((12,), seed=5)
        found.append(model(fed, past_key_values=cache).logits.log_softmax(-1))
    return float((found[0].exp() * (found[0] - found[1])).sum(-1).mean())


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_large_key_biases(size, monkeypatch):
    model = with_key_bias(size)
    kinds = ["int4:recent=8", "int8:recent=8"]
    four, eight = (divergence(model, kind) for kind in kinds)
    assert four < 0.03
    assert eight < 3e-4
    monkeypatch.setattr(layers, "centres", lambda *parts: tuple(torch.zeros_like(part[..., 0, :]) for part in parts))
    assert divergence(model, kinds[0]) > 20 * four  # the bias is large, and it is the mean that takes it out


def with_capped_logits():
    config = Gemma2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_logit_softcapping=2.0,
        layer_types=["full_attention"] * 2,
        initializer_range=0.25,
        attention_bias=True,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [lambda: build("gpt_oss", head_dim=16), with_capped_logits], ids=["sinks", "caps"])
@torch.no_grad()
def test_logits_that_may_not_be_shifted(make, monkeypatch):
    """Learned sinks compare logits with a number of their own, caps bend them: the mean key must not be left out."""
    model = make()
    for block in model.model.layers:
        if hasattr(block.self_attn, "sinks"):
            block.self_attn.sinks.data.fill_(4.0)
        block.self_attn.q_proj.bias.data.add_(1.0)
        block.self_attn.k_proj.bias.data.sub_(3.5)
    full, coded = ReFreeKVCache(model, "full"), ReFreeKVCache(model, "full", kv_dtype="int8:recent=8")
    ids, _ = prompts((LENGTH,), seed=4)
    fed, _ = prompts((1,), seed=5)
    for cache in (full, coded):
        model(ids, past_key_values=cache)

    def step(cache):
        """One more token as `generate` feeds it, which is read in place."""
        cache = copy.deepcopy(cache)
        with cache.state.until(LENGTH, generating=True):
            return model(fed, past_key_values=cache).logits

    wanted, got = step(full), step(coded)
    off = float((wanted - got).abs().mean() / wanted.std())
    assert off < 0.03
    read = kernels.packed_attention

    def shifted(query, exact, tables, forms, maps, **settings):
        return read(query, exact, tables, forms, replace(maps, key_mean=0 * maps.key_mean), **settings)

    monkeypatch.setattr(kernels, "packed_attention", shifted)
    wrong = step(coded)
    assert float((wanted - wrong).abs().mean() / wanted.std()) > 2 * off


@pytest.mark.parametrize("kind", ["int4:recent=8", "int8:recent=8", "k4v2+int8:recent=8"])
def test_drafts(kind):
    model = build("llama", attention="sdpa", head_dim=16)
    ids, _ = prompts((60,), seed=12)
    ids = ids.repeat(1, 2)
    mask = torch.ones_like(ids)
    caches = [ReFreeKVCache(model, "full", kv_dtype=kind) for _ in range(2)]
    wanted = greedy(model, ids, mask, caches[0], steps=50)
    assert torch.equal(greedy(model, ids, mask, caches[1], steps=50, prompt_lookup_num_tokens=4), wanted)
    assert all(layer.ragged.lines.lengths == [(120 - 12 + 32,) * 2] for layer in caches[1].pruned_layers)


@pytest.mark.parametrize("kind", ["int4:recent=8", "int8:recent=8", "k6v4:recent=8", "k4v2+k6v4+int8:recent=8"])
@torch.no_grad()
def test_rows_of_a_batch_do_not_influence_each_other(kind):
    model = build("llama", attention="sdpa", head_dim=16)
    lengths = (150, 97, 128)
    together = ReFreeKVCache(model, "full", kv_dtype=kind)
    _, mask = prefill(model, together, lengths)
    ids, _ = prompts(lengths, seed=3)
    fed = torch.randint(2, 90, (3, 40), generator=torch.Generator().manual_seed(1))
    positions = mask.sum(-1, keepdim=True) + torch.arange(40)
    longer = torch.cat([mask, torch.ones_like(fed)], 1)
    outputs = model(fed, attention_mask=longer, position_ids=positions, past_key_values=together).logits
    for row, length in enumerate(lengths):
        alone = ReFreeKVCache(model, "full", kv_dtype=kind)
        model(ids[row : row + 1, -length:], past_key_values=alone)
        got = model(fed[row : row + 1], past_key_values=alone).logits
        for mine, other in zip(alone.pruned_layers, together.pruned_layers, strict=True):
            assert mine.ragged.lines.lengths[0] == other.ragged.lines.lengths[row]
            means = [storage.coding.maps.key_mean for storage in (mine.ragged, other.ragged)]
            assert torch.allclose(means[0][0], means[1][row], atol=1e-4)
        # A key half-way between two levels may fall on either side: one step of it, at most.
        assert (got[0] - outputs[row]).abs().mean() < 2e-2 * outputs.std()


def means_of(layer):
    return layer.ragged.coding.maps.key_mean, layer.ragged.coding.maps.value_mean


@torch.no_grad()
def test_means_are_the_prompt_s_and_stay():
    model = build("qwen2", attention="sdpa", head_dim=16)
    cache = ReFreeKVCache(model, "streaming-llm", size=60, kv_dtype=KVDtype("int4", recent=8))
    ids, _ = prompts((LENGTH,), seed=4)
    dense = ReFreeKVCache(model, "full")
    for each in (cache, dense):
        model(ids, past_key_values=each)
    means = [
        (quantisation.centre_of(layer.dense[0]), quantisation.centre_of(layer.dense[1]))
        for layer in dense.pruned_layers
    ]
    for turn in range(2):
        for layer, own in zip(cache.pruned_layers, means, strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(means_of(layer), own, strict=True))
        model(prompts((50,), seed=6 + turn)[0], past_key_values=cache)
    cache.reset()
    model(ids[:, :100], past_key_values=cache)
    assert not torch.allclose(means_of(cache.pruned_layers[1])[0], means[1][0], atol=1e-3)
