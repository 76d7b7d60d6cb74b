"""Models whose cache holds the states of an image beside those of tokens: these stay, and nothing is out of step."""

import pytest
import torch

import refreekv
from helpers.models import build_mllama, image_prompts
from helpers.sweep import hidden_columns, hidden_logits, logits_of
from refreekv import ReFreeKVCache
from refreekv.engines.transformers.attachment import attached
from refreekv.engines.transformers.copy_scores import copy_scores

LENGTH = 40
STEPS = 6
POLICIES = [("full", {}), ("streaming-llm", {"size": 20}), ("snapkv", {"ratio": 0.4}), ("cake", {"ratio": 0.4})]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def mllama(request):
    return build_mllama(attention=request.param)


@pytest.mark.parametrize("arena", [None, True])
@pytest.mark.parametrize(("policy", "parameters"), POLICIES)
# As many tokens as the image has states, too: then their number says nothing.
@pytest.mark.parametrize("length", [LENGTH, 50])
def test_text_is_pruned_and_images_stay(mllama, policy, parameters, length, arena):
    inputs = image_prompts(length=length)
    full = logits_of(mllama, inputs, STEPS)
    cache = ReFreeKVCache(mllama, policy, **parameters)
    cache.state.arena = arena
    got = logits_of(mllama, inputs, STEPS, cache)
    report, hidden = cache.report, hidden_columns(cache, length)
    assert [layer.kind for layer in report.layers] == ["full_attention", "cross_attention"] * 2
    assert [layer.index for layer in report.prunable] == [0, 2]
    assert [cache.layers[index].keys.shape[2] for index in (1, 3)] == [50, 50]
    del cache
    wanted, _ = hidden_logits(mllama, inputs, STEPS, hidden)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert ((wanted - full).abs().max() > 0.1) == (policy != "full")


def test_a_batch_of_images(mllama):
    inputs = image_prompts(rows=3)
    cache = ReFreeKVCache(mllama, "streaming-llm", size=20)
    got = mllama.generate(**inputs, past_key_values=cache, max_new_tokens=STEPS, do_sample=False)
    rows = []
    for row in range(3):
        with refreekv.compress(mllama, "streaming-llm", size=20):
            one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            rows.append(mllama.generate(**one, max_new_tokens=STEPS, do_sample=False))
    assert torch.equal(got, torch.cat(rows))


def test_the_default_policy_measures_copy_scores_by_layer(mllama):
    """The short pass that measures them has no image: layers of images take no part in it."""
    inputs = image_prompts(length=600)
    with refreekv.compress(mllama) as kv:
        mllama.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert [layer.index for layer in kv.report.prunable] == [0, 2]
    assert all("copying" in layer.rows[0].reasons for layer in kv.report.prunable)
    with attached(mllama):
        assert [tuple(scores.shape) for scores in copy_scores(mllama)] == [(2,), (2,)]


def test_text_without_an_image(mllama):
    inputs = {name: tensor for name, tensor in image_prompts().items() if name in ("input_ids", "attention_mask")}
    inputs["input_ids"] = inputs["input_ids"].clamp_max(100)
    cache = ReFreeKVCache(mllama, "streaming-llm", size=20)
    got = logits_of(mllama, inputs, STEPS, cache)
    hidden = hidden_columns(cache, LENGTH)
    report = cache.report
    del cache
    torch.testing.assert_close(got, hidden_logits(mllama, inputs, STEPS, hidden)[0], atol=1e-4, rtol=1e-4)
    assert report.layers[1].bytes_after == 0


def test_in_chunks():
    """The model looks at what each layer of the cache holds, also at those of text whose prompt is not finished."""
    model = build_mllama(hidden_size=128)
    text = {"input_ids": torch.arange(2, 102).repeat(1, 2), "attention_mask": torch.ones(1, 200, dtype=torch.long)}
    wanted = logits_of(model, text, STEPS)
    cache = ReFreeKVCache(model, "full", kv_dtype=None, prompt_dtype="int8")
    got = logits_of(model, {**text, "prefill_chunk_size": 64}, STEPS, cache)
    torch.testing.assert_close(got[0], wanted[0], atol=0.05 * float(wanted.abs().max()), rtol=0)
