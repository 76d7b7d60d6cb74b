"""Physically pruned decoding equals a masked full cache, on every architecture and path."""

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import refreekv
from helpers import reference
from helpers.driving import SpreadHeavyHitter, Uneven
from helpers.models import ARCHITECTURES, HAS_SDPA, LAYERS, build, prompts
from helpers.reference import Rule, Turn, positions_of
from refreekv import ReFreeKVCache
from refreekv.policies import Policy

STEPS = 8
CHUNK = 13
TOLERANCE = 1e-4

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
def model_of(name: str, attention: str) -> PreTrainedModel:
    return build(name, attention=attention)


@cache
def turns_of(lengths: tuple[int, ...], second: tuple[int, ...]) -> list[tuple[Tensor, Tensor | None]]:
    turns = [prompts(lengths, seed=1), prompts(second, seed=2)]
    return [(ids, mask if len(lengths) > 1 else None) for ids, mask in turns]


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


def loop(model, kv_cache, turns, chunk=None) -> tuple[list[Turn], list]:
    """Loops of one's own around the model; ``chunk`` feeds each prompt in pieces."""
    results, reports, total, last = [], [], None, None
    for ids, mask in turns:
        if last is not None:
            ids = torch.cat([last, ids], 1)
            mask = None if mask is None else torch.cat([torch.ones_like(last), mask], 1)
        padded = mask is not None
        mask = torch.ones_like(ids) if mask is None else mask
        total = mask if total is None else torch.cat([total, mask], 1)
        start = total.shape[1] - ids.shape[1]
        with kv_cache.prompt_until(total.shape[1]):
            for piece in ids.split(chunk or ids.shape[1], 1):
                stop = start + piece.shape[1]
                step = forward(model, kv_cache, piece, total[:, :stop], padded)
                start = stop
        reports.append(kv_cache.report)
        tokens, logits = [step.argmax(-1, keepdim=True)], [step]
        while len(tokens) < STEPS:
            total = torch.cat([total, torch.ones_like(tokens[-1])], 1)
            step = forward(model, kv_cache, tokens[-1], total, padded)
            logits.append(step)
            tokens.append(step.argmax(-1, keepdim=True))
        last = tokens[-1]
        results.append(Turn(torch.cat(tokens, 1), torch.stack(logits, 1)))
    return results, reports


@torch.no_grad()
def forward(model, kv_cache, ids, total, padded) -> Tensor:
    # Without padding the model must find its positions by the cache's logical length alone.
    extra = {"attention_mask": total, "position_ids": positions_of(total)[:, -ids.shape[1] :]} if padded else {}
    return model(ids, past_key_values=kv_cache, **extra).logits[:, -1]


@cache
def generate_chunks_later_turns() -> bool:
    """Whether this transformers can: older ones feed a later turn's chunks at positions and masks from 0 on."""
    model = build("llama")  # one of its own: the others are being compressed
    lengths = []
    for chunk in (None, CHUNK):
        own = DynamicCache(config=model.config)
        model.generate(prompts((20,))[0], past_key_values=own, max_new_tokens=2, min_new_tokens=2)
        settings = {"max_new_tokens": 2, "min_new_tokens": 2, "prefill_chunk_size": chunk}
        model.generate(prompts((40,))[0], past_key_values=own, **settings)
        lengths.append(own.get_seq_length())
    return lengths[0] == lengths[1]


def generate(model, kv_cache, turns, chunk=None) -> tuple[list[Turn], list]:
    """`generate`, turn by turn with all ids so far, as a chat does; the first call may make the cache."""
    results, reports, sequence, total = [], [], None, None
    for ids, mask in turns:
        mask = torch.ones_like(ids) if mask is None else mask
        sequence = ids if sequence is None else torch.cat([sequence, ids], 1)
        if total is not None:
            mask = torch.cat([total, torch.ones(len(ids), STEPS, dtype=torch.long), mask], 1)
        total = mask
        output = model.generate(
            sequence,
            attention_mask=total,
            past_key_values=kv_cache,
            max_new_tokens=STEPS,
            do_sample=False,
            prefill_chunk_size=chunk if not results or (chunk and generate_chunks_later_turns()) else None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        kv_cache = output.past_key_values
        reports.append(kv_cache.report)
        results.append(Turn(output.sequences[:, sequence.shape[1] :], torch.stack(output.logits, 1)))
        sequence = output.sequences
    return results, reports


def assert_same(got: list[Turn], wanted: list[Turn]) -> None:
    for turn, (left, right) in enumerate(zip(got, wanted, strict=True)):
        torch.testing.assert_close(left.logits, right.logits, rtol=0, atol=TOLERANCE, msg=lambda m, t=turn: f"{t}: {m}")
        assert torch.equal(left.tokens, right.tokens), f"turn {turn}"


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


@pytest.mark.parametrize("chunk", [None, CHUNK], ids=["single", "chunked"])
@pytest.mark.parametrize(("lengths", "second"), [(SINGLE, (17,)), (RAGGED, (17,) * 4)], ids=["batch1", "batch4"])
@pytest.mark.parametrize(("name", "attention"), CASES)
class TestTwoTurns:
    """Two turns of greedy decoding, each pruned, against the reference."""

    def test_compress_and_generate(self, name, attention, lengths, second, chunk):
        wanted, kept = expected(name, "refreekv", lengths, second)
        model = model_of(name, attention)
        policy, parameters = POLICIES["refreekv"]
        with refreekv.compress(model, policy, **parameters):
            got, reports = generate(model, None, turns_of(lengths, second), chunk)
        assert_same(got, wanted)
        assert_kept(reports, kept)

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
@pytest.mark.parametrize(("name", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("gemma3", "sdpa")])
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


@pytest.mark.parametrize("frozen_layers", [0, "all"])
@pytest.mark.parametrize(("lengths", "second"), [(SINGLE, (17,)), (RAGGED, (17, 3, 1, 9))], ids=["batch1", "batch4"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_bit_for_bit_on_every_architecture(name, attention, lengths, second, frozen_layers):
    parameters = {"threshold": 0.0 if frozen_layers == 0 else 0.3, "frozen_layers": frozen_layers}
    check_nothing_evicted(name, attention, lengths, second, "refreekv", parameters)


def check_nothing_evicted(name, attention, lengths, second, policy, parameters):
    model = model_of(name, attention)
    turns = turns_of(lengths, second)
    wanted = plain(name, attention, lengths, second)
    got, reports = generate(model, ReFreeKVCache(model, policy, **parameters), turns)
    for left, right in zip(got, wanted, strict=True):
        assert torch.equal(left.tokens, right.tokens)
        assert torch.equal(left.logits, right.logits)
    assert all(report.budget == 1.0 for report in reports)
    assert all(report.bytes_after == report.bytes_before for report in reports)


@cache
def plain(name, attention, lengths, second) -> list[Turn]:
    """The model untouched, with its own cache."""
    model = model_of(name, attention)
    results, sequence, total = [], None, None
    kv_cache = DynamicCache(config=model.config)
    for ids, mask in turns_of(lengths, second):
        mask = torch.ones_like(ids) if mask is None else mask
        sequence = ids if sequence is None else torch.cat([sequence, ids], 1)
        if total is not None:
            mask = torch.cat([total, torch.ones(len(ids), STEPS, dtype=torch.long), mask], 1)
        total = mask
        output = model.generate(
            sequence,
            attention_mask=total,
            past_key_values=kv_cache,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        results.append(Turn(output.sequences[:, sequence.shape[1] :], torch.stack(output.logits, 1)))
        sequence = output.sequences
    return results


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
