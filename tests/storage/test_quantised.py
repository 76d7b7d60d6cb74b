"""Quantised storage: against full-precision storage, in models, to the byte. Its numbers: tests/core/test_codes.py."""

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refreekv
from helpers.driving import POLICIES, PRUNING, Uneven, feed, greedy, prefill, storage_bytes, tensors_of
from helpers.models import build, prompts
from refreekv import KVDtype, ReFreeKVCache, policies
from refreekv.core.quantisation import FLUSH, SINKS, round_trip
from refreekv.storage.columns import Columns
from refreekv.storage.quantised import QuantisedKV
from refreekv.storage.ragged import RaggedKV

KINDS = ["fp8", "int8", "int4"]
LONG = (150, 120, 85, 140)
"""Of a ragged batch of which something is coded, too, where half is evicted."""


def lines(count: int, elements: int, seed: int = 0) -> torch.Tensor:
    """Entries with outlying elements and offsets, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(elements, generator=generator).exp()
    return torch.randn(count, elements, generator=generator) * scale + 3 * torch.randn(elements, generator=generator)


# -- storage ------------------------------------------------------------------------------------


@dataclass
class Twins:
    """The same entries quantised and not; ``decoded`` is what the quantised ones must give back."""

    quantised: QuantisedKV
    plain: RaggedKV

    def check(self, tolerance: float) -> None:
        full = self.quantised.full()
        assert full.lengths == self.quantised.lengths == self.plain.lengths
        for ours, theirs in ((full.keys, self.plain.keys), (full.values, self.plain.values)):
            assert torch.allclose(ours, theirs, atol=tolerance)
        held = storage_bytes(tensors_of_storage(self.quantised))
        assert self.quantised.nbytes == held
        assert held == sum(self.quantised.row_nbytes(row) for row in range(len(self.plain.lengths)))


def tensors_of_storage(storage: QuantisedKV) -> list[torch.Tensor]:
    codes = [tensor for part in storage._codes for tensor in part.tensors]
    return [*codes, storage.keys, storage.values, storage._sinks.keys, storage._sinks.values, *storage._centres]


def ragged(lengths: list[tuple[int, ...]], seed: int) -> RaggedKV:
    total = sum(map(sum, lengths))
    return RaggedKV(lines(total, 16, seed), lines(total, 8, seed + 1), lengths)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_storage_does_what_full_precision_storage_does(data, kind):
    heads = data.draw(st.integers(1, 3))
    rows = data.draw(st.integers(1, 3))
    even = data.draw(st.booleans())
    length = st.integers(0, 70)
    lengths = [
        (n,) * heads if even else tuple(data.draw(length) for _ in range(heads))
        for n in (data.draw(length) for _ in range(rows))
    ]
    number = KVDtype(kind, recent=data.draw(st.integers(0, 20)))
    plain = ragged(lengths, seed=1)
    twins = Twins(QuantisedKV.of(number, plain), plain)
    for step in range(data.draw(st.integers(0, 4))):
        match data.draw(st.sampled_from(["append", "select", "truncate", "keep"])):
            case "append":
                count = data.draw(st.integers(1, 40))
                rows_now = len(twins.plain.lengths)
                new = [lines(rows_now * heads * count, d, 7 + step).view(rows_now, heads, count, d) for d in (16, 8)]
                twins = Twins(twins.quantised.append(*new), twins.plain.append(*new))
            case "select":
                rows_now = len(twins.plain.lengths)
                wanted = data.draw(st.lists(st.integers(0, rows_now - 1), min_size=1, max_size=3))
                twins = Twins(twins.quantised.select_rows(wanted), twins.plain.select_rows(wanted))
            case "truncate":
                wanted = [[data.draw(st.integers(0, n)) for n in row] for row in twins.plain.lengths]
                twins = Twins(twins.quantised.truncate(wanted), twins.plain.truncate(wanted))
            case "keep":
                behind = data.draw(st.integers(0, min(3, *(n for row in twins.plain.lengths for n in row))))
                kept, plain_rows = [], []
                for row, own in enumerate(twins.plain.lengths):
                    longest = max(own)
                    index = [
                        torch.tensor(
                            [i for i in range(longest - n, longest - behind) if (i * 7 + h) % 3], dtype=torch.int32
                        )
                        for h, n in enumerate(own)
                    ]
                    kept.append(Columns(heads=tuple(index)))
                    keys, values = twins.plain.segments(row)
                    parts = [
                        [
                            torch.cat([part[(i.long() - (longest - n))], part[n - behind :]])
                            for part, i, n in zip(side, index, own, strict=True)
                        ]
                        for side in (keys, values)
                    ]
                    plain_rows.append(parts)
                twins = Twins(
                    twins.quantised.keep(kept, behind),
                    RaggedKV.from_pieces([[k] for k, _ in plain_rows], [[v] for _, v in plain_rows]),
                )
        twins.check(tolerance={"fp8": 1.5, "int8": 1.5, "int4": 4.5}[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_moving_entries_never_changes_them(kind):
    storage = QuantisedKV.of(KVDtype(kind, recent=5), ragged([(60, 60), (41, 41)], seed=3))
    before = storage.full()
    kept = [Columns.of_ranges((0, 9), (20, 60)), Columns(heads=(torch.arange(0, 41, 2),))]
    moved = storage.keep(kept, behind=0).select_rows([1, 0]).truncate([[20, 20], [30, 30]]).full()
    for row, columns in ((1, torch.arange(0, 41, 2)[:20]), (0, torch.cat([torch.arange(9), torch.arange(20, 41)]))):
        for then, now in zip(before.segments(row), moved.segments(1 - row), strict=True):
            assert torch.equal(then[:, columns], now)


def test_first_and_recent_entries_are_bit_for_bit_and_others_move_in_blocks():
    plain = ragged([(50,)], seed=4)
    storage = QuantisedKV.of(KVDtype("int4", recent=10), plain)
    assert storage.coded == [(36,)]
    for step in range(1, 2 * FLUSH + 2):
        new = lines(1, 16, step).view(1, 1, 1, 16), lines(1, 8, step).view(1, 1, 1, 8)
        storage, plain = storage.append(*new), plain.append(*new)
        recent = storage.lengths[0][0] - storage.coded[0][0]
        recent -= SINKS
        assert 10 < recent <= 10 + FLUSH
        found, sinks = storage.full().keys, SINKS
        assert torch.equal(found[:sinks], plain.keys[:sinks])
        assert torch.equal(found[-recent:], plain.keys[-recent:])
        assert not (found[sinks:-recent] == plain.keys[sinks:-recent]).all(-1).any()
    assert storage.coded == [(36 + 2 * FLUSH,)]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_rows_and_heads_are_stored_as_if_each_were_alone(data, kind):
    """To the bit, and at the same time: neither codes nor what is coded yet depend on neighbours."""
    number, length = KVDtype(kind, recent=data.draw(st.integers(0, 20))), st.integers(0, 90)
    lengths = [tuple(data.draw(length) for _ in range(2)) for _ in range(data.draw(st.integers(2, 3)))]
    centres = torch.randn(len(lengths), 2, 16), torch.randn(len(lengths), 2, 8)
    plain = ragged(lengths, seed=1)
    together = QuantisedKV.of(number, plain, centres)
    apart = [
        QuantisedKV.of(number, plain.select_rows([row]), (centres[0][row : row + 1], centres[1][row : row + 1]))
        for row in range(len(lengths))
    ]
    for count in data.draw(st.lists(st.integers(1, 50), max_size=4)):
        new = lines(len(lengths) * 2 * count, 16, count).view(len(lengths), 2, count, 16)
        together = together.append(new, new[..., :8])
        apart = [one.append(*(part[row : row + 1] for part in (new, new[..., :8]))) for row, one in enumerate(apart)]
    assert together.coded == [one.coded[0] for one in apart]
    for row, one in enumerate(apart):
        alone, among = one.full(), together.select_rows([row])
        for mine, other in zip(one._codes, among._codes, strict=True):
            assert all(map(torch.equal, mine.tensors, other.tensors))
        assert all(map(torch.equal, one._centres, among._centres))
        assert torch.allclose(alone.keys, among.full().keys, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_coded_does_not_depend_on_how_many_come_at_once(kind):
    plain = ragged([(90, 70)], seed=2)
    number = KVDtype(kind, recent=10)
    new = lines(2 * 120, 16, 5).view(1, 2, 120, 16)
    found = []
    for step in (1, 3, 40):
        storage = QuantisedKV.of(number, plain)
        for part in new.split(step, dim=2):
            storage = storage.append(part, part[..., :8])
        found.append(storage._settled())
    for other in found[1:]:
        assert other.coded == found[0].coded
        assert all(torch.equal(a.payload, b.payload) for a, b in zip(other._codes, found[0]._codes, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_rejected_drafts_leave_no_trace(kind):
    storage = QuantisedKV.of(KVDtype(kind, recent=6), ragged([(90, 90)], seed=2))
    twin = storage
    for step in range(60):
        new = lines(2, 16, step).view(1, 2, 1, 16)
        draft = torch.cat([new, torch.randn(1, 2, 3, 16)], dim=2)
        storage = storage.append(draft, draft[..., :8])
        storage = storage.truncate([[n - 3 for n in row] for row in storage.lengths])
        twin = twin.append(new, new[..., :8])
        assert storage.coded == twin.coded
        assert torch.equal(storage.full().keys, twin.full().keys)


@pytest.mark.parametrize("sizes", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (48, 7)])
@pytest.mark.parametrize("kind", [*KINDS, "k6v3"])
def test_attention_over_rotated_copies_is_attention(kind, sizes):
    """Queries rotated, output rotated back, means missing: the same as over the entries themselves."""
    lengths = [(130, 110), (60, 101)]
    total = sum(map(sum, lengths))
    plain = RaggedKV(lines(total, sizes[0], 1), lines(total, sizes[1], 2), lengths)
    storage = QuantisedKV.of(KVDtype(kind, recent=7), plain)
    query = torch.randn(2, 4, 3, sizes[0])
    read, frame = storage.for_attention(shifts=True)
    turned = frame.output(torch.stack([_attention(frame.query(query)[row], *read.segments(row)) for row in (0, 1)]))
    whole, none = storage.for_attention(shifts=False)
    assert none is None
    wanted = torch.stack([_attention(query[row], *whole.segments(row)) for row in (0, 1)])
    assert torch.allclose(turned, wanted, atol=1e-3 * float(wanted.abs().max()))
    assert storage.lengths == whole.lengths == read.lengths


def _attention(query, keys, values):
    """One row: ``[H, q, D]`` over its segments, ``[q, H, Dv]``."""
    group = len(query) // len(keys)
    heads = [
        (query[head] @ keys[head // group].T / query.shape[-1] ** 0.5).softmax(-1) @ values[head // group]
        for head in range(len(query))
    ]
    return torch.stack(heads, dim=1)


# -- models -------------------------------------------------------------------------------------


def with_decoded_entries(cache: ReFreeKVCache) -> ReFreeKVCache:
    """A copy of a cache that holds in full precision what the quantised one stands for."""
    twin = copy.deepcopy(cache)
    for layer in twin.pruned_layers:
        assert isinstance(layer.ragged, QuantisedKV)
        layer.kv_dtype = None
        # What has gathered is coded when the next entries come.
        layer._store(layer.ragged._settled().full())
    return twin


def again_coded(number: KVDtype, storage: QuantisedKV, entries: torch.Tensor, side: int) -> torch.Tensor:
    """Flat entries of a storage's segments as coding them (again) gives them back."""
    counts = [n for row in storage.lengths for n in row]
    parts = zip(entries.split(counts), storage._centres[side].flatten(0, 1), strict=True)
    return torch.cat([round_trip(part, number.widths[side], centre) for part, centre in parts])


def check_bytes(cache: ReFreeKVCache) -> None:
    """What the report says is what all reachable storages hold; only the indices are counted apart."""
    report = cache.report
    sliding = [layer for layer in cache.layers if layer not in cache.pruned_layers]
    tensors = [tensor for layer in cache.pruned_layers for tensor in tensors_of(layer)]
    tensors += [tensor for layer in sliding for tensor in (layer.keys, layer.values)]
    everything = storage_bytes(tensors)
    assert report.bytes_after + report.index_bytes == everything
    for layer in report.prunable:
        assert layer.bytes_after == sum(row.bytes_after for row in layer.rows)
        assert layer.bytes_before == sum(row.bytes_before for row in layer.rows)


CASES = {**POLICIES, "full": ("full", {}), "uneven": (Uneven(), {}), "ada-kv": ("ada-kv", {"ratio": 0.5})}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_turns_of_a_ragged_batch(llama, kind, case):
    policy, parameters = CASES[case]
    number = KVDtype(kind, recent=4)
    cache = ReFreeKVCache(llama, policy, kv_dtype=number, **parameters)
    plain = ReFreeKVCache(llama, policy, **parameters)
    logits, mask = prefill(llama, cache, LONG)
    others, _ = prefill(llama, plain, LONG)
    assert torch.equal(logits, others)  # the prompt itself is read in full precision
    assert [layer.records for layer in cache.pruned_layers] == [layer.records for layer in plain.pruned_layers]
    assert cache.report.bytes_before == plain.report.bytes_before
    check_bytes(cache)
    assert all(isinstance(layer.ragged, QuantisedKV) for layer in cache.pruned_layers)
    # These two keep too little of a prompt for anything to be coded at its end.
    coded = any(sum(map(sum, layer.ragged.coded)) for layer in cache.pruned_layers)
    assert coded == (case not in ("heavy-hitter", "window"))
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
    assert [[r.kept for r in layer.records] for layer in cache.pruned_layers] == [
        [r.kept for r in layer.records] for layer in twin.pruned_layers
    ]
    check_bytes(cache)
    for layer, other in zip(cache.pruned_layers, twin.pruned_layers, strict=True):
        mine = layer.ragged.full()
        for side, (ours, theirs) in enumerate(((mine.keys, other.ragged.keys), (mine.values, other.ragged.values))):
            # Each entry is as it was before the turn, or was quantised once; where the two ways of
            # reading the turn differ in the last bits, a value half-way may be rounded to the other side.
            off = [(ours - one).abs().amax(1) for one in (theirs, again_coded(number, layer.ragged, theirs, side))]
            assert (torch.minimum(*off) < 1e-3).float().mean() > 0.98


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3", "gpt_oss", "qwen3_moe"])
def test_other_architectures(name, kind):
    model = build(name)
    cache = ReFreeKVCache(model, kv_dtype=f"{kind}:recent=8", policy="refreekv", threshold=0.2, frozen_layers=0)
    logits, mask = prefill(model, cache, (150,))
    check_bytes(cache)
    twin = with_decoded_entries(cache)
    assert any(sum(map(sum, layer.ragged.coded)) for layer in cache.pruned_layers)
    tokens = logits.argmax(-1, keepdim=True)
    assert torch.allclose(feed(model, cache, tokens, mask)[0], feed(model, twin, tokens, mask)[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_chunks_beams_and_crop(model, kind):
    ids, mask = prompts(LONG, seed=6)
    with refreekv.compress(model, kv_dtype=f"{kind}:recent=8", **PRUNING) as kv:
        once = greedy(model, ids, mask, None)
        chunked = greedy(model, ids, mask, None, prefill_chunk_size=16)
        beams = greedy(model, ids, mask, None, num_beams=3)
        report = kv.report
    assert once.shape == beams.shape == (4, ids.shape[1] + 6)
    assert torch.equal(once, chunked)
    assert report.kv_dtype == f"{kind}:recent=8"
    assert f"in {kind}" in str(report)
    assert report.to_dict()["kv_dtype"] == report.kv_dtype
    cache = ReFreeKVCache(model, kv_dtype=KVDtype(kind, recent=8), **PRUNING)
    prefill(model, cache, LONG)
    cache.crop(-20)
    check_bytes(cache)
    assert cache.get_seq_length() == max(LONG) - 20
    cache.reset()
    assert cache.report.bytes_after == 0


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_again_while_the_answer_grows(llama, kind):
    ids, mask = prompts(LONG, seed=6)
    number = KVDtype(kind, recent=4)
    stored, plain = (
        ReFreeKVCache(llama, "streaming-llm", size=45, kv_dtype=one, decode_interval=3) for one in (number, None)
    )
    for cache in (stored, plain):
        greedy(llama, ids, mask, cache, steps=12)
        assert cache is plain or any(sum(map(sum, layer.ragged.coded)) for layer in cache.pruned_layers)
    # Beside keys and values such a layer remembers the last queries, for the next look.
    for layer, said in zip(stored.pruned_layers, stored.report.prunable, strict=True):
        assert said.bytes_after == storage_bytes(tensors_of_storage(layer.ragged))
    assert [layer.ragged.lengths for layer in stored.pruned_layers] == [
        layer.ragged.lengths for layer in plain.pruned_layers
    ]
    assert max(max(row) for layer in stored.pruned_layers for row in layer.ragged.lengths) <= 45 + 3
    assert stored.report.bytes_after < plain.report.bytes_after


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
        assert all(isinstance(layer.ragged, QuantisedKV) for layer in cache.pruned_layers), name


def test_bytes_at_a_length_where_they_matter():
    """Half precision, 600 tokens, nothing evicted: the formats' own sizes, but for the recent entries."""
    model = build("llama", attention="sdpa", max_position_embeddings=1024).to(torch.bfloat16)
    ids, mask = prompts((600,))
    sizes = {}
    for kind in KINDS:
        cache = ReFreeKVCache(model, "full", kv_dtype=kind)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
        check_bytes(cache)
        report = cache.report
        elements = 8  # a head's size in this model, and so the groups'
        line, exact = KVDtype(kind).entry_bytes((elements, elements)), SINKS + (0 if kind == "int8" else 64)
        old = 600 - exact
        # One more is the mean.
        assert report.bytes_after / report.bytes_before == pytest.approx(
            (old * line + (exact + 1) * 4 * elements) / (600 * 4 * elements)
        )
        sizes[kind] = report.bytes_after
    assert sizes["int4"] < sizes["int8"]


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_dtype", "error", "fragment"),
    [
        ("int9", ValueError, "kv_dtype must be fp8, int8, int4 .or int2 to int7., or widths of keys and values such"),
        ("k6", ValueError, "such as k6v4, got 'k6'"),
        ("k9v4", ValueError, "such as k6v4, got 'k9v4'"),
        ("int4:group=8", ValueError, "no groups; leave group out"),
        ("int4:recent=-1", ValueError, "'recent=-1' is none of recent=N, group=N"),
        ("int4:window=8", ValueError, "'window=8' is none of"),
        ("fp8:group=8", ValueError, "no groups; leave group out"),
        ("int8:group=0", ValueError, "group must be a whole number of at least 1"),
        (4, TypeError, "kv_dtype must be a name such as 'int4'"),
    ],
)
def test_refusals(llama, kv_dtype, error, fragment):
    with pytest.raises(error, match=fragment.replace("(", r"\(")):
        ReFreeKVCache(llama, kv_dtype=kv_dtype)
    with pytest.raises(error), refreekv.compress(llama, kv_dtype=kv_dtype):
        pass


def test_specifications_round_trip():
    for text in ("int4", "int8", "int8:recent=64", "int8:recent=128", "int8:group=16", "k6v4", "int3:recent=0"):
        assert str(KVDtype.parse(text)) == text
    assert [KVDtype(kind).recent for kind in (*KINDS, "k8v8")] == [64, 0, 64, 64]
    assert KVDtype("int8") == KVDtype("int8", recent=0)
    assert KVDtype.parse(None) is None
