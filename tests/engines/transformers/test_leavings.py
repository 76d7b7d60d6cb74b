"""What stays when refreekv goes: caches that outlive their block, changes of the user's, calls that broke off."""

import copy
import functools

import pytest
import torch

import refreekv
from helpers.driving import PRUNING, generate, state_of
from helpers.models import build, prompts
from refreekv import ReFreeKVCache

WINDOW = {"policy": "streaming-llm", "size": 20}
TOKEN = torch.tensor([[9]])


def answered(model, ids, **settings):
    """An answer and its cache."""
    return generate(model, ids, 3, return_dict_in_generate=True, **settings)


# -- caches that outlive their block ---------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("policy", [WINDOW, {"policy": "full"}])
@pytest.mark.parametrize("way", ["forward", "generate", "copy"])
def test_a_cache_is_refused_outside_of_its_block_and_serves_in_another(ids, layers, policy, way):
    model = build("llama", attention="sdpa", num_hidden_layers=layers)
    with refreekv.compress(model, **policy):
        output = answered(model, ids)
        cache, sequences = output.past_key_values, output.sequences
        wanted = generate(model, sequences, past_key_values=copy.deepcopy(cache))

    def go_on():
        if way == "generate":
            return generate(model, sequences, past_key_values=cache)
        with torch.no_grad():
            return model(TOKEN, past_key_values=copy.deepcopy(cache) if way == "copy" else cache).logits

    with pytest.raises(RuntimeError, match="block that was left"):
        go_on()
    assert cache.get_seq_length() == 52
    with refreekv.compress(model, "full"):
        assert torch.equal(generate(model, sequences, past_key_values=cache), wanted)
    with pytest.raises(RuntimeError, match="block that was left"):
        go_on()
    other = ReFreeKVCache(model, **WINDOW)  # keeps the model as it has to be
    assert go_on().shape[0] == 1
    assert other.get_seq_length() == 0


def test_the_report_of_such_a_cache_can_be_read(model, ids):
    with refreekv.compress(model, **WINDOW) as kv:
        cache = answered(model, ids).past_key_values
        report = kv.report
    assert cache.report == kv.report == report
    assert len(cache.kept_ranges()) == 4
    cache.reset()
    with refreekv.compress(model, **WINDOW):
        assert answered(model, ids, past_key_values=cache).past_key_values is cache
    assert cache.report == report


# -- each cause by its name ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("at", ["self_attn", "mlp"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_forward_that_was_interrupted(model, ids, error, at, layer):
    """Between storing keys and attending to them, or after: then some layers have tokens that others have not."""
    wanted = answered(model, ids, past_key_values=ReFreeKVCache(model, **WINDOW)).sequences
    cache = ReFreeKVCache(model, **WINDOW)

    def fail(*_):
        raise error

    module = model.model.layers[layer]
    handle = (module.self_attn.o_proj if at == "self_attn" else module.mlp).register_forward_pre_hook(fail)
    with pytest.raises(error):
        generate(model, ids, past_key_values=cache)
    handle.remove()
    if layer < 3:
        with pytest.raises(RuntimeError, match=r"was interrupted, .* reset\(\)"):
            generate(model, ids, past_key_values=cache)
    cache.reset()
    assert torch.equal(answered(model, ids, past_key_values=cache).sequences, wanted)


def test_attention_that_was_interrupted(model, ids, monkeypatch):
    cache, calls = ReFreeKVCache(model, **WINDOW), []

    def fail(*args, **kwargs):
        calls.append(1)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            model(ids, past_key_values=cache)
    assert calls
    with pytest.raises(RuntimeError, match="was interrupted"), torch.no_grad():
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("layers", [1, 4])
def test_keys_of_another_model(ids, layers):
    one, other = (build("llama", attention="sdpa", seed=seed, num_hidden_layers=layers) for seed in (1, 2))
    cache = ReFreeKVCache(one, **WINDOW)
    if layers == 1:
        with torch.no_grad():
            other(ids, past_key_values=cache)  # all is there and attended to as ever
    with pytest.raises(RuntimeError, match="something else than the LlamaForCausalLM"), torch.no_grad():
        other(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="another model"), torch.no_grad():
        one(ids, past_key_values=cache)
    cache.reset()
    keys = torch.zeros(1, 2, 3, 8)
    cache.update(keys, keys, 0)
    with pytest.raises(RuntimeError, match=r"a call of update\(\) itself"):
        cache.update(keys, keys, 0)


# -- what the user changes -------------------------------------------------------------------------


@pytest.mark.parametrize("used", [True, False])
def test_an_attention_implementation_set_meanwhile_is_used_and_stays(model, ids, used):
    with refreekv.compress(model, **WINDOW) as kv:
        wanted, budget = generate(model, ids), kv.report.budget
    with refreekv.compress(model, **WINDOW) as kv:
        if used:
            generate(model, ids)
        model.set_attn_implementation("eager")
        assert torch.equal(generate(model, ids), wanted)
        assert kv.report.budget == budget < 1
    assert model.config._attn_implementation == "eager"
    with refreekv.compress(model, **WINDOW):
        model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    with refreekv.compress(model, **WINDOW):
        model.set_attn_implementation("flex_attention")
        with pytest.raises(ValueError, match="flex_attention"):
            generate(model, ids)
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("name", ["generate", "forward", "_prepare_model_inputs"])
def test_methods_set_meanwhile_stay(model, ids, name):
    calls = []

    def counted(function, *args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    with refreekv.compress(model, **WINDOW) as kv:
        wanted = generate(model, ids)
    plain = generate(model, ids)
    with refreekv.compress(model, **WINDOW) as kv:
        mine = functools.wraps(getattr(model, name))(functools.partial(counted, getattr(model, name)))
        setattr(model, name, mine)
        assert torch.equal(generate(model, ids), wanted)
        assert kv.report.budget < 1
    assert calls
    assert model.__dict__[name] is mine
    assert torch.equal(generate(model, ids), plain)
    with refreekv.compress(model, **WINDOW):  # once more, through what was kept of the last time
        assert torch.equal(generate(model, ids), wanted)
    assert model.__dict__[name] is mine


def test_methods_set_while_generate_runs_stay(model, ids):
    class Set:
        def put(self, tokens):
            model.forward = mine

        def end(self):
            pass

    own = type(model).forward.__get__(model)
    mine = functools.wraps(own)(functools.partial(own))
    with refreekv.compress(model, **WINDOW):
        generate(model, ids, streamer=Set())
    assert model.__dict__["forward"] is mine


def test_settings_changed_meanwhile_stay(model, ids):
    with refreekv.compress(model, **WINDOW):
        model.config.rms_norm_eps = 1e-3
        model.generation_config.max_new_tokens = 4
        handle = model.register_forward_hook(lambda *_: None)
    assert model.config.rms_norm_eps == 1e-3
    assert model.generation_config.max_new_tokens == 4
    assert list(model._forward_hooks) == [handle.id]


def test_a_copy_made_meanwhile_runs_itself_and_can_be_attached_and_left(model, ids):
    with refreekv.compress(model, **WINDOW):
        wanted = generate(model, ids)
    plain = generate(model, ids)
    with refreekv.compress(model, **WINDOW):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert (generate(model, ids)[:, 50:] == 0).all()
        assert torch.equal(generate(copied, ids), plain)
        with refreekv.compress(copied, **WINDOW):
            assert torch.equal(generate(copied, ids), wanted)
    assert copied.config._attn_implementation == "sdpa"
    assert not copied._forward_hooks
    assert "generate" not in copied.__dict__
    assert torch.equal(generate(copied, ids), plain)


def test_models_that_share_a_configuration(ids):
    one = build("llama", attention="sdpa", seed=1)
    two = type(one)(one.config).eval()
    before = state_of(one), state_of(two)
    wanted = []
    for model in (one, two):
        with refreekv.compress(model, **PRUNING):
            wanted.append(generate(model, ids))
    first, second = refreekv.compress(one, **PRUNING), refreekv.compress(two, **PRUNING)
    first.__enter__()
    second.__enter__()
    assert torch.equal(generate(one, ids), wanted[0])
    first.__exit__(None, None, None)
    assert torch.equal(generate(two, ids), wanted[1])
    second.__exit__(None, None, None)
    assert (state_of(one), state_of(two)) == before


# -- entries that cannot be followed ---------------------------------------------------------------


def compiled(model, how):
    if how == "module":
        return torch.compile(model, backend="eager")
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "layer in place":
        model.model.layers[1].compile(backend="eager")
    else:
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


@pytest.mark.parametrize("how", ["module", "forward", "in place", "layer in place", "layer"])
def test_compiled_models_are_refused(model, how):
    model = compiled(model, how)
    with pytest.raises(ValueError, match=r"compiled by torch\.compile"), refreekv.compress(model):
        pass
    with pytest.raises(ValueError, match=r"compiled by torch\.compile"):
        ReFreeKVCache(model)


@pytest.mark.parametrize("how", ["forward", "in place"])
def test_models_compiled_meanwhile_are_refused(model, ids, how):
    with refreekv.compress(model, **WINDOW):
        compiled(model, how)
        with pytest.raises(ValueError, match=r"compiled by torch\.compile"):
            generate(model, ids)


def test_parts_without_attention_may_be_compiled(model, ids):
    with refreekv.compress(model, **WINDOW):
        wanted = generate(model, ids)
    model.model.layers[1].mlp.compile(backend="eager")
    with refreekv.compress(model, **WINDOW):
        assert torch.equal(generate(model, ids), wanted)


@pytest.mark.parametrize("explicit", [True, False])
def test_continuous_batching_is_refused_where_it_begins(model, ids, explicit):
    cache = ReFreeKVCache(model) if explicit else None
    asked = [ids[0].tolist()]
    with refreekv.compress(model) if cache is None else torch.no_grad():
        with pytest.raises(RuntimeError, match="continuous batching"):
            model.generate_batch(asked)
        with pytest.raises(RuntimeError, match="continuous batching"):
            model.init_continuous_batching()
        with (
            pytest.raises(RuntimeError, match="continuous batching"),
            model.continuous_batching_context_manager(),
        ):
            pass
    assert model.config._attn_implementation == ("refreekv_sdpa" if explicit else "sdpa")


def test_the_last_prompt_of_a_layer_is_as_long_as_it_was(model, ids):
    """A second prompt of many tokens outside of generate is a prompt, as ever."""
    cache = ReFreeKVCache(model, **WINDOW)
    generate(model, ids, past_key_values=cache)
    with torch.no_grad():
        model(prompts((30,), seed=2)[0], past_key_values=cache)
    assert cache.report.prunable[0].rows[0].prompt_length == 85
