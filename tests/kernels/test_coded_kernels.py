"""int8 lines: written by kernels as `core.coded_lines` has them, to the bit, and attended to as float64 has it."""

import pytest
import torch

from helpers.segments import LENGTHS, run
from refreekv import KVDtype
from refreekv.core.coded_lines import from_lines, half_of, line_bytes, to_lines
from refreekv.kernels import ops, reference
from refreekv.kernels.coded_decode import launch_coded_decode
from refreekv.kernels.coded_storage import launch_coded_append, launch_coded_gather
from refreekv.kernels.reference import decode_segment
from refreekv.kernels.storage import launch_move
from refreekv.kernels.table import Format

POISON = 0x7F
"""Numbers of these bytes are NaN in float16 and huge in bfloat16."""


def group_of(size):
    return KVDtype("int8").group_size(size)


class Lines:
    """Segments of lines, poisoned wherever nothing was written."""

    def __init__(self, lengths, sizes, dtype, device, room=0, capacities=None):
        """``dtype`` is that of keys and values, or a pair."""
        self.types = dtype if isinstance(dtype, tuple) else (dtype, dtype)
        self.lengths, self.sizes, self.device = list(lengths), sizes, device
        self.groups = tuple(group_of(size) for size in sizes)
        self.form = Format(sizes, *map(half_of, self.types), self.groups)
        self.capacities = capacities or [length + room for length in lengths]
        self.keys, self.values = (
            [
                torch.full((c, line_bytes(size, group)), POISON, dtype=torch.uint8, device=device)
                for c in self.capacities
            ]
            for size, group in zip(sizes, self.groups, strict=True)
        )
        lines = zip(self.keys, self.values, self.lengths, self.capacities, strict=True)
        self.table = torch.tensor([[k.data_ptr(), v.data_ptr(), n, c] for k, v, n, c in lines], device=device)

    def fill(self):
        sides = zip((self.keys, self.values), self.sizes, self.types, self.groups, strict=True)
        for part, size, kind, group in sides:
            for lines, length in zip(part, self.lengths, strict=True):
                lines[:length] = to_lines(entries(length, size).to(kind), group).to(self.device)
        return self

    def exact(self, which, segment):
        """What the lines stand for, in float64."""
        lines = (self.keys, self.values)[which][segment].cpu()
        half = half_of(self.types[which])
        return from_lines(lines, self.sizes[which], self.groups[which], half, torch.float32).double()


def entries(*shape):
    """Entries with outlying elements and offsets, as keys have them."""
    scale = torch.randn(shape[-1]).exp()
    return torch.randn(*shape) * scale + 3 * torch.randn(shape[-1])


def check_lines(stored, wanted, size, group):
    """Codes and numbers to the bit; what fills a line up is nobody's."""
    used = size + 4 * (size // group)
    assert torch.equal(stored[:, :used].cpu(), to_lines(wanted.cpu(), group)[:, :used])


# -- decode attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("group", [1, 4, 9])
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
        {"head_size": 192, "value_size": 128},
        {"head_size": 8, "value_size": 16},
        {"window": 40},
        {"softcap": 2.0},
        {"sinks": True},
        {"sinks": True, "softcap": 5.0, "window": 64, "group": 5, "head_size": 128},
        {"programs": 1},
        {"programs": 37},
        {"block": 16},
        {"block": 32},
    ],
    ids=str,
)
def test_decode_settings_equal_float64(setting, which, dtype, close, device):
    check_decode(LENGTHS["mixed"], which, dtype, close, device, **setting)


def check_decode(
    lengths, which, dtype, close, device, *, group=4, head_size=64, value_size=64,
    window=0, softcap=None, sinks=False, **launch,
):  # fmt: skip
    kv_heads = 2
    batch, heads = len(lengths) // kv_heads, kv_heads * group
    lines = Lines(lengths, (head_size, value_size), dtype, device, room=5).fill()
    # A view of what a projection writes, with other heads in between.
    query = torch.randn(batch, 1, 2 * heads, head_size, device=device).to(dtype).transpose(1, 2)[:, ::2]
    logits = torch.randn(heads, device=device).to(dtype) * 2 if sinks else None
    arguments = (query, lines.table, lines.form, 0.1, window, softcap, logits)
    if which == "kernel":
        got = launch_coded_decode(*arguments, **launch)
    else:
        got = run(which, device, None, reference.ragged_decode, *arguments)
    want = torch.zeros(batch, 1, heads, value_size, dtype=torch.float64)
    for segment, length in enumerate(lengths):
        row, head = divmod(segment, kv_heads)
        start = max(0, length - window) if window else 0
        mine = slice(head * group, (head + 1) * group)
        keys, values = lines.exact(0, segment)[start:length], lines.exact(1, segment)[start:length]
        sink = None if logits is None else logits[mine].double().cpu()
        want[row, 0, mine] = decode_segment(query[row, mine, 0].double().cpu(), keys, values, 0.1, softcap, sink)
    assert got.dtype == dtype
    close(got, want)


def test_small_scales_lose_little(dtype, close, device):
    """Weights times scales are tiny where values are alike: they are not to vanish in float16."""
    lines = Lines([4096, 33], (64, 64), dtype, device)
    for segment, length in enumerate(lines.lengths):
        lines.keys[segment][:] = to_lines(entries(length, 64).to(dtype), 64).to(device)
        lines.values[segment][:] = to_lines((1e-2 * torch.randn(length, 64)).to(dtype), 64).to(device)
    query = torch.randn(1, 8, 1, 64, device=device).to(dtype)
    got = launch_coded_decode(query, lines.table, lines.form, 0.01, 0, None, None)
    want = [
        decode_segment(part.double().cpu()[0, :, 0], lines.exact(0, s), lines.exact(1, s), 0.01, None, None)
        for s, part in enumerate((query[:, :4], query[:, 4:]))
    ]
    close(got[0, 0], torch.cat(want))


def test_decode_reads_a_ring(dtype, close, device):
    lines = Lines([32, 9], (64, 64), dtype, device, capacities=[32, 32]).fill()
    lines.table[0, 2] = 50
    query = torch.randn(1, 2, 1, 64, device=device).to(dtype)
    got = launch_coded_decode(query, lines.table, lines.form, 0.125, 0, None, None)
    want = [
        decode_segment(query[0, h].double().cpu(), lines.exact(0, h)[:n], lines.exact(1, h)[:n], 0.125, None, None)[0]
        for h, n in enumerate((32, 9))
    ]
    close(got[0, 0], torch.stack(want))


# -- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("sizes", [(64, 64), (80, 64), (96, 128), (256, 192), (8, 16)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_append_encodes_to_the_bit(tokens, sizes, which, dtype, device):
    lengths = [0, 1, 31, 7, 0, 12]
    lines = Lines(lengths, sizes, dtype, device, capacities=[45, 41, 80, 47, 0, 60]).fill()
    before = [[part.clone() for part in side] for side in (lines.keys, lines.values)]
    keys = entries(3, tokens, 2, sizes[0]).to(device, dtype).transpose(1, 2)
    values = entries(3, 2, tokens, sizes[1]).to(device, dtype)
    run(which, device, launch_coded_append, reference.append, keys, values, lines.table, lines.form)
    for segment, length in enumerate(lengths):
        row, head = divmod(segment, 2)
        grown = 0 if segment == 4 else tokens
        assert int(lines.table[segment, 2]) == length + grown
        for side, new in enumerate((keys, values)):
            stored, old = (lines.keys, lines.values)[side][segment], before[side][segment]
            check_lines(stored[length : length + grown], new[row, head][:grown], sizes[side], lines.groups[side])
            for rest in (slice(length), slice(length + grown, None)):
                assert torch.equal(stored[rest], old[rest])


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_entries_without_spread_and_halves(which, dtype, device):
    """Scales of zero, and steps that are just between two codes."""
    lines = Lines([0, 0], (64, 64), dtype, device, room=4)
    rows = torch.stack([torch.zeros(64), torch.full((64,), 5.0), torch.full((64,), -1e4), torch.arange(64) * 0.5])
    rows[3, -1] = 255.0
    new = rows[None, None].expand(1, 2, 4, 64).to(device, dtype)
    run(which, device, launch_coded_append, reference.append, new, -new, lines.table, lines.form)
    for head in range(2):
        check_lines(lines.keys[head], rows.to(dtype), 64, 64)
        check_lines(lines.values[head], -rows.to(dtype), 64, 64)


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("sizes", [(80, 64), (128, 256)], ids=str)
def test_gather_encodes_ranges_and_indices_to_the_bit(sizes, which, dtype, device):
    n, end = 150, 140
    keys = entries(2, n, 2, sizes[0]).to(device, dtype).transpose(1, 2)
    values = entries(2, 2, n, sizes[1]).to(device, dtype)
    some = torch.sort(torch.randperm(end)[:70]).values.to(torch.int32).to(device)
    tail = torch.arange(end, n)
    wanted = [
        torch.cat([torch.arange(4), torch.arange(60, n)]),
        torch.cat([some.cpu().long(), tail]),
        torch.arange(33, n),
        tail,
    ]
    spans = torch.tensor([(0, 4, 56), (some.data_ptr(), 70, 0), (0, 0, 33), (0, 0, end)], device=device)
    lines = Lines([len(w) for w in wanted], sizes, dtype, device, room=3)
    if which == "kernel":
        launch_coded_gather(keys, values, lines.table, spans, end, max(lines.lengths), lines.form)
    else:
        run(which, device, None, reference.gather, keys, values, lines.table, spans, end, lines.form)
    for segment, index in enumerate(wanted):
        row, head = divmod(segment, 2)
        for side, source in enumerate((keys, values)):
            stored = (lines.keys, lines.values)[side][segment]
            check_lines(stored[: len(index)], source[row, head][index.to(device)], sizes[side], lines.groups[side])
            assert (stored[len(index) :] == POISON).all()


def test_lines_that_begin_at_odd_multiples_of_8_bytes_are_moved(device):
    """A line of 136 bytes: the second of two segments in one storage begins where no 16 bytes do."""
    old, new = (torch.randint(0, 256, (60, 136), dtype=torch.uint8, device=device) for _ in range(2))
    before = new.clone()
    source, target = (
        torch.tensor([[t.data_ptr() + 136 * at, t.data_ptr() + 136 * (at + 20), 17, 20]], device=device)
        for t, at in ((old, 3), (new, 5))
    )
    launch_move(source, target, 136, 136, 17)
    for start in (0, 20):
        assert torch.equal(new[start + 5 : start + 22], old[start + 3 : start + 20])
    assert torch.equal(new[:5], before[:5])
    assert torch.equal(new[42:], before[42:])


def test_the_operators_are_what_torch_expects_of_them():
    lines = Lines([5, 9], (16, 16), torch.float32, "cpu", room=3).fill()
    entry = torch.randn(1, 2, 1, 16)
    decode = (entry, lines.table, *lines.form, 0.25, 0, None, None)
    torch.library.opcheck(ops.ragged_decode, decode, test_utils=("test_schema", "test_faketensor"))
    append = (entry, entry, lines.table, *lines.form)
    torch.library.opcheck(ops.append, append, test_utils=("test_schema", "test_faketensor"))
