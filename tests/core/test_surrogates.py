"""Entries that stand in for evicted ones: against a slow twin, exact cases, and in a real cache."""

import numpy as np
import pytest
import torch

import refreekv
from helpers import models
from helpers.layers import random_layer, view_of
from refreekv import policies
from refreekv.core.surrogates import make, put


def a_layer(seed, n=40, batch=2, heads=4, kv_heads=2, dim=6, probes=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, kv_heads, n, dim, generator=generator).to(dtype) for _ in range(2))
    queries = torch.randn(batch, heads, probes, dim, generator=generator) + 0.5
    evicted = torch.rand(batch, kv_heads, n, generator=generator) < 0.6
    evicted[..., -probes:] = False
    return queries, keys, values, evicted


def slow(queries, keys, values, evicted, count):
    """One KV head, part by part and query by query in float64: lists of column, key and value, None where empty."""
    columns = np.flatnonzero(evicted)
    parts = [[c for i, c in enumerate(columns) if i * count // len(columns) == part] for part in range(count)]
    found = []
    for part in parts:
        if not part:
            found.append(None)
            continue
        sums = np.array([np.exp(keys[part] @ query).sum() for query in queries])
        share = sums / np.array([np.exp(keys @ query).sum() for query in queries])
        weight = share / share.sum()
        inside = np.zeros(len(part))
        for query, each, total in zip(queries, weight, sums, strict=True):
            inside += each * np.exp(keys[part] @ query) / total
        mean_key, mean_query = inside @ keys[part], weight @ queries
        along, missing = queries @ mean_query, np.log(sums) - queries @ mean_key
        step = (weight * along * missing).sum() / (weight * along**2).sum()
        for one, over in zip(along, missing, strict=True):
            if one > 0:
                step = min(step, (over + np.log(2.0)) / one)
        found.append((part[int(inside.argmax())], mean_key + step * mean_query, inside @ values[part]))
    return found


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_they_are_what_the_slow_twin_says(seed, count):
    queries, keys, values, evicted = a_layer(seed)
    made = make(queries, keys, values, evicted, count=count)
    wide = [part.double().numpy() for part in (queries, keys, values)]
    for row in range(2):
        for head in range(2):
            asked = wide[0][row, 2 * head : 2 * head + 2].reshape(-1, 6)
            wanted = slow(asked, wide[1][row, head], wide[2][row, head], evicted[row, head].numpy(), count)
            assert made.real[row, head].tolist() == [one is not None for one in wanted]
            for at, one in enumerate(wanted):
                if one is not None:
                    assert made.columns[row, head, at] == one[0]
                    np.testing.assert_allclose(made.keys[row, head, at].numpy(), one[1], atol=1e-4)
                    np.testing.assert_allclose(made.values[row, head, at].numpy(), one[2], atol=1e-4)


def attention(queries, keys, values, visible):
    weights = (queries @ keys.transpose(-1, -2)).masked_fill(~visible[:, :, None], -torch.inf).softmax(-1)
    return weights @ values


def test_for_a_single_query_nothing_is_lost():
    """One stand-in has the whole sum and the whole mean: attention over it is that over everything."""
    queries, keys, values, evicted = a_layer(7, heads=2, probes=1)
    full = attention(queries, keys, values, torch.ones_like(evicted))
    without = attention(queries, keys, values, ~evicted)
    made = make(queries, keys, values, evicted, count=1)
    put(made, keys, values)
    with_it = attention(queries, keys, values, (~evicted).scatter(-1, made.columns, made.real))
    torch.testing.assert_close(with_it, full, atol=1e-5, rtol=1e-5)
    assert (without - full).abs().max() > 0.05


def test_no_query_gives_a_stand_in_much_more_than_what_it_stands_for():
    """Not even one that is unlike the others, whom a fit to the mean would serve badly."""
    queries, keys, values, evicted = a_layer(11, batch=1, heads=1, kv_heads=1, probes=8, dim=16)
    queries[:, :, 0] *= 2
    made = make(queries, keys, values, evicted, count=1)
    logits = (queries @ keys.transpose(2, 3))[0, 0]
    sums = logits.masked_fill(~evicted[0], -torch.inf).logsumexp(-1)
    weight = (sums - logits.logsumexp(-1)).softmax(0)
    asked = queries[0, 0]
    towards = asked @ (weight @ asked) > 0
    over = (asked @ made.keys[0, 0, 0] - sums)[towards]
    assert over.max() < np.log(2.0) + 1e-4
    # The bound is what stopped it: the best fit alone goes beyond.
    assert over.max() > np.log(2.0) - 1e-4


def test_for_many_queries_most_of_what_is_lost_comes_back():
    queries, keys, values, evicted = a_layer(8, n=400, probes=16, dim=16)
    queries = queries / 4
    grouped = queries.view(2, 2, -1, 16)
    full = attention(grouped, keys, values, torch.ones_like(evicted))
    without = attention(grouped, keys, values, ~evicted)
    made = make(queries, keys, values, evicted, count=4)
    put(made, keys, values)
    with_them = attention(grouped, keys, values, (~evicted).scatter(-1, made.columns, made.real))
    assert (with_them - full).square().mean() < 0.5 * (without - full).square().mean()


def test_queries_may_lie_in_memory_as_models_leave_them():
    """Heads inside of positions: what rotary embeddings return of projections."""
    queries, keys, values, evicted = a_layer(6)
    apart = queries.transpose(1, 2).contiguous().transpose(1, 2)
    for one, other in zip(*(make(q, keys, values, evicted, count=2) for q in (queries, apart)), strict=True):
        torch.testing.assert_close(one, other)


def test_padding_changes_nothing():
    queries, keys, values, evicted = a_layer(3)
    alone = make(queries, keys, values, evicted, count=3)
    pads = 7
    wide = [torch.nn.functional.pad(part, (0, 0, pads, 0), value=9.0) for part in (keys, values)]
    mask = torch.nn.functional.pad(evicted, (pads, 0))
    real = torch.ones_like(mask)
    real[..., :pads] = False
    more = torch.cat([torch.full_like(queries[:, :, :2], 5.0), queries], dim=2)
    asked = torch.tensor([[False, False, True, True, True, True, True]])
    padded = make(more, *wide, mask, count=3, real=real, asked=asked)
    assert torch.equal(padded.columns - pads, alone.columns)
    torch.testing.assert_close(padded.keys, alone.keys)
    torch.testing.assert_close(padded.values, alone.values)


def test_nothing_evicted_changes_nothing():
    queries, keys, values, evicted = a_layer(4)
    evicted = torch.zeros_like(evicted)
    evicted[0, 1, 3] = True
    made = make(queries, keys, values, evicted, count=2)
    assert made.real.sum() == 1
    before = keys.clone(), values.clone()
    put(made, keys, values)
    # A single entry stands in for itself: with its own value, and a logit of its own.
    changed = (keys != before[0]).any(-1)
    assert changed.nonzero().tolist() in ([], [[0, 1, 3]])
    torch.testing.assert_close(values, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_numbers(dtype):
    queries, keys, values, evicted = a_layer(5, dtype=dtype)
    for factor in (0.0, 40.0):
        made = make(queries * factor, keys * (1 + factor), values, evicted, count=4)
        assert made.keys.isfinite().all()
        assert made.values.isfinite().all()


SPEC = "adaptive:bits=16,min_length=8,window=8,spread=12,constant=0.2,lost_mass=0.5,follow=2,copying=0.9"


def test_a_cache_holds_them_in_the_places_of_evicted_entries():
    model = models.build("llama")
    ids = torch.randint(5, models.VOCAB, (1, 60), generator=torch.Generator().manual_seed(1))
    held = {}
    for count in (0, 3):
        with refreekv.compress(model, SPEC, stand_ins=count) as kv, torch.no_grad():
            model.generate(ids, max_new_tokens=4, do_sample=False)
        held[count] = [layer.rows[0] for layer in kv.report.layers]
    # Only the first layer sees the same in both runs.
    few, many = held[0][0].kept_heads, held[3][0].kept_heads
    assert many == tuple(n + min(3, 60 - n) for n in few)
    assert sum(many) > sum(few)
    for row in held[3]:
        assert 0 <= row.reasons["stand-ins"] <= 3 / 60
    assert "stand-ins" not in held[0][0].reasons


def test_a_later_turn_evicts_without_them():
    """What is left of the first turn is not written over; its stand-ins stay as all that it left."""
    model = models.build("llama")
    ids = torch.randint(5, models.VOCAB, (1, 90), generator=torch.Generator().manual_seed(2))
    cache = refreekv.ReFreeKVCache(model, SPEC, stand_ins=3)
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
        pruned = [layer for layer in cache.pruned_layers if layer.ragged is not None]
        assert pruned
        first = [(next(iter(layer.ragged.rows()))[0].clone(), layer.ragged.lengths[0]) for layer in pruned]
        model(ids[:, 50:], past_key_values=cache)
    for layer, (before, counts) in zip(pruned, first, strict=True):
        keys = next(iter(layer.ragged.rows()))[0]
        for head, count in enumerate(counts):
            kept, was = (part[head][part[head].abs().sum(-1) > 0] for part in (keys, before))
            assert torch.equal(kept[:count], was[:count])


def test_none_is_made_where_heads_share_a_set_or_none_is_asked_for():
    layer = random_layer(0, 40)[:3]
    scores = torch.zeros(1, 2)
    for changes, given in (({"shared": True}, scores), ({"stand_ins": 0}, scores), ({}, None)):
        policy = policies.create("adaptive", **{"min_length": 8, "window": 6, "constant": 0.4, **changes})
        assert policy.select(view_of(policy, *layer, scores=given)).surrogates is None
