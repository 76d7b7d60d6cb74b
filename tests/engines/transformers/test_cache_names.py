"""What calls of a model name the cache: as the installed transformers does, or in the old way."""

import warnings

import pytest
import torch
from transformers import LlamaForCausalLM

import refreekv
from helpers.driving import PRUNING, generate
from helpers.models import build
from refreekv.engines.transformers.naming import NAME, NAMES, cache_argument, cache_given

names = pytest.mark.parametrize("name", sorted(NAMES))


@names
def test_generate_prunes_the_cache_under_each_name(model, ids, name):
    with refreekv.compress(model, **PRUNING):
        wanted = generate(model, ids)
    cache = refreekv.ReFreeKVCache(model, **PRUNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert torch.equal(generate(model, ids, **{name: cache}), wanted)
    assert cache.report.budget < 1


@names
def test_a_call_that_brings_a_cache_keeps_it_under_each_name(model, ids, name):
    """Also inside `compress`, which would make one."""
    cache = refreekv.ReFreeKVCache(model, "streaming-llm", size=20)
    with refreekv.compress(model, **PRUNING) as kv, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert getattr(model(ids, **{name: cache}), NAME) is cache
        assert kv.cache is None
    assert cache.report.budget < 1


@names
def test_other_caches_are_refused_under_each_name(model, ids, name):
    with refreekv.compress(model), pytest.raises(TypeError, match="would not be pruned"):
        model(ids, **{name: object()})


def test_the_library_itself_uses_no_name_that_goes_away(model, ids):
    """Of generate, forward and a captured step; transformers says FutureWarning to the old one."""
    mask = torch.ones_like(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        with refreekv.compress(model, **PRUNING) as kv:
            generate(model, ids)
            with torch.no_grad():
                model(ids)
        cache = refreekv.ReFreeKVCache(model, **PRUNING)
        cache.state.arena = True
        output = generate(model, ids, attention_mask=mask, **{NAME: cache}, return_dict_in_generate=True)
    assert kv.report.budget < 1
    assert getattr(output, NAME) is cache


class OldLlama(LlamaForCausalLM):
    """As code that came with a checkpoint: it knows the old name only."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        given = {NAME: past_key_values} | kwargs
        return super().forward(input_ids, attention_mask=attention_mask, **given)


def test_a_model_that_knows_the_old_name_only(model, ids):
    old = OldLlama(build("llama").config).eval()
    old.load_state_dict(model.state_dict())
    with torch.no_grad():
        with refreekv.compress(model, **PRUNING) as wanted:
            logits = model(ids).logits
        with refreekv.compress(old, **PRUNING) as kv:
            assert torch.allclose(old(ids).logits, logits, atol=1e-4)
        assert kv.report.budget == wanted.report.budget < 1
        own = refreekv.ReFreeKVCache(old, **PRUNING)
        assert cache_argument(old.forward, own) == {"past_key_values": own}
        assert torch.allclose(old(ids, **cache_argument(old.forward, own)).logits, logits, atol=1e-4)
    assert own.report.budget == kv.report.budget


def test_the_name_that_counts_comes_first():
    """As in transformers, which warns and passes over the old one."""
    assert cache_given({NAME: "new", "past_key_values": "new" if NAME == "past_key_values" else "old"}) == "new"
    assert cache_given({"past_key_values": "old"}) == "old"
    assert cache_given({"input_ids": None}) is None
