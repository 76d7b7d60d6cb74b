"""Quantised storage: against the numbers themselves, against full-precision storage, in models, to the byte."""

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refreekv
from helpers.driving import POLICIES, PRUNING, RAGGED, Uneven, feed, greedy, prefill, storage_bytes, tensors_of
from helpers.models import build, prompts
from refreekv import KVDtype, ReFreeKVCache, policies
from refreekv.storage.columns import Columns
from refreekv.storage.quantised import FLUSH, QuantisedKV
from refreekv.storage.ragged import RaggedKV

KINDS = ["fp8", "int8", "int4"]


def lines(count: int, elements: int, seed: int = 0) -> torch.Tensor:
    """Entries with outlying elements and offsets, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(elements, generator=generator).exp()
    return torch.randn(count, elements, generator=generator) * scale + 3 * torch.randn(elements, generator=generator)


# -- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [8, 64, 80, 128])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_error_is_half_a_step_at_most(kind, elements, dtype):
    entries = lines(50, elements).to(dtype)
    number = KVDtype(kind)
    codes = number.encode(entries)
    groups = entries.float().view(50, -1, number.group_size(elements))
    low, high = groups.amin(-1), groups.amax(-1)
    step = (high - low) / {"int8": 255, "int4": 15}[kind]
    # Beside half a step: what scale and lowest value, and the result itself, lose to 16 bits.
    half = torch.float16 if dtype == torch.float32 else dtype
    rounding = 2 * torch.finfo(half).eps * groups.abs().amax(-1)
    error = (codes.decode().float() - entries.float()).abs().view_as(groups).amax(-1)
    assert (error <= 0.51 * step + rounding).all()
    assert (error > 0.2 * step).float().mean() > 0.5  # it is that coarse, too
    assert codes.nbytes == 50 * number.line_bytes(elements) == storage_bytes(codes.tensors)
    assert codes.decode().dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_a_scaled_cast(dtype):
    entries = lines(50, 64).to(dtype)
    codes = KVDtype("fp8").encode(entries)
    largest = entries.float().abs().amax(-1, keepdim=True)
    # e4m3: three bits behind the point, and a fixed step below the smallest normal number.
    bound = (entries.float().abs() * 2**-4).maximum(largest / 448 * 2**-10) + 2**-8 * entries.float().abs()
    assert ((codes.decode().float() - entries.float()).abs() <= bound).all()
    assert codes.nbytes == 50 * (64 + 2)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_without_spread(kind):
    entries = torch.stack([torch.zeros(64), torch.full((64,), 5.0), torch.full((64,), -1e4)])
    decoded = KVDtype(kind).encode(entries).decode()
    assert torch.allclose(decoded, entries, rtol=1e-3)
    assert KVDtype(kind).encode(entries[:0]).decode().shape == (0, 64)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_numbers_are_torchao_s(kind):
    """The same codes, computed by a library, where it is given the groups' lowest values as origin."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    entries, number = lines(40, 64), KVDtype(kind)
    codes = number.encode(entries)
    group = number.group_size(64)
    shifted = (entries.view(40, -1, group) - codes.low[..., None].float()).reshape(40, 64)
    levels = {"int8": 255, "int4": 15}[kind]
    arguments = (
        (1, group),
        codes.scale.float(),
        torch.zeros_like(codes.scale, dtype=torch.float32),
        torch.uint8,
        0,
        levels,
    )
    theirs = primitives.quantize_affine(shifted, *arguments)
    back = primitives.dequantize_affine(theirs, *arguments).view(40, -1, group) + codes.low[..., None].float()
    step = codes.scale.float().repeat_interleave(group, 1)
    # They multiply by the inverse of the scale: a value half-way may fall on the other side.
    difference = (codes.decode() - back.view(40, 64)).abs()
    assert (difference < 1e-4 * step).float().mean() > 0.999
    assert (difference < 1.01 * step).all()


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
    return [*codes, storage.keys, storage.values]


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
        twins.check(tolerance={"fp8": 0.9, "int8": 0.15, "int4": 1.6}[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_moving_entries_never_changes_them(kind):
    storage = QuantisedKV.of(KVDtype(kind, recent=5), ragged([(60, 60), (41, 41)], seed=3))
    before = storage.full()
    kept = [Columns.of_ranges((0, 9), (20, 60)), Columns(heads=(torch.arange(0, 41, 2),))]
    moved = storage.keep(kept, behind=0).select_rows([1, 0]).truncate([[20, 20], [30, 30]]).full()
    for row, columns in ((1, torch.arange(0, 41, 2)[:20]), (0, torch.cat([torch.arange(9), torch.arange(20, 41)]))):
        for then, now in zip(before.segments(row), moved.segments(1 - row), strict=True):
            assert torch.equal(then[:, columns], now)


def test_recent_entries_are_bit_for_bit_and_older_ones_move_in_blocks():
    plain = ragged([(50,)], seed=4)
    storage = QuantisedKV.of(KVDtype("int4", recent=10), plain)
    assert storage.coded == [(40,)]
    for step in range(1, 2 * FLUSH + 2):
        new = lines(1, 16, step).view(1, 1, 1, 16), lines(1, 8, step).view(1, 1, 1, 8)
        storage, plain = storage.append(*new), plain.append(*new)
        recent = storage.lengths[0][0] - storage.coded[0][0]
        assert 10 < recent <= 10 + FLUSH
        assert torch.equal(storage.full().keys[-recent:], plain.keys[-recent:])
        assert not torch.equal(storage.full().keys[:-recent], plain.keys[:-recent])
    assert storage.coded == [(40 + 2 * FLUSH,)]


# -- models -------------------------------------------------------------------------------------


def with_decoded_entries(cache: ReFreeKVCache) -> ReFreeKVCache:
    """A copy of a cache that holds in full precision what the quantised one stands for."""
    twin = copy.deepcopy(cache)
    for layer in twin.pruned_layers:
        assert isinstance(layer.ragged, QuantisedKV)
        layer.kv_dtype = None
        layer._store(layer.ragged.full())
    return twin


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
    number = KVDtype(kind, recent=8)
    cache = ReFreeKVCache(llama, policy, kv_dtype=number, **parameters)
    plain = ReFreeKVCache(llama, policy, **parameters)
    logits, mask = prefill(llama, cache)
    others, _ = prefill(llama, plain)
    assert torch.equal(logits, others)  # the prompt itself is read in full precision
    assert [layer.records for layer in cache.pruned_layers] == [layer.records for layer in plain.pruned_layers]
    assert cache.report.bytes_before == plain.report.bytes_before
    check_bytes(cache)
    assert all(isinstance(layer.ragged, QuantisedKV) for layer in cache.pruned_layers)
    assert any(sum(map(sum, layer.ragged.coded)) for layer in cache.pruned_layers)
    twin = with_decoded_entries(cache)
    for _ in range(3):
        tokens = logits.argmax(-1, keepdim=True)
        (logits, longer), (others, _) = feed(llama, cache, tokens, mask), feed(llama, twin, tokens, mask)
        assert torch.allclose(logits, others, atol=1e-5)
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
        for ours, theirs in ((mine.keys, other.ragged.keys), (mine.values, other.ragged.values)):
            # Each entry is as it was before the turn, or was quantised once; where the two ways of
            # reading the turn differ in the last bits, a value half-way may be rounded to the other side.
            off = [(ours - one).abs().amax(1) for one in (theirs, number.encode(theirs).decode())]
            assert (torch.minimum(*off) < 1e-3).float().mean() > 0.98


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3", "gpt_oss", "qwen3_moe"])
def test_other_architectures(name, kind):
    model = build(name)
    cache = ReFreeKVCache(model, kv_dtype=f"{kind}:recent=8", policy="refreekv", threshold=0.2, frozen_layers=0)
    logits, mask = prefill(model, cache, (60,))
    check_bytes(cache)
    twin = with_decoded_entries(cache)
    tokens = logits.argmax(-1, keepdim=True)
    assert torch.allclose(feed(model, cache, tokens, mask)[0], feed(model, twin, tokens, mask)[0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_chunks_beams_and_crop(model, kind):
    ids, mask = prompts(RAGGED, seed=6)
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
    prefill(model, cache)
    cache.crop(-20)
    check_bytes(cache)
    assert cache.get_seq_length() == max(RAGGED) - 20
    cache.reset()
    assert cache.report.bytes_after == 0


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_again_while_the_answer_grows(llama, kind):
    ids, mask = prompts(RAGGED, seed=6)
    number = KVDtype(kind, recent=4)
    stored, plain = (
        ReFreeKVCache(llama, "streaming-llm", size=20, kv_dtype=one, decode_interval=3) for one in (number, None)
    )
    for cache in (stored, plain):
        greedy(llama, ids, mask, cache, steps=12)
    # Beside keys and values such a layer remembers the last queries, for the next look.
    for layer, said in zip(stored.pruned_layers, stored.report.prunable, strict=True):
        assert said.bytes_after == storage_bytes(tensors_of_storage(layer.ragged))
    assert [layer.ragged.lengths for layer in stored.pruned_layers] == [
        layer.ragged.lengths for layer in plain.pruned_layers
    ]
    assert max(max(row) for layer in stored.pruned_layers for row in layer.ragged.lengths) <= 20 + 3
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
        line, recent = KVDtype(kind).line_bytes(elements), 0 if kind == "int8" else 64
        old = 600 - recent
        assert report.bytes_after / report.bytes_before == pytest.approx(
            (old * line + recent * 2 * elements) / (600 * 2 * elements)
        )
        sizes[kind] = report.bytes_after
    assert sizes["int4"] < sizes["int8"]


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_dtype", "error", "fragment"),
    [
        ("int3", ValueError, "kv_dtype must be one of fp8, int8, int4, got 'int3'"),
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


def test_odd_heads_do_not_fit_four_bits():
    with pytest.raises(ValueError, match="even head size, got 7; take int8 or fp8"):
        KVDtype("int4").encode(torch.zeros(3, 7))


def test_specifications_round_trip():
    for text in ("int4", "int8", "int8:recent=64", "int8:recent=128", "int4:recent=0,group=16"):
        assert str(KVDtype.parse(text)) == text
    assert [KVDtype(kind).recent for kind in KINDS] == [64, 0, 64]
    assert KVDtype("int8") == KVDtype("int8", recent=0)
    assert KVDtype.parse(None) is None
