"""The report and the memory: what the report says is what the storages hold, to the byte."""

import gc
import weakref
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from transformers import DynamicCache

from helpers.driving import PRUNING, RAGGED, check_bytes, feed, greedy, index_bytes, kv_bytes, prefill, storage_bytes
from helpers.models import LAYERS, build, full_layers, prompts
from refreekv import ReFreeKVCache
from refreekv.core.selection import Selection
from refreekv.engines.transformers import layer as layer_module
from refreekv.policies import JointPolicy, LayerView, Policy


def test_bytes_are_those_of_the_storages(llama, new_cache):
    cache = new_cache()
    assert cache.report.bytes_after == 0
    logits, mask = prefill(llama, cache)
    report = cache.report
    check_bytes(cache, report)
    assert 0 < report.bytes_after < 0.95 * report.bytes_before
    entry = 2 * 2 * 8 * 4  # keys and values, KV heads, head size, bytes of float32: never the 8 query heads
    for layer in report.prunable:
        for row in layer.rows:
            # A layer that lost nothing in any row stays rectangular, padding included.
            untouched = all(other.kept == other.prompt_length for other in layer.rows)
            assert row.bytes_after == entry * (max(RAGGED) if untouched else row.kept)
            assert row.bytes_before == entry * max(RAGGED)
    for step in range(3):
        logits, mask = feed(llama, cache, logits.argmax(-1, keepdim=True), mask)
        logits = logits[:, -1]
        grown = cache.report
        check_bytes(cache, grown)
        assert grown.bytes_after - report.bytes_after == (step + 1) * LAYERS * len(RAGGED) * entry
        assert grown.tokens == max(RAGGED) + step + 1


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3", "gpt_oss"])
def test_bytes_on_other_architectures(name):
    model = build(name)
    cache = ReFreeKVCache(model, "refreekv", threshold=0.2, frozen_layers=0)
    prefill(model, cache, (60,))
    report = cache.report
    check_bytes(cache, report)
    full = DynamicCache(config=model.config)
    prefill(model, full, (60,))
    assert report.bytes_before == storage_bytes([t for layer in full.layers for t in (layer.keys, layer.values)])
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert [layer.index for layer in report.prunable] == full_layers(model)
    for layer in report.prunable:
        assert layer.rows[0].kept < 60
        assert layer.bytes_after == layer.rows[0].kept * config.num_key_value_heads * head * 2 * 4


def test_evicted_memory_is_released_layer_by_layer(llama):
    """When a layer's attention is done its full keys and values are gone, before the next layer has any."""
    cache = ReFreeKVCache(llama, **PRUNING)
    full, held = [], []

    def watch(module, args, kwargs, output):
        held.append(kv_bytes(cache))

    original = DynamicCache.update

    def update(key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = original(cache, key_states, value_states, layer_idx, *args, **kwargs)
        full.append((weakref.ref(keys.untyped_storage()), weakref.ref(keys)))
        return keys, values

    cache.update = update
    handles = [layer.self_attn.register_forward_hook(watch, with_kwargs=True) for layer in llama.model.layers]
    gc.disable()  # it must be reference counts that free the memory, not a collection some time later
    try:
        prefill(llama, cache)
        assert [ref() is None for _, ref in full] == [layer.ragged is not None for layer in cache.layers]
        assert any(ref() is None for _, ref in full)
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()
    after = [layer.bytes_after for layer in cache.report.layers]
    assert held == [sum(after[: index + 1]) for index in range(LAYERS)]


def test_dropping_the_cache_frees_it_without_a_collection(llama):
    cache = ReFreeKVCache(llama, **PRUNING)
    logits, mask = prefill(llama, cache)
    feed(llama, cache, logits.argmax(-1, keepdim=True), mask)
    watched = [weakref.ref(layer.keys) for layer in cache.layers] + [weakref.ref(cache)]
    gc.disable()
    try:
        del cache
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()


@dataclass(frozen=True)
class Some(Policy):
    """Of each KV head everything, less a token of the last one if ``less``."""

    name = "some"
    frozen_layers: int | Literal["all"] = 0
    less: bool = False

    def select(self, view: LayerView) -> Selection:
        keep = view.real_heads.expand(-1, view.keys.shape[1], -1).clone()
        keep[:, -1, 20] &= not self.less
        return Selection(keep)


@pytest.mark.parametrize("arena", [None, True])
@pytest.mark.parametrize("lengths", [(60,), RAGGED], ids=["alone", "batch"])
def test_a_layer_that_loses_nothing_needs_no_list_of_what_it_keeps(llama, arena, lengths):
    listed = {}
    for less in (False, True):
        cache = ReFreeKVCache(llama, Some(less=less))
        cache.state.arena = arena
        prefill(llama, cache, lengths)
        held = [layer.kept_columns for layer in cache.pruned_layers]
        listed[less] = sum(row.ranges is None for rows in held for row in rows)
    # On its way to an arena a padded row loses its padding, so that there is something to list.
    padded = sum(length < max(lengths) for length in lengths) if arena else 0
    assert listed == {False: len(cache.pruned_layers) * padded, True: len(cache.pruned_layers) * len(lengths)}


def test_crop_and_reorder_keep_the_bytes_true(llama, new_cache):
    cache = new_cache()
    _logits, mask = prefill(llama, cache)
    with cache.decoding():
        feed(llama, cache, torch.full((4, 5), 7), mask)
    cache.crop(-3)
    check_bytes(cache, cache.report)
    cache.batch_repeat_interleave(2)
    check_bytes(cache, cache.report)
    cache.reorder_cache(torch.tensor([1, 1, 0, 3, 7, 6, 5, 4]))
    check_bytes(cache, cache.report)
    cache.batch_select_indices(torch.tensor([2, 5]))
    check_bytes(cache, cache.report)
    cache.reset()
    assert kv_bytes(cache) == index_bytes(cache) == cache.report.bytes_after == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision(dtype, attention):
    model = build("llama", attention=attention).to(dtype)
    ids, mask = prompts(RAGGED, seed=18)
    cache = ReFreeKVCache(model, **PRUNING)
    out = greedy(model, ids, mask, cache)
    assert out.shape == (4, max(RAGGED) + 6)
    check_bytes(cache, cache.report)
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    full = DynamicCache(config=model.config)
    greedy(model, ids, mask, full)
    assert cache.report.bytes_before == storage_bytes([t for layer in full.layers for t in (layer.keys, layer.values)])
    assert cache.report.budget < 1
    nothing = ReFreeKVCache(model, "refreekv", threshold=0.0)
    assert torch.equal(greedy(model, ids, mask, nothing), greedy(model, ids, mask, DynamicCache(config=model.config)))


def test_layers_compacted_later_as_on_a_gpu(llama, new_cache, monkeypatch):
    """There a layer is compacted when the next one was decided on: one full layer at a time, the same result."""
    at_once = new_cache()
    logits, mask = prefill(llama, at_once)
    monkeypatch.setattr(layer_module, "is_late", lambda device: True)
    later, waiting = new_cache(), []
    handles = [
        layer.self_attn.register_forward_hook(
            lambda *_: waiting.append([layer.index for layer in later.layers if layer._undecided])
        )
        for layer in llama.model.layers
    ]
    try:
        assert torch.equal(prefill(llama, later)[0], logits)
    finally:
        for handle in handles:
            handle.remove()
    # Under a joint policy all wait for the last one, and are then compacted at once.
    joint = isinstance(later.policy, JointPolicy)
    assert waiting == [[] if joint else [index] for index in range(LAYERS)]
    assert not any(layer._undecided for layer in later.layers)
    assert later.report == at_once.report
    assert later.report.budget < 1
    check_bytes(later, later.report)
    for _ in range(2):
        tokens = logits.argmax(-1, keepdim=True)
        (logits, longer), (others, _) = feed(llama, at_once, tokens, mask), feed(llama, later, tokens, mask)
        assert torch.equal(logits, others)
        logits, mask = logits[:, -1], longer
    more = torch.full((4, 7), 5)
    assert torch.equal(feed(llama, at_once, more, mask)[0], feed(llama, later, more, mask)[0])
    assert later.report == at_once.report
