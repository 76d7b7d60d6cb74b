"""Codes of a model's own: measured once, on disk for the next process, in caches and their files."""

import copy
import logging

import pytest
import torch

import refreekv
from helpers.driving import greedy, prefill
from helpers.models import build, prompts
from refreekv.core.key_codes import KeyCodes, Moments
from refreekv.engines.transformers import copy_scores, key_codes, model_constants
from refreekv.engines.transformers.attachment import attached
from refreekv.pruning.copy_scores import tokens_said_twice
from refreekv.pruning.key_codes import SHARES, TOKENS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def passes(monkeypatch):
    """Rows that models read for their constants."""
    seen, read = [], copy_scores.read

    def noted(model, probe, prompts, starts=None):
        seen.append(starts or [0])
        return read(model, probe, prompts, starts)

    monkeypatch.setattr(copy_scores, "read", noted)
    return seen


def codes_of(model):
    with attached(model):
        return key_codes.key_codes(model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3", "gpt_oss"])
@torch.no_grad()
def test_they_are_those_of_keys_and_queries_that_the_model_makes(name, passes):
    """Measured once more by hand where there is one row: keys off a plain cache, queries off the attention calls."""
    model = build(name, max_position_embeddings=300, head_dim=16)
    ids, count = tokens_said_twice(model.config)
    assert len(ids) < 300
    codes = codes_of(model)
    cache = refreekv.ReFreeKVCache(model, "full")
    rows = []
    look = type(cache.pruned_layers[0]).after_attention

    def noted(layer, call):
        rows.append(call.query[:, :, -count:])
        look(layer, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cache.pruned_layers[0]), "after_attention", noted)
        model(torch.tensor([ids]), past_key_values=cache)
    starts = passes[1] if len(passes) > 1 else []
    assert len(codes) == len(cache.pruned_layers)
    if not starts:
        for own, layer, queries in zip(codes, cache.pruned_layers, rows, strict=True):
            want = Moments.of(layer.dense[0], queries * queries.shape[-1] ** -0.5).codes()
            torch.testing.assert_close(own.matrix, want.matrix, rtol=1e-3, atol=1e-3)


def test_rows_stand_at_several_positions_where_the_context_is_long(passes):
    model = build("llama", attention="sdpa", head_dim=16)
    longest = model.config.max_position_embeddings
    codes_of(model)
    row = len(tokens_said_twice(model.config, TOKENS)[0])
    assert passes == [[0], sorted({min(int(share * longest), longest - row) for share in SHARES})]


def test_one_pass_gives_copy_scores_too(passes):
    alone, both = (build("llama", attention="sdpa", head_dim=16) for _ in range(2))
    codes_of(both)
    reads = len(passes)
    with attached(alone), attached(both):
        for one, other in zip(copy_scores.copy_scores(alone), copy_scores.copy_scores(both), strict=True):
            assert torch.equal(one, other)
    assert len(passes) == reads + 1


def saved_model(tmp_path):
    place = tmp_path / "model"
    build("llama", attention="sdpa", head_dim=16).save_pretrained(place)
    kind = type(build("llama"))
    return lambda: kind.from_pretrained(place).eval()


def test_a_model_file_is_measured_once(tmp_path, passes, monkeypatch, caplog):
    load = saved_model(tmp_path)
    first = codes_of(load())
    assert len(passes) == 2
    second = codes_of(load())
    assert len(passes) == 2
    assert all(one is other for one, other in zip(first, second, strict=True))
    with attached(model := load()):
        assert len(copy_scores.copy_scores(model)) == len(first)
    assert len(passes) == 2
    monkeypatch.setattr(key_codes, "PARTS", ("order", "spread", "weight"))
    kept = model_constants.load(model_constants.key_of(model))
    kept[f"{key_codes.KEPT}0.weight"] *= 0
    model_constants.store(model_constants.key_of(model), kept)
    with caplog.at_level(logging.WARNING, "refreekv"):
        codes_of(load())
    assert len(passes) == 4
    assert "measured anew" in caplog.text


def test_codes_follow_the_weights(passes):
    model = build("llama", attention="sdpa", head_dim=16)
    first = codes_of(model)
    assert codes_of(model) is first
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[:8] *= 3
    assert codes_of(model)[0] is not first[0]


@pytest.mark.parametrize("kind", ["int4:recent=8", "k4v2+k6v4+int8:recent=8"])
def test_caches_have_them_before_the_first_entry_is_coded(kind, passes, tmp_path):
    model = build("llama", attention="sdpa", head_dim=16)
    ids, mask = prompts((90, 60), seed=2)
    cache = refreekv.ReFreeKVCache(model, "streaming-llm", ratio=0.7, kv_dtype=kind)
    greedy(model, ids, mask, cache, steps=3)
    own = codes_of(model)
    assert [layer.ragged.coding.codes for layer in cache.pruned_layers] == list(own)
    widths = {form.key_widths for layer in cache.pruned_layers for form in layer.ragged.coding.forms}
    assert (6, 4, 4, 2) in widths
    cache.save(tmp_path / "saved")
    other = build("llama", attention="sdpa", head_dim=16)
    count = len(passes)
    loaded = refreekv.ReFreeKVCache.load(tmp_path / "saved", other)
    for mine, theirs in zip(loaded.pruned_layers, cache.pruned_layers, strict=True):
        assert mine.ragged.coding.codes is theirs.ragged.coding.codes
        assert torch.equal(mine.ragged.full().keys, theirs.ragged.full().keys)
    assert len(passes) == count
    assert all(layer.ragged.coding.codes is own[at] for at, layer in enumerate(copy.deepcopy(cache).pruned_layers))


def test_plain_caches_ask_for_none(passes):
    model = build("llama", attention="sdpa", head_dim=16)
    prefill(model, refreekv.ReFreeKVCache(model, "streaming-llm", ratio=0.5))
    assert passes == []


def test_a_lack_of_memory_is_not_remembered(monkeypatch):
    model = build("llama", head_dim=16)

    def fails(*args):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(copy_scores, "read", fails)
        with pytest.raises(torch.OutOfMemoryError):
            codes_of(model)
    assert codes_of(model) is not None


def test_without_codes_keys_are_rotated(monkeypatch):
    model = build("llama", attention="sdpa", head_dim=16)
    monkeypatch.setattr("refreekv.engines.transformers.key_codes.key_codes", lambda model, weights: None)
    cache = refreekv.ReFreeKVCache(model, "full", kv_dtype="int4:recent=8")
    greedy(model, *prompts((90,)), cache, steps=2)
    for layer in cache.pruned_layers:
        assert layer.ragged.coding.codes is None
        assert layer.ragged.coding.forms[0].key_widths == (4,) * 4


@torch.no_grad()
def test_a_step_serves_one_set_of_codes(steps):
    """Caches of other codes, as those of files may be, get a step of their own."""
    model = build("llama", attention="sdpa", head_dim=16)
    ids, mask = prompts((90,), seed=2)
    caches = []
    for changed in (False, True, False):
        cache = refreekv.ReFreeKVCache(model, "full", kv_dtype="int4:recent=8")
        cache.state.arena = True
        if changed:
            cache.state.codes_wanted = False
            cache.state.key_codes = [KeyCodes.known(c.order.flip(-1), c.weight, c.spread) for c in codes_of(model)]
        greedy(model, ids, mask, cache, steps=4)
        caches.append(cache)
    assert steps["made"] == 2
    assert caches[0].pruned_layers[0].ragged.coding.codes is not caches[1].pruned_layers[0].ragged.coding.codes
