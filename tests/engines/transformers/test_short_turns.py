"""Turns of few tokens: each reads what is stored by itself, and `adaptive` looks at them once enough has come."""

import gc

import pytest
import torch

from helpers.counting import counting
from helpers.models import build, prompts
from refreekv import ReFreeKVCache, compress
from refreekv.engines.transformers import ragged_attention
from refreekv.policies.adaptive import WAITS_FOR
from refreekv.policies.registry import parse
from refreekv.storage.token_rows import MOST

LENGTH = 640
EVICTING = {"min_length": 16, "copying": 2.0, "constant": 0.1, "evict_unit": 1.0, "window": 8, "lost_mass": 0.6}
CASES = {
    "codes": ("adaptive", EVICTING, {}),
    "one format": ("snapkv:ratio=0.3", {}, {"kv_dtype": "int4"}),
    "exact": ("snapkv:ratio=0.3", {}, {"kv_dtype": None}),
    "uneven": ("ada-kv:ratio=0.3", {}, {"kv_dtype": None}),
}


@pytest.fixture
def _as_rows(monkeypatch):
    """On a CPU, too, tokens of a turn are rows of their own."""
    monkeypatch.setattr(ragged_attention, "reads_many", lambda device: True)


def cache_of(model, case, **settings):
    name, parameters, more = CASES[case]
    cache = ReFreeKVCache(model, name, **parameters, **more, **settings)
    cache.state.arena = True
    return cache


def feed(model, cache, ids):
    """Logits of all tokens ``[1, q, V]``."""
    with torch.no_grad(), cache.prompt_until(cache.get_seq_length() + ids.shape[1]):
        found = model(ids, past_key_values=cache).logits
    cache.state.finish()
    return found


@pytest.mark.parametrize("tokens", [2, 33, MOST])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_same_attention(case, tokens, monkeypatch):
    """As over decoded entries in full precision, behind a causal mask."""
    model = build("llama", attention="sdpa", head_dim=16)
    (ids, _), (turn, _) = prompts((LENGTH,)), prompts((tokens,), seed=1)
    found = []
    for alone in (False, True):
        monkeypatch.setattr(ragged_attention, "reads_many", lambda device, alone=alone: alone)
        cache = cache_of(model, case)
        feed(model, cache, ids)
        assert cache.pruned_layers[0].ragged.tables
        found.append((feed(model, cache, turn), feed(model, cache, turn[:, :2])))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


@pytest.mark.usefixtures("_as_rows")
def test_nothing_is_decoded(monkeypatch):
    """Another way would give the same numbers, which a number that is asked for more than once shows."""
    model = build("llama", attention="sdpa", head_dim=16)
    cache, asked = cache_of(model, "codes"), []
    feed(model, cache, prompts((LENGTH,))[0])
    storage = type(cache.pruned_layers[0].ragged)
    monkeypatch.setattr(storage, "_decoded", lambda *given: asked.append(given))
    feed(model, cache, prompts((20,), seed=1)[0])
    assert not asked


@pytest.mark.usefixtures("_as_rows")
@pytest.mark.parametrize("tokens", [1, MOST + 1])
def test_others_go_as_they_did(tokens, monkeypatch):
    model = build("llama", attention="sdpa", head_dim=16)
    cache = cache_of(model, "exact")
    feed(model, cache, prompts((LENGTH,))[0])
    monkeypatch.setattr(type(cache.pruned_layers[0].ragged), "attend_each", None)
    feed(model, cache, prompts((tokens,), seed=1)[0])


@pytest.mark.usefixtures("_as_rows")
@pytest.mark.parametrize("lengths", [(LENGTH, 500)])
def test_rows_of_a_batch_go_as_they_did(lengths, monkeypatch):
    model = build("llama", attention="sdpa", head_dim=16)
    cache = cache_of(model, "exact")
    ids, mask = prompts(lengths)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.state.finish()
        monkeypatch.setattr(type(cache.pruned_layers[0].ragged), "attend_each", None)
        model(ids[:, :9], attention_mask=torch.cat([mask, mask[:, -9:]], 1), past_key_values=cache)


# -- whether the policy is asked ----------------------------------------------------------------


def decided(cache):
    """Logical length at which what is stored was last decided on, of each layer."""
    cache.state.finish()
    return {layer._pruned_length for layer in cache.pruned_layers}


def test_adaptive_waits_until_enough_is_new():
    adaptive, others = parse("adaptive"), parse("snapkv:ratio=0.5")
    assert adaptive.waits(LENGTH // WAITS_FOR, LENGTH)
    assert not adaptive.waits(LENGTH // WAITS_FOR + 1, LENGTH)
    assert not others.waits(1, 10**6)


def test_answers_and_turns_count():
    model = build("llama", attention="sdpa", head_dim=16)
    cache, new = cache_of(model, "codes"), LENGTH // WAITS_FOR
    feed(model, cache, prompts((LENGTH,))[0])
    kept = cache.pruned_layers[0].ragged.lengths
    feed(model, cache, prompts((10,), seed=1)[0])
    with torch.no_grad(), cache.decoding():
        for token in prompts((new - 20,), seed=2)[0].split(1, 1):
            model(token, past_key_values=cache)
    feed(model, cache, prompts((10,), seed=3)[0])
    assert decided(cache) == {LENGTH}
    assert cache.pruned_layers[0].ragged.lengths == [tuple(n + new for n in row) for row in kept]
    assert cache.report.tokens == LENGTH + new
    feed(model, cache, prompts((2,), seed=4)[0])
    assert decided(cache) == {LENGTH + new + 2}


def test_what_waits_is_as_generated_tokens_are():
    """The same tokens, said to be a turn or an answer: the same entries are left, and the next logits."""
    model = build("llama", attention="sdpa", head_dim=16)
    turn, last = prompts((38,), seed=1)[0], prompts((1,), seed=2)[0]
    found = []
    for said in ("turn", "answer"):
        cache = cache_of(model, "codes")
        feed(model, cache, prompts((LENGTH,))[0])
        with torch.no_grad():
            if said == "turn":
                feed(model, cache, turn)
            else:
                with cache.decoding():
                    model(turn, past_key_values=cache)
            with cache.decoding():
                found.append((model(last, past_key_values=cache).logits, cache.pruned_layers[0].ragged.full()))
    (logits, kept), (wanted, held) = found
    assert torch.equal(logits, wanted)
    assert torch.equal(kept.keys, held.keys)
    assert torch.equal(kept.values, held.values)


def test_what_waited_is_looked_at_then():
    """As an answer is: what nobody was asked about is not what an earlier prompt's end kept."""
    model = build("llama", attention="sdpa", head_dim=16)
    turn, later = prompts((38,), seed=1)[0], prompts((60,), seed=2)[0]
    found = []
    for said in ("turn", "answer"):
        cache = cache_of(model, "codes")
        feed(model, cache, prompts((LENGTH,))[0])
        kept = [layer.ragged.lengths for layer in cache.pruned_layers]
        if said == "turn":
            feed(model, cache, turn)
        else:
            with torch.no_grad(), cache.decoding():
                model(turn, past_key_values=cache)
        feed(model, cache, later)
        found.append([layer.ragged.lengths for layer in cache.pruned_layers])
        assert decided(cache) <= {LENGTH, LENGTH + 98}
    assert found[0] == found[1]
    # Something goes.
    assert found[0] != [[tuple(n + 98 for n in row) for row in own] for own in kept]


def test_who_made_the_cache_is_told_of_a_turn_that_waits():
    model = build("llama", attention="sdpa", head_dim=16)
    with compress(model, "adaptive", **EVICTING) as session, torch.no_grad():
        cache = model(prompts((LENGTH,))[0], use_cache=True).past_key_values
        model(prompts((10,), seed=1)[0], past_key_values=cache)
        assert {layer._earlier_length for layer in cache.pruned_layers} == {LENGTH}
        del cache
        gc.collect()
        assert session.report.tokens == LENGTH + 10


def test_it_waits_again_after_a_turn_of_which_all_stayed():
    """What is asked about is what came since: also where nothing had to be moved for the answer."""
    model = build("llama", attention="sdpa", head_dim=16)
    cache = cache_of(model, "codes")
    feed(model, cache, prompts((LENGTH,))[0])
    for layer in cache.pruned_layers:
        layer._in_place = lambda chosen, after: True
    feed(model, cache, prompts((60,), seed=1)[0])
    asked = []
    for layer in cache.pruned_layers:
        layer._prune = lambda *given: asked.append(given)
    feed(model, cache, prompts((10,), seed=2)[0])
    assert not asked


@pytest.mark.parametrize("settings", [{"keep_evicted": "host"}, {"decode_interval": 64}], ids=["keeping", "interval"])
def test_it_does_not_wait_where_turns_need_an_end(settings):
    """Where all comes back it has to be evicted again; where answers are pruned, what counts them ends with a turn."""
    model = build("llama", attention="sdpa", head_dim=16)
    cache = cache_of(model, "codes", **settings)
    feed(model, cache, prompts((LENGTH,))[0])
    feed(model, cache, prompts((10,), seed=1)[0])
    assert decided(cache) == {LENGTH + 10}


@pytest.mark.parametrize("length", [LENGTH, 1900])
def test_a_turn_that_waits_is_a_few_launches(length, monkeypatch):
    """It was 194 launches a layer, of which 41 are the model's own; whatever the length."""
    monkeypatch.setattr(ragged_attention, "reads_many", lambda device: True)
    found = []
    for layers in (2, 4):
        torch.manual_seed(0)
        model = build("llama", attention="sdpa", head_dim=16, num_hidden_layers=layers)
        cache = cache_of(model, "codes")
        feed(model, cache, prompts((length,))[0])
        with counting() as counts:
            feed(model, cache, prompts((32,), seed=1)[0])
        assert decided(cache) == {length}
        found.append(counts)
    few, more = found
    assert (more.total - few.total) / 2 <= 47
    assert sum((more.waits - few.waits).values()) == 0
