"""What refreekv refuses: calls, caches and models that cannot be pruned."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    xLSTMConfig,
    xLSTMForCausalLM,
)

import refreekv
from helpers.driving import PRUNING, generate, state_of
from helpers.models import build
from refreekv import ReFreeKVCache
from refreekv.engines.transformers.naming import cache_given

# -- calls and caches ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_refused(model, ids, training):
    model.train(training)
    with refreekv.compress(model, **PRUNING), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        model(ids)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        model(ids, past_key_values=ReFreeKVCache(model, **PRUNING))


def test_output_attentions_is_refused(ids):
    model = build("llama", attention="eager")
    with refreekv.compress(model, **PRUNING):
        with pytest.raises(ValueError, match="output_attentions"), torch.no_grad():
            model(ids, output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions"):
            generate(model, ids, output_attentions=True, return_dict_in_generate=True)
    assert len(model(ids, output_attentions=True).attentions) == 4
    model.config.output_attentions = True
    with refreekv.compress(model, **PRUNING), pytest.raises(ValueError, match="output_attentions"), torch.no_grad():
        model(ids)
    assert model.config.output_attentions
    assert len(model(ids).attentions) == 4


def test_empty_prompts_are_refused(model):
    nothing = torch.empty(1, 0, dtype=torch.long)
    cache = ReFreeKVCache(model, **PRUNING)
    with pytest.raises(ValueError, match="empty prompt"), torch.no_grad():
        model(nothing, past_key_values=cache)
    with refreekv.compress(model):
        with pytest.raises(ValueError, match="empty prompt"), torch.no_grad():
            model(nothing)
        with pytest.raises(ValueError, match="empty prompt"):
            generate(model, nothing)
        with pytest.raises(ValueError, match="empty prompt"):
            generate(model, None, inputs_embeds=torch.empty(1, 0, 64))


@pytest.mark.parametrize("direct", [True, False], ids=["forward", "generate"])
def test_foreign_caches_are_refused_inside(model, ids, direct):
    caches = {
        "DynamicCache": DynamicCache(config=model.config),
        "StaticCache": StaticCache(config=model.config, max_cache_len=64),
    }
    with refreekv.compress(model, **PRUNING):
        for name, cache in caches.items():
            with pytest.raises(TypeError, match=name), torch.no_grad():
                model(ids, past_key_values=cache) if direct else generate(model, ids, past_key_values=cache)


def test_cache_implementations_are_refused_inside(model, ids):
    with refreekv.compress(model, **PRUNING):
        for settings in (
            {"cache_implementation": "static"},
            {"generation_config": GenerationConfig(cache_implementation="offloaded", max_new_tokens=6)},
        ):
            with pytest.raises(ValueError, match="cache_implementation"):
                model.generate(ids, **settings)
        model.generation_config.cache_implementation = "static"
        with pytest.raises(ValueError, match="cache_implementation"):
            generate(model, ids)
        model.generation_config.cache_implementation = None
        assert generate(model, ids, cache_implementation="dynamic").shape == (1, 56)


# -- models that cannot be pruned ------------------------------------------------------------------

_TINY = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _t5():
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


UNSUPPORTED = {
    "encoder-decoder": (_t5, "encoder-decoder"),
    "sliding window only": (lambda: build("mistral", sliding_window=16), "no full-attention layer"),
    "state space": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)),
        "mamba",
    ),
    "a cache that is none of transformers'": (
        lambda: xLSTMForCausalLM(
            xLSTMConfig(
                vocab_size=128, hidden_size=64, embedding_dim=64, num_blocks=2, num_hidden_layers=2, num_heads=4
            )
        ),
        "takes no KV cache",
    ),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(**{**_TINY, "n_layer": 2, "n_head": 4})), "attention interface"),
    "falcon": (lambda: FalconForCausalLM(FalconConfig(**_TINY)), "attention interface"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_models_that_cannot_be_pruned(kind):
    make, message = UNSUPPORTED[kind]
    model = make().eval()
    before = state_of(model)
    with pytest.raises(ValueError, match=message), refreekv.compress(model):
        pass
    with pytest.raises(ValueError, match=message):
        ReFreeKVCache(model)
    assert state_of(model) == before


@pytest.mark.parametrize("thing", [None, "gpt2", torch.nn.Linear(2, 2)])
def test_things_that_are_no_model(thing):
    with pytest.raises(TypeError, match="expected a transformers model"), refreekv.compress(thing):
        pass
    with pytest.raises(TypeError, match="expected a transformers model"):
        ReFreeKVCache(thing)


def test_unsupported_attention_implementation(model):
    model.config._attn_implementation = "flex_attention"
    before = state_of(model)
    with pytest.raises(ValueError, match="flex_attention"), refreekv.compress(model):
        pass
    assert state_of(model) == before


class _OwnAttention(torch.nn.Module):
    """Attention that uses the cache and computes everything else by itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.layer_idx = inner, inner.config, inner.layer_idx

    def forward(self, hidden_states, **kwargs):
        batch, length, _ = hidden_states.shape
        heads = [
            proj(hidden_states).view(batch, length, -1, self.inner.head_dim).transpose(1, 2)
            for proj in (self.inner.q_proj, self.inner.k_proj, self.inner.v_proj)
        ]
        keys, values = cache_given(kwargs).update(heads[1], heads[2], self.layer_idx)
        output = torch.nn.functional.scaled_dot_product_attention(heads[0], keys, values, enable_gqa=True)
        return self.inner.o_proj(output.transpose(1, 2).reshape(batch, length, -1)), None


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_attention_that_bypasses_the_interface_is_found_out(model, ids, layer):
    """Also where only one layer does, the last one included."""
    model.model.layers[layer].self_attn = _OwnAttention(model.model.layers[layer].self_attn)
    assert generate(model, ids).shape == (1, 56)
    with refreekv.compress(model, **PRUNING), pytest.raises(RuntimeError, match="attention interface"):
        generate(model, ids)


def test_a_model_that_ignores_its_cache_is_found_out(ids):
    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, **kwargs):
            return super().forward(input_ids, use_cache=False)

    model = Forgetful(build("llama").config).eval()
    with refreekv.compress(model), torch.no_grad(), pytest.raises(RuntimeError, match="did not store"):
        model(ids)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_called_so(number):
    """They were taken for attention of another kind."""
    model = build("llama", attention="sdpa")
    model.model.layers[1].self_attn.v_proj.weight.data[3, 3] = number
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"\(layer 1\) computes NaN or infinity.*overflow"):
        model(torch.arange(2, 40)[None], past_key_values=ReFreeKVCache(model))
