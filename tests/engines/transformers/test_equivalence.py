"""Physically pruned decoding equals a masked full cache, on every architecture and path."""

from functools import cache

import pytest

import refreekv
from helpers import reference
from helpers.driving import SpreadHeavyHitter, Uneven
from helpers.equivalence import (
    CHUNK,
    STEPS,
    TOLERANCE,
    assert_same,
    check_nothing_evicted,
    generate,
    loop,
    model_of,
    plain,
    turns_of,
)
from helpers.models import ARCHITECTURES, HAS_SDPA, LAYERS, build
from helpers.reference import Rule, Turn
from refreekv import ReFreeKVCache
from refreekv.policies import Policy

SINGLE = (61,)
RAGGED = (52, 40, 29, 47)

# Thresholds far above the default, for these short and random prompts to lose a good part.
POLICIES: dict[str, tuple[str | Policy, dict]] = {
    "refreekv": ("refreekv", {"threshold": 0.2, "frozen_layers": 1}),
    "sinks-in-norm": ("refreekv", {"threshold": 0.2, "frozen_layers": 0, "norm_includes_sinks": True}),
    "four-rows": ("refreekv", {"threshold": 0.2, "frozen_layers": 0, "probe_rows": 4, "sinks": 2}),
    "no-sinks": ("refreekv", {"threshold": 0.2, "frozen_layers": 0, "sinks": 0}),
    "heavy-hitter": ("refreekv-heavy-hitter", {"threshold": 0.1, "frozen_layers": 0}),
    "heavy-hitter-sinks-in-norm": (
        "refreekv-heavy-hitter",
        {"threshold": 0.1, "frozen_layers": 1, "norm_includes_sinks": True, "recent": 3, "probe_rows": 5},
    ),
    "heavy-hitter-spread-probes": (SpreadHeavyHitter(threshold=0.1, frozen_layers=0, spread=12), {}),
    "uneven-heads": (Uneven(), {}),
    "window": ("streaming-llm", {"size": 18}),
    "window-ratio": ("streaming-llm", {"ratio": 0.4, "sinks": 3}),
}


def rule_of(policy: str) -> Rule:
    name, parameters = POLICIES[policy]
    if name == "refreekv":
        return Rule("position", **parameters)
    if isinstance(name, Uneven):
        return Rule("uneven", frozen_layers=0)
    if isinstance(name, SpreadHeavyHitter):
        return Rule("attention", threshold=0.1, frozen_layers=0, recent=8, probe_rows=8, spread=12)
    if name == "refreekv-heavy-hitter":
        return Rule("attention", **{"recent": 8, "probe_rows": 8, **parameters})
    return Rule("window", frozen_layers=0, **parameters)


@cache
def expected(name: str, policy: str | None, lengths: tuple[int, ...], second: tuple[int, ...]):
    """The reference's turns, and per turn the entries kept of each layer and row."""
    model = build(name)
    model.set_attn_implementation(reference.NAME)
    masked = reference.MaskedReference(model, None if policy is None else rule_of(policy))
    results, kept = [], []
    for ids, mask in turns_of(lengths, second):
        results.append(masked.turn(ids, mask, STEPS))
        kept.append({layer: list(counts) for layer, counts in masked.kept_counts.items()})
    return results, kept


# -- two ways to drive a pruned cache -------------------------------------------------------------


def assert_kept(reports, kept) -> None:
    """The report says what the reference kept, and every row really lost something in every turn."""
    for report, counts in zip(reports, kept, strict=True):
        for layer in report.prunable:
            for row, heads in zip(layer.rows, counts[layer.index], strict=True):
                assert row.kept_heads in (heads, heads[: len(set(heads))])  # one number where all heads have the same
        for row in zip(*(layer.rows for layer in report.prunable), strict=True):
            assert any(entry.kept < entry.prompt_length for entry in row)
        assert report.budget < 0.95


CASES = [(name, "eager") for name in ARCHITECTURES] + [(name, "sdpa") for name in HAS_SDPA]


@pytest.mark.parametrize(("name", "attention"), CASES)
class TestTwoTurns:
    """Two turns of greedy decoding, each pruned, against the reference: in chunks, batches and by each way of driving.

    Every two of these go together.
    """

    @pytest.mark.parametrize(
        ("lengths", "second", "chunk"), [(SINGLE, (17,), None), (RAGGED, (17,) * 4, CHUNK)], ids=["alone", "chunks"]
    )
    def test_compress_and_generate(self, name, attention, lengths, second, chunk):
        wanted, kept = expected(name, "refreekv", lengths, second)
        model = model_of(name, attention)
        policy, parameters = POLICIES["refreekv"]
        with refreekv.compress(model, policy, **parameters):
            got, reports = generate(model, None, turns_of(lengths, second), chunk)
        assert_same(got, wanted)
        assert_kept(reports, kept)

    @pytest.mark.parametrize(
        ("lengths", "second", "chunk"), [(SINGLE, (17,), CHUNK), (RAGGED, (17,) * 4, None)], ids=["chunks", "batch"]
    )
    def test_cache_and_loop(self, name, attention, lengths, second, chunk):
        wanted, kept = expected(name, "refreekv", lengths, second)
        model = model_of(name, attention)
        policy, parameters = POLICIES["refreekv"]
        got, reports = loop(model, ReFreeKVCache(model, policy, **parameters), turns_of(lengths, second), chunk)
        assert_same(got, wanted)
        assert_kept(reports, kept)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("lengths", "second"), [(SINGLE, (17,)), (RAGGED, (17,) * 4)], ids=["batch1", "batch4"])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "refreekv"])
def test_every_policy(policy, lengths, second, attention):
    wanted, kept = expected("llama", policy, lengths, second)
    model = model_of("llama", attention)
    name, parameters = POLICIES[policy]
    got, reports = generate(model, ReFreeKVCache(model, name, **parameters), turns_of(lengths, second))
    assert_same(got, wanted)
    assert_kept(reports, kept)
    got, reports = loop(model, ReFreeKVCache(model, name, **parameters), turns_of(lengths, second), CHUNK)
    assert_same(got, wanted)
    assert_kept(reports, kept)


@pytest.mark.parametrize("policy", ["four-rows", "heavy-hitter", "uneven-heads"])
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt_oss", "qwen3_moe"])
def test_more_rows_on_other_architectures(name, policy):
    """Probes of several rows where scaling, learned sinks or grouping differ from Llama's."""
    wanted, kept = expected(name, policy, RAGGED, (17,) * 4)
    model = model_of(name, "eager")
    given, parameters = POLICIES[policy]
    got, reports = loop(model, ReFreeKVCache(model, given, **parameters), turns_of(RAGGED, (17,) * 4), CHUNK)
    assert_same(got, wanted)
    assert_kept(reports, kept)


@pytest.mark.parametrize(
    "policy",
    ["refreekv", "four-rows", "heavy-hitter", "heavy-hitter-spread-probes", "uneven-heads", "window-ratio"],
)
@pytest.mark.parametrize("chunk", [None, 5], ids=["single", "chunked"])
def test_second_turns_of_different_length(policy, chunk):
    """Padding between two turns counts for nothing either."""
    second = (17, 3, 1, 9)
    wanted, kept = expected("llama", policy, RAGGED, second)
    model = model_of("llama", "sdpa")
    name, parameters = POLICIES[policy]
    got, reports = loop(model, ReFreeKVCache(model, name, **parameters), turns_of(RAGGED, second), chunk)
    assert_same(got, wanted)
    assert_kept(reports, kept)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("gemma3", "eager")])
def test_a_row_of_a_batch_is_as_alone(name, attention, policy):
    model = model_of(name, attention)
    given, parameters = POLICIES[policy]
    # transformers counts padding between turns as part of a sliding window, so no such padding there.
    turns = turns_of(RAGGED, (17,) * 4 if name == "gemma3" else (17, 3, 1, 9))
    together, _ = loop(model, ReFreeKVCache(model, given, **parameters), turns)
    for row in range(len(RAGGED)):
        own = [(ids[row : row + 1, -int(mask[row].sum()) :], None) for ids, mask in turns]
        alone, reports = loop(model, ReFreeKVCache(model, given, **parameters), own)
        assert_same([Turn(t.tokens[row : row + 1], t.logits[row : row + 1]) for t in together], alone)
        assert all(report.budget < 1 for report in reports)


# -- nothing evicted -------------------------------------------------------------------------------

NOTHING = [
    ("refreekv", {"threshold": 0.0, "frozen_layers": 0}),
    ("refreekv", {"threshold": 0.3, "frozen_layers": "all"}),
    ("refreekv", {"threshold": 0.3, "frozen_layers": 10**6}),
    ("refreekv-heavy-hitter", {"threshold": 0.0, "frozen_layers": 0}),
    ("refreekv-heavy-hitter", {"threshold": 0.3, "frozen_layers": "all"}),
    ("streaming-llm", {"ratio": 1.0}),
    ("streaming-llm", {"size": 10**6}),
]


@pytest.mark.parametrize(("policy", "parameters"), NOTHING)
@pytest.mark.parametrize(("lengths", "second"), [(SINGLE, (17,)), (RAGGED, (17, 3, 1, 9))], ids=["batch1", "batch4"])
@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("gemma3", "eager")])
def test_nothing_evicted_is_bit_for_bit_the_full_cache(name, attention, lengths, second, policy, parameters):
    check_nothing_evicted(name, attention, lengths, second, policy, parameters)


@pytest.mark.parametrize(
    ("lengths", "second", "frozen_layers"),
    [(SINGLE, (17,), "all"), (RAGGED, (17, 3, 1, 9), 0)],
    ids=["batch1-all", "batch4-0"],
)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_bit_for_bit_on_every_architecture(name, attention, lengths, second, frozen_layers):
    parameters = {"threshold": 0.0 if frozen_layers == 0 else 0.3, "frozen_layers": frozen_layers}
    check_nothing_evicted(name, attention, lengths, second, "refreekv", parameters)


# -- the reference itself --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reference_without_eviction_is_the_model(name):
    wanted = plain(name, "eager", RAGGED, (17,) * 4)
    got, _ = expected(name, None, RAGGED, (17,) * 4)
    assert_same(got, wanted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eviction_shows(name):
    """What is evicted matters to the logits: the equalities above compare something."""
    pruned, kept = expected(name, "refreekv", RAGGED, (17,) * 4)
    full, _ = expected(name, None, RAGGED, (17,) * 4)
    assert (pruned[0].logits[:, 0] - full[0].logits[:, 0]).abs().max() == 0  # the prompt itself is not affected
    assert (pruned[0].logits[:, 1] - full[0].logits[:, 1]).abs().max() > 100 * TOLERANCE
    assert all(min(counts[row] for counts in kept[0].values()) < (RAGGED[row],) for row in range(4))
    assert len(kept[0]) <= LAYERS
