"""Policies with a number format in the bench: against caches of the library that really store it."""

import pytest
import torch

from helpers.fidelity import ASKED, POLICIES, Uneven, bench, job, tokens
from helpers.models import build
from refreekv import ReFreeKVCache
from refreekv.core.quantisation import Ladder
from refreekv.evaluation import sweeps
from refreekv.evaluation.fidelity.formats import StoredPolicy, ladder_of, parse
from refreekv.evaluation.fidelity.prefill import SharedPrefill, forward

NUMBERS = [
    Ladder.parse(ladder)
    for ladder in ("k6v4:recent=0", "int8:recent=9", "int4:recent=9", "int4:recent=500", "k4v2+k6v4+int8:recent=5")
]
STORED = {
    f"{name}@{number}": StoredPolicy(policy, number) for name, policy in POLICIES.items() for number in NUMBERS
} | {f"full@{number}": parse(f"full@{number}") for number in NUMBERS}


@pytest.fixture(scope="module")
def llama():
    return build("llama", attention="sdpa", head_dim=16)


def rooms(cache):
    """Bytes that storage has room for and does not hold yet."""
    arenas = [arena for layer in cache.pruned_layers if layer.ragged is not None for arena in layer.ragged.tables]
    lines = [sum(map(sum, arena.capacities)) - sum(map(sum, arena.lengths)) for arena in arenas]
    return sum(count * sum(arena.line_bytes) for count, arena in zip(lines, arenas, strict=True))


@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa"), ("gpt_oss", "eager")]
)
@torch.no_grad()
def test_one_call_for_all_equals_caches_that_store_it(name, attention):
    model = build(name, attention=attention, head_dim=16)
    context, fed = tokens(57, 0), tokens(9, 1)
    asked = ASKED | STORED
    with_cache = ReFreeKVCache(model, "full")  # keeps refreekv attached
    shared = SharedPrefill(model, context, asked)
    names = list(asked)
    together = forward(model, [fed], shared.masked(names), start=57, keep=9, rows=len(names))
    for row, one in enumerate(names):
        policy = asked[one]
        if one == "full":
            continue
        inner = policy.policy if isinstance(policy, StoredPolicy) else policy
        cache = ReFreeKVCache(model, inner, kv_dtype=ladder_of(policy))
        forward(model, [context], cache, start=0, keep=1)
        held = cache.report.bytes_after - rooms(cache)
        with cache.decoding():
            alone = forward(model, [fed], cache, start=57, keep=9)[0]
        torch.testing.assert_close(together[row], alone, atol=2e-4, rtol=1e-3)
        # A sliding layer's storage may be longer than what it shows until it next grows.
        if name == "llama":
            assert shared.bytes(one)[1] == held
    del with_cache


def test_a_policy_that_decides_about_all_layers_together(llama):
    names = ["cake:ratio=0.5", "cake:ratio=0.5@int4:recent=9"]
    (records,) = bench(llama).measure([job(asked={"full": None, **sweeps.choose(names)})])
    plain, stored = records[1:]
    assert [plain.policy, stored.policy] == names
    assert stored.kept_heads == plain.kept_heads
    assert stored.bytes_kept < plain.bytes_kept
    assert stored.kl_mean != plain.kl_mean


@torch.no_grad()
def test_copy_scores_are_measured_for_a_policy_that_comes_with_a_format_only(llama):
    with_cache = ReFreeKVCache(llama, "full")
    for spec, measured in (("adaptive@int8", True), ("snapkv:ratio=0.5@int8", False)):
        shared = SharedPrefill(llama, tokens(57, 0), {spec: parse(spec)})
        assert (shared._cache.state.copy_scores is not None) is measured
    del with_cache


def test_records(llama):
    names = ["cut", "cut@int4:recent=9", "full@int8:recent=9", "uneven@int4:recent=9"]
    one = job(asked={"full": None, **{name: (POLICIES | STORED)[name] for name in names}})
    (records,) = bench(llama).measure([one])
    by_name = {record.policy: record for record in records}
    plain, stored = by_name["cut"], by_name["cut@int4:recent=9"]
    assert stored.kept_heads == plain.kept_heads
    assert stored.bytes_kept < plain.bytes_kept
    assert stored.kl_mean != plain.kl_mean
    assert by_name["full@int8:recent=9"].budget == 1.0
    assert 0 < by_name["full@int8:recent=9"].kl_mean < 0.05


def test_specifications():
    chosen = sweeps.choose(["refreekv:threshold=0.01,0.02@int4", "full", "full@k6v4", "snapkv:ratio=0.5@int4:recent=8"])
    assert list(chosen) == [
        "refreekv@int4",
        "refreekv:threshold=0.02@int4",
        "full@k6v4",
        "snapkv:ratio=0.5@int4:recent=8",
    ]
    assert chosen["full@k6v4"].probe_plan(9).count == 0
    assert str(chosen["full@k6v4"]) == "full()@k6v4"
    assert isinstance(chosen["refreekv@int4"], StoredPolicy)
    assert StoredPolicy(Uneven(), NUMBERS[1]).name == "uneven@int8:recent=9"
    for spec, error in (("refreekv@int9", "kv_dtype must be"), ("nobody@int4", "no policy is named")):
        with pytest.raises(ValueError, match=error):
            sweeps.choose([spec])
