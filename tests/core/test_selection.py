"""The vectorised Uni-Metric against its slow NumPy twin (issue: the cut, exactly)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import numpy_reference as slow
from refreekv.core.scores import attention_received, mean_over_visible_rows
from refreekv.core.selection import sink_mask, uni_metric_cut, uni_metric_keep

THRESHOLDS = st.one_of(st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.3, 0.9]), st.floats(1e-4, 0.99, allow_nan=False))


def softmax_rows(rng, heads, n, sharpness):
    logits = rng.normal(size=(heads, n)) * sharpness
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def near_threshold(rows, sinks, threshold, includes_sinks, *cuts):
    """Whether rounding may decide: the loss at one of the cuts is within rounding of the threshold."""
    n = rows.shape[1]
    ranking = slow.ranked_positions(n, sinks)
    for cut in cuts:
        for neighbour in (cut, cut + 1):
            i = min(sinks, n) + n - neighbour
            loss = slow.loss_of_prefix(rows.astype(np.float64), ranking, i, sinks, includes_sinks)
            if loss is not None and abs(loss - threshold) < 1e-9:
                return True
    return False


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 6),
    n=st.integers(1, 60),
    sinks=st.integers(0, 12),
    threshold=THRESHOLDS,
    includes_sinks=st.booleans(),
    sharpness=st.sampled_from([0.0, 1.0, 4.0, 30.0]),
    ties=st.booleans(),
)
def test_cut_equals_the_slow_twin(seed, heads, n, sinks, threshold, includes_sinks, sharpness, ties):
    rows = softmax_rows(np.random.default_rng(seed), heads, n, sharpness)
    if ties:
        rows = np.round(rows * 8) / 8  # many equal values and zeros
    expected = slow.cut(rows, sinks, threshold, includes_sinks)
    got, _ = uni_metric_cut(
        torch.from_numpy(rows)[None], sinks=sinks, threshold=threshold, includes_sinks=includes_sinks
    )
    got = got.item()
    assert got == expected or near_threshold(rows, sinks, threshold, includes_sinks, got, expected)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(100, 5000),
    sinks=st.integers(0, 64),
    threshold=THRESHOLDS,
    includes_sinks=st.booleans(),
    sharpness=st.sampled_from([0.5, 3.0, 8.0]),
)
def test_cut_equals_the_slow_twin_on_long_prompts(seed, n, sinks, threshold, includes_sinks, sharpness):
    rows = softmax_rows(np.random.default_rng(seed), 4, n, sharpness)
    expected = slow.cut_fast(rows, sinks, threshold, includes_sinks)
    got, _ = uni_metric_cut(
        torch.from_numpy(rows)[None], sinks=sinks, threshold=threshold, includes_sinks=includes_sinks
    )
    got = got.item()
    assert got == expected or near_threshold(rows, sinks, threshold, includes_sinks, got, expected)


def test_both_twins_agree():
    rng = np.random.default_rng(5)
    for n in (1, 3, 4, 5, 40):
        for includes_sinks in (False, True):
            rows = softmax_rows(rng, 3, n, 3.0)
            assert slow.cut(rows, 4, 0.05, includes_sinks) == slow.cut_fast(rows, 4, 0.05, includes_sinks)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), threshold=THRESHOLDS, includes_sinks=st.booleans())
def test_padding_is_neither_sink_nor_norm(seed, threshold, includes_sinks):
    """A padded batch cuts each row where the row alone is cut, counted from its first real token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, size=4)
    width = int(lengths.max())
    rows = np.full((4, 3, width), 7.0, dtype=np.float32)  # padding holds what would ruin the norm
    valid = np.zeros((4, width), dtype=bool)
    for b, length in enumerate(lengths):
        rows[b, :, width - length :] = softmax_rows(rng, 3, length, 4.0)
        valid[b, width - length :] = True
    arguments = {"sinks": 4, "threshold": threshold, "includes_sinks": includes_sinks}
    together, loss = uni_metric_cut(torch.from_numpy(rows), valid=torch.from_numpy(valid), **arguments)
    for b, length in enumerate(lengths):
        alone, alone_loss = uni_metric_cut(torch.from_numpy(rows[b : b + 1, :, width - length :]), **arguments)
        assert together[b].item() - (width - length) == alone.item()
        assert loss[b].item() == pytest.approx(alone_loss.item(), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 80), includes_sinks=st.booleans())
def test_a_stricter_threshold_never_keeps_less(seed, n, includes_sinks):
    rows = torch.from_numpy(softmax_rows(np.random.default_rng(seed), 4, n, 4.0))[None]
    cuts = [
        uni_metric_cut(rows, sinks=4, threshold=t, includes_sinks=includes_sinks)[0].item()
        for t in (0.0, 0.001, 0.01, 0.1, 0.5, 0.95)
    ]
    assert cuts == sorted(cuts)
    assert cuts[0] == min(4, n)


@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_rows_without_a_usable_norm_keep_everything(broken):
    rows = torch.full((2, 3, 20), broken)
    rows[1] = torch.softmax(torch.randn(3, 20), -1)
    cut, _ = uni_metric_cut(rows, sinks=4, threshold=0.5, includes_sinks=False)
    assert cut[0] == 4
    assert cut[1] > 4


def test_loss_is_the_loss_at_the_cut():
    rows = softmax_rows(np.random.default_rng(1), 4, 50, 3.0)
    for includes_sinks in (False, True):
        cut, loss = uni_metric_cut(torch.from_numpy(rows)[None], sinks=4, threshold=0.1, includes_sinks=includes_sinks)
        kept = 4 + 50 - cut.item()
        expected = slow.loss_of_prefix(rows.astype(np.float64), slow.ranked_positions(50, 4), kept, 4, includes_sinks)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert 0 < loss.item() <= 0.1


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 2.0, float("nan")])
def test_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\)"):
        uni_metric_cut(torch.ones(1, 1, 4), sinks=1, threshold=threshold, includes_sinks=False)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    group=st.integers(1, 3),
    sinks=st.integers(0, 6),
    recent=st.integers(0, 10),
    threshold=THRESHOLDS,
    includes_sinks=st.booleans(),
    ties=st.booleans(),
)
def test_heavy_hitters_equal_the_slow_twin(seed, n, group, sinks, recent, threshold, includes_sinks, ties):
    rng = np.random.default_rng(seed)
    rows = softmax_rows(rng, 2 * group, n, 3.0)
    scores = softmax_rows(rng, 2, n, 3.0)
    if ties:
        scores = np.round(scores * 4) / 4
    keep, _ = uni_metric_keep(
        torch.from_numpy(rows)[None],
        torch.from_numpy(scores)[None],
        sinks=sinks,
        recent=recent,
        threshold=threshold,
        includes_sinks=includes_sinks,
        valid=torch.ones(1, n, dtype=torch.bool),
    )
    expected = slow.heavy_hitters(rows, scores, sinks, recent, threshold, includes_sinks)
    got = [keep[0, head].nonzero()[:, 0].tolist() for head in range(2)]
    assert got == expected


def test_mean_over_visible_rows_equals_the_slow_twin():
    rng = np.random.default_rng(3)
    for n, k in [(1, 1), (6, 3), (6, 6), (40, 8)]:
        rows = rng.random((2, k, n))
        visible = np.tril(np.ones((n, n), dtype=bool))[n - k :]
        rows[:, ~visible] = 0.0
        got = mean_over_visible_rows(torch.from_numpy(rows)[None], torch.from_numpy(visible)[None])[0]
        np.testing.assert_allclose(got.numpy(), slow.mean_of_visible_rows(rows), rtol=1e-12)


def test_attention_received_adds_up_the_query_group():
    rows = torch.rand(2, 6, 3, 5)
    expected = torch.stack([rows[:, :3].sum((1, 2)), rows[:, 3:].sum((1, 2))], dim=1)
    torch.testing.assert_close(attention_received(rows, kv_heads=2), expected)


def test_sinks_are_the_first_real_positions():
    valid = torch.tensor([[False, True, True, True], [True, True, True, True], [False, False, False, True]])
    assert sink_mask(valid, 2).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
        [False, False, False, True],
    ]
