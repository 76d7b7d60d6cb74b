"""What refreekv changes about a model, and for how long."""

import copy
import gc
import sys
import threading

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, StaticCache

import refreekv
from helpers.driving import PARAMETERS, PRUNING, generate, state_of
from helpers.models import build
from refreekv import ReFreeKVCache

# -- the model is left as it was -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_compress_leaves_no_trace(name, ids):
    model = build(name)
    before, wanted = state_of(model), generate(model, ids)
    with refreekv.compress(model, **PRUNING) as kv:
        assert state_of(model) != before
        generate(model, ids)
    assert state_of(model) == before
    assert torch.equal(generate(model, ids), wanted)
    assert kv.report.prunable


def test_compress_leaves_no_trace_after_an_exception(model, ids):
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), refreekv.compress(model, **PRUNING):
        raise ZeroDivisionError
    assert state_of(model) == before

    def fail(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.register_forward_pre_hook(fail)
    within = state_of(model)
    with pytest.raises(KeyboardInterrupt), refreekv.compress(model, **PRUNING):
        generate(model, ids)
    assert state_of(model) == within
    handle.remove()
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("error", "policy", "parameters", "message"),
    [
        (ValueError, "refrekv", {}, "did you mean 'refreekv'"),
        (ValueError, "refreekv", {"threshold": 1.0}, r"\[0, 1\)"),
        (TypeError, "refreekv", {"treshold": 0.5}, "did you mean 'threshold'"),
        (ValueError, "streaming-llm", {}, "size="),
    ],
)
def test_a_refused_policy_changes_nothing(model, error, policy, parameters, message):
    before = state_of(model)
    with pytest.raises(error, match=message), refreekv.compress(model, policy, **parameters):
        pass
    with pytest.raises(error, match=message):
        ReFreeKVCache(model, policy, **parameters)
    assert state_of(model) == before


def test_hooks_and_methods_of_the_user_survive(model, ids):
    calls = []
    handle = model.register_forward_hook(lambda *args: calls.append("hook"))
    inner = model.generate
    model.generate = lambda *args, **kwargs: (calls.append("generate"), inner(*args, **kwargs))[1]
    before = state_of(model)
    with refreekv.compress(model, **PRUNING) as kv:
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert calls == ["generate", "hook", "hook"]
    assert kv.report.budget < 1
    assert state_of(model) == before
    handle.remove()


def test_a_model_saved_inside_is_the_model(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    with refreekv.compress(model, **PRUNING):
        model.save_pretrained(tmp_path / "within")
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "before" / file).read_text() == (tmp_path / "within" / file).read_text()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "within")
    assert loaded.config._attn_implementation == "sdpa"


def test_nested_on_one_model(model, ids):
    before, wanted = state_of(model), {}
    specs = [("refreekv", PARAMETERS), ("streaming-llm", {"size": 15})]
    for name, parameters in specs:
        with refreekv.compress(model, name, **parameters) as kv:
            wanted[name] = generate(model, ids), kv.report
    assert not torch.equal(wanted["refreekv"][0], wanted["streaming-llm"][0])
    with refreekv.compress(model, specs[0][0], **specs[0][1]) as outer:
        assert torch.equal(generate(model, ids), wanted["refreekv"][0])
        of_outer = outer.report
        with refreekv.compress(model, specs[1][0], **specs[1][1]) as inner:
            assert torch.equal(generate(model, ids), wanted["streaming-llm"][0])
        assert inner.report == wanted["streaming-llm"][1]
        assert outer.report == of_outer == wanted["refreekv"][1]
        assert torch.equal(generate(model, ids), wanted["refreekv"][0])
    assert state_of(model) == before


def test_two_models_at_once(ids):
    one, two = build("llama", seed=1), build("llama", seed=2)
    wanted = []
    for model in (one, two):
        with refreekv.compress(model, **PRUNING) as kv:
            wanted.append((generate(model, ids), kv.report))
    before = state_of(one), state_of(two)
    with refreekv.compress(one, **PRUNING) as first, refreekv.compress(two, **PRUNING) as second:
        for _ in range(2):
            assert torch.equal(generate(one, ids), wanted[0][0])
            assert torch.equal(generate(two, ids), wanted[1][0])
        assert (first.report, second.report) == (wanted[0][1], wanted[1][1])
    assert (state_of(one), state_of(two)) == before


def test_two_models_in_two_threads(ids):
    models = [build("llama", attention="sdpa", seed=seed) for seed in (1, 2)]
    before = [state_of(model) for model in models]
    wanted = []
    for model in models:
        with refreekv.compress(model, **PRUNING) as kv:
            wanted.append((generate(model, ids).tolist(), kv.report))
    results, start = {0: [], 1: []}, threading.Barrier(2)

    def work(place):
        start.wait()
        for _ in range(6):
            with refreekv.compress(models[place], **PRUNING) as kv:
                results[place].append((generate(models[place], ids).tolist(), kv.report))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(place,)) for place in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert results == {place: [wanted[place]] * 6 for place in results}
    assert [state_of(model) for model in models] == before


# -- the explicit cache ----------------------------------------------------------------------------


def test_the_last_explicit_cache_detaches(model, ids):
    before = state_of(model)
    gc.disable()  # reference counts alone must do
    try:
        cache, other = ReFreeKVCache(model, **PRUNING), ReFreeKVCache(model, "streaming-llm", size=15)
        generate(model, ids, past_key_values=cache)
        del cache
        assert state_of(model) != before
        generate(model, ids, past_key_values=other)
        assert other.report.budget == 15 / 50
        del other
        assert state_of(model) == before
    finally:
        gc.enable()


def test_cache_and_compress_share_an_attachment(model, ids):
    before = state_of(model)
    with refreekv.compress(model, "streaming-llm", size=15) as kv:
        cache = ReFreeKVCache(model, **PRUNING)
        inside = generate(model, ids, past_key_values=cache)  # its own policy, not the block's
        assert not kv.report.prunable
    assert state_of(model) != before
    cache.reset()
    assert torch.equal(generate(model, ids, past_key_values=cache), inside)
    assert "refreekv" in cache.report.policy
    del cache
    assert state_of(model) == before


def test_other_caches_are_unchanged_beside_an_explicit_one(model, ids):
    settings = {"return_dict_in_generate": True, "output_logits": True}
    wanted = generate(model, ids, past_key_values=DynamicCache(config=model.config), **settings)
    cache = ReFreeKVCache(model, **PRUNING)
    assert str(model.config._attn_implementation) != "sdpa"  # in letters: the name says that it is equal
    for other in (DynamicCache(config=model.config), None):
        got = generate(model, ids, past_key_values=other, **settings)
        assert all(torch.equal(left, right) for left, right in zip(got.logits, wanted.logits, strict=True))
        assert type(got.past_key_values) is DynamicCache
    static = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(generate(model, ids, past_key_values=static), wanted.sequences)
    loss = model(ids, labels=ids).loss  # training beside a cache that is not in use
    loss.backward()
    assert model.lm_head.weight.grad is not None
    assert cache.get_seq_length() == 0


def test_a_copy_of_a_cache_goes_on_by_itself(model, ids):
    """A prompt prefilled once and copied for every continuation, as one does with DynamicCache."""
    before = state_of(model)
    cache = ReFreeKVCache(model, **PRUNING)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        copied = copy.deepcopy(cache)
        token = torch.tensor([[9]])
        wanted = [model(token, past_key_values=cache).logits for _ in range(3)]
        assert copied.get_seq_length() == 50
        del cache
        assert all(torch.equal(model(token, past_key_values=copied).logits, step) for step in wanted)
    assert copied.report.budget < 1
    del copied
    assert state_of(model) == before


def test_one_cache_serves_one_model(model, ids):
    other = build("llama", attention="sdpa", seed=5)
    cache, own = ReFreeKVCache(model, **PRUNING), ReFreeKVCache(other, **PRUNING)
    with pytest.raises(ValueError, match="another model"), torch.no_grad():
        other(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="another model"):
        generate(other, ids, past_key_values=cache)
    with refreekv.compress(model), pytest.raises(ValueError, match="another model"):
        generate(model, ids, past_key_values=own)
    assert generate(model, ids, past_key_values=cache).shape == (1, 56)  # nothing was spoilt


def test_a_model_without_refreekv_refuses_the_cache(model, ids):
    """No hook is there to look at the cache; the cache itself notices."""
    other = build("llama", attention="sdpa", seed=5)
    cache = ReFreeKVCache(model, **PRUNING)
    with pytest.raises(RuntimeError, match="another model"), torch.no_grad():
        other(ids, past_key_values=cache)


# -- calls of the model ----------------------------------------------------------------------------


def test_forward_gets_a_cache_of_its_own(model, ids):
    with refreekv.compress(model, **PRUNING) as kv, torch.no_grad():
        output = model(ids)
        assert output.past_key_values is kv.cache
        report = kv.report
        assert report.tokens == 50
        assert report.budget < 1
        again = model(ids, torch.ones_like(ids), torch.arange(50)[None], None)  # all by position
        assert torch.equal(again.logits, output.logits)
        assert again.past_key_values is kv.cache
        as_tuple = model(ids, return_dict=False)
        assert as_tuple[1] is kv.cache
    del output, again, as_tuple
    assert kv.cache is None
    assert kv.report == report


def test_use_cache_false_is_left_alone(model, ids):
    wanted = generate(model, ids)
    with refreekv.compress(model, **PRUNING) as kv:
        assert not torch.equal(generate(model, ids), wanted)
        first = kv.report
        assert torch.equal(generate(model, ids, use_cache=False), wanted)
        settings = GenerationConfig(use_cache=False, max_new_tokens=6, do_sample=False)
        assert torch.equal(model.generate(ids, generation_config=settings), wanted)
        with torch.no_grad():
            assert model(ids, use_cache=False).past_key_values is None
            model.config.use_cache = False
            assert model(ids).past_key_values is None
            model.config.use_cache = True
        assert kv.report == first


def test_training_inside_without_a_cache(model, ids):
    with refreekv.compress(model, **PRUNING):
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert model.lm_head.weight.grad is not None
