"""The peer policies: against slow twins, by hand, and what they promise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.peer_reference import FREE, JOINT, SLOW, Held, make, spread
from refreekv import policies
from refreekv.core import scores as core_scores
from refreekv.core.budget import fill_evenly
from refreekv.core.probes import attention_rows, causal_visibility
from refreekv.policies import LayerView, ProbePlan
from refreekv.pruning.calls import AttentionCall, Entries, Queries
from refreekv.pruning.decide import decide, layer_view

FIXED = [name for name in SLOW if name not in FREE]
ROOT = Path(__file__).parents[1]


# -- against the slow twins -----------------------------------------------------------------------

PARAMETERS = {
    "h2o": [{}, {"queries": 5, "recent_share": 0.3}, {"queries": 3, "recent_share": 0.0}],
    "snapkv": [
        {},
        {"window": 4, "kernel": 7},
        {"window": 3, "kernel": 3, "pooling": "max"},
        {"window": 8, "kernel": 1},
    ],
    "pyramidkv": [{"window": 2, "beta": 4.0}, {"window": 1, "pooling": "max"}, {"beta": 1.0, "window": 5}],
    "tova": [{}],
    "knorm": [{}, {"recent": 0}, {"recent": 5}],
    "keydiff": [{}, {"recent": 0}, {"recent": 5}],
    "expected-attention": [{}, {"window": 6, "sinks": 2}, {"window": 1, "sinks": 0, "epsilon": 0.1}],
    "ada-kv": [{"window": 4}, {"window": 2, "safeguard": 0.5, "kernel": 3}, {"window": 3, "safeguard": 0.0}],
    "gvote": [{}, {"p": 0.7, "window": 6}, {"p": 0.3, "samples": 2, "window": 1}, {"samples": 3, "seed": 7}],
    "top-p": [{}, {"p": 0.5, "window": 3}, {"p": 0.9, "window": 1}, {"p": 0.05, "window": 6}],
}
CASES = [(name, settings) for name, cases in PARAMETERS.items() for settings in cases]
BUDGETS = [{"ratio": 0.5}, {"ratio": 0.29}, {"ratio": 0.001}, {"size": 1}, {"size": 3}, {"size": 11}, {"size": 1000}]


def random_layer(seed, n, batch=3, heads=6, kv_heads=2, dim=5, uneven=False):
    """What a layer holds of a batch: left padding, padding between turns, and, if uneven, heads of their own length."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, kv_heads, n, dim, generator=generator)
    values = torch.randn(batch, kv_heads, n, dim, generator=generator)
    turn = int(torch.randint(1, n + 1, (), generator=generator)) if n > 1 else 1
    queries = 3 * torch.randn(batch, heads, turn, dim, generator=generator)
    valid = torch.ones(batch, n, dtype=torch.bool)
    for row in range(1, batch):
        pads = int(torch.randint(0, n, (), generator=generator))
        valid[row, :pads] = False  # the last token is always real
        if pads < n - turn < n - 1:
            valid[row, n - turn] = False
    if uneven:
        valid = valid[:, None].repeat(1, kv_heads, 1)
        for row in range(batch):
            own = int(torch.randint(0, max(1, n - turn), (), generator=generator))
            valid[row, row % kv_heads, :own] = False
    return keys, values, valid, queries


def asked_of(layer):
    """The attention call and the entries that the library would see."""
    keys, values, valid, states = layer
    n, turn = keys.shape[2], states.shape[2]
    shared = valid.any(1) if valid.dim() == 3 else valid
    queries = Queries.of_call(states, n - turn, shared)
    return AttentionCall(states, None, scaling=0.7), Entries(keys, values, valid, torch.arange(n), queries)


def view_of(policy, layer, where=(2, 5)):
    return layer_view(policy.probe_plan(layer[0].shape[2]), *asked_of(layer), *where)


def fast_kept(policy, layer, where=(2, 5)):
    """What the library keeps, ``[row][kv head]`` sets of columns, through probe, selection and checks."""
    keys = layer[0]
    kept = [row.columns.tensors(keys.device) for row in decide(policy, *asked_of(layer), *where).rows()]
    return [[set(heads[g % len(heads)].tolist()) for g in range(keys.shape[1])] for heads in kept]


def case_of(layer, row, where=(2, 5)):
    """One row as the slow twins see it, and the columns of each KV head's entries."""
    keys, values, valid, states = (t.double().numpy() if t.is_floating_point() else t.numpy() for t in layer)
    _, kv_heads, n, _ = keys.shape
    real = [valid[row, g] if valid.ndim == 3 else valid[row] for g in range(kv_heads)]
    own = [np.flatnonzero(r) for r in real]
    anyone = np.logical_or.reduce(real)
    at = [i for i in range(states.shape[2]) if anyone[n - states.shape[2] + i]]
    columns = np.array(at) + n - states.shape[2]
    case = Held(
        keys=[keys[row, g, o] for g, o in enumerate(own)],
        values=[values[row, g, o] for g, o in enumerate(own)],
        queries=list(states[row][:, at] * 0.7),
        seen=[o <= columns[:, None] for o in own],
        layer=where[0],
        layers=where[1],
    )
    return case, own


def slow_kept(name, parameters, layer, where=(2, 5)):
    cases = [case_of(layer, row, where) for row in range(layer[0].shape[0])]
    return [
        [set(o[k].tolist()) for o, k in zip(own, SLOW[name](case, **parameters), strict=True)] for case, own in cases
    ]


def without_ties(layer, kept):
    """Two keys make the same angle with their mean direction: either may be the one to keep."""
    real = layer[2] if layer[2].dim() == 3 else layer[2][:, None].expand(-1, layer[0].shape[1], -1)
    two = (real.sum(-1) == 2).tolist()
    return [
        [set(range(len(k))) if pair else k for k, pair in zip(*row, strict=True)] for row in zip(kept, two, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "chosen", "uneven"),
    # The heads of tova share one set: they never become uneven.
    [(*case, uneven) for case in CASES for uneven in (False, True) if case[0] != "tova" or not uneven],
    ids=lambda v: str(list(v.values())) if isinstance(v, dict) else {False: "even", True: "uneven"}.get(v, v),
)
def test_kept_sets_are_those_of_the_slow_twin(name, chosen, uneven):
    lost = False
    for seed, n in enumerate([1, 2, 3, 7, 16, 33, 50, 90]):
        layer = random_layer(seed, n, uneven=uneven)
        for budget in [{}] if name in FREE else BUDGETS:
            parameters = {**chosen, **budget}
            wanted = slow_kept(name, parameters, layer)
            got = fast_kept(make(name, parameters), layer)
            if name == "keydiff" and not chosen.get("recent", 1):
                got, wanted = without_ties(layer, got), without_ties(layer, wanted)
            assert got == wanted, (seed, n, budget)
            lost |= any(len(head) < n // 2 for row in wanted for head in row)
    assert lost


@pytest.mark.parametrize("where", [(0, 5), (1, 5), (4, 5), (0, 1)])
def test_the_pyramid_by_hand(where):
    """n = 100, mean 40, window 4, beta 10: 76 in the first layer, 4 in the last, steps of 18."""
    layer = random_layer(0, 100, batch=1)
    kept = fast_kept(policies.create("pyramidkv", size=40, window=4, beta=10.0), layer, where)
    expected = {(0, 5): 76, (1, 5): 58, (4, 5): 4, (0, 1): 40}[where]
    assert [len(head) for head in kept[0]] == [expected, expected]


def hand_view(rows, kv_heads=1, **given):
    rows = torch.tensor(rows, dtype=torch.float32)[None]
    keys = torch.zeros(1, kv_heads, rows.shape[-1], 2)
    return LayerView(keys, keys, None, rows, given.get("layer", 0), given.get("layers", 1))


def positions(selection):
    return [head.nonzero()[:, 0].tolist() for head in selection.keep[0]]


def test_snapkv_by_hand():
    """The window is the last two; pooling by 3 lifts 0 and 2 beside the peak at 1 above the lone 5."""
    view = hand_view([[[0.0, 0.6, 0.0, 0.0, 0.0, 0.15, 0.0, 0.25, 0.0], [0.0, 0.6, 0.0, 0.0, 0.0, 0.1, 0.0, 0.1, 0.2]]])
    assert positions(policies.create("snapkv", size=5, window=2, kernel=3).select(view)) == [[0, 1, 2, 7, 8]]
    assert positions(policies.create("snapkv", size=4, window=2, kernel=1).select(view)) == [[1, 5, 7, 8]]
    assert positions(policies.create("snapkv", size=1, window=2).select(view)) == [[8]]


def test_h2o_tova_and_top_p_by_hand():
    rows = [
        [[0.5, 0.5, 0.0, 0.0, 0.0], [0.1, 0.0, 0.6, 0.2, 0.1]],
        [[0.0, 0.9, 0.1, 0.0, 0.0], [0.5, 0.1, 0.1, 0.3, 0.0]],
    ]
    view = hand_view(rows)
    assert positions(policies.create("h2o", size=3).select(view)) == [[0, 1, 4]]  # received: 1.1 1.5 .8 .5 .1
    assert positions(policies.create("tova", size=3).select(view)) == [[0, 2, 4]]  # last query: .3 .05 .35 .25 .05
    view = hand_view(rows, kv_heads=2)  # received: .6 .5 .6 .2 .1 and .5 1 .2 .3 0
    assert positions(policies.create("top-p", p=0.59, window=1).select(view)) == [[0, 2, 4], [0, 1, 4]]
    assert positions(policies.create("top-p", p=0.61, window=1).select(view)) == [[0, 1, 2, 4], [0, 1, 4]]
    metric = policies.create("top-p", p=0.61, window=1).select(view).metric
    torch.testing.assert_close(metric, torch.tensor([(0.2 / 2 + 0.5 / 2) / 2]))


def test_ada_kv_by_hand():
    """A peaked head beside a flat one: both are sure of a part, the rest goes to the larger scores."""
    rows = [[[0.4, 0.3, 0.2, 0.05, 0.05]], [[0.21, 0.2, 0.19, 0.2, 0.2]]]
    view = hand_view(rows, kv_heads=2)
    scorer = policies.create("snapkv", size=1, window=1, kernel=1)
    keep = policies.create("ada-kv", size=3, scorer=scorer, safeguard=0.0).select(view)
    assert positions(keep) == [[0, 1, 4], [0, 3, 4]]  # .2 of the flat head's 3 comes after .2 of its 1, as newer
    keep = policies.create("ada-kv", size=3, scorer="tova", safeguard=1.0).select(view)
    assert positions(keep) == [[0, 1, 4], [0, 1, 4]]


def test_norms_by_hand():
    keys = torch.tensor([[3.0, 0.0], [0.5, 0.0], [2.0, 0.1], [0.0, 1.0], [4.0, 0.0]])[None, None]
    view = LayerView(keys, keys, None, None, 0, 1)
    assert positions(policies.create("knorm", size=2, recent=0).select(view)) == [[1, 3]]
    assert positions(policies.create("knorm", size=2).select(view)) == [[1, 4]]
    assert positions(policies.create("keydiff", size=1, recent=0).select(view)) == [[3]]


def test_expected_attention_is_the_mean_over_many_queries():
    """The closed form against a Monte Carlo estimate of E[exp(q k)]."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 2, 20000, 4, generator=generator) * 0.5 + 0.3
    keys = torch.randn(1, 1, 6, 4, generator=generator)
    got = core_scores.expected_attention(queries, keys, real=torch.ones(1, 1, 6, dtype=torch.bool))
    sampled = (queries @ keys.transpose(-1, -2)).exp().mean(2)
    torch.testing.assert_close(got, (sampled / sampled.sum(-1, keepdim=True)).mean(1, keepdim=True), rtol=0.05, atol=0)


def test_expected_attention_in_chunks(monkeypatch):
    layer = random_layer(3, 50)
    policy = policies.create("expected-attention", ratio=0.5)
    whole = fast_kept(policy, layer)
    monkeypatch.setattr(core_scores, "EXPECTED_CHUNK", 7)
    assert fast_kept(policy, layer) == whole


# -- all layers together ---------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{}, {"window": 4, "tau1": 0.5, "gamma": 0.0}, {"window": 2, "tau2": 3.0}], ids=str)
@pytest.mark.parametrize(
    "budget", [{"ratio": 0.5}, {"ratio": 0.05}, {"size": 3}, {"size": 21}, {"size": 1000}], ids=str
)
def test_cake_is_that_of_the_slow_twin(chosen, budget):
    policy = policies.create("cake", **chosen, **budget)
    for n in (1, 5, 40, 90):
        first, *others = [random_layer(seed, n, heads=2 + 2 * (seed % 2)) for seed in range(4)]
        # Layers of one prompt share its padding and its last turn. Mild queries: where one key has nearly all
        # the attention, what is pooled around it is equal but for rounding.
        turn, generator = first[3].shape[2], torch.Generator().manual_seed(n)
        first = (*first[:3], 0.2 * first[3])
        layers = [first] + [
            (keys, values, first[2], 0.3 * (seed + 1) * torch.randn(3, states.shape[1], turn, 5, generator=generator))
            for seed, (keys, values, _, states) in enumerate(others)
        ]
        noted, cases = [], []
        for layer in layers:
            cases.append([case_of(layer, row) for row in range(3)])
            noted.append(policy.examine(view_of(policy, layer)).rows())
        for row in range(3):
            wanted = JOINT["cake"]([case[row][0] for case in cases], **chosen, **budget)
            got = policy.allot([notes[row] for notes in noted])
            for selection, masks, case in zip(got, wanted, cases, strict=True):
                for g, (mask, own) in enumerate(zip(masks, case[row][1], strict=True)):
                    assert selection.keep[0, g].nonzero()[:, 0].tolist() == own[mask].tolist()


@settings(deadline=None)
@given(st.data())
def test_filling_evenly(data):
    count = data.draw(st.integers(1, 8))
    numbers = st.lists(st.integers(0, 50), min_size=count, max_size=count)
    wanted, room = data.draw(numbers), data.draw(numbers)
    total = sum(wanted) + data.draw(st.integers(0, 200))
    expected = [min(w, r) for w, r in zip(wanted, room, strict=True)]
    while sum(expected) < total and (able := [at for at in range(count) if expected[at] < room[at]]):
        for at in able[: total - sum(expected)]:
            expected[at] += 1
    got = fill_evenly(torch.tensor(wanted), torch.tensor(room), torch.tensor(total))
    assert got.tolist() == expected


def test_joint_policies_refuse_one_layer_alone():
    policy = policies.create("cake", ratio=0.5)
    with pytest.raises(ValueError, match="'cake' decides about all layers together"):
        policy.select(view_of(policy, random_layer(0, 20)))


# -- which queries are probed ----------------------------------------------------------------------


@pytest.mark.parametrize("plan", [ProbePlan(spread=4), ProbePlan(rows=3, spread=5), ProbePlan(spread=1), ProbePlan(2)])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_planned_queries_do_not_depend_on_chunks_or_padding(plan, chunk):
    lengths, longest = (41, 18, 3), 41
    valid = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    states = torch.arange(longest, dtype=torch.float32).expand(3, 2, longest)[..., None]
    earlier = None
    for start in range(0, longest, chunk):
        piece = states[:, :, start : start + chunk]
        call = Queries.of_call(piece, start, valid[:, : start + chunk], earlier)
        kept = ProbePlan(max(plan.rows, 1), plan.spread)
        earlier, everything = call.planned(kept).after(earlier).planned(kept), call.after(earlier)
    got = everything.planned(plan)
    for row, length in enumerate(lengths):
        ordinals = set(range(length)[length - plan.rows :] if plan.rows else ())
        ordinals |= set(spread(length, plan.spread)) if plan.spread else set()
        expected = [i + longest - length for i in sorted(ordinals)]
        real = got.real[row]
        assert got.columns[row][real].tolist() == expected
        assert got.states[row, 0, real, 0].tolist() == expected
        assert len(real) <= plan.count
    alone = Queries.of_call(states[:1], 0, None).planned(plan)
    shown = slice(None) if alone.real is None else alone.real[0]
    assert alone.columns[0][shown].tolist() == got.columns[0][got.real[0]].tolist()


# -- parameters and promises -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
def test_budgets_are_checked(name):
    for parameters in ({}, {"size": 4, "ratio": 0.5}):
        with pytest.raises(ValueError, match=f"{name} needs a budget: give exactly one"):
            policies.create(name, **parameters)
    for parameters, message in [({"ratio": 0.0}, r"\(0, 1\]"), ({"ratio": 1.1}, r"\(0, 1\]"), ({"size": 0}, "size")]:
        with pytest.raises(ValueError, match=message):
            policies.create(name, **parameters)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h2o:size=4,recent_share=1.5", "recent_share"),
        ("h2o:size=4,queries=0", "queries"),
        ("snapkv:size=4,window=0", "window"),
        ("snapkv:size=4,kernel=4", "kernel must be odd"),
        ("snapkv:size=4,pooling=sum", "pooling"),
        ("pyramidkv:size=4,beta=0.5", "beta"),
        ("knorm:size=4,recent=-1", "recent"),
        ("keydiff:size=4,recent=0.5", "recent"),
        ("expected-attention:size=4,window=0", "window"),
        ("expected-attention:size=4,sinks=-1", "sinks"),
        ("expected-attention:size=4,epsilon=-1", "epsilon"),
        ("ada-kv:size=4,safeguard=2", "safeguard"),
        ("ada-kv:size=4,scorer=ada-kv", "scorer must be another"),
        ("ada-kv:size=4,scorer=full", "scorer must be another"),
        ("ada-kv:size=4,scorer=streaming-llm", "scorer must be another"),
        ("ada-kv:size=4,scorer=snapk", "did you mean 'snapkv'"),
        ("ada-kv:size=4,scorer=3", "scorer must be another"),
        ("cake", "cake needs a budget"),
        ("cake:size=4,window=0", "window"),
        ("cake:size=4,kernel=2", "kernel must be odd"),
        ("cake:size=4,pooling=sum", "pooling"),
        ("cake:size=4,tau1=0", "tau1 must be positive"),
        ("cake:size=4,tau2=-1", "tau2 must be positive"),
        ("cake:size=4,gamma=-1", "gamma"),
        ("gvote:p=0", "p is the share"),
        ("gvote:p=true", "p is the share"),
        ("gvote:samples=0", "samples"),
        ("gvote:window=0", "window"),
        ("gvote:seed=-1", "seed"),
        ("top-p:p=0", "p is the share"),
        ("top-p:p=1.1", "p is the share"),
        ("top-p:window=0", "window"),
        ("top-p:frozen_layers=some", "frozen_layers"),
    ],
)
def test_parameters_out_of_range(spec, message):
    with pytest.raises(ValueError, match=message):
        policies.parse(spec)


@pytest.mark.parametrize("name", SLOW)
def test_selecting_never_waits_for_the_device(name):
    """Tensors without data: whatever reads a number back would fail."""
    with torch.device("meta"):
        valid = torch.ones(2, 40, dtype=torch.bool)
        rows, queries = torch.randn(2, 4, 8, 40), torch.randn(2, 4, 8, 16)
        visible = causal_visibility(valid, torch.arange(32, 40))
        keys = torch.randn(2, 2, 40, 16)
        assert attention_rows(queries, keys, visible=visible).shape == rows.shape
        for real in (None, valid, valid[:, None].repeat(1, 2, 1)):
            policy = policies.create(name, **({} if name in FREE else {"ratio": 0.5}))
            keep = policy.select(LayerView(keys, keys, real, rows, 3, 9, visible, queries)).keep
            assert keep.is_meta
            assert keep.shape[::2] == (2, 40)


def test_allotting_never_waits_for_the_device():
    policy = policies.create("cake", ratio=0.5, window=8)
    with torch.device("meta"):
        valid = torch.ones(2, 40, dtype=torch.bool)
        visible = causal_visibility(valid, torch.arange(32, 40))
        view = LayerView(
            torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16), valid, torch.rand(2, 4, 8, 40), 3, 9, visible
        )
        notes = policy.examine(view).rows()
        assert all(selection.keep.is_meta for selection in policy.allot([notes[0]] * 3))
