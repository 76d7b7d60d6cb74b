"""Keys and values reach one attention call unchanged, or the model is refused by a sentence that is true."""

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

import refreekv
from helpers.driving import generate
from helpers.models import _SHAPE, build
from helpers.sweep import hidden_columns, hidden_logits, logits_of
from refreekv import ReFreeKVCache
from refreekv.engines.transformers.naming import cache_given

LAYER = 2
WINDOW = {"policy": "streaming-llm", "size": 20}
SHARED: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """What the modules below run under ``attn_implementation="eager"``: with slopes or factors of their own."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    logits = query @ key.transpose(2, 3) * scaling
    if module.slopes is not None:  # ALiBi: the farther back, the less
        distance = torch.arange(key.shape[2] - 1, -1, -1)
        logits = logits - module.slopes[:, None, None] * distance
    if attention_mask is not None:
        logits = logits + attention_mask
    output = logits.softmax(-1) @ value
    if module.factors is not None:
        output = output * module.factors[:, None, None]
    return output.transpose(1, 2).contiguous(), None


class Attention(nn.Module):
    """Llama's attention with one thing done otherwise, which subclasses do in one of three places."""

    slopes = factors = None

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.layer_idx = inner, inner.config, inner.layer_idx
        self.scaling, self.is_causal = inner.scaling, True
        self.num_key_value_groups = inner.num_key_value_groups

    def attend(self, query, key, value, mask, **kwargs):
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return function(self, query, key, value, mask, scaling=self.scaling, **kwargs)[0]

    def store(self, query, key, value, cos_sin, cache):
        query, key = apply_rotary_pos_emb(query, key, *cos_sin)
        return query, *cache.update(key, value, self.layer_idx)

    def run(self, query, key, value, mask):
        return self.attend(query, key, value, mask)

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        shape = *hidden_states.shape[:-1], -1, self.inner.head_dim
        projections = self.inner.q_proj, self.inner.k_proj, self.inner.v_proj
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        query, key, value = self.store(query, key, value, position_embeddings, cache_given(kwargs))
        output = self.run(query, key, value, attention_mask)
        return self.inner.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), None


class Unchanged(Attention):
    def run(self, query, key, value, mask):
        return self.attend(query.contiguous(), key.contiguous(), value.to(value.dtype), mask, sliding_window=None)


class SameTensorTwice(Attention):
    def store(self, query, key, value, cos_sin, cache):
        query, key = apply_rotary_pos_emb(query, key, *cos_sin)
        return query, *cache.update(key, key, self.layer_idx)


class ScalesValues(Attention):
    def run(self, query, key, value, mask):
        return self.attend(query, key, value * 1.5, mask)


class SwapsValueHeads(Attention):
    def run(self, query, key, value, mask):
        return self.attend(query, key, value.flip(1), mask)


class NormsKeys(Attention):
    def run(self, query, key, value, mask):
        return self.attend(query, nn.functional.normalize(key, dim=-1), value, mask)


class RotatesAfterwards(Attention):
    def store(self, query, key, value, cos_sin, cache):
        key, value = cache.update(key, value, self.layer_idx)
        positions = torch.arange(key.shape[2]).float()[None, :, None].expand(1, -1, 8)
        query = query * positions[:, -query.shape[2] :].cos()
        return query, key * positions.cos(), value.contiguous()


class RepeatsHeads(Attention):
    def run(self, query, key, value, mask):
        self.num_key_value_groups = 1
        return self.attend(query, repeat_kv(key, 4), repeat_kv(value, 4), mask)


class AttendsTwice(Attention):
    def run(self, query, key, value, mask):
        return self.attend(query, key, value, mask) - 0.5 * self.attend(query.flip(1), key, value, mask)


class LendsToTheNextLayer(Attention):
    """One that attends to the keys and values of the layer before, as models with shared caches do."""

    def store(self, query, key, value, cos_sin, cache):
        query, key, value = super().store(query, key, value, cos_sin, cache)
        SHARED[self.layer_idx] = key, value
        return query, key, value

    def run(self, query, key, value, mask):
        borrowed = SHARED.get(self.layer_idx - 1, (key, value))
        return self.attend(query, *borrowed, mask)


class ByItself(Attention):
    def attend(self, query, key, value, mask, **kwargs):
        hidden = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=mask is None, enable_gqa=True)
        return hidden.transpose(1, 2)


class WithPositionBias(Attention):
    def run(self, query, key, value, mask):
        distance = torch.arange(key.shape[2]) - torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        return self.attend(query, key, value, mask, position_bias=0.1 * distance[None, None].expand(1, 8, -1, -1))


class WithBiasInTheMask(Attention):
    def run(self, query, key, value, mask):
        distance = torch.arange(key.shape[2]) - torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        bias = torch.where(distance <= 0, 0.1 * distance, torch.finfo(torch.float32).min)
        return self.attend(query, key, value, bias[None, None])


class WithSlopes(Attention):
    slopes = torch.linspace(0.02, 0.5, 8)


class WithFactors(Attention):
    factors = torch.linspace(0.8, 1.2, 8)


class SparseByItsMask(Attention):
    def run(self, query, key, value, mask):
        columns = torch.arange(key.shape[2])
        rows = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        seen = (columns <= rows) & ((columns % 3 == 0) | (columns > rows - 4))
        return self.attend(query, key, value, seen[None, None])


class LeavesQueriesOut(Attention):
    def run(self, query, key, value, mask):
        last = self.attend(query[:, :, -1:], key, value, None if mask is None else mask[:, :, -1:])
        return last.expand(-1, query.shape[2], -1, -1)


class LooksAtAnImage(Attention):
    """The states of something else, in a layer that nothing says is one of cross-attention."""

    states = 30

    def store(self, query, key, value, cos_sin, cache):
        if query.shape[2] == 1:
            return query, cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        times = -(-self.states // key.shape[2])
        return query, *(t.repeat(1, 1, times, 1)[:, :, : self.states] for t in (key, value))

    def forward(self, *args, **kwargs):
        self.cache = cache_given(kwargs)
        return super().forward(*args, **kwargs)

    def run(self, query, key, value, mask):
        if query.shape[2] > 1:
            key, value = self.cache.update(key, value, self.layer_idx)
        return self.attend(query, key, value, None, is_causal=False)


class ImageCrossAttention(LooksAtAnImage):
    states = 50  # as many as the prompt has tokens


REFUSED = {
    ScalesValues: r"ScalesValues \(layer 2\) attends to other values than the cache returned",
    SwapsValueHeads: r"SwapsValueHeads \(layer 2\) attends to other values",
    NormsKeys: r"NormsKeys \(layer 2\) attends to other keys",
    RotatesAfterwards: r"RotatesAfterwards \(layer 2\) attends to other keys",
    RepeatsHeads: r"layer 2 .*RepeatsHeads, keys \[1, 8, 50, 8\].*made out of what the cache returned",
    AttendsTwice: r"AttendsTwice \(layer 2\) attends more than once",
    LendsToTheNextLayer: r"attends more than once to the keys and values|attends to other",
    ByItself: r"layer 2 of the model computes attention by itself",
    WithPositionBias: r"WithPositionBias \(layer 2\) computes attention with position_bias",
    WithBiasInTheMask: r"WithBiasInTheMask \(layer 2\).*computes something else",
    SparseByItsMask: r"SparseByItsMask \(layer 2\) leaves out entries by a mask of its own",
    LeavesQueriesOut: r"layer 2 of the model stored 50 new entries and attends to them with 1 queries",
    LooksAtAnImage: r"layer 2 of the model stored 30 new entries and attends to them with 50 queries",
    ImageCrossAttention: r"ImageCrossAttention \(layer 2\) is cross-attention",
}
ONLY_EAGER = {
    WithSlopes: r"WithSlopes \(layer 2\).*factor of its own",
    WithFactors: r"WithFactors \(layer 2\).*'eager'",
}


def model_with(attention, implementation="sdpa", layers=(LAYER,)):
    model = build("llama", attention=implementation)
    for layer in layers:
        model.model.layers[layer].self_attn = attention(model.model.layers[layer].self_attn)
    return model


@pytest.mark.parametrize("arena", [None, True])
@pytest.mark.parametrize("attention", REFUSED, ids=lambda cls: cls.__name__)
def test_each_is_refused_for_what_it_does(attention, arena, ids):
    layers = (1, 2) if attention is LendsToTheNextLayer else (LAYER,)
    model = model_with(attention, layers=layers)
    assert generate(model, ids).shape == (1, 56)
    check_refused(model, ids, arena, REFUSED[attention])


@pytest.mark.parametrize("attention", ONLY_EAGER, ids=lambda cls: cls.__name__)
def test_what_an_eager_function_adds_is_found_out(attention, ids):
    check_refused(model_with(attention, "eager"), ids, None, ONLY_EAGER[attention])


def check_refused(model, ids, arena, message):
    for policy, parameters in (("streaming-llm", {"size": 20}), ("full", {})):
        cache = ReFreeKVCache(model, policy, **parameters)
        cache.state.arena = arena
        with pytest.raises((RuntimeError, ValueError), match=message) as caught:
            generate(model, ids, past_key_values=cache)
        assert "run this model without refreekv" in str(caught.value)


@pytest.mark.parametrize("arena", [None, True])
@pytest.mark.parametrize("attention", [Attention, Unchanged, SameTensorTwice], ids=lambda cls: cls.__name__)
def test_what_changes_nothing_is_served(attention, arena, ids):
    model = model_with(attention, layers=range(4))
    cache = ReFreeKVCache(model, **WINDOW)
    cache.state.arena = arena
    got = logits_of(model, {"input_ids": ids}, 6, cache)
    hidden = hidden_columns(cache, 50)
    del cache
    wanted, masked = hidden_logits(model, {"input_ids": ids}, 6, hidden)
    assert masked
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_model_is_looked_at_once_and_every_implementation_for_itself(ids):
    model = model_with(WithSlopes, "sdpa")  # which knows nothing of slopes
    with refreekv.compress(model, **WINDOW):
        generate(model, ids)
    model.set_attn_implementation("eager")
    check_refused(model, ids, None, "WithSlopes")


_MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
_EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _deepseek():
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**_SHAPE, **_MLA, **_EXPERTS, "num_key_value_heads": 8}))


def _jetmoe():
    return JetMoeForCausalLM(JetMoeConfig(**{**_SHAPE, "kv_channels": 8, "num_local_experts": 4}))


REAL = {
    "diffllama": (
        lambda: DiffLlamaForCausalLM(DiffLlamaConfig(**{**_SHAPE, "head_dim": 8})),
        r"DiffLlamaAttention \(layer 0\) attends to other values",
    ),
    "jetmoe": (_jetmoe, r"layer 0 .*JetMoeAttention.*models that repeat their heads"),
}


@pytest.mark.parametrize("name", REAL)
def test_models_of_transformers_that_are_refused(name, ids):
    make, message = REAL[name]
    model = make().eval()
    before = generate(model, ids)
    with refreekv.compress(model, "streaming-llm", size=49), pytest.raises(RuntimeError, match=message):
        generate(model, ids)
    assert torch.equal(generate(model, ids), before)


def test_latent_attention_is_equal_or_refused_for_what_it_is(ids):
    """Expanded keys, wider than values, may be cached: that works. Of latents, attention reads something else."""
    model = _deepseek().eval()
    cache = ReFreeKVCache(model, **WINDOW)
    try:
        got = logits_of(model, {"input_ids": ids}, 6, cache)
    except RuntimeError as error:
        refusal = str(error)
    else:
        hidden = hidden_columns(cache, 50)
        del cache
        wanted, _ = hidden_logits(model, {"input_ids": ids}, 6, hidden)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        return
    assert "DeepseekV3Attention, keys [1, 8, 50, 16]" in refusal
    assert "latent attention" in refusal


def test_an_interrupted_forward_is_called_that(model, ids):
    cache = ReFreeKVCache(model, **WINDOW)

    def interrupt(*args):
        raise KeyboardInterrupt

    layer = cache.layers[LAYER]
    update = layer.update
    layer.update = lambda *args, **kwargs: (update(*args, **kwargs), interrupt())[0]
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)
    del layer.update
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"was interrupted.*call reset\(\)"):
        model(ids, past_key_values=cache)
    cache.reset()
    assert generate(model, ids, past_key_values=cache).shape == (1, 56)


def test_a_module_inside_called_for_its_model(model):
    """Policies that read copy scores would become others; those that do not are served."""
    ids = torch.randint(2, 120, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = ReFreeKVCache(model)
        with pytest.raises(RuntimeError, match="a module inside it was called"):
            model.model(ids, past_key_values=cache)
        cache = ReFreeKVCache(model.model)
        model.model(ids, past_key_values=cache)
        assert "copying" in cache.report.prunable[0].rows[0].reasons
        cache = ReFreeKVCache(model, **WINDOW)
        model.model(ids, past_key_values=cache)
        assert cache.report.budget < 0.1
