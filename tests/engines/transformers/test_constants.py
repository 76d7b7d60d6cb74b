"""Whether codes and scores are still the model's, asked when the device is busy; and what happens if they are not."""

import pytest
import torch

from helpers.models import build
from refreekv import ReFreeKVCache
from refreekv.engines.transformers import attachment, constants, fingerprint, key_codes
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.naming import NAME

PROBED = {"min_length": 16, "constant": 0.02, "spread": 8, "window": 8, "follow": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def order(monkeypatch):
    """What happens, in its order: the model is asked what it is, attention of a layer has run."""
    found, asked, look = [], fingerprint.of_contents, ReFreeKVLayer.after_attention

    def ask(model):
        found.append("asked")
        return asked(model)

    def after(layer, call):
        if layer.ordinal < 2:
            found.append(f"attention {layer.ordinal}")
        look(layer, call)

    monkeypatch.setattr(fingerprint, "of_contents", ask)
    monkeypatch.setattr(ReFreeKVLayer, "after_attention", after)
    monkeypatch.setattr(constants, "asks_later", lambda device: True)
    return found


def model_of(name="llama"):
    return build(name, attention="sdpa", head_dim=64)


def read(model, ids, **given):
    cache = ReFreeKVCache(model, "adaptive", **PROBED)
    with torch.no_grad(), cache.prompt_until(ids.shape[1]):
        out = model(input_ids=ids, **{NAME: cache}, **given)
    cache.state.finish()
    return cache, out


def trained(model):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(1.5)
    return model


def entries(cache):
    return [torch.cat([part.flatten() for part in (layer.ragged.full().keys, layer.ragged.full().values)])
            for layer in cache.pruned_layers]  # fmt: skip


def assert_reads_as_trained(model, cache, ids):
    """After a reset the cache holds what that of a model with these weights from the first holds."""
    cache.reset()
    with torch.no_grad(), cache.prompt_until(ids.shape[1]):
        model(input_ids=ids, **{NAME: cache})
    cache.state.finish()
    plain, _ = read(trained(model_of()), ids)
    assert all(torch.equal(*pair) for pair in zip(entries(cache), entries(plain), strict=True))


def test_it_is_asked_behind_the_second_attention(order):
    model, ids = model_of(), torch.randint(2, 90, (1, 70))
    first, _ = read(model, ids)
    assert order[0] == "asked"
    order.clear()
    second, _ = read(model, ids)
    assert order == ["attention 0", "attention 1", "asked"]
    assert second.state.key_codes is first.state.key_codes
    assert all(torch.equal(*pair) for pair in zip(entries(first), entries(second), strict=True))


@pytest.mark.parametrize("chunk", [None, 40])
def test_a_model_that_was_trained_meanwhile(order, monkeypatch, chunk):
    model, ids = model_of(), torch.randint(2, 90, (1, 70))
    read(model, ids)
    trained(model)
    order.clear()
    cache = ReFreeKVCache(model, "adaptive", **PROBED)
    with torch.no_grad(), cache.prompt_until(70):
        for part in ids.split(chunk or 70, 1):
            out = model(input_ids=part, **{NAME: cache}, output_hidden_states=True)
    cache.state.finish()
    assert order[:3] == ["attention 0", "attention 1", "asked"]
    assert len(out.hidden_states) == len(model.model.layers) + 1
    monkeypatch.setattr(constants, "asks_later", lambda device: False)
    other = trained(model_of())
    plain = ReFreeKVCache(other, "adaptive", **PROBED)
    with torch.no_grad(), plain.prompt_until(70):
        for part in ids.split(chunk or 70, 1):
            wanted = other(input_ids=part, **{NAME: plain})
    plain.state.finish()
    assert torch.equal(out.logits, wanted.logits)
    assert cache.get_seq_length() == 70
    for one, two in zip(cache.state.key_codes, plain.state.key_codes, strict=True):
        assert torch.equal(one.order, two.order)
    assert all(torch.equal(*pair) for pair in zip(cache.state.copy_scores, plain.state.copy_scores, strict=True))
    assert all(torch.equal(*pair) for pair in zip(entries(cache), entries(plain), strict=True))


def test_within_generate(order):
    model, ids = model_of(), torch.randint(2, 90, (1, 70))
    read(model, ids)
    trained(model)
    order.clear()
    cache = ReFreeKVCache(model, "adaptive", **PROBED)
    given = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **{NAME: cache}, **given)
    assert order[:3] == ["attention 0", "attention 1", "asked"]
    plain = ReFreeKVCache(model, "adaptive", **PROBED)
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **{NAME: plain}, **given)
    assert torch.equal(tokens, wanted)
    assert cache.get_seq_length() == plain.get_seq_length()


def test_a_part_of_the_model_that_is_compressed_by_itself(order, monkeypatch):
    """It is not the one that is measured, and called once more, for a cache of the whole model."""
    model, ids, again = model_of(), torch.randint(2, 90, (1, 70)), []

    def measured(whole, cache):
        again.append(whole)
        constants.measure_again(whole, cache)

    monkeypatch.setattr(attachment, "measure_again", measured)
    part, _ = read(model.model, ids)
    read(model, ids)
    trained(model)
    for _ in range(2):
        read(model, ids)
    assert part.get_seq_length() == 70
    assert again == [model]


def test_somebody_s_own_forward_is_asked_before(order):
    """What is raised behind an attention would end there."""
    model, ids = model_of(), torch.randint(2, 90, (1, 70))
    read(model, ids)
    cache = ReFreeKVCache(model, "adaptive", **PROBED)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    order.clear()
    with torch.no_grad(), cache.prompt_until(70):
        model(input_ids=ids, **{NAME: cache})
    assert order == ["asked", "attention 0", "attention 1"]


def test_layers_of_other_kinds_are_asked_before(order):
    model, ids = model_of("gemma3"), torch.randint(2, 90, (1, 70))
    read(model, ids)
    order.clear()
    read(model, ids)
    assert order == ["asked", "attention 0", "attention 1"]


@pytest.mark.parametrize("where", ["second layer", "measuring"])
def test_a_prompt_that_was_interrupted_before_it_was_asked(order, monkeypatch, where):
    model, ids = model_of(), torch.randint(2, 90, (1, 70))
    read(model, ids)
    trained(model)
    cache = ReFreeKVCache(model, "adaptive", **PROBED)

    def fail(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched, torch.no_grad(), cache.prompt_until(70):
        if where == "measuring":
            patched.setattr(key_codes, "_measure", fail)
        else:
            patched.setattr(type(model.model.layers[1].mlp), "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            model(input_ids=ids, **{NAME: cache})
    assert_reads_as_trained(model, cache, ids)


def test_one_layer_that_may_be_pruned(order):
    model, ids = build("llama", attention="sdpa", head_dim=64, num_hidden_layers=1), torch.randint(2, 90, (1, 70))
    read(model, ids)
    order.clear()
    read(model, ids)
    assert order == ["attention 0", "asked"]


def test_a_model_that_lost_layers(order):
    model, ids = model_of(), torch.randint(2, 90, (1, 70))
    read(model, ids)
    order.clear()
    cache = ReFreeKVCache(model, "adaptive", **PROBED)
    rest = model.model.layers[1:]
    del model.model.layers[1:]
    with torch.no_grad(), cache.prompt_until(70), pytest.raises(RuntimeError, match="ran fewer layers than then"):
        model(input_ids=ids, **{NAME: cache})
    assert order == ["attention 0", "asked"]
    model.model.layers.extend(rest)
    trained(model)
    assert_reads_as_trained(model, cache, ids)
