"""The adaptive policy: against a slow twin, and what it promises."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refreekv
from helpers import models
from helpers.layers import random_layer, view_of
from refreekv import policies
from refreekv.core.neighbours import dilate, following, peak_level_of_share
from refreekv.core.quantisation import Ladder
from refreekv.engines.transformers.attachment import Attachment
from refreekv.engines.transformers.copy_scores import _KNOWN, copy_scores
from refreekv.policies import LayerView

SMALL = {"min_length": 8, "window": 6, "spread": 8, "constant": 0.15, "spread_factor": 2.0, "follow": 3, "hit": 0.6}


def made(**changes):
    return policies.create("adaptive", **{**SMALL, "lost_mass": 0.5, **changes})


# -- the slow twin ---------------------------------------------------------------------------------


def slow(policy, keys, queries, scores):
    """One row without padding, position by position in float64: ``[H_kv, n]``."""
    keys, queries = keys.double().numpy(), queries.double().numpy()
    heads, n, dim = queries.shape
    kv_heads = len(keys)
    group = heads // kv_heads
    keep = np.zeros((kv_heads, n), dtype=bool)
    unit = policy.constant * heads**0.5
    step = 1
    while n // step > policy.spread:
        step *= 2
    for kv_head in range(kv_heads):
        rows = {}
        for query in range(n):
            for head in range(kv_head * group, (kv_head + 1) * group):
                logits = keys[kv_head, : query + 1] @ queries[head, query] / dim**0.5
                weights = np.exp(logits - logits.max())
                rows[query, head] = weights / weights.sum()
        window = {key: row for key, row in rows.items() if key[0] >= n - policy.window}
        spread = {key: row for key, row in rows.items() if (key[0] + 1) % step == 0}

        def seen(rows, j, distance=0):
            return [row[j] for (query, _), row in rows.items() if query - distance >= j]

        peak = np.array([max(seen(window, j), default=0.0) for j in range(n)])
        mean = np.array([np.mean(seen(window, j) or [0.0]) for j in range(n)])
        far = np.array([max(seen(spread, j, policy.window), default=0.0) for j in range(n)])
        level = 1.0
        while mean[peak >= level].sum() < mean.sum() * (1 - policy.lost_mass):
            level /= 2
        for j in range(n):
            near = range(max(j - 1, 0), min(j + 2, n))
            keep[kv_head, j] = (
                j < policy.sinks
                or j >= n - policy.window
                or any(peak[i] >= unit or far[i] >= unit * policy.spread_factor for i in near)
                or any(peak[i] >= policy.hit for i in range(max(j - policy.follow, 0), j))
                or peak[j] >= level
                or scores[kv_head] >= policy.copying
            )
    return keep


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "changes", [{}, {"constant": 0.1, "lost_mass": 0.6}, {"spread": 64, "spread_factor": 3.0}, {"hit": 0.9, "sinks": 0}]
)
def test_against_the_slow_twin(seed, changes):
    policy = made(**changes)
    keys, values, queries, _ = random_layer(seed, n=30 + 7 * seed)
    scores = torch.tensor([[0.0, 0.3 if seed % 2 else 0.05]])
    selection = policy.select(view_of(policy, keys, values, queries, scores=scores))
    expected = np.stack([slow(policy, k, q, scores[0].tolist()) for k, q in zip(keys, queries, strict=True)])
    assert (selection.keep.numpy() == expected).all()
    if seed % 2 == 0:
        assert not expected.all(), "nothing was evicted: the test shows nothing"


def test_neighbours_by_hand():
    hits = torch.tensor([[0, 1, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    assert dilate(hits, 1).int().tolist() == [[1, 1, 1, 0, 0, 1, 1, 1]]
    assert dilate(hits, 0) is hits
    assert dilate(hits, 2).int().tolist() == [[1, 1, 1, 1, 1, 1, 1, 1]]
    assert dilate(hits[:, :2], 5).all()
    assert not dilate(hits[:, 2:6], 3).any()
    assert following(hits, 2).int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 1]]
    assert not following(hits, 0).any()
    peak = torch.tensor([0.9, 0.3, 0.2, 0.001])
    mass = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for share, level in [(0.0, 1.0), (0.4, 0.5), (0.75, 0.25), (0.9, 0.125), (1.0, 2.0**-10)]:
        assert peak_level_of_share(peak, mass, share).item() == level
    # Positions without any attention belong to no level: nothing under the lowest is refused.
    assert peak_level_of_share(torch.zeros(3), torch.ones(3), 1.0).item() == 0.0


# -- what it promises ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 90),
    constants=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    pads=st.integers(0, 30),
)
def test_a_stricter_constant_never_keeps_less_and_the_protected_stay(seed, n, constants, pads):
    keys, values, queries, valid = random_layer(seed, n, pads=(min(pads, n - 1), 0))
    real = torch.ones(2, n, dtype=torch.bool) if valid is None else valid
    kept = []
    for constant in sorted(constants):
        policy = made(constant=constant)
        selection = policy.select(view_of(policy, keys, values, queries, valid, torch.zeros(1, 2)))
        keep = real[:, None].expand(2, 2, n) if selection is None else selection.keep & real[:, None]
        kept.append(keep)
        protected = real & ((real.cumsum(1) <= policy.sinks) | (real.flip(1).cumsum(1).flip(1) <= policy.window))
        assert (keep | ~protected[:, None]).all()
        short = real.sum(1) < policy.min_length
        assert torch.equal(keep[short], real[short][:, None].expand(-1, 2, -1))
    assert (kept[0] | ~kept[1]).all()


CODED = Ladder.of("k4v2", "k4v4", "k6v4", "k7v6").forms((16, 16), sorted_keys=False)


def coded_view(policy, seed, n):
    keys, values, queries, valid = random_layer(seed, n)
    view = view_of(policy, keys, values, queries, valid, torch.zeros(1, 2))
    return dataclasses.replace(view, forms=CODED)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6), n=st.integers(8, 90), constants=st.tuples(st.floats(0.001, 0.5), st.floats(0.001, 0.5))
)
def test_a_stricter_constant_never_gives_fewer_bits_and_none_are_the_fewest(seed, n, constants):
    given_bits = []
    for constant in sorted(constants):
        selection = made(constant=constant).select(coded_view(made(constant=constant), seed, n))
        given_bits.append(torch.where(selection.keep, selection.levels.int() + 1, 0))
    assert (given_bits[0] >= given_bits[1]).all()


@pytest.mark.parametrize("seed", range(4))
def test_where_entries_are_coded_dropping_one_may_do_less(seed):
    """As much as ``evict_unit`` of the constant drops in 16 bits; what codes may do is asked of the constant itself."""
    coded = made(constant=0.2)
    sixteen = made(constant=coded.constant * coded.evict_unit)
    kept = coded.select(coded_view(coded, seed, 80))
    plain = sixteen.select(dataclasses.replace(coded_view(sixteen, seed, 80), forms=()))
    assert torch.equal(kept.keep, plain.keep)
    assert plain.levels is None
    looser = made(constant=0.2, evict_unit=1.0)
    found = looser.select(coded_view(looser, seed, 80))
    assert torch.equal(found.levels, kept.levels)
    assert (kept.keep | ~found.keep).all()
    assert found.keep.sum() < kept.keep.sum()


@pytest.mark.parametrize("n", [40, 80])
def test_in_short_prompts_coding_may_do_less_in_proportion(n):
    """As with a smaller ``code_unit``, and what is kept does not change; longer ones than ``code_length`` are alike."""

    def selected(**changes):
        policy = made(constant=0.004, **changes)
        return policy.select(coded_view(policy, 3, n))

    always = selected(code_length=0)
    assert len(always.levels.unique()) > 2
    for length in (1, n - 1, n):
        assert torch.equal(selected(code_length=length).levels, always.levels)
    fourth = selected(code_length=4 * n)
    assert torch.equal(fourth.levels, selected(code_length=0, code_unit=made().code_unit / 4).levels)
    assert torch.equal(fourth.keep, always.keep)
    assert (fourth.levels >= always.levels).all()
    assert not torch.equal(fourth.levels, always.levels)


def test_each_row_counts_its_own_length():
    policy, scores = made(constant=0.02, code_length=300), torch.zeros(1, 2)
    layers = [random_layer(seed, n, batch=1)[:3] for seed, n in ((1, 30), (2, 90))]
    alone = [
        policy.select(dataclasses.replace(view_of(policy, *layer, scores=scores), forms=CODED)).levels
        for layer in layers
    ]
    assert all(len(levels.unique()) > 1 for levels in alone)
    padded = [torch.cat([torch.nn.functional.pad(a, (0, 0, 60, 0)), b]) for a, b in zip(*layers, strict=True)]
    valid = torch.arange(90) >= torch.tensor([[60], [0]])
    together = policy.select(dataclasses.replace(view_of(policy, *padded, valid, scores), forms=CODED)).levels
    assert torch.equal(together[0, :, 60:], alone[0][0])
    assert torch.equal(together[1], alone[1][0])
    # Heads that an earlier turn left with fewer entries: the fullest one counts, told either way.
    view = coded_view(policy, 2, 90)
    fewer = torch.arange(90) >= torch.tensor([[[20], [50]]] * 2)
    heads = dataclasses.replace(view, valid=fewer)
    assert heads.lengths.tolist() == [70.0, 70.0]
    assert dataclasses.replace(heads, origins=torch.tensor([[20, 50]], dtype=torch.int32)).lengths.tolist() == [70.0]
    assert view.lengths == 90


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 70), pads=st.integers(1, 20))
def test_neighbours_in_the_batch_and_padding_change_nothing(seed, n, pads):
    policy = made()
    keys, values, queries, _ = random_layer(seed, n, batch=1)
    scores = torch.tensor([[0.0, 0.05]])
    alone = policy.select(view_of(policy, keys, values, queries, scores=scores))
    other = random_layer(seed + 1, n + pads, batch=1)
    padded = [
        torch.cat([torch.nn.functional.pad(a, (0, 0, pads, 0)), b])
        for a, b in zip((keys, values, queries), other[:3], strict=True)
    ]
    valid = torch.ones(2, n + pads, dtype=torch.bool)
    valid[0, :pads] = False
    together = policy.select(view_of(policy, *padded, valid, scores))
    if alone is None:
        assert together is None or together.keep[0, :, pads:].all()
    else:
        assert torch.equal(together.keep[0, :, pads:], alone.keep[0])


def test_padding_between_two_turns_is_no_distance():
    policy = made(follow=2, hit=0.2)
    keys, values, queries, _ = random_layer(5, 40, batch=1, sharp=3.0)
    apart = [
        torch.cat([part[:, :, :20], part.new_zeros(1, part.shape[1], 7, 6), part[:, :, 20:]], 2)
        for part in (keys, values, queries)
    ]
    valid = torch.ones(1, 47, dtype=torch.bool)
    valid[:, 20:27] = False
    # The same distances in columns for both, so that the spread queries count for the same positions.
    alone = policy.select(
        view_of(dataclasses.replace(policy, spread=1), keys, values, queries, scores=torch.zeros(1, 2))
    )
    both = policy.select(view_of(dataclasses.replace(policy, spread=1), *apart, valid, torch.zeros(1, 2)))
    assert torch.equal(both.keep[:, :, valid[0]], alone.keep)


def test_flat_rows_one_token_rows_and_masked_rows():
    policy = made(lost_mass=0.0)
    keys, values, queries, _ = random_layer(0, 40)
    flat = policy.select(view_of(policy, keys, values, torch.zeros_like(queries), scores=torch.zeros(1, 2)))
    assert flat.keep.all(), "all positions are alike: none may go where no mass may"
    valid = torch.zeros(2, 40, dtype=torch.bool)
    valid[0, -1] = valid[1, -20:] = True
    selection = policy.select(view_of(policy, keys, values, queries, valid, torch.zeros(1, 2)))
    assert selection.keep[0, :, -1].all()
    assert not torch.isnan(selection.metric).any()
    assert not any(torch.isnan(share).any() for share in selection.reasons.values())


def test_constant_zero_and_short_prompts_ask_for_nothing():
    assert made(constant=0).probe_plan(10_000).count == 0
    assert made().probe_plan(7).count == 0
    assert made().select(LayerView(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), None, None, 0, 1)) is None


def test_what_copies_is_kept_whole_and_without_scores_heads_share():
    keys, values, queries, _ = random_layer(3, 60)
    policy = made(constant=0.2, lost_mass=0.9)
    scored = policy.select(view_of(policy, keys, values, queries, scores=torch.tensor([[0.0, 0.2]])))
    assert scored.keep[:, 1].all()
    assert not scored.keep[:, 0].all()
    blind = policy.select(view_of(policy, keys, values, queries))
    assert torch.equal(blind.keep[:, 0], blind.keep[:, 1])
    assert not blind.keep.all()
    one = dataclasses.replace(policy, shared=True).select(
        view_of(policy, keys, values, queries, scores=torch.zeros(1, 2))
    )
    each = policy.select(view_of(policy, keys, values, queries, scores=torch.zeros(1, 2)))
    assert one.keep.shape[1] == 1
    assert torch.equal(one.keep[:, 0], each.keep.any(1))


def test_what_an_earlier_turn_left_stays():
    policy = made(constant=0.4, lost_mass=0.9, follow=0)
    keys, values, queries, _ = random_layer(4, 50, batch=1)
    earlier = (torch.arange(50) < 20)[None, None]
    kept = policy.select(view_of(policy, keys, values, queries, scores=torch.zeros(1, 2), earlier=earlier))
    assert kept.keep[..., :20].all()
    free = policy.select(view_of(policy, keys, values, queries, scores=torch.zeros(1, 2)))
    assert not free.keep[..., :20].all()


# -- in a model ------------------------------------------------------------------------------------


def induction_model():
    """A two-layer model that copies by construction is more than a test needs: one head is made to look back."""
    torch.manual_seed(0)
    return models.build("llama")


def test_copy_scores_are_measured_once_and_anew_for_new_weights():
    model = induction_model()
    attachment = Attachment.attach(model)
    try:
        before = copy_scores(model)
        assert copy_scores(model) is before
        assert len(before) == len(models.full_layers(model))
        assert all(((score >= 0) & (score <= 1)).all() for score in before)
        with torch.no_grad():
            next(model.parameters()).mul_(2.0)
        assert copy_scores(model) is not before
    finally:
        attachment.detach()
    assert model in _KNOWN


def test_compress_measures_only_for_prompts_that_are_pruned():
    model = induction_model()
    policy = policies.create("adaptive", min_length=20, window=4, constant=0.05, bits=16)
    with refreekv.compress(model, policy):
        model.generate(torch.arange(1, 11)[None], max_new_tokens=2, do_sample=False)
        assert model not in _KNOWN
        model.generate(torch.arange(1, 31)[None], max_new_tokens=2, do_sample=False)
        assert model in _KNOWN


def test_the_report_says_why():
    model = induction_model()
    ids = torch.randint(5, models.VOCAB, (1, 60), generator=torch.Generator().manual_seed(1))
    policy = policies.create("adaptive", min_length=20, window=4, constant=0.2, lost_mass=0.9, hit=0.9)
    with refreekv.compress(model, policy) as kv:
        model.generate(ids, max_new_tokens=2, do_sample=False)
    reasons = kv.report.reasons
    assert reasons["recent"] == pytest.approx(4 / 60)
    assert reasons["sinks"] == pytest.approx(4 / 60)
    assert "kept for: sinks" in str(kv.report)
    assert kv.report.to_dict()["reasons"] == reasons
    assert 0 < kv.report.budget < 1


def test_chunks_and_whole_prompts_keep_the_same():
    model = induction_model()
    ids = torch.randint(5, models.VOCAB, (1, 64), generator=torch.Generator().manual_seed(2))
    policy = policies.create("adaptive", min_length=20, window=4, spread=8, constant=0.1, lost_mass=0.9)
    kept = []
    for chunk in (None, 7, 16):
        cache = refreekv.ReFreeKVCache(model, policy)
        extra = {} if chunk is None else {"prefill_chunk_size": chunk}
        model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False, **extra)
        kept.append(cache.kept_ranges())
    assert kept[0] == kept[1] == kept[2]


# -- long answers ----------------------------------------------------------------------------------


def test_generated_tokens_are_pruned_where_asked_for():
    model = induction_model()
    ids = torch.randint(5, models.VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))
    policy = policies.create("adaptive", min_length=20, window=8, spread=8, constant=0.3, lost_mass=0.9, follow=0)
    held = {}
    for interval in (None, 16):
        cache = refreekv.ReFreeKVCache(model, policy, decode_interval=interval)
        model.generate(ids, past_key_values=cache, max_new_tokens=100, min_new_tokens=100, do_sample=False)
        prompt = [
            [sum(min(stop, 40) - start for start, stop in head if start < 40) for head in layer]
            for layer in cache.kept_ranges()
        ]
        held[interval] = (prompt, cache.report.bytes_after, cache.get_seq_length())
    assert held[None][2] == held[16][2] == 139
    assert held[None][0] == held[16][0], "the prompt's entries stay as they were"
    assert held[16][1] < 0.7 * held[None][1]


def test_an_interval_that_keeps_everything_changes_no_token():
    model = induction_model()
    ids = torch.randint(5, models.VOCAB, (1, 40), generator=torch.Generator().manual_seed(4))
    policy = policies.create("adaptive", min_length=20, window=4, constant=1e-9, lost_mass=0.0)
    outputs = []
    for interval in (None, 5):
        with refreekv.compress(model, policy, decode_interval=interval):
            outputs.append(model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False))
    assert torch.equal(*outputs)


def test_an_interval_must_be_a_number_of_tokens():
    with pytest.raises(ValueError, match="decode_interval must be an integer >= 1"):
        refreekv.ReFreeKVCache(induction_model(), decode_interval=0)
