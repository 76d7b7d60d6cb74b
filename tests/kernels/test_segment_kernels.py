"""Append, gather, move and decode attention over segments: kernels and references against float64."""

import pytest
import torch

from helpers.segments import LENGTHS, run
from refreekv import kernels
from refreekv.kernels import ops, reference
from refreekv.kernels.decode import launch_ragged_decode
from refreekv.kernels.reference import decode_segment
from refreekv.kernels.storage import launch_append, launch_fetch, launch_gather, launch_move, launch_take_out
from refreekv.kernels.table import Format

POISON = float("nan")


class Segments:
    """Segments in storage of their own, poisoned wherever nothing was written."""

    def __init__(self, lengths, sizes, dtype, device, growth=0, capacities=None):
        """``dtype`` is that of keys and values, or a pair."""
        types = dtype if isinstance(dtype, tuple) else (dtype, dtype)
        self.form = Format(sizes, *types)
        self.lengths = list(lengths)
        self.capacities = capacities or [length + growth for length in lengths]
        self.keys, self.values = (
            [torch.full((c, size), POISON, dtype=kind, device=device) for c in self.capacities]
            for size, kind in zip(sizes, types, strict=True)
        )
        lines = zip(self.keys, self.values, self.lengths, self.capacities, strict=True)
        self.table = torch.tensor([[k.data_ptr(), v.data_ptr(), n, c] for k, v, n, c in lines], device=device)

    def fill(self):
        for tensors in (self.keys, self.values):
            for part, length in zip(tensors, self.lengths, strict=True):
                part[:length].normal_()
        return self


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("group", [1, 4, 7])
def test_decode_equals_float64(lengths, group, which, dtype, close, device):
    check_decode(lengths, which, dtype, close, device, group=group)


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize(
    "setting",
    [
        {"head_size": 80, "value_size": 80},
        {"head_size": 96, "value_size": 96},
        {"head_size": 128, "value_size": 128},
        {"head_size": 256, "value_size": 256},
        {"head_size": 96, "value_size": 64},
        {"softcap": 2.0},
        {"sinks": True},
        {"sinks": True, "softcap": 5.0, "group": 5},
        {"programs": 1},
        {"programs": 37},
        {"programs": 100},
    ],
    ids=str,
)
def test_decode_settings_equal_float64(setting, which, dtype, close, device):
    check_decode(LENGTHS["mixed"], which, dtype, close, device, **setting)


def check_decode(
    lengths, which, dtype, close, device, *, group=4, head_size=64, value_size=64,
    softcap=None, sinks=False, programs=None,
):  # fmt: skip
    kv_heads = 2
    batch = len(lengths) // kv_heads
    segments = Segments(lengths, (head_size, value_size), dtype, device, growth=5).fill()
    heads = kv_heads * group
    # A view of what a projection writes, with other heads in between.
    query = torch.randn(batch, 1, 2 * heads, head_size, device=device).to(dtype).transpose(1, 2)[:, ::2]
    logits = torch.randn(heads, device=device).to(dtype) * 2 if sinks else None
    arguments = (query, segments.table, segments.form, 0.2, softcap, logits)
    extra = (programs,) if which == "kernel" else ()
    got = run(which, device, launch_ragged_decode, reference.ragged_decode, *arguments, *extra)
    want = torch.zeros(batch, 1, heads, value_size, dtype=torch.float64, device=device)
    for segment, length in enumerate(lengths):
        row, head = divmod(segment, kv_heads)
        mine = slice(head * group, (head + 1) * group)
        want[row, 0, mine] = decode_segment(
            query[row, mine, 0].double(),
            segments.keys[segment][:length].double(),
            segments.values[segment][:length].double(),
            0.2,
            softcap,
            None if logits is None else logits[mine].double(),
        )
    assert got.dtype == dtype
    close(got, want)


@pytest.mark.parametrize("block", [16, 32])
def test_decode_blocks_of_smaller_gpus(block, dtype, close, device):
    segments = Segments(LENGTHS["mixed"], (64, 64), dtype, device).fill()
    query = torch.randn(len(LENGTHS["mixed"]) // 2, 4, 1, 64, device=device).to(dtype)
    arguments = (query, segments.table, segments.form, 0.2, None, None)
    close(launch_ragged_decode(*arguments, block=block), launch_ragged_decode(*arguments))


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_append_writes_behind_what_is_there(tokens, which, device):
    lengths = [0, 1, 31, 7, 0, 12]
    segments = Segments(lengths, (80, 64), torch.float16, device, capacities=[45, 41, 80, 47, 0, 60]).fill()
    before = [(k.clone(), v.clone()) for k, v in zip(segments.keys, segments.values, strict=True)]
    new_keys = torch.randn(3, tokens, 2, 80, device=device).half().transpose(1, 2)
    new_values = torch.randn(3, 2, tokens, 64, device=device).half()
    run(which, device, launch_append, reference.append, new_keys, new_values, segments.table, segments.form)
    for segment, length in enumerate(lengths):
        row, head = divmod(segment, 2)
        grown = 0 if segment == 4 else tokens
        assert int(segments.table[segment, 2]) == length + grown
        for stored, old, new in zip(
            (segments.keys[segment], segments.values[segment]), before[segment], (new_keys, new_values), strict=True
        ):
            want = old.clone()
            want[length : length + grown] = new[row, head][:grown]
            torch.testing.assert_close(stored, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_what_there_is_no_capacity_for_is_not_written(which, device):
    segments = Segments([0, 6], (64, 64), torch.float16, device, capacities=[8, 8])
    entries = torch.randn(1, 2, 5, 64, device=device).half()
    for t in range(0, 10, 5):
        new = entries + t
        run(which, device, launch_append, reference.append, new, -new, segments.table, segments.form)
    assert segments.table[:, 2].tolist() == [8, 8]
    want = torch.cat([entries[0, 0], entries[0, 0, :3] + 5])
    assert torch.equal(segments.keys[0], want)
    assert torch.equal(segments.values[0], -want)
    assert torch.equal(segments.keys[1][6:], entries[0, 1, :2])


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_gather_takes_ranges_and_indices(which, device):
    n, end = 150, 140
    keys = torch.randn(2, n, 2, 80, device=device).half().transpose(1, 2)
    values = torch.randn(2, 2, n, 64, device=device).half()
    some = torch.sort(torch.randperm(end)[:70]).values.to(torch.int32).to(device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    tail = torch.arange(end, n)
    wanted = [
        torch.cat([torch.arange(4), torch.arange(60, n)]),
        torch.cat([some.cpu().long(), tail]),
        torch.arange(33, n),
        tail,
    ]
    spans = [(0, 4, 56), (some.data_ptr(), 70, 0), (0, 0, 33), (none.data_ptr(), 0, 0)]
    if none.data_ptr() == 0:
        # Nothing listed and nothing before the tail: a gap from the start says the same.
        spans[3] = (0, 0, end)
    segments = Segments([len(w) for w in wanted], (80, 64), torch.float16, device, growth=3)
    arguments = (keys, values, segments.table, torch.tensor(spans, device=device), end)
    extra = (max(segments.lengths),) if which == "kernel" else ()
    run(which, device, launch_gather, reference.gather, *arguments, *extra, segments.form)
    for segment, index in enumerate(wanted):
        row, head = divmod(segment, 2)
        index = index.to(device)
        assert torch.equal(segments.keys[segment][: len(index)], keys[row, head][index])
        assert torch.equal(segments.values[segment][: len(index)], values[row, head][index])
        assert segments.keys[segment][len(index) :].isnan().all()


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_move_copies_what_both_hold(which, device):
    old = Segments([0, 1, 300, 33], (80, 64), torch.float16, device, growth=2).fill()
    new = Segments([0, 1, 300, 20], (80, 64), torch.float16, device, growth=9)
    arguments = (old.table, new.table, 160, 128)
    extra = (300,) if which == "kernel" else ()
    run(which, device, launch_move, reference.move, *arguments, *extra)
    for segment, length in enumerate(new.lengths):
        assert torch.equal(new.keys[segment][:length], old.keys[segment][:length])
        assert torch.equal(new.values[segment][:length], old.values[segment][:length])
        assert new.keys[segment][length:].isnan().all()


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("programs", [1, 5])
def test_fetch_copies_what_is_there_by_then(which, programs, device):
    old = Segments([0, 33, 400, 3000], (80, 2), torch.float16, device, growth=3).fill()
    new = Segments([7, 7, 7, 7], (80, 2), torch.float16, device, capacities=[5, 40, 300, 3003])
    extra = (programs,) if which == "kernel" else ()
    for lengths in ([0, 33, 400, 3000], [0, 30, 5, 2999]):  # and again, with less in it
        old.table[:, 2] = torch.tensor(lengths, device=device)
        for parts in (new.keys, new.values):
            for part in parts:
                part.fill_(POISON)
        run(which, device, launch_fetch, reference.fetch, old.table, new.table, 160, 4, *extra)
        assert new.table[:, 2].tolist() == [min(*pair) for pair in zip(lengths, new.capacities, strict=True)]
        for segment, length in enumerate(new.table[:, 2].tolist()):
            assert torch.equal(new.keys[segment][:length], old.keys[segment][:length])
            assert torch.equal(new.values[segment][:length], old.values[segment][:length])
            assert new.keys[segment][length:].isnan().all()


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("lane", [64, 2048])
def test_what_is_behind_those_taken_out_moves_up(which, lane, device):
    """Also over places that it is read from: little is taken out before much, in parts."""
    lengths, told = [0, 40, 300, 300, 300, 96, 7], [[0, 4, 0, 4, 290, 4, 3], [0, 32, 1, 3, 10, 0, 4]]
    segments = Segments(lengths, (80, 2), torch.float16, device, growth=3).fill()
    before = [[part.clone() for part in side] for side in (segments.keys, segments.values)]
    extra = (lane,) if which == "kernel" else ()
    run(which, device, launch_take_out, reference.take_out, segments.table,
        torch.tensor(told, device=device), 160, 4, *extra)  # fmt: skip
    left = [n - count for n, count in zip(lengths, told[1], strict=True)]
    assert segments.table[:, 2].tolist() == left
    for segment, (length, first, count) in enumerate(zip(lengths, *told, strict=True)):
        for side, old in zip((segments.keys, segments.values), before, strict=True):
            stay = torch.cat([old[segment][:first], old[segment][first + count : length]])
            assert torch.equal(side[segment][: left[segment]], stay)
            assert side[segment][length:].isnan().all()


def test_what_is_taken_out_is_told_of_each_segment():
    segments = Segments([5, 9], (16, 16), torch.float32, "cpu").fill()
    for told in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64).T[:1]):
        with pytest.raises(ValueError, match=r"told in contiguous int64 \[2, 2\], got"):
            kernels.take_out(segments.table, told, key_bytes=64, value_bytes=64)
    with pytest.raises(ValueError, match="4 or 8 bytes at a time; got keys of 6"):
        kernels.take_out(segments.table, torch.zeros(2, 2, dtype=torch.int64), key_bytes=6, value_bytes=64)
    assert segments.table[:, 2].tolist() == [5, 9]


def test_the_operators_are_what_torch_expects_of_them():
    segments = Segments([5, 9], (16, 16), torch.float32, "cpu", growth=3).fill()
    entry = torch.randn(1, 2, 1, 16)
    decode = (entry, segments.table, *segments.form, 0.25, None, None)
    torch.library.opcheck(ops.ragged_decode, decode, test_utils=("test_schema", "test_faketensor"))
    append = (entry, entry, segments.table, *segments.form)
    torch.library.opcheck(ops.append, append, test_utils=("test_schema", "test_faketensor"))
