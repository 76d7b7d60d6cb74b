"""Prompts that come in chunks and are coded as they are read: all that is kept of them, and when."""

import copy
import ctypes
import functools
from dataclasses import dataclass

import pytest
import torch

import refreekv
from helpers.driving import POLICIES, SpreadHeavyHitter, Uneven, greedy, storage_bytes, tensors_of
from helpers.equivalence import loop
from helpers.models import LAYERS, build, full_layers, prompts
from refreekv import KVDtype, ReFreeKVCache
from refreekv.core.quantisation import FLUSH, SINKS, Ladder
from refreekv.core.selection import Selection
from refreekv.core.surrogates import Surrogates
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.kernels.table import LENGTH
from refreekv.policies import Policy
from refreekv.storage import unfinished
from refreekv.storage.leveled import LeveledKV

RECENT = 4
NUMBER = KVDtype("int8", recent=RECENT)
LONG, SECOND = (150, 40, 121, 99), (70, 9, 61, 1)
CASES = {
    **POLICIES,
    "full": ("full", {}),
    "uneven": (Uneven(), {}),
    "adaptive": ("adaptive", {"min_length": 16}),
    "spread": (SpreadHeavyHitter(threshold=0.1, frozen_layers=0, spread=12), {}),
    "frozen": ("refreekv", {"threshold": 0.2, "frozen_layers": "all"}),
    "ada-kv": ("ada-kv", {"ratio": 0.5}),
}


@functools.cache
def model_of(name="llama"):
    return build(name, attention="sdpa", head_dim=16)


@functools.cache
def turns_of(lengths, second):
    return [prompts(lengths, seed=1), prompts(second, seed=2)]


@pytest.fixture
def lossless(monkeypatch):
    """Coding that loses nothing: what comes out is what came in, however it is laid out. Counts coded columns."""
    kept, seen = [], []

    def place(table):
        """The number of what was kept for these lines, which is written into the first of them."""
        return ctypes.c_int64.from_address(int(table[0, 0]))

    def pack(keys, values, table, form, maps, spans, *, end, longest, starts):
        first = 0 if starts is None else int(starts[0])
        assert starts is None or (starts == first).all()
        assert (table[:, LENGTH] == first + longest).all()
        assert spans.tolist() == [[0, 0, 0]] * len(table)  # from the first one on
        old = kept[place(table).value] if first else [new[:, :, :0] for new in (keys, values)]
        assert all(held.shape[2] >= first for held in old)
        kept.append(
            [
                torch.cat([held[:, :, :first], new[:, :, :longest]], 2)
                for held, new in zip(old, (keys, values), strict=True)
            ]
        )
        place(table).value = len(kept) - 1
        seen.append(longest)

    def unpack(keys, values, table, form, maps, spans, *, end, longest):
        for held, out in zip(kept[place(table).value], (keys, values), strict=True):
            out.copy_(held[:, :, :longest])

    monkeypatch.setattr(unfinished.kernels, "pack_lines", pack)
    monkeypatch.setattr(unfinished.kernels, "unpack_lines", unpack)
    return seen


def run(model, policy, parameters, turns, chunk, arena=None, **settings):
    cache = ReFreeKVCache(model, policy, kv_dtype=None, **parameters, **settings)
    cache.state.arena = arena
    results, reports = loop(model, cache, turns, chunk)
    return results, reports, cache


def check_same(got, wanted, exact):
    for one, other in zip(got[0], wanted[0], strict=True):
        assert torch.equal(one.logits, other.logits) if exact else torch.allclose(one.logits, other.logits, atol=1e-4)
        assert torch.equal(one.tokens, other.tokens)
    assert got[1] == wanted[1]
    for one, other in zip(got[2].pruned_layers, wanted[2].pruned_layers, strict=True):
        assert one.reading is None
        assert one.reports == other.reports
        assert (one.padding is None) == (other.padding is None)
        assert one.holds_hidden == other.holds_hidden
        assert [columns.as_ranges() for columns in one.kept_columns] == [
            columns.as_ranges() for columns in other.kept_columns
        ]


# -- all bookkeeping is that of the prompt in full precision -----------------------------------------


@pytest.mark.parametrize("chunk", [16, 37])
@pytest.mark.parametrize("case", CASES)
def test_without_loss_it_is_the_prompt_in_full_precision(lossless, case, chunk):
    model = model_of()
    turns = turns_of(LONG, SECOND)
    got = run(model, *CASES[case], turns, chunk, prompt_dtype=NUMBER)
    coded = sum(lossless)
    wanted = run(model, *CASES[case], turns, chunk, prompt_dtype=None)
    assert sum(lossless) == coded > LAYERS * (150 - 37 - RECENT - FLUSH)
    check_same(got, wanted, exact=True)


@pytest.mark.parametrize("case", ["heavy-hitter", "uneven", "joint", "full"])
def test_without_loss_in_storage_that_grows(lossless, case):
    """As on CUDA: a second prompt comes behind an arena."""
    model, turns = model_of(), turns_of(LONG, SECOND)
    got, wanted = (run(model, *CASES[case], turns, 37, arena=True, prompt_dtype=one) for one in (NUMBER, None))
    assert lossless
    check_same(got, wanted, exact=False)


@pytest.mark.parametrize("name", ["gemma3", "qwen2", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("case", ["heavy-hitter", "joint"])
def test_without_loss_on_other_architectures(lossless, name, case):
    model, turns = model_of(name), turns_of(LONG, (70,) * 4)
    got, wanted = (run(model, *CASES[case], turns, 37, prompt_dtype=one) for one in (NUMBER, None))
    assert lossless
    check_same(got, wanted, exact=True)


def test_without_loss_while_the_answer_is_pruned_too(lossless):
    model, turns = model_of(), turns_of(LONG, SECOND)
    got, wanted = (
        run(model, "streaming-llm", {"size": 45}, turns, 37, decode_interval=3, prompt_dtype=one)
        for one in (NUMBER, None)
    )
    assert lossless
    check_same(got, wanted, exact=True)


def test_without_loss_through_generate(lossless):
    model = model_of()
    ids, mask = prompts(LONG, seed=6)
    answers = []
    for number in (NUMBER, None):
        with refreekv.compress(model, "refreekv", threshold=0.2, prompt_dtype=number) as kv:
            answers.append([greedy(model, ids, mask, None, prefill_chunk_size=40, **more) for more in MODES])
            assert kv.report.budget < 1
    assert lossless
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)


MODES = [{}, {"num_beams": 3}]


@pytest.mark.parametrize("act", ["crop", "rows", "copy", "beams"])
@pytest.mark.parametrize("kind", ["first", "second"])
@torch.no_grad()
def test_in_the_middle_of_a_prompt(lossless, act, kind):
    """What changes the cache there goes on from all entries in full precision."""
    model = model_of()
    results = []
    for number in (NUMBER, None):
        cache = ReFreeKVCache(model, "refreekv", threshold=0.2, prompt_dtype=number)
        ids = torch.randint(2, 90, (2, 200), generator=torch.Generator().manual_seed(3))
        before = 0
        if kind == "second":
            before = 60
            model(ids[:, :before], past_key_values=cache)
        logits = []
        with cache.prompt_until(before + 120):
            for piece in ids[:, before : before + 80].split(40, 1):
                model(piece, past_key_values=cache)
            if act == "crop":
                cache.crop(-7)
            elif act == "rows":
                cache.batch_select_indices(torch.tensor([1]))
            elif act == "beams":
                cache.reorder_cache(torch.tensor([1, 1]))
            else:
                cache = copy.deepcopy(cache)
            at = cache.get_seq_length()
            rest = ids[-cache.pruned_layers[0].batch :, at : before + 120]
            logits += [model(piece, past_key_values=cache).logits for piece in rest.split(20, 1)]
        logits.append(model(rest[:, :1], past_key_values=cache).logits)
        results.append((logits, cache.report, [layer.reports for layer in cache.pruned_layers]))
    assert lossless
    (mine, *said), (theirs, *others) = results
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)
    assert said == others


@torch.no_grad()
def test_lines_of_what_was_cropped_are_not_moved():
    """A prompt that was cropped and goes on otherwise, in chunks that are too small to be coded."""
    model = build("llama", attention="sdpa", head_dim=64)
    ids, others = (prompts((220,), seed=seed)[0] for seed in (1, 2))
    found = []
    for number in ("auto", None):
        cache = ReFreeKVCache(model, "full", kv_dtype="int8", prompt_dtype=number)
        with cache.prompt_until(220):
            for piece in ids[:, :180].split(90, 1):
                model(piece, past_key_values=cache)
            assert all(prompt.coded == 116 for prompt in unfinished_of(cache))
            cache.crop(-130)
            for piece in others[:, 50:].split(40, 1):
                model(piece, past_key_values=cache)
        found.append([layer.ragged.full() for layer in cache.pruned_layers])
    for one, other in zip(*found, strict=True):
        assert (one.keys - other.keys).norm() < 0.05 * other.keys.norm()


# -- what is coded, and when -------------------------------------------------------------------------


@torch.no_grad()
def read(model, cache, ids, mask, chunk, after=lambda: None, end=None):
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with cache.prompt_until(ids.shape[1] if end is None else end):
        for start in range(0, ids.shape[1], chunk):
            part = slice(start, min(start + chunk, ids.shape[1]))
            out = model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                past_key_values=cache,
            )
            after()
    return out.logits[:, -1]


def unfinished_of(cache):
    return [layer.reading.prompt for layer in cache.pruned_layers if layer.reading is not None]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int6", "k6v4", "int4"])
def test_entries_come_back_but_for_the_format(kind, padded):
    """Sinks and the newest are as they were; those between are within what the format loses; padding is no entry."""
    model, number = model_of(), KVDtype(kind, recent=RECENT)
    lengths = (150, 40, 121, 99) if padded else (150, 150)
    ids, mask = prompts(lengths, seed=1)
    coded, plain = (ReFreeKVCache(model, "full", prompt_dtype=one) for one in (number, None))
    # The first layer's entries depend on no attention.
    for cache in (coded, plain):
        read(model, cache, ids, mask, 30, end=200)
    layer, want = coded.pruned_layers[0], plain.pruned_layers[0].dense
    assert 150 - RECENT - FLUSH < layer.reading.prompt.coded <= 150 - RECENT
    loss = {"int8": 0.012, "int6": 0.04, "k6v4": 0.13, "int4": 0.13}[kind]
    for row, length in enumerate(lengths):
        for got, exact in zip(layer.dense, want, strict=True):
            mine, theirs = got[row, :, 150 - length :], exact[row, :, 150 - length :]
            assert torch.equal(mine[:, :SINKS], theirs[:, :SINKS])
            assert torch.equal(mine[:, -RECENT:], theirs[:, -RECENT:])
            between = slice(SINKS, layer.reading.prompt.coded - (150 - length))
            if between.stop > between.start:
                centred = theirs[:, between] - theirs[:, SINKS:].mean(1, keepdim=True)
                off = (mine[:, between] - theirs[:, between]).norm() / centred.norm()
                assert 0 < off < loss
    report = coded.report
    assert report.bytes_after < 0.8 * plain.report.bytes_after


@pytest.mark.parametrize("lengths", [(90,), (90, 40, 61)], ids=["alone", "batch"])
def test_chunks_may_be_shorter_than_what_a_policy_looks_at(lengths):
    """Queries of chunks were not asked as long as the prompt was too short for the policy to keep less than all."""
    model, (ids, mask) = model_of(), prompts(lengths, seed=1)
    loose = {
        "constant": 0.1,
        "copying": 2.0,
        "window": 4,
        "spread_factor": 1.0,
        "hit": 0.9,
        "follow": 0,
        "lost_mass": 0.9,
    }

    def kept(chunk):
        cache = ReFreeKVCache(model, "adaptive", min_length=64, bits=16, prompt_dtype=None, **loose)
        loop(model, cache, [(ids, mask if len(lengths) > 1 else None)], chunk)
        return [cache.kept_ranges(row) for row in range(len(lengths))]

    assert any(len(head) > 1 for layer in kept(None)[0] for head in layer)
    assert kept(16) == kept(None)


def test_a_row_is_as_alone_where_chunks_end_in_the_same_places():
    """Neither its padding nor its neighbours change how it is coded."""
    model = model_of()
    ids, mask = prompts((150, 70), seed=1)
    together, alone = (ReFreeKVCache(model, "full", prompt_dtype=NUMBER) for _ in range(2))
    read(model, together, ids, mask, 30, end=200)
    # 20 of the padding's 80 columns stay: the first of its chunks has ten real tokens.
    read(model, alone, ids[1:, 60:], mask[1:, 60:], 30, end=140)
    for one, other in zip(together.pruned_layers, alone.pruned_layers, strict=True):
        for mine, theirs in zip(one.dense, other.dense, strict=True):
            # Means are summed in another order: what lies half-way between two codes may go to either.
            assert (mine[1, :, 80:] - theirs[0, :, 20:]).norm() < 2e-3 * theirs.norm()


def test_the_same_tokens_as_in_full_precision():
    model = model_of()
    ids, mask = prompts(LONG, seed=6)
    for policy in (("refreekv", {"threshold": 0.2}), ("full", {})):
        answers = [
            greedy(model, ids, mask, ReFreeKVCache(model, policy[0], prompt_dtype=one, **policy[1]), **more)
            for one, more in ((NUMBER, {"prefill_chunk_size": 40}), (None, {"prefill_chunk_size": 40}))
        ]
        assert (answers[0] == answers[1]).float().mean() > 0.99
    logits = [
        read(model, ReFreeKVCache(model, "full", prompt_dtype=one), ids, mask, 40)
        for one in (None, "int8", "int8:recent=4", "int4:recent=4")
    ]
    off = [(one - logits[0]).norm() / logits[0].norm() for one in logits[1:]]
    assert 0 < off[1] < 0.2 * off[2] < 0.2
    assert off[0] < off[1]  # fewer entries are coded


@dataclass(frozen=True)
class StandIns(Policy):
    """Columns 90 to 99 go, and entries like no other take the places of some of them."""

    name = "stand-ins"

    def select(self, view):
        keep = torch.ones_like(view.keys[..., 0], dtype=torch.bool)
        keep[:, :, 90:100] = False
        columns = torch.tensor([92, 95, 97]).expand(*view.keys.shape[:2], -1)
        real = torch.tensor([True, True, False]).expand_as(columns)
        keys, values = (7 + side[:, :, :3] for side in (view.keys, view.values))
        return Selection(keep, surrogates=Surrogates(columns, keys, values, real))


KEPT = {
    "int8": ("full", {}),
    "int8, some": (Uneven(), {}),
    "int8, stand-ins": (StandIns(), {}),
    "k4v4+int8": (Uneven(), {}),
    "int4": ("full", {}),
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("second", [False, True])
def test_lines_of_the_final_format_are_moved_as_they_are(kind, second):
    """What comes back of the final storage is what chunks attended to, for all that has that format; no other loss."""
    model = model_of()
    policy, parameters = KEPT[kind]
    ladder = Ladder.parse(f"{kind.partition(',')[0]}:recent={RECENT}")
    cache = ReFreeKVCache(model, policy, kv_dtype=ladder, prompt_dtype=NUMBER, **parameters)
    ids, mask = prompts((150, 90), seed=1)
    seen, gathered = [], LeveledKV.gathered

    def watched(keys, values, *args):
        made = gathered(keys, values, *args)
        seen.append(([keys.clone(), values.clone()], made, args[-1]))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeveledKV, "gathered", watched)
        read(model, cache, ids, mask, 30)
    moved = coarser = 0
    for layer, (dense, made, coded) in zip(cache.pruned_layers, seen, strict=True):
        assert (coded is None) == (kind == "int4")
        full = made.full()
        for row in range(2):
            for head, columns in enumerate(layer.kept_columns[row].tensors(ids.device) * 2):
                if head > 1:
                    break
                for got, exact in zip(full.segments(row), dense, strict=True):
                    got, exact = got[head], exact[row, head][columns.long()]
                    off = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
                    early = (columns < 100) & (columns > 150 - ids.shape[1] + SINKS)
                    moved += int((off[early] < 1e-5).sum())
                    coarser += int((off[early] >= 1e-5).sum())
                    assert off.max() < (0.02 if "int8" in kind and "+" not in kind else 0.5)
    if second:
        more, _ = prompts((90, 90), seed=2)
        read_on = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
        with torch.no_grad(), cache.prompt_until(240):
            for start in range(150, 240, 30):
                part = slice(start, start + 30)
                positions = read_on[1].cumsum(1)[:, part] - 1
                model(read_on[0][:, part], attention_mask=read_on[1][:, : part.stop], position_ids=positions,
                      past_key_values=cache)  # fmt: skip
        assert cache.get_seq_length() == 240
    if kind == "int4":
        assert coarser > 10 * moved
    elif "+" in kind:
        assert moved > 0 < coarser
    elif "stand-ins" in kind:
        # Two of each head, keys and values, are coded anew.
        assert coarser == LAYERS * 2 * 2 * 2 * 2 < moved
    else:
        assert moved > 0 == coarser


@torch.no_grad()
def test_under_autocast_keys_and_values_keep_their_types():
    model = model_of()
    ids, mask = prompts((150, 90), seed=1)
    caches = [ReFreeKVCache(model, "streaming-llm", ratio=0.7, prompt_dtype=one) for one in (NUMBER, None)]
    with torch.autocast("cpu", torch.bfloat16):
        logits = [read(model, cache, ids, mask, 30) for cache in caches]
    for one, other in zip(*(cache.pruned_layers for cache in caches), strict=True):
        assert one.types == other.types == (torch.float32, torch.bfloat16)
        for mine, theirs in zip((one.keys, one.values), (other.keys, other.values), strict=True):
            assert mine.dtype == theirs.dtype
            assert (mine.float() - theirs.float()).norm() < 0.2 * theirs.float().norm()
    assert (logits[0] - logits[1]).norm() < 0.2 * logits[1].norm()


@torch.inference_mode()
def test_in_inference_mode_and_out_of_it():
    model = model_of()
    ids, mask = prompts((150, 90), seed=1)
    cache, other = (ReFreeKVCache(model, "full", prompt_dtype=NUMBER) for _ in range(2))
    read(model, cache, ids[:, :90], mask[:, :90], 30, end=150)
    with torch.inference_mode(False), torch.no_grad():
        whole, rest = prompts((150, 90), seed=1)
        with cache.prompt_until(150):
            for start in range(90, 150, 30):
                part = slice(start, start + 30)
                positions = (rest.cumsum(1) - 1).clamp_min(0)[:, part]
                logits = model(
                    whole[:, part], attention_mask=rest[:, : part.stop], position_ids=positions, past_key_values=cache
                ).logits[:, -1]
    assert torch.equal(logits, read(model, other, ids, mask, 30))


# -- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("case", ["refreekv", "joint"])
def test_between_calls_nothing_is_held_in_full_precision(case, second):
    """All storages that can be reached, at each chunk's end; and within a call one layer's copy at most."""
    model = build("llama", attention="sdpa", head_dim=64)
    policy, parameters = CASES[case]
    cache = ReFreeKVCache(model, policy, prompt_dtype=NUMBER, **parameters)
    before = 0
    ids = torch.randint(2, 90, (1, 700), generator=torch.Generator().manual_seed(3))
    if second:
        before = 100
        with torch.no_grad():
            model(ids[:, :before], past_key_values=cache)
    entry = 2 * 2 * 64 * 4  # bytes of a token's keys and values in a layer
    held, within, chunk = [], [], 50

    def bytes_of(layers):
        # Beside keys and values a layer remembers the queries that the policy is going to ask with, and what they saw.
        others = {t.data_ptr() for layer in layers for t in tensors_of(layer._queries)}
        others |= {layer._padding.seen.data_ptr() for layer in layers if layer._padding.seen is not None}
        for layer in layers:
            if layer.reading is not None and layer.reading.prompt._maps is not None:
                # All caches share the matrices.
                maps = layer.reading.prompt._maps
                means = {t.data_ptr() for t in (maps.key_mean, maps.value_mean, maps.key_offset, maps.value_offset)}
                others |= {t.data_ptr() for t in maps.tensors} - means
        return storage_bytes([t for layer in layers for t in tensors_of(layer) if t.data_ptr() not in others])

    update = ReFreeKVLayer.after_attention

    def watched(self, call):
        within.append(max(bytes_of([layer]) for layer in cache.pruned_layers if layer is not self))
        update(self, call)

    started = bytes_of(cache.pruned_layers)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), cache.prompt_until(700):
        patch.setattr(ReFreeKVLayer, "after_attention", watched)
        for piece in ids[:, before:650].split(chunk, 1):
            model(piece, past_key_values=cache)
            held.append(bytes_of(cache.pruned_layers))
            if unfinished_of(cache):
                report = cache.report
                assert report.bytes_after + report.index_bytes == held[-1]
    line = NUMBER.entry_bytes((64, 64)) * 2
    coded = 700 - before - RECENT
    exact = (RECENT + FLUSH + chunk + SINKS) * entry
    assert max(held) <= started + LAYERS * (coded * line + exact + 2048)
    assert max(held) < started + 0.45 * LAYERS * 650 * entry
    assert max(within) <= started + coded * line + exact + 2048


@torch.no_grad()
@pytest.mark.parametrize("second", [False, True])
def test_a_chunk_behind_a_mask_repeats_one_kv_head_at_a_time(monkeypatch, second):
    """Query heads that share a KV head see one view of it: behind a mask sdpa would copy all of them for each.

    A few queries behind what an earlier prompt left are more queries of the KV heads.
    """
    model = model_of()
    seen, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *args, **kwargs):
        seen.append((key.shape[1], key.stride(1) == 0))
        return sdpa(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    cache = ReFreeKVCache(model, "streaming-llm", size=50, prompt_dtype=NUMBER)
    ids, before = prompts((150,), seed=1)[0], 60 if second else 0
    if second:
        model(ids[:, :before], past_key_values=cache)
        seen.clear()
    with cache.prompt_until(150):
        for piece in ids[:, before:].split(30, 1):
            model(piece, past_key_values=cache)
    masked = seen[0 if second else LAYERS :]
    assert set(masked) == {(2, False) if second else (4, True)}  # of 8 query heads
    assert len(masked) == LAYERS * (3 if second else 2 * 4)


# -- the switch --------------------------------------------------------------------------------------


def test_heads_that_cannot_be_packed():
    model = build("llama", attention="sdpa")  # heads of 8
    ids, mask = prompts((150,))
    automatic, plain = (ReFreeKVCache(model, "full", prompt_dtype=one) for one in ("auto", None))
    assert torch.equal(read(model, automatic, ids, mask, 40), read(model, plain, ids, mask, 40))
    with pytest.raises(ValueError, match="prompt_dtype int8 packs heads of a multiple of 16 elements"):
        read(model, ReFreeKVCache(model, "full", prompt_dtype="int8"), ids, mask, 40)


def test_small_chunks_are_not_coded_unasked():
    """Each would decode all that came before; from the first longer one on they are."""
    model = build("llama", attention="sdpa", head_dim=64)
    ids, mask = prompts((400,))
    for chunk, wanted, coded in ((63, "auto", False), (64, "auto", True), (40, "int8", True)):
        cache = ReFreeKVCache(model, "full", prompt_dtype=wanted)
        read(model, cache, ids, mask, chunk, end=500)
        assert [prompt.coded > 0 for prompt in unfinished_of(cache)] == [True] * (LAYERS * coded)
        assert {str(prompt.number) for prompt in unfinished_of(cache)} <= {"int8"}


@pytest.mark.parametrize("wrong", ["int7", "fp8", "int8:group=32", ""])
def test_unknown_formats_are_refused(wrong):
    with pytest.raises(ValueError, match=r"prompt_dtype.*; or auto"):
        ReFreeKVCache(model_of(), "full", prompt_dtype=wrong)
    with pytest.raises(ValueError, match=r"prompt_dtype.*; or auto"), refreekv.compress(model_of(), prompt_dtype=wrong):
        pass


def test_the_switch_is_kept_in_files(tmp_path):
    model = model_of()
    ids, mask = prompts((60,))
    for wanted in ("auto", None, "int6:recent=8"):
        cache = ReFreeKVCache(model, "full", prompt_dtype=wanted)
        read(model, cache, ids, mask, 60)
        cache.save(tmp_path / "cache")
        assert ReFreeKVCache.load(tmp_path / "cache", model).state.prompt_dtype == cache.state.prompt_dtype
    cache = ReFreeKVCache(model, "full")
    read(model, cache, ids, mask, 30, end=100)
    with pytest.raises(ValueError, match="in the middle of a prompt"):
        cache.save(tmp_path / "cache")


def test_only_full_attention_layers_are_coded():
    model = model_of("gemma3")
    cache = ReFreeKVCache(model, "full", prompt_dtype=NUMBER)
    ids, mask = prompts((150,))
    read(model, cache, ids, mask, 40, end=200)
    assert [layer.index for layer in cache.pruned_layers if layer.reading is not None] == full_layers(model)
