"""int8 entries in the captured step, on the CPU without a graph: full-precision storage that rounds is the judge."""

import copy
import logging

import pytest
import torch

import refreekv
from helpers.arenas import rounded
from helpers.driving import POLICIES, RAGGED, Uneven, feed, prefill, storage_bytes, tensors_of
from helpers.models import build, prompts
from refreekv.engines.transformers.attachment import attached
from refreekv.storage.coded_arena import CodedArena
from refreekv.storage.quantised import QuantisedKV
from refreekv.storage.ragged import RaggedKV


def close(one, other):
    """Where the two ways differ in the last bits, an element half-way between two codes may go to either."""
    assert (one - other).norm() < 2e-3 * other.norm()


class Rounding(RaggedKV):
    """Plain storage whose entries are rounded as they come."""

    @classmethod
    def of(cls, plain):
        return cls(plain.keys, plain.values, plain.lengths)

    def append(self, keys, values):
        return Rounding.of(super().append(rounded(keys), rounded(values)))

    def select_rows(self, indices):
        return Rounding.of(super().select_rows(indices))

    def truncate(self, lengths):
        return Rounding.of(super().truncate(lengths))


def int8_cache(model, policy="refreekv", kv_dtype="int8", **parameters):
    cache = refreekv.ReFreeKVCache(model, policy, kv_dtype=kv_dtype, **parameters)
    cache.state.arena = True
    return cache


def judge_of(cache):
    """A copy of a cache in full precision: it holds what this one's entries stand for, and rounds what comes."""
    judge = copy.deepcopy(cache)
    judge.state.arena = None
    for layer in judge.pruned_layers:
        rows = [layer.ragged.segments(row) for row in range(layer.batch)]
        layer.kv_dtype = None
        layer._store(Rounding.of(RaggedKV.from_pieces([[keys] for keys, _ in rows], [[values] for _, values in rows])))
    return judge


def check_bytes(cache):
    report, layers = cache.report, cache.pruned_layers
    assert report.bytes_after + report.index_bytes == storage_bytes([t for layer in layers for t in tensors_of(layer)])
    for layer, said in zip(layers, report.prunable, strict=True):
        assert isinstance(layer.ragged, CodedArena)
        assert said.bytes_after == layer.ragged.nbytes == sum(row.bytes_after for row in said.rows)
        assert said.bytes_before == layer.batch * layer.get_seq_length() * layer.kv_heads * sum(layer.ragged.sizes) * 4


@torch.no_grad()
def step(model, cache, ids, mask):
    """Logits of one more token a row, fed as `generate` feeds it."""
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    before = cache.get_seq_length()
    with attached(model) as attachment, attachment.captured_steps(), cache.state.until(before, generating=True):
        positions = mask.cumsum(-1)[:, -1:] - 1
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits, mask


def answer(model, logits, mask, cache, judge=None, tokens=24):
    """Tokens one after another, each against a judge. The last one's logits, and the mask."""
    for _ in range(tokens):
        judge = judge_of(cache) if judge is None else judge
        chosen = logits.view(len(mask), -1).argmax(-1, keepdim=True)
        (logits, longer), (others, _) = step(model, cache, chosen, mask), step(model, judge, chosen, mask)
        close(logits, others)
        judge, mask = None, longer
    return logits, mask


@pytest.mark.parametrize("policy", [*POLICIES, "full", "uneven"])
@pytest.mark.parametrize("lengths", [(60,), RAGGED], ids=["alone", "batch"])
def test_captured_steps_read_what_was_coded(policy, lengths, llama, steps):
    name, parameters = POLICIES.get(policy, (Uneven() if policy == "uneven" else policy, {}))
    cache, plain = int8_cache(llama, name, **parameters), refreekv.ReFreeKVCache(llama, name, **parameters)
    logits, mask = prefill(llama, cache, lengths)
    others, _ = prefill(llama, plain, lengths)
    assert torch.equal(logits, others)  # the prompt itself is read in full precision
    kept = [[row.kept_heads for row in layer.rows] for layer in cache.report.layers]
    assert kept == [[row.kept_heads for row in layer.rows] for layer in plain.report.layers]
    check_bytes(cache)
    before = [layer.ragged.lines.segments(0) for layer in cache.pruned_layers]
    # More than the first room: storage moves under the step, and lines with it, as they are.
    with attached(llama):
        answer(llama, logits, mask, cache)
    assert steps == {"made": 1, "run": 24}
    check_bytes(cache)
    for then, layer in zip(before, cache.pruned_layers, strict=True):
        for old, new in zip(then, layer.ragged.lines.segments(0), strict=True):
            assert all(torch.equal(one, other[: len(one)]) for one, other in zip(old, new, strict=True))


def test_it_is_near_what_storage_that_is_not_decoded_in_place_gives(llama):
    """That centres and rotates, and keeps sinks and up to 31 of the newest entries as they are."""
    quantised = refreekv.ReFreeKVCache(llama, "refreekv", kv_dtype="int8", threshold=0.2)
    cache = int8_cache(llama, threshold=0.2)
    logits, mask = prefill(llama, cache)
    prefill(llama, quantised)
    assert all(isinstance(layer.ragged, QuantisedKV) for layer in quantised.pruned_layers)
    for layer, other in zip(cache.pruned_layers, quantised.pruned_layers, strict=True):
        assert layer.ragged.lengths == other.ragged.lengths
        for row in range(layer.batch):
            for mine, theirs in zip(layer.ragged.segments(row), other.ragged.segments(row), strict=True):
                for one, exact in zip(mine, theirs, strict=True):
                    assert (one - exact).norm() < 0.02 * exact.norm()
    for _ in range(24):
        tokens = logits.view(len(RAGGED), -1).argmax(-1, keepdim=True)
        logits, longer = step(llama, cache, tokens, mask)
        others, mask = feed(llama, quantised, tokens, mask)
        assert (logits - others).norm() < 0.1 * others.norm()
        assert torch.equal(longer, mask)


@pytest.mark.parametrize("policy", ["heavy-hitter", "uneven"])
def test_further_turns_crops_and_rows(policy, llama):
    name, parameters = POLICIES.get(policy, (Uneven(), {}))
    cache = int8_cache(llama, name, **parameters)
    logits, mask = prefill(llama, cache)
    logits, mask = answer(llama, logits, mask, cache, tokens=3)
    judge = judge_of(cache)
    lines = [layer.ragged.lines.segments(0) for layer in cache.pruned_layers]
    more = prompts((30,) * len(RAGGED), seed=8)[0]
    # A further prompt: pruned again at its end, and what stays is the lines that were there.
    (mine, longer), (others, _) = feed(llama, cache, more, mask), feed(llama, judge, more, mask)
    close(mine, others)
    assert all(
        layer.ragged.lengths == other.ragged.lengths
        for layer, other in zip(cache.pruned_layers, judge.pruned_layers, strict=True)
    )
    for then, layer in zip(lines, cache.pruned_layers, strict=True):
        counts = layer.kept_columns[0].below(mask.shape[1]).for_heads(layer.kv_heads)
        for old, new in zip(then, layer.ragged.lines.segments(0), strict=True):
            for one, other, count in zip(old, new, counts, strict=True):
                known = {bytes(line.tolist()) for line in one}
                assert all(bytes(line.tolist()) in known for line in other[:count])
    check_bytes(cache)
    logits, mask = answer(llama, mine[:, -1], longer, cache, tokens=4)
    judge = judge_of(cache)
    for each in (cache, judge):
        each.crop(-2)
    logits, mask = answer(llama, logits, mask[:, :-2], cache, judge, tokens=20)
    judge = judge_of(cache)
    for each in (cache, judge):
        each.batch_select_indices(torch.tensor([2, 0]))
        each.batch_repeat_interleave(2)
        each.reorder_cache(torch.tensor([3, 1, 0]))
    rows = [0, 2, 2]
    logits, mask = answer(llama, logits[rows], mask[rows], cache, judge, tokens=3)
    check_bytes(cache)
    judge = judge_of(cache)
    for each in (cache, judge):
        each.crop(-(mask.shape[1] - 25))  # into the first prompt
    answer(llama, logits, mask[:, :25], cache, judge, tokens=2)
    check_bytes(cache)


def test_rows_that_are_freed(llama):
    cache = int8_cache(llama, threshold=0.2)
    logits, mask = prefill(llama, cache)
    judge = judge_of(cache)
    before = cache.report.bytes_after
    cache.free_rows([1, 3])
    assert cache.report.bytes_after < 0.7 * before
    for _ in range(20):
        tokens = logits.view(len(RAGGED), -1).argmax(-1, keepdim=True)
        (mine, _), (logits, mask) = step(llama, cache, tokens, mask), step(llama, judge, tokens, mask)
        close(mine[::2], logits[::2])
    assert [layer.ragged.lengths[1] for layer in cache.pruned_layers] == [(0,) * cache.pruned_layers[0].kv_heads] * 4


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "phi3", "gpt_oss", "gemma3"])
def test_other_architectures(name):
    model = build(name)
    cache = int8_cache(model, threshold=0.2, frozen_layers=0)
    logits, mask = prefill(model, cache, (50, 33))
    answer(model, logits, mask, cache, tokens=4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}], ids=str)
def test_generate(settings, llama, steps):
    ids, mask = prompts((48, 35), seed=2)
    with refreekv.compress(llama, "refreekv", threshold=0.2, kv_dtype="int8") as kv:
        cache = kv.new_cache()
        cache.state.arena = True
        out = llama.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, do_sample=False, **settings
        )
        assert out.shape[1] == ids.shape[1] + 24
        assert kv.report.kv_dtype == "int8"
    assert steps["run"] == 23
    check_bytes(cache)


def test_a_step_serves_one_format(llama, steps):
    ids, _ = prompts((50,), seed=1)
    outcome = []
    for _ in range(2):
        for kv_dtype in (None, "int8"):
            cache = int8_cache(llama, "streaming-llm", kv_dtype, ratio=0.5)
            outcome.append(llama.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False))
    assert torch.equal(outcome[0], outcome[2])
    assert torch.equal(outcome[1], outcome[3])
    assert steps == {"made": 2, "run": 20}


def test_pruned_again_while_the_answer_grows(llama):
    ids, mask = prompts(RAGGED, seed=6)
    stored = int8_cache(llama, "streaming-llm", size=20, decode_interval=3)
    plain = refreekv.ReFreeKVCache(llama, "streaming-llm", size=20, decode_interval=3)
    for cache in (stored, plain):
        llama.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False)
    for mine, other in zip(stored.pruned_layers, plain.pruned_layers, strict=True):
        assert isinstance(mine.ragged, CodedArena)
        assert mine.ragged.lengths == other.ragged.lengths
        assert max(max(row) for row in mine.ragged.lengths) <= 20 + 3


@pytest.mark.parametrize("kv_dtype", ["int8:recent=64", "int4", "fp8:recent=0"])
def test_other_formats_decode_eagerly_and_say_so_once(kv_dtype, llama, steps, caplog):
    ids, _ = prompts((50,), seed=1)
    cache = int8_cache(build("llama", attention="sdpa"), "full", kv_dtype)
    with caplog.at_level(logging.WARNING, logger="refreekv"):
        cache._model().generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert steps["run"] == 0
    (record,) = [record for record in caplog.records if record.name == "refreekv"]
    assert "QuantisedKV" in record.getMessage()
