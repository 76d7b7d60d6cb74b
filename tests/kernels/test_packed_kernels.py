"""Packed lines: written by kernels as plain torch codes them, and attended to as float64 has it."""

import functools

import pytest
import torch

from helpers.packed_attention import packed_attention
from kernels.test_segment_kernels import run
from refreekv import kernels
from refreekv.core.packed_lines import PackedFormat, Side
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import KVDtype
from refreekv.kernels import packed_join, packed_ops, packed_reference, reference
from refreekv.kernels.packed_block import codes_of_six, fields_of
from refreekv.kernels.packed_calls import PackedKV, Transfer
from refreekv.kernels.packed_launch import launch_packed_attention
from refreekv.kernels.packed_storage import launch_pack
from refreekv.kernels.packed_unpack import launch_unpack
from refreekv.kernels.storage import launch_move
from refreekv.storage import unfinished
from refreekv.storage.unfinished import UnfinishedKV

POISON = 0x7F
KV_HEADS = 2


def form_of(keys, values, sizes=(64, 64)):
    return PackedFormat(*sizes, tuple(map(int, keys)), tuple(map(int, values)))


def maps_of(sizes, dtype, rows=1, heads=KV_HEADS, shared=False):
    """Random ones: keys' channels of sizes that differ tenfold, behind large means."""
    matrix = torch.linalg.qr(torch.randn(rows, heads, sizes[0], sizes[0]))[0] * torch.logspace(-0.5, 0.5, sizes[0])
    rotation = torch.linalg.qr(torch.randn(rows, heads, sizes[1], sizes[1]))[0]
    means = (torch.randn(rows, heads, size) for size in sizes)
    if shared:
        matrix, rotation = matrix[:1], rotation[:1]
    return PackedMaps.of(5 * next(means), matrix, next(means), rotation, dtype)


def on(maps, device):
    return PackedMaps(*(part.to(device) for part in maps.tensors))


class Packed:
    """Segments of packed lines, poisoned wherever nothing was written."""

    def __init__(self, lengths, form, device, growth=0, capacities=None):
        self.form, self.lengths = form, list(lengths)
        self.capacities = capacities or [length + growth for length in lengths]
        self.lines, self.factors = (
            [torch.full((max(c, 1), width), POISON, dtype=torch.uint8, device=device) for c in self.capacities]
            for width in (form.line_bytes, 4)
        )
        parts = zip(self.lines, self.factors, self.lengths, self.capacities, strict=True)
        self.table = torch.tensor([[x.data_ptr(), f.data_ptr(), n, c] for x, f, n, c in parts], device=device)

    def fill(self, seed_of_values=1.0):
        """Entries that are Gaussian in code space."""
        sizes = self.form.key_size, self.form.value_size
        for lines, factors, length in zip(self.lines, self.factors, self.lengths, strict=True):
            spread = torch.rand(length, 1) + 0.5
            new = self.form.pack(spread * torch.randn(length, sizes[0]), seed_of_values * torch.randn(length, sizes[1]))
            lines[:length] = new[0].to(lines)
            factors[:length] = new[1].view(torch.uint8).to(factors)
        return self

    def host(self):
        """The same in host memory."""
        other = Packed(self.lengths, self.form, "cpu", capacities=self.capacities)
        for mine, theirs in ((self.lines, other.lines), (self.factors, other.factors)):
            for here, there in zip(mine, theirs, strict=True):
                there.copy_(here)
        other.table[:, 2] = self.table[:, 2].cpu()
        return other


class Exact:
    """Segments of exact entries."""

    def __init__(self, lengths, sizes, dtype, device, growth=3):
        self.lengths = lengths
        self.keys, self.values = (
            [torch.randn(length + growth, size).to(device, dtype) for length in lengths] for size in sizes
        )
        parts = zip(self.keys, self.values, lengths, strict=True)
        self.table = torch.tensor([[k.data_ptr(), v.data_ptr(), n, n + growth] for k, v, n in parts], device=device)

    def host(self):
        other = Exact(self.lengths, (1, 1), self.keys[0].dtype, "cpu")
        other.keys, other.values = ([part.cpu() for part in side] for side in (self.keys, self.values))
        other.table[:, 0] = torch.tensor([part.data_ptr() for part in other.keys])
        other.table[:, 1] = torch.tensor([part.data_ptr() for part in other.values])
        return other


# -- attention ----------------------------------------------------------------------------------

CASES = {
    "K4V4": {"levels": [("4444", "4444")]},
    "K8V8": {"levels": [("8888", "8888")]},
    "K6V6": {"levels": [("6666", "6666")]},
    "K2V2": {"levels": [("2222", "2222")]},
    "6442": {"levels": [("6442", "4422")]},
    "8642": {"levels": [("8642", "8642")]},
    "K7V6": {"levels": [("8866", "6666")]},
    "two levels": {"levels": [("6666", "4444"), ("4422", "2222")], "group": 7},
    "three levels, rows of their own": {"levels": [("8888", "6666"), ("6666", "4444"), ("4444", "4444")], "rows": True},
    "rows' own means": {"levels": [("6666", "4444")], "rows": True, "shared": True},
    "no levels": {"levels": []},
    "heads of 80": {"levels": [("4444", "4444"), ("6444", "8642")], "sizes": (80, 80)},
    "heads of 96": {"levels": [("6666", "4444")], "sizes": (96, 96)},
    "heads of 128": {"levels": [("6666", "4444"), ("4444", "4444")], "sizes": (128, 128), "lengths": [90, 0, 64, 33]},
    "six bits of 128": {
        "levels": [("8866", "6666"), ("6666", "6666")],
        "sizes": (128, 128),
        "lengths": [90, 0, 64, 33],
    },
    "six bits of 256": {"levels": [("8866", "6666")], "sizes": (256, 256), "lengths": [40, 31]},
    "heads of 256": {"levels": [("6442", "4444")], "sizes": (256, 256), "lengths": [40, 31]},
    "keys and values differ": {"levels": [("4444", "6442")], "sizes": (96, 64)},
    "small values' heads": {"levels": [("4444", "4444")], "sizes": (64, 16), "group": 1},
    "softcap": {"levels": [("4444", "4444")], "softcap": 2.0},
    "sinks": {"levels": [("4444", "4444")], "sinks": True},
    "softcap, sinks, group of 16": {"levels": [("6666", "4444")], "softcap": 5.0, "sinks": True, "group": 16},
    "one program": {"levels": [("4444", "4444")], "programs": 1},
    "37 programs of small blocks": {"levels": [("4444", "4444")], "programs": 37, "block": 16},
    "blocks that cost alike, segments nothing": {
        "levels": [("8888", "8888"), ("4422", "2222")],
        "programs": 23,
        "block": 16,
        "extra": 0,
        "beside": 9999,
    },
    "blocks that cost what they hold": {
        "levels": [("8888", "8888"), ("4422", "2222")],
        "programs": 23,
        "block": 16,
        "extra": 7,
        "beside": 0,
    },
    "shares side by side": {
        "levels": [("6666", "4444"), ("4422", "2222")],
        "programs": None,
        "least": 1,
    },
    "wide parts of lines": {"levels": [("6442", "2222"), ("8866", "4444")], "sizes": (128, 128), "joined": 32},
    "empty": {"levels": [("4444", "4444")], "lengths": [0, 0], "exact": [0, 0]},
    "only coded": {"levels": [("4444", "4444")], "exact": [0] * 6},
    "only exact": {"levels": [("4444", "4444")], "lengths": [0] * 6},
    "tiny values": {"levels": [("4444", "4444")], "values": 1e-4},
    "huge values": {"levels": [("4444", "4444")], "values": 2e3},
}
LENGTHS = [0, 1, 31, 140, 64, 65]
EXACT = [5, 0, 1, 68, 0, 33]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_equals_float64(case, dtype, close, device):
    check_attention(dtype, close, device, **case)


def check_attention(
    dtype, close, device, *, levels, sizes=(64, 64), lengths=LENGTHS, exact=None, group=4, softcap=None, sinks=False,
    rows=False, shared=False, values=1.0, **settings,
):  # fmt: skip
    exact = EXACT[: len(lengths)] if exact is None else exact
    batch, heads = len(lengths) // KV_HEADS, KV_HEADS * group
    maps = maps_of(sizes, dtype, batch if rows else 1, shared=shared)
    forms = [form_of(*level, sizes) for level in levels]
    # Each level in another order of lengths.
    packed = [Packed(lengths[i:] + lengths[:i], form, device, growth=4).fill(values) for i, form in enumerate(forms)]
    kept = Exact(exact, sizes, dtype, device)
    if values != 1.0:
        for part in kept.values:
            part *= values
        maps = PackedMaps.of(maps.key_mean, maps.key_matrix, values * maps.value_mean, maps.value_matrix, dtype)
    # A view of what a projection writes, with other heads in between.
    query = torch.randn(batch, 1, 2 * heads, sizes[0], device=device).to(dtype).transpose(1, 2)[:, ::2]
    logits = torch.randn(heads, device=device).to(dtype) * 2 if sinks else None
    # Few programs: the interpreter runs one after the other.
    settings = {"programs": 5, "least": 64} | settings
    arguments = (0.1, softcap, logits)
    got = launch_packed_attention(
        query, PackedKV(kept.table, [part.table for part in packed], forms, on(maps, device)), *arguments, **settings
    )
    on_host = [part.host() for part in packed], kept.host()
    tables = on_host[1].table, [part.table for part in on_host[0]]
    want = packed_attention(
        query.cpu(),
        PackedKV(*tables, forms, maps),
        0.1,
        softcap,
        None if logits is None else logits.cpu(),
        torch.float64,
    )
    assert got.dtype == dtype
    close(got, want)
    plain = kernels.packed_attention(
        query.cpu(), *tables, forms, maps, scaling=0.1, softcap=softcap, sinks=None if logits is None else logits.cpu()
    )
    close(plain, want)


IN_TWO = (
    "K6V6", "8642", "three levels, rows of their own", "rows' own means", "heads of 80", "heads of 256",
    "keys and values differ", "softcap, sinks, group of 16", "empty", "only exact", "37 programs of small blocks",
)  # fmt: skip


@pytest.mark.parametrize("case", IN_TWO)
def test_attention_joined_in_two_kernels(case, dtype, close, device, monkeypatch):
    monkeypatch.setattr(packed_join, "MANY", 1)
    check_attention(dtype, close, device, **CASES[case])


def test_attention_over_decoded_entries(dtype, close, device):
    """The judge itself: decoded into the entries' own space, one softmax over all, by other formulas."""
    maps, form = maps_of((64, 64), dtype), form_of("6442", "4422")
    packed, kept = Packed([150, 40], form, device).fill(), Exact([20, 9], (64, 64), dtype, device)
    query = torch.randn(1, 6, 1, 64, device=device).to(dtype)
    held = PackedKV(kept.table, [packed.table], [form], on(maps, device))
    got = launch_packed_attention(query, held, 0.125, None, None)
    want = []
    for head in range(2):
        keys, values = form.unpack(
            packed.lines[head].cpu(), packed.factors[head].cpu().view(torch.float16), torch.float64
        )
        inverse = torch.linalg.inv(maps.key_matrix[0, head].double())
        keys = keys @ inverse.T + maps.key_mean[0, head].double()
        values = values @ maps.value_matrix[0, head].double() + maps.value_mean[0, head].double()
        length = kept.lengths[head]
        keys = torch.cat([keys, kept.keys[head][:length].cpu().double()])
        values = torch.cat([values, kept.values[head][:length].cpu().double()])
        mine = query[0, 3 * head : 3 * head + 3, 0].cpu().double()
        want.append((mine @ keys.T * 0.125).softmax(-1) @ values)
    close(got[0, 0], torch.cat(want))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fields_of_words_are_the_same_by_hand(bits, device):
    """What is written in assembly gives what plain Triton does, for all words."""
    if device == "cpu":
        pytest.skip("the interpreter runs no assembly")
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(words, out, BITS: tl.constexpr, ASSEMBLY: tl.constexpr, COUNT: tl.constexpr):
        at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        fields = fields_of(tl.load(words + at), BITS, ASSEMBLY)
        for place in tl.static_range(COUNT):
            tl.store(out + place * 65536 + at, fields[place])

    words = torch.arange(65536, device=device).to(torch.uint16)
    count = 16 // bits
    by_hand, plain = (torch.empty(count, 65536, dtype=torch.float16, device=device) for _ in range(2))
    kernel[(64,)](words, by_hand, bits, True, count)
    kernel[(64,)](words, plain, bits, False, count)
    assert torch.equal(by_hand, plain)
    for place in range(count):
        fields = (torch.arange(65536) >> (bits * place)) & (2**bits - 1)
        want = fields * 2.0 ** (bits * place % 8 - 24)
        assert torch.equal(plain[place].cpu().double(), want.double())


def test_codes_of_two_planes_are_the_same_by_hand(device):
    if device == "cpu":
        pytest.skip("the interpreter runs no assembly")
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(words, out, ASSEMBLY: tl.constexpr):
        at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        first, second, lower = tl.load(words + at), tl.load(words + 65536 + at), tl.load(words + 2 * 65536 + at)
        codes = codes_of_six(first, second, lower, ASSEMBLY)
        for place in tl.static_range(8):
            tl.store(out + place * 65536 + at, codes[place])

    words = torch.stack([torch.randperm(65536) for _ in range(3)])
    by_hand, plain = (torch.empty(8, 65536, dtype=torch.float16, device=device) for _ in range(2))
    kernel[(64,)](words.to(device).to(torch.uint16), by_hand, True)
    kernel[(64,)](words.to(device).to(torch.uint16), plain, False)
    assert torch.equal(by_hand, plain)
    for place in range(8):
        byte, field = divmod(place, 4)
        upper = (words[field % 2] >> (8 * byte + 4 * (field // 2))) & 15
        code = 4 * upper + ((words[2] >> (8 * byte + 2 * field)) & 3)
        assert torch.equal(plain[place].cpu().double(), code * 16.0 ** (field // 2) * 2.0**-24)


# -- writing ------------------------------------------------------------------------------------


def check_lines(packed, segment, first, keys, values, maps, sizes):
    """What was written for entries: codes of the nearest levels but for ties, and factors as good as the best."""
    form = packed.form
    coded = packed_reference.to_code_space(keys.cpu().double(), values.cpu().double(), maps, segment, KV_HEADS)
    lines = packed.lines[segment][first : first + len(keys)].cpu()
    factors = packed.factors[segment][first : first + len(keys)].cpu().view(torch.float16)
    sides: list[tuple[Side, int]] = [(form.keys, 0), (form.values, form.keys.bytes)]
    for (side, start), entries, factor in zip(sides, coded, factors.T, strict=True):
        codes = side.unpack(lines[:, start : start + side.bytes]).int()
        best, reaching = side.encode(entries)
        # Of two sizes as good in float32 an entry may have either: at 6 bits and 256 channels one in 4000 may.
        other = ((codes - best.int()).abs() > 1).any(-1)
        assert other.sum() <= 2
        # Halfway between two levels an element may have either, which in a segment of 160 may be one.
        assert (codes != best.int())[~other].sum() <= max(1, 2e-3 * codes.numel())
        if side.in_bytes:
            torch.testing.assert_close(factor, reaching, rtol=1e-3, atol=0)
            continue
        # By least squares for the codes that were written, of which a tie may be another than the reference's.
        best_factors, lost = least_squares(side, codes, entries)
        torch.testing.assert_close(factor.double(), best_factors, rtol=2e-3, atol=0)
        assert (lost <= least_squares(side, best, entries)[1] + AS_GOOD)[other].all()


AS_GOOD = 5e-6
"""Of an entry's squares: more than float32 makes of equal losses (3e-7), less than sizes differ by at 8 bits (2e-5)."""


def least_squares(side, codes, entries):
    """The best factors for codes of entries, and the share of each entry's squares that is lost with them."""
    levels = side.levels(codes, torch.float64)
    factors = (entries * levels).sum(-1) / levels.square().sum(-1)
    return factors, (entries - factors[:, None] * levels).square().sum(-1) / entries.square().sum(-1)


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize(("keys_of", "values_of", "sizes"), [
    ("4444", "4444", (64, 64)), ("6666", "4444", (128, 128)), ("8642", "6442", (80, 96)), ("8888", "2222", (64, 16)),
    ("4422", "8888", (256, 256)), ("6444", "6666", (96, 64)), ("8888", "8888", (128, 128)), ("8888", "8888", (80, 16)),
])  # fmt: skip
def test_pack_takes_ranges_and_indices(keys_of, values_of, sizes, which, dtype, device):
    n, end = 150, 140
    form, maps = form_of(keys_of, values_of, sizes), maps_of(sizes, dtype, rows=2, shared=keys_of == "4444")
    keys = (4 * torch.randn(2, n, 2, sizes[0]) + 5).to(device, dtype).transpose(1, 2)
    values = torch.randn(2, 2, n, sizes[1]).to(device, dtype)
    some = torch.sort(torch.randperm(end)[:70]).values.to(torch.int32).to(device)
    tail = torch.arange(end, n)
    wanted = [
        torch.cat([torch.arange(4), torch.arange(60, n)]),
        torch.cat([some.cpu().long(), tail]),
        torch.arange(0),
        tail,
    ]
    spans = torch.tensor([(0, 4, 56), (some.data_ptr(), 70, 0), (0, 0, n), (0, 0, end)], device=device)
    packed = Packed([len(w) for w in wanted], form, device, growth=3)
    arguments = (keys, values, None, packed.table, form, on(maps, device), spans, end)
    if which == "kernel":
        launch_pack(Transfer(*arguments, max(packed.lengths), None))
    else:
        run(which, device, None, packed_reference.pack, Transfer(*arguments, 0, None))
    for segment, index in enumerate(wanted):
        row, head = divmod(segment, 2)
        if len(index):
            chosen = (side[row, head][index.to(device)] for side in (keys, values))
            check_lines(packed, segment, 0, *chosen, maps, sizes)
        assert (packed.lines[segment][len(index) :] == POISON).all()
        assert (packed.factors[segment][len(index) :] == POISON).all()


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_pack_takes_entries_out_of_an_arena_and_goes_on_behind_lines(which, dtype, device):
    sizes, lengths, taken = (64, 64), [7, 0, 12, 3], [20, 33, 0, 1]
    form, maps = form_of("6442", "4444", sizes), maps_of(sizes, dtype)
    packed = Packed([a + b for a, b in zip(lengths, taken, strict=True)], form, device, growth=2)
    before = [[part.clone() for part in side] for side in (packed.lines, packed.factors)]
    kept = Exact([count + 6 for count in taken], sizes, dtype, device)
    starts = torch.tensor(lengths, device=device)
    # All but the first four, which are sinks.
    spans = torch.tensor([(0, 0, 4)] * 4, device=device)
    storage = torch.empty(0, 64, dtype=dtype, device=device)
    arguments = (storage, storage, kept.table, packed.table, form, on(maps, device), spans, 0)
    if which == "kernel":
        launch_pack(Transfer(*arguments, max(taken), starts))
    else:
        run(which, device, None, packed_reference.pack, Transfer(*arguments, 0, starts))
    for segment, (first, count) in enumerate(zip(lengths, taken, strict=True)):
        if count:
            chosen = (side[segment][4 : 4 + count] for side in (kept.keys, kept.values))
            check_lines(packed, segment, first, *chosen, maps, sizes)
        for side, old in zip((packed.lines, packed.factors), before, strict=True):
            for rest in (slice(first), slice(first + count, None)):
                assert torch.equal(side[segment][rest], old[segment][rest])


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_pack_of_entries_that_are_the_mean(which, dtype, device):
    """Nothing in code space: factors of nothing, and none that is no number."""
    form = form_of("4444", "4444")
    maps = maps_of((64, 64), dtype)
    means = [mean.to(dtype)[:, :, None].expand(1, 2, 5, 64) for mean in (maps.key_mean, maps.value_mean)]
    maps = PackedMaps.of(means[0][:, :, 0], maps.key_matrix, means[1][:, :, 0], maps.value_matrix, dtype)
    keys, values = (mean.to(device) for mean in means)
    packed = Packed([5, 5], form, device)
    spans = torch.zeros(2, 3, dtype=torch.int64, device=device)
    arguments = (keys, values, None, packed.table, form, on(maps, device), spans, 5)
    if which == "kernel":
        launch_pack(Transfer(*arguments, 5, None))
    else:
        run(which, device, None, packed_reference.pack, Transfer(*arguments, 0, None))
    assert all(part.view(torch.float16).abs().max() < 1e-4 for part in packed.factors)


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_lines_and_factors_are_moved(which, device):
    """Factors of 4 bytes begin at odd multiples of that, and may be an odd number."""
    form = form_of("6444", "4444")
    old, new = Packed([17, 0, 5], form, device).fill(), Packed([17, 9, 3], form, device)
    new.table[1, 2] = 0
    before = [[part.clone() for part in side] for side in (new.lines, new.factors)]
    source, target = old.table.clone(), new.table.clone()
    # Both begin with the third entry.
    for table in (source, target):
        table[:, 0] += 2 * form.line_bytes
        table[:, 1] += 2 * 4
        table[:, 2] = (table[:, 2] - 2).clamp_min(0)
    arguments = (source, target, form.line_bytes, 4)
    run(which, device, launch_move, reference.move, *arguments, *([17] if which == "kernel" else []))
    for mine, theirs, was in zip((new.lines, new.factors), (old.lines, old.factors), before, strict=True):
        for segment, length in enumerate((17, 0, 3)):
            moved = slice(2, length)
            assert torch.equal(mine[segment][moved], theirs[segment][moved])
            for rest in (slice(0, 2), slice(max(length, 2), None)):
                assert torch.equal(mine[segment][rest], was[segment][rest])


UNPACKED = {
    "K8V8": {"levels": ("8888", "8888")},
    "K6V4": {"levels": ("6666", "4444")},
    "8642": {"levels": ("8642", "8642"), "rows": True},
    "6442, 2222": {"levels": ("6442", "2222")},
    "heads of 80": {"levels": ("6444", "8642"), "sizes": (80, 80)},
    "heads of 96 and 64": {"levels": ("8888", "6666"), "sizes": (96, 64)},
    "heads of 128": {"levels": ("8888", "4444"), "sizes": (128, 128), "lengths": [90, 0]},
    "heads of 256": {"levels": ("6666", "4444"), "sizes": (256, 256), "lengths": [20, 31]},
}


def decoded(packed, maps, segment, first):
    """The lines of a segment from ``first`` on in the entries' own space, by other formulas, in float64."""
    row, head = divmod(segment, KV_HEADS)
    own = maps.of_segment(row, head)
    stored = (part[segment][first : packed.lengths[segment]].cpu() for part in (packed.lines, packed.factors))
    keys, values = packed.form.unpack(next(stored), next(stored).view(torch.float16), torch.float64)
    back = (torch.linalg.inv(matrix.double()).T for matrix in (own.key_matrix, own.value_matrix))
    return keys @ next(back) + own.key_mean.double(), values @ next(back) + own.value_mean.double()


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("case", UNPACKED.values(), ids=UNPACKED.keys())
def test_unpack_equals_float64(case, which, dtype, close, device):
    check_unpack(which, dtype, close, device, **case)


def check_unpack(which, dtype, close, device, *, levels, sizes=(64, 64), lengths=(70, 0, 3, 64), rows=False):
    """To dense entries: behind others, in a gap, in listed places, and nowhere but there."""
    form, maps = form_of(*levels, sizes), maps_of(sizes, dtype, len(lengths) // KV_HEADS if rows else 1)
    packed, n = Packed(list(lengths), form, device, growth=2).fill(), 90
    # Of a wider tensor: rows and heads lie apart.
    keys, values = (
        torch.full((len(lengths) // KV_HEADS, KV_HEADS, n + 5, size), float("nan"), dtype=dtype, device=device)[
            :, :, 2:-3
        ]
        for size in sizes
    )
    listed = torch.randperm(n)[: lengths[2]].sort().values.int().to(device) if len(lengths) > 2 else None
    spans = [(0, 0, 7), (0, 0, 0), *([(listed.data_ptr(), len(listed), 0), (0, 5, 20)] if len(lengths) > 2 else [])]
    if len(lengths) == 2:
        spans = [(0, 0, 0), (0, 0, 3)]
    starts = torch.tensor([1, 0, 0, 2][: len(lengths)], device=device)
    arguments = (keys, values, None, packed.table, form, on(maps, device), torch.tensor(spans, device=device), n)
    if which == "kernel":
        launch_unpack(Transfer(*arguments, max(lengths), starts))
    else:
        run(which, device, None, packed_reference.unpack, Transfer(*arguments, 0, starts))
    for segment, (index, first, skip) in enumerate(spans):
        row, head = divmod(segment, KV_HEADS)
        count = max(lengths[segment] - int(starts[segment]), 0)
        at = torch.arange(count)
        places = listed.cpu().long() if index else torch.where(at < first, at, at + skip)
        rest = torch.ones(n, dtype=torch.bool)
        rest[places] = False
        for got, want in zip((keys, values), decoded(packed, maps, segment, int(starts[segment])), strict=True):
            if count:
                close(got[row, head][places.to(device)], want)
            assert got[row, head][rest.to(device)].isnan().all()


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_unpack_to_an_arena(which, dtype, close, device):
    form, maps = form_of("6442", "8844"), maps_of((64, 64), dtype)
    lengths = [7, 0, 40, 1]
    packed = Packed(lengths, form, device).fill()
    kept = Exact([n + 6 for n in lengths], (64, 64), dtype, device)
    before = [[part.clone() for part in side] for side in (kept.keys, kept.values)]
    spans = torch.tensor([(0, 0, 4)] * 4, device=device)
    storage = torch.empty(0, 64, dtype=dtype, device=device)
    arguments = (storage, storage, kept.table, packed.table, form, on(maps, device), spans, 0)
    if which == "kernel":
        launch_unpack(Transfer(*arguments, max(lengths), None))
    else:
        run(which, device, None, packed_reference.unpack, Transfer(*arguments, 0, None))
    for segment, length in enumerate(lengths):
        sides = zip((kept.keys, kept.values), before, decoded(packed, maps, segment, 0), strict=True)
        for got, old, want in sides:
            if length:
                close(got[segment][4 : 4 + length], want)
            for rest in (slice(4), slice(4 + length, None)):
                assert torch.equal(got[segment][rest], old[segment][rest])


@pytest.mark.parametrize("kind", ["int8", "k6v4"])
def test_an_unfinished_prompt_through_the_kernels(kind, dtype, device, monkeypatch):
    """Its tables, spans and views, chunk by chunk behind earlier entries, as plain torch has them."""
    sides = [torch.randn(2, KV_HEADS, 150, size).to(dtype) for size in (64, 96)]
    earlier = [side[:, :, :9] for side in sides]
    real = torch.arange(150) >= torch.tensor([[0], [41]])
    found = []
    for where in ("cpu", device):
        if len(found) == 1:
            for name, launch in (("pack_lines", launch_pack), ("unpack_lines", launch_unpack)):
                monkeypatch.setattr(unfinished.kernels, name, _launched(launch))
        prompt = UnfinishedKV(KVDtype(kind, recent=4), [side.to(where) for side in sides], 150, sinks=True)
        for part in (slice(0, 60), slice(60, 75), slice(75, 120), slice(120, 150)):
            prompt.append(*(side[:, :, part].to(where) for side in sides), real[:, : part.stop].to(where))
        assert prompt.coded == 116
        new = [side[:, :, :5].to(where) for side in sides]
        found.append([part.cpu().double() for part in prompt.dense(new, [side.to(where) for side in earlier])])
    for want, got, side in zip(*found, sides, strict=True):
        assert torch.equal(want[:, :, :9], side[:, :, :9].double())
        for row, first in enumerate((0, 41)):
            # An element half-way between two codes may go to either.
            assert (got - want)[row, :, 9 + first :].norm() < 5e-3 * want[row, :, 9 + first :].norm()
            # Sinks and newest entries are exact, and come at their places.
            for part in (slice(9 + first, 13 + first), slice(155, 164)):
                assert torch.equal(got[row, :, part], want[row, :, part])


def _launched(launch):
    """A kernel in place of the function of `kernels` that picks one by device."""

    def call(keys, values, table, form, maps, spans, *, end, longest, starts=None):
        launch(Transfer(keys, values, None, table, form, maps, spans, end, longest, starts))

    return call


def test_what_does_not_go_together_is_refused(dtype, device):
    """By what a user calls, before any address is followed."""
    form, maps = form_of("4444", "4444"), on(maps_of((64, 64), dtype), device)
    packed, kept = Packed([5, 9], form, device).fill(), Exact([3, 2], (64, 64), dtype, device)
    query, new = torch.randn(1, 4, 1, 64).to(device, dtype), torch.randn(1, 2, 9, 64).to(device, dtype)
    spans = torch.zeros(2, 3, dtype=torch.int64, device=device)
    attend = functools.partial(kernels.packed_attention, query, kept.table)
    with pytest.raises(ValueError, match="2 tables of levels for 1 formats"):
        attend([packed.table] * 2, [form], maps)
    with pytest.raises(ValueError, match="a level of 1 segments beside 2"):
        attend([packed.table[:1]], [form], maps)
    with pytest.raises(ValueError, match=r"maps of heads of 64 and 64 elements on .* for lines of 80 and 64"):
        attend([packed.table], [form_of("4444", "4444", (80, 64))], maps)
    with pytest.raises(ValueError, match="maps of 3 rows of 2 KV heads for 2 segments"):
        attend([packed.table], [form], on(maps_of((64, 64), dtype, rows=3), device))
    pack = functools.partial(kernels.pack_lines, end=9, longest=9)
    with pytest.raises(TypeError, match=r"PackedMaps.of_type"):
        pack(new.double(), new.double(), packed.table, form, maps, spans)
    with pytest.raises(ValueError, match="expected heads of 64 and 64 elements"):
        pack(new[..., :32], new, packed.table, form, maps, spans)
    with pytest.raises(ValueError, match=r"expected .B, H_kv, n, D. of 2 segments"):
        pack(new[:, :1], new[:, :1], packed.table, form, maps, spans)
    with pytest.raises(ValueError, match="1 segments of exact entries for 2 of lines"):
        pack(new, new, packed.table, form, maps, spans, source=kept.table[:1])
    unpack = functools.partial(kernels.unpack_lines, end=9, longest=9)
    with pytest.raises(ValueError, match="expected heads of 64 and 64 elements"):
        unpack(new[..., :32], new, packed.table, form, maps, spans)
    with pytest.raises(ValueError, match="1 segments of exact entries for 2 of lines"):
        unpack(new, new, packed.table, form, maps, spans, target=kept.table[:1])


def test_the_operators_are_what_torch_expects_of_them():
    form, maps = form_of("4444", "4444", (16, 16)), maps_of((16, 16), torch.float32)
    packed, kept = Packed([5, 9], form, "cpu").fill(), Exact([3, 2], (16, 16), torch.float32, "cpu")
    query = torch.randn(1, 4, 1, 16)
    decode = (query, kept.table, [packed.table], form.numbers, maps.tensors, 0.25, None, None)
    torch.library.opcheck(packed_ops.packed_attention, decode, test_utils=("test_schema", "test_faketensor"))
    new = torch.randn(1, 2, 9, 16)
    spans = torch.zeros(2, 3, dtype=torch.int64)
    pack = (new, new, None, packed.table, form.numbers, maps.tensors, spans, 9, 9, None)
    torch.library.opcheck(packed_ops.pack_lines, pack, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(packed_ops.unpack_lines, pack, test_utils=("test_schema", "test_faketensor"))
