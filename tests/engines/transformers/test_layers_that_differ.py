"""Models whose layers have configurations of their own: Gemma 4, with heads of two sizes."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING

from helpers.command_line import runner
from helpers.tiny import tiny
from refreekv import ReFreeKVCache
from refreekv.core.configuration import head_size, largest, of_layers
from refreekv.core.footprint import Reader
from refreekv.engines.transformers import fitting
from refreekv.evaluation.checking.check import head_sizes

KIND = "gemma4_text"
SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    if KIND not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {KIND}")
    return tiny(KIND)


@pytest.fixture(scope="module")
def sizes(model):
    """Elements of a key, by layer, as the model's own cache has them."""
    made = model.generate(torch.arange(5, 45)[None], **SETTINGS, return_dict_in_generate=True)
    cache = getattr(made, "cache", None) or made.past_key_values
    return [layer.keys.shape[-1] for layer in cache.layers]


def test_what_is_read_off_the_configuration(model, sizes):
    text = model.config
    assert len(set(sizes)) == 2
    assert of_layers(text, "head_dim") == sizes
    assert head_size(text) == largest(text, "head_dim") == max(sizes)
    assert of_layers(text, "hidden_size") == text.hidden_size
    assert head_sizes(model) == (max(sizes), max(sizes))
    assert Reader.of(text).repeated == 2 * text.num_attention_heads * max(sizes)


def test_what_layers_are_forecast_to_hold(model, sizes):
    cache = ReFreeKVCache(model)
    before = fitting._layers(model.config, cache, 4)
    assert [layer.key_size for layer in before] == sizes
    model.generate(torch.arange(5, 45)[None], past_key_values=cache, **SETTINGS)
    assert fitting._layers(model.config, cache, 4) == before


def test_a_cache_is_saved_and_goes_on(model, tmp_path):
    ids = torch.arange(5, 45)[None]
    cache = ReFreeKVCache(model, "streaming-llm", size=20)
    said = model.generate(ids, past_key_values=cache, **SETTINGS)
    cache.save(tmp_path / "saved.safetensors")
    loaded = ReFreeKVCache.load(tmp_path / "saved.safetensors", model)
    ids = torch.cat([said, torch.arange(50, 60)[None]], 1)
    first, second = (model.generate(ids, past_key_values=one, **SETTINGS) for one in (cache, loaded))
    assert torch.equal(first, second)


def test_a_plan_of_it(model, sizes, tmp_path, capsys):
    model.config.save_pretrained(tmp_path)
    result = runner(capsys)("plan", str(tmp_path), "--vram", "8GB", "--context", "256", "--json")
    layers = json.loads(result.out)["kv"]["layers"]
    assert all(str(size) in str(layers) for size in sizes), layers
