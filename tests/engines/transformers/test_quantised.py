"""Caches in number formats: eager and captured decoding against copies in full precision, to the byte."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

import refreekv
from helpers.driving import POLICIES, PRUNING, Uneven, feed, greedy, prefill, storage_bytes, tensors_of
from helpers.models import build, prompts
from refreekv import ReFreeKVCache, policies
from refreekv.core.quantisation import FLUSH, SINKS, KVDtype, Ladder
from refreekv.engines.transformers.attachment import attached
from refreekv.storage.leveled import LeveledKV

KINDS = ["int8", "int4", "k6v4", "k4v2+k6v4+int8"]
LADDER = KINDS[-1]
LONG = (150, 120, 85, 140)
"""Of a ragged batch of which something is coded, too, where half is evicted."""
CASES = {**POLICIES, "full": ("full", {}), "uneven": (Uneven(), {}), "ada-kv": ("ada-kv", {"ratio": 0.5})}


@pytest.fixture(scope="module")
def llama():
    return build("llama", attention="sdpa", head_dim=16)


@pytest.fixture
def model():
    return build("llama", attention="sdpa", head_dim=16)


def close(one, other):
    """Where two ways differ in the last bits, an element half-way between two codes may go to either."""
    assert (one - other).norm() < 5e-3 * other.norm()


def coded_entries(cache):
    return [sum(map(sum, layer.ragged.lines.lengths)) for layer in cache.pruned_layers]


def with_decoded_entries(cache: ReFreeKVCache) -> ReFreeKVCache:
    """A copy of a cache that holds in full precision what the quantised one stands for."""
    twin = copy.deepcopy(cache)
    twin.state.arena = None
    for layer in twin.pruned_layers:
        assert isinstance(layer.ragged, LeveledKV)
        layer.ladder = None
        # What has gathered is coded when the next entries come.
        layer.ragged.code_older()
        layer._store(layer.ragged.full())
    return twin


def check_bytes(cache: ReFreeKVCache) -> None:
    """What the report says is what all reachable storages hold, but for matrices that all caches share, and indices."""
    report = cache.report
    sliding = [layer for layer in cache.layers if layer not in cache.pruned_layers]
    own, others = set(), set()
    for layer in cache.pruned_layers:
        maps = layer.ragged.coding.maps
        means = [maps.key_mean, maps.value_mean, maps.key_offset, maps.value_offset]
        own |= {tensor.data_ptr() for tensor in means}
        others |= {tensor.data_ptr() for tensor in maps.tensors}
    others -= own
    tensors = [t for layer in cache.pruned_layers for t in tensors_of(layer) if t.data_ptr() not in others]
    tensors += [tensor for layer in sliding for tensor in (layer.keys, layer.values)]
    assert report.bytes_after + report.index_bytes == storage_bytes(tensors)
    for layer in report.prunable:
        assert layer.bytes_after == sum(row.bytes_after for row in layer.rows)
        assert layer.bytes_before == sum(row.bytes_before for row in layer.rows)


@pytest.mark.parametrize(
    ("case", "kind"),
    [*((case, "int4") for case in CASES), *itertools.product(("refreekv", "uneven"), ["int8", "k6v4", LADDER])],
)
def test_two_turns_of_a_ragged_batch(llama, kind, case):
    policy, parameters = CASES[case]
    cache = ReFreeKVCache(llama, policy, kv_dtype=f"{kind}:recent=4", **parameters)
    plain = ReFreeKVCache(llama, policy, **parameters)
    logits, mask = prefill(llama, cache, LONG)
    others, _ = prefill(llama, plain, LONG)
    assert torch.equal(logits, others)  # the prompt itself is read in full precision
    assert [layer.reports for layer in cache.pruned_layers] == [layer.reports for layer in plain.pruned_layers]
    assert cache.report.bytes_before == plain.report.bytes_before
    check_bytes(cache)
    assert any(coded_entries(cache))
    for layer in cache.pruned_layers:
        for lengths, coded in zip(layer.ragged.lengths, layer.ragged.lines.lengths, strict=True):
            assert coded == tuple(max(0, n - SINKS - 4) for n in lengths)
    for _ in range(3):
        twin = with_decoded_entries(cache)
        tokens = logits.argmax(-1, keepdim=True)
        (logits, longer), (others, _) = feed(llama, cache, tokens, mask), feed(llama, twin, tokens, mask)
        assert torch.allclose(logits, others, atol=1e-4)
        logits, mask = logits[:, -1], longer
    check_bytes(cache)
    again = torch.randint(2, 90, (4, 30), generator=torch.Generator().manual_seed(5))
    twin = with_decoded_entries(cache)
    (logits, longer), (others, _) = feed(llama, cache, again, mask), feed(llama, twin, again, mask)
    assert torch.allclose(logits, others, atol=1e-4)
    assert [[r.kept_heads for r in layer.reports] for layer in cache.pruned_layers] == [
        [r.kept_heads for r in layer.reports] for layer in twin.pruned_layers
    ]
    check_bytes(cache)
    for layer, other in zip(cache.pruned_layers, twin.pruned_layers, strict=True):
        mine, theirs = layer.ragged.full(), other.ragged
        for row, coded in enumerate(layer.ragged.lines.lengths):
            for head, count in enumerate(coded):
                first = layer.ragged.sinks[row][head]
                for ours, wanted in zip(mine.segments(row), theirs.segments(row), strict=True):
                    exact = torch.cat([torch.arange(first), torch.arange(first + count, len(ours[head]))])
                    assert torch.allclose(ours[head][exact], wanted[head][exact], atol=1e-4)
                    # As they were before the turn, or coded since.
                    off = (ours[head] - wanted[head]).norm() / wanted[head].norm().clamp_min(1e-9)
                    assert off < {"int8": 0.02}.get(kind, 0.2 if kind != LADDER else 0.6)


@pytest.mark.parametrize("chunk", [None, 16])
def test_entries_are_in_the_rungs_that_the_policy_says(llama, chunk):
    """In a padded batch, whose rows keep other entries in each head; first and newest ones are exact all the same."""
    cache = ReFreeKVCache(llama, Uneven(), kv_dtype=f"{LADDER}:recent=8")
    ids, mask = prompts(LONG, seed=3)
    greedy(llama, ids, mask, cache, steps=1, **({} if chunk is None else {"prefill_chunk_size": chunk}))
    for layer in cache.pruned_layers:
        rungs = layer.ragged.lines.rung_of_each().split([n for row in layer.ragged.lines.lengths for n in row])
        for row, length in enumerate(LONG):
            for head in range(layer.kv_heads):
                newest = range(length, 0, -1)  # of the columns, in order
                kept = [n for n in newest if n <= 6 or n * 7 % 5 < 1 + head]
                want = [min((n + head) % 4, 2) for n in kept[SINKS:-8]]
                assert rungs[row * layer.kv_heads + head].tolist() == want


def test_what_a_policy_is_not_asked_about_goes_to_the_widest_rung(llama):
    """Tokens that the mask hides in the midst of a prompt stay, whatever the policy keeps."""
    cache = ReFreeKVCache(llama, Uneven(), kv_dtype=f"{LADDER}:recent=8,generated=0")
    ids, mask = prompts((120,), seed=3)
    mask[0, 60:64] = 0
    with torch.no_grad():
        llama(ids, attention_mask=mask, past_key_values=cache)
    for layer in cache.pruned_layers:
        columns = layer.kept_columns[0].tensors(torch.device("cpu"))
        at = 0
        for own, count in zip(columns, layer.ragged.lines.lengths[0], strict=True):
            rungs = dict(
                zip(own[SINKS:].tolist(), layer.ragged.lines.rung_of_each()[at : at + count].tolist(), strict=False)
            )
            assert [rungs[column] for column in range(60, 64)] == [2] * 4
            at += count


@pytest.mark.parametrize(
    ("levels", "what"), [((1, 3, 150), r"\(1, 3, 150\)"), ((1, 2, 149), r"149"), (None, "float32")], ids=str
)
def test_levels_of_another_shape_or_type_are_refused(llama, levels, what):
    class Wrong(Uneven):
        def select(self, view):
            made = torch.zeros(1, 1, 150) if levels is None else torch.zeros(levels, dtype=torch.uint8)
            return replace(super().select(view), levels=made)

    cache = ReFreeKVCache(llama, Wrong(), kv_dtype=LADDER)
    with pytest.raises(ValueError, match=f"returned levels of .*{what}.*expected uint8"):
        prefill(llama, cache, (150,))


@torch.no_grad()
def step(model, cache, ids, mask):
    """Logits of one more token a row, fed as `generate` feeds it: through the captured step where there is one."""
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    before = cache.get_seq_length()
    with attached(model) as attachment, attachment.captured_steps(), cache.state.until(before, generating=True):
        positions = mask.cumsum(-1)[:, -1:] - 1
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits, mask


def answer(model, logits, mask, cache, tokens):
    """Tokens one after another, in the captured step, each against what the same entries give in full precision."""
    for _ in range(tokens):
        twin = with_decoded_entries(cache)
        chosen = logits.view(len(mask), -1).argmax(-1, keepdim=True)
        (logits, longer), (others, _) = step(model, cache, chosen, mask), feed(model, twin, chosen, mask)
        close(logits, others)
        mask = longer
    return logits, mask


def captured(model, policy, kind="int4", recent=8, **parameters):
    cache = ReFreeKVCache(model, policy, kv_dtype=f"{kind}:recent={recent}", **parameters)
    cache.state.arena = True
    return cache


@pytest.mark.parametrize(
    ("case", "kind", "lengths"),
    [
        *((case, "int4", (90,)) for case in ("refreekv", "heavy-hitter")),
        *((case, "int4", LONG) for case in ("window", "joint", "full", "uneven")),
        *itertools.product(("full", "uneven"), [LADDER], [(90,), LONG]),
    ],
)
def test_captured_steps_read_what_was_coded(case, kind, lengths, llama, steps):
    policy, parameters = CASES[case]
    cache = captured(llama, policy, kind, **parameters)
    logits, mask = prefill(llama, cache, lengths)
    before = coded_entries(cache)
    with attached(llama):
        # Longer than entries gather, so that some are coded under the step.
        answer(llama, logits, mask, cache, FLUSH + 5)
    assert steps == {"made": 1, "run": FLUSH + 5}
    assert all(mine > then for mine, then in zip(coded_entries(cache), before, strict=True))
    check_bytes(cache)


@pytest.mark.parametrize("kind", ["int4", LADDER])
def test_captured_steps_further_turns_crops_and_rows(llama, kind):
    cache = captured(llama, Uneven(), kind)
    logits, mask = prefill(llama, cache, LONG)
    logits, mask = answer(llama, logits, mask, cache, tokens=3)
    more = prompts((30,) * len(LONG), seed=8)[0]
    twin = with_decoded_entries(cache)
    (mine, longer), (others, _) = feed(llama, cache, more, mask), feed(llama, twin, more, mask)
    close(mine, others)
    check_bytes(cache)
    logits, mask = answer(llama, mine[:, -1], longer, cache, tokens=4)
    cache.crop(-2)
    logits, mask = answer(llama, logits, mask[:, :-2], cache, tokens=3)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1, 0]))
    rows = [0, 2, 2]
    logits, mask = answer(llama, logits[rows], mask[rows], cache, tokens=3)
    check_bytes(cache)
    cache.crop(-(mask.shape[1] - 60))  # into the first prompt
    answer(llama, logits, mask[:, :60], cache, tokens=2)
    check_bytes(cache)


@pytest.mark.parametrize("kind", ["int4", LADDER])
def test_rows_that_are_freed(llama, kind):
    cache = captured(llama, "refreekv", kind, threshold=0.2)
    logits, mask = prefill(llama, cache, LONG)
    other = copy.deepcopy(cache)
    before = cache.report.bytes_after
    cache.free_rows([1, 3])
    assert cache.report.bytes_after < 0.7 * before
    for _ in range(FLUSH + 3):
        tokens = logits.view(len(LONG), -1).argmax(-1, keepdim=True)
        (mine, _), (logits, mask) = step(llama, cache, tokens, mask), step(llama, other, tokens, mask)
        close(mine[::2], logits[::2])
    assert [layer.ragged.lengths[1] for layer in cache.pruned_layers] == [(0,) * cache.pruned_layers[0].kv_heads] * 4


@pytest.mark.parametrize("kind", ["int4", LADDER])
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3", "gpt_oss", "qwen3_moe", "mistral", "qwen3"])
def test_other_architectures(name, kind):
    model = build(name, head_dim=16)
    cache = captured(model, "refreekv", kind, threshold=0.2, frozen_layers=0)
    logits, mask = prefill(model, cache, (150,))
    check_bytes(cache)
    assert any(coded_entries(cache))
    answer(model, logits, mask, cache, tokens=3)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_chunks_beams_and_crop(model, kind):
    ids, mask = prompts(LONG, seed=6)
    with refreekv.compress(model, kv_dtype=f"{kind}:recent=8", prompt_dtype=None, **PRUNING) as kv:
        once = greedy(model, ids, mask, None)
        chunked = greedy(model, ids, mask, None, prefill_chunk_size=16)
        beams = greedy(model, ids, mask, None, num_beams=3)
        report = kv.report
    assert once.shape == beams.shape == (4, ids.shape[1] + 6)
    assert torch.equal(once, chunked)
    assert report.kv_dtype == f"{kind}:recent=8"
    assert f"in {kind}" in str(report)
    assert report.to_dict()["kv_dtype"] == report.kv_dtype
    cache = ReFreeKVCache(model, kv_dtype=f"{kind}:recent=8", **PRUNING)
    prefill(model, cache, LONG)
    cache.crop(-20)
    check_bytes(cache)
    assert cache.get_seq_length() == max(LONG) - 20
    cache.reset()
    assert cache.report.bytes_after == 0


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}], ids=str)
def test_generate_in_captured_steps(settings, llama, steps):
    ids, mask = prompts((90, 60), seed=2)
    answers = []
    for arena in (True, None):
        with refreekv.compress(llama, "refreekv", threshold=0.2, kv_dtype="int8:recent=8") as kv:
            cache = kv.new_cache()
            cache.state.arena = arena
            answers.append(greedy(llama, ids, mask, cache, steps=FLUSH + 12, **settings))
        assert steps["run"] == FLUSH + 11
        check_bytes(cache)
    assert torch.equal(*answers)


def test_a_step_serves_one_format_and_many_caches(llama, steps):
    ids, _ = prompts((90,), seed=1)
    caches = [captured(llama, "streaming-llm", kind, ratio=0.5) for kind in ("int8", "int4") * 2]
    outcome = [greedy(llama, ids, None, cache) for cache in caches]
    assert torch.equal(outcome[0], outcome[2])
    assert torch.equal(outcome[1], outcome[3])
    assert steps == {"made": 2, "run": 20}


@torch.no_grad()
def test_a_step_takes_over_the_means_of_each_cache(llama):
    """They belong to a cache; a captured step has copies in places of its own."""
    prompted = []
    for seed in (1, 9):
        cache = captured(llama, "full")
        logits, mask = prefill(llama, cache, (90,), seed=seed)
        prompted.append([cache, logits, mask])
    with attached(llama):
        for _ in range(2):
            for each in prompted:
                each[1:] = answer(llama, each[1], each[2], each[0], tokens=2)


@pytest.mark.parametrize("arena", [True, None])
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_again_while_the_answer_grows(llama, kind, arena):
    ids, mask = prompts(LONG, seed=6)
    number = Ladder.parse(f"{kind}:recent=4")
    stored, plain = (
        ReFreeKVCache(llama, "streaming-llm", size=45, kv_dtype=one, decode_interval=3) for one in (number, None)
    )
    stored.state.arena = arena
    for cache in (stored, plain):
        greedy(llama, ids, mask, cache, steps=12)
    assert all(coded_entries(stored))
    for layer, said in zip(stored.pruned_layers, stored.report.prunable, strict=True):
        # Beside keys and values such a layer remembers the last queries, for the next look.
        assert said.bytes_after == layer.ragged.nbytes
    assert [layer.ragged.lengths for layer in stored.pruned_layers] == [
        layer.ragged.lengths for layer in plain.pruned_layers
    ]
    assert max(max(row) for layer in stored.pruned_layers for row in layer.ragged.lengths) <= 45 + 3


def test_every_policy_can_store_quantised(llama):
    ids, mask = prompts((70, 40), seed=6)
    for name in policies.available():
        parameters = {"ratio": 0.5} if name in ("streaming-llm", "snapkv", "h2o", "tova", "knorm", "keydiff") else {}
        try:
            cache = ReFreeKVCache(llama, name, kv_dtype="int8:recent=8", **parameters)
        except (TypeError, ValueError):
            cache = ReFreeKVCache(llama, name, kv_dtype="int8:recent=8", ratio=0.5)
        greedy(llama, ids, mask, cache, steps=3)
        check_bytes(cache)
        assert all(isinstance(layer.ragged, LeveledKV) for layer in cache.pruned_layers), name


def test_bytes_at_a_length_where_they_matter():
    """Half precision, 1000 tokens, nothing evicted: the formats' own sizes, but for exact entries, and room for few."""
    model = build("llama", attention="sdpa", head_dim=64, max_position_embeddings=1024).to(torch.bfloat16)
    ids, mask = prompts((1000,))
    sizes = {}
    for kind in KINDS[:-1]:
        cache = ReFreeKVCache(model, "full", kv_dtype=kind)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
        check_bytes(cache)
        report, number = cache.report, KVDtype(kind)
        heads = sum(layer.kv_heads for layer in cache.pruned_layers)
        coded = number.coded(1000)
        # Float32 means of keys and values, as they are and rotated.
        least = heads * (coded * number.entry_bytes((64, 64)) + ((1000 - coded) * 2 + 8) * 128)
        room = heads * FLUSH * 256
        assert report.bytes_after == least + room
        sizes[kind] = report.bytes_after / report.bytes_before
    assert sizes["int4"] < 0.4 < sizes["k6v4"] < sizes["int8"] < 0.65


def test_heads_that_cannot_be_packed_are_refused_when_the_prompt_begins():
    model = build("llama", attention="sdpa")
    ids, mask = prompts((30,))
    cache = ReFreeKVCache(model, "full", kv_dtype="int8")
    with pytest.raises(ValueError, match="packs heads of a multiple of 16 elements, and this model's keys have 8"):
        greedy(model, ids, mask, cache)


def test_float64_stays_as_it_is_and_formats_for_it_are_refused():
    model = build("llama", attention="sdpa", hidden_size=64, num_attention_heads=4, num_key_value_heads=2).double()
    ids, mask = prompts((600,))
    with pytest.raises(
        ValueError, match=r"codes float16, bfloat16 and float32, and this model's keys are in torch\.float64"
    ):
        greedy(model, ids, mask, ReFreeKVCache(model, "full", kv_dtype="int8"))
    cache = ReFreeKVCache(model, "adaptive")
    greedy(model, ids, mask, cache)
    assert all(layer.ladder is None for layer in cache.pruned_layers)
