"""Keys and values of different types: autocast around a prompt, an answer or both; exact storage is the judge."""

import contextlib
import functools
import itertools

import pytest
import torch
from transformers import DynamicCache

import refreekv
from helpers.driving import POLICIES, RAGGED, Uneven, check_bytes, feed
from helpers.models import build, prompts
from refreekv.engines.transformers import layer as layer_module
from refreekv.engines.transformers.attachment import attached
from refreekv.storage.arena import KVArena
from refreekv.storage.leveled import LeveledKV

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ON_GPU = torch.cuda.is_available()
WHERE = "cuda" if ON_GPU else "cpu"
MIXED = {
    "in": (BF16, BF16),
    "in, float16": (F16, F16),
    "prompt in, answer out": (BF16, None),
    "prompt out, answer in": (None, BF16),
    "two types": (F16, BF16),
}
PLAIN, ARENA, INT8 = {"arena": False}, {"arena": True}, {"arena": True, "kv_dtype": "int8"}


def around(kind):
    return contextlib.nullcontext() if kind is None else torch.autocast(WHERE, dtype=kind)


def cache_of(model, policy, *, arena, kv_dtype=None, decode="graph"):
    name, parameters = POLICIES.get(policy, (Uneven() if policy == "uneven" else policy, {}))
    cache = refreekv.ReFreeKVCache(model, name, kv_dtype=kv_dtype, decode=decode, **parameters)
    cache.state.arena = arena
    return cache


@torch.no_grad()
def conversation(model, cache, prompt, answer, lengths=RAGGED, tokens=20):
    """Logits along fixed tokens, fed as `generate` feeds them: a prompt, an answer, a second turn, an answer."""
    ids, mask = (part.to(model.device) for part in prompts(lengths, seed=3))
    given = prompts((2 * tokens + 7,) * len(lengths), seed=5)[0].to(model.device)
    found, at = [], 0
    with attached(model) as attachment, attachment.captured_steps():
        for piece in (ids, given[:, :7]):
            if piece is not ids:
                mask = torch.cat([mask, torch.ones_like(piece)], 1)
            end = mask.shape[1]
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -piece.shape[1] :]
            with (
                contextlib.nullcontext()
                if isinstance(cache, DynamicCache) and not hasattr(cache, "state")
                else (cache.state.until(end, generating=True))
            ):
                with around(prompt):
                    out = model(input_ids=piece, attention_mask=mask, position_ids=positions, past_key_values=cache)
                found.append(out.logits[:, -1])
                for token in given[:, 7 + at : 7 + at + tokens].split(1, 1):
                    mask = torch.cat([mask, torch.ones_like(token)], 1)
                    with around(answer):
                        out = model(
                            input_ids=token, attention_mask=mask, position_ids=mask.cumsum(-1)[:, -1:] - 1,
                            past_key_values=cache,
                        )  # fmt: skip
                    found.append(out.logits[:, -1])
            at += tokens
    return torch.stack(found, 1).float()


def error(got, want):
    return float((got - want).norm() / want.norm())


def storage_types(cache):
    return {layer.ragged.types for layer in cache.pruned_layers}


@functools.cache
def in_full_precision(policy):
    """A conversation of exact storage without autocast."""
    model = build("llama", attention="sdpa", head_dim=16).to(WHERE)
    return conversation(model, cache_of(model, policy, **PLAIN), None, None)


@pytest.mark.parametrize(
    ("when", "policy"),
    [*itertools.product(MIXED, ["full", "uneven"]), ("in", "window"), ("prompt out, answer in", "window")],
)
def test_arena_and_captured_steps_give_what_exact_storage_gives(when, policy, steps):
    model = build("llama", attention="sdpa", head_dim=16).to(WHERE)
    prompt, answer = MIXED[when]
    plain, arena, coded = (cache_of(model, policy, **kind) for kind in (PLAIN, ARENA, INT8))
    want = conversation(model, plain, prompt, answer)
    before = steps["run"]
    got = conversation(model, arena, prompt, answer)
    in_lines = conversation(model, coded, prompt, answer)
    assert {type(layer.ragged) for layer in arena.pruned_layers} == {KVArena}
    assert {type(layer.ragged) for layer in coded.pruned_layers} == {LeveledKV}
    # Only a token whose values are wider than what is stored has to run by itself.
    assert steps["run"] - before == 80 - (when in ("prompt in, answer out", "two types"))
    if answer is None:
        assert error(got[:, :21], want[:, :21]) < 1e-5
    # Half precision rounds: exact storage is no nearer to what float32 gives.
    exact = in_full_precision(policy)
    assert error(got, exact) < 1.2 * error(want, exact)
    assert error(in_lines, want) < 0.2
    for one, other in zip(arena.report.layers, plain.report.layers, strict=True):
        assert [row.kept_heads for row in one.rows] == [row.kept_heads for row in other.rows]
        assert [row.bytes_before for row in one.rows] == [row.bytes_before for row in other.rows]
    check_bytes(arena, arena.report)
    expected = {"in": BF16, "in, float16": F16}.get(when, F32)
    assert storage_types(arena) == {(F32, expected)}
    if policy == "full" and when != "two types":  # of which PyTorch's autocast joins none
        own = conversation(model, DynamicCache(config=model.config), prompt, answer)
        assert error(want, own) < 1e-6


@pytest.mark.parametrize(
    "policy",
    [*POLICIES, "adaptive:min_length=0", "adaptive:min_length=0,stand_ins=2", "gvote", "expected-attention:ratio=0.5"],
)
@pytest.mark.parametrize("kind", [BF16, F16], ids=str)
def test_policies_decide_as_they_would_without_autocast(policy, kind, monkeypatch):
    """What looks at keys, values and queries of different types computes in the precision that it is written in."""
    model = build("llama", attention="sdpa", head_dim=16).to(WHERE)
    chosen = []

    def noted(*arguments):
        chosen.append((arguments, torch.is_autocast_enabled(WHERE)))
        return decide(*arguments)

    decide = layer_module.decide
    monkeypatch.setattr(layer_module, "decide", noted)
    for arena in (False, True):
        cache = cache_of(model, policy, arena=arena)
        out = conversation(model, cache, kind, kind, tokens=3)
        assert torch.isfinite(out).all()
    assert not any(enabled for _, enabled in chosen)
    assert all(part.keys.dtype == F32 and part.values.dtype == kind for (_, _, part, *_), _ in chosen)


@pytest.fixture(scope="module")
def not_moved():
    """Logits of an answer, and of the last token of a further turn, of exact storage in full precision."""
    plain = build("llama", attention="sdpa", head_dim=16).to(WHERE)
    judge = cache_of(plain, "window", **PLAIN)
    ids, mask = (part.to(WHERE) for part in prompts(RAGGED, seed=3))
    with torch.no_grad(), judge.state.until(ids.shape[1], generating=True):
        plain(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), past_key_values=judge)
        want = []
        for token in prompts((5,) * len(RAGGED), seed=7)[0].to(WHERE).split(1, 1):
            logits, mask = feed(plain, judge, token, mask)
            want.append(logits[:, -1])
        last, _ = feed(plain, judge, ids[:, :9], mask)
    return torch.stack(want), last[:, -1]


@pytest.mark.parametrize("kind", [PLAIN, ARENA, INT8, {"arena": False, "kv_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("order", [*itertools.permutations([None, BF16, F16], 2)], ids=str)
def test_a_model_moved_to_another_type_goes_on(order, kind, not_moved):
    """Queries of another type than the keys, both ways, without autocast."""
    model = build("llama", attention="sdpa", head_dim=16).to(WHERE)
    first, then = (F32 if kind is None else kind for kind in order)
    cache = cache_of(model.to(first), "window", **kind)
    ids, mask = (part.to(WHERE) for part in prompts(RAGGED, seed=3))
    with torch.no_grad(), cache.state.until(ids.shape[1], generating=True):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        model.to(then)
        got = []
        for token in prompts((5,) * len(RAGGED), seed=7)[0].to(WHERE).split(1, 1):
            logits, mask = feed(model, cache, token, mask)
            got.append(logits[:, -1].float())
        more, mask = feed(model, cache, ids[:, :9], mask)
    want, last = not_moved
    assert error(torch.stack(got), want) < 0.15
    assert error(more[:, -1].float(), last) < 0.15


@pytest.mark.parametrize("kind", [ARENA, INT8], ids=str)
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {}], ids=str)
def test_generate_within_autocast(settings, kind):
    """Beams reorder, repeat and select rows of both storages."""
    model = build("llama", attention="sdpa", head_dim=16).to(WHERE)
    ids, mask = (part.to(WHERE) for part in prompts((40, 33), seed=3))
    outcome = []
    for choice in (PLAIN, kind):
        cache = cache_of(model, "window", **choice)
        with around(BF16):
            out = model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, min_new_tokens=10, do_sample=False,
                return_dict_in_generate=True, output_logits=True, **settings,
            )  # fmt: skip
        outcome.append(out)
        for layer in cache.pruned_layers:
            assert layer.ragged.types == (F32, BF16)
    want, got = outcome
    assert got.sequences.shape == want.sequences.shape
    # Beams are compared up to where rounding makes them part.
    assert error(got.logits[0], want.logits[0]) < 2e-2
    assert error(got.logits[1], want.logits[1]) < (0.1 if kind is INT8 else 3e-2)


@pytest.mark.parametrize("kind", [PLAIN, ARENA, INT8], ids=str)
def test_what_changes_rows_and_lengths_keeps_types_apart(kind):
    model = build("llama", attention="sdpa", head_dim=16).to(WHERE)
    cache = cache_of(model, "uneven", **kind)
    whole = cache_of(model, "uneven", **PLAIN)
    ids, mask = (part.to(WHERE) for part in prompts(RAGGED, seed=3))
    new = prompts((3,) * 4, seed=7)[0].to(WHERE)
    with torch.no_grad(), around(BF16):
        for each in (cache, whole):
            with each.prompt_until(ids.shape[1]):
                positions = (mask.cumsum(-1) - 1).clamp_min(0)
                model(ids, attention_mask=mask, position_ids=positions, past_key_values=each)
                feed(model, each, new, mask)
            each.crop(-2)
            each.batch_select_indices(torch.tensor([3, 0, 1]))
            each.batch_repeat_interleave(2)
            each.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
        if kind is not PLAIN:
            cache.free_rows([1])
        rows = torch.tensor([1, 1, 0, 0, 3, 3])
        longer = torch.cat([mask, torch.ones_like(new[:, :1])], 1)[rows]
        got, want = (feed(model, each, new[rows, :1], longer)[0][:, -1].float() for each in (cache, whole))
    for layer in cache.pruned_layers:
        assert layer.ragged.types == (F32, BF16)
    left = [0, 2, 3, 4, 5]
    assert error(got[left], want[left]) < (0.1 if kind is INT8 else 2e-2)


def test_rotary_tables_in_float32_of_a_bfloat16_model():
    """Keys and queries of such models are wider than their values, without any autocast."""
    model = build("llama", attention="sdpa", head_dim=16).to(WHERE, BF16)
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(x.float(), position_ids)
    project = model.model.layers[0].self_attn.o_proj.weight.dtype

    def in_model_type(module, arguments):
        return tuple(part.to(project) for part in arguments)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(in_model_type)
    outcome = []
    for kind in (PLAIN, ARENA):
        cache = cache_of(model, "window", **kind)
        outcome.append(conversation(model, cache, None, None))
        assert storage_types(cache) == {(F32, BF16)}
    # Both round as bfloat16 does, and neither is further from what float32 gives.
    exact = build("llama", attention="sdpa", head_dim=16).to(WHERE, BF16).float()
    want = conversation(exact, cache_of(exact, "window", **PLAIN), None, None)
    assert error(outcome[1], want) < 1.2 * error(outcome[0], want) < 0.1


def test_values_of_another_size_than_stored_are_refused():
    model = build("llama", attention="sdpa", head_dim=16)
    for arena in (False, True):
        cache = cache_of(model, "window", arena=arena)
        layer = cache.pruned_layers[0]
        with torch.no_grad():
            model(prompts((30,))[0], past_key_values=cache)
        shape = (1, layer.kv_heads, 1)
        keys = torch.zeros(*shape, 8)
        with pytest.raises(ValueError, match="value size"):
            layer.update(keys, torch.zeros(*shape, 16))
        with pytest.raises(ValueError, match="one value belongs to each key"):
            layer.update(keys, torch.zeros(1, layer.kv_heads, 2, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("when", MIXED)
def test_on_a_gpu_graphs_give_what_eager_decoding_gives(when, kv_dtype):
    """Captured under autocast a graph must not read copies of weights that autocast has dropped."""
    model = build("llama", attention="sdpa", head_dim=16).cuda()
    prompt, answer = MIXED[when]
    outcome = []
    for decode in ("eager", "graph", "graph"):
        cache = cache_of(model, "refreekv", arena=None, kv_dtype=kv_dtype, decode=decode)
        # What autocast dropped is written over.
        torch.empty(1 << 22, device="cuda").fill_(float("nan"))
        outcome.append(conversation(model, cache, prompt, answer))
        assert torch.isfinite(outcome[-1]).all()
    tolerance = 2e-2 if answer is not None or kv_dtype else 1e-4
    assert error(outcome[1], outcome[0]) < tolerance
    assert error(outcome[2], outcome[0]) < tolerance
