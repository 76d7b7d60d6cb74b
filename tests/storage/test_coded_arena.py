"""An arena of int8 lines is one that holds what its entries round to, and never rounds twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.arenas import INT8, check_changes, check_entries, exact, lengths_of, moves, rounded
from refreekv import KVDtype
from refreekv.core.coded_lines import fits, from_lines, half_of, line_bytes, to_lines
from refreekv.kernels import ragged_decode
from refreekv.kernels.reference import decode_segment
from refreekv.storage.coded_arena import CodedArena
from refreekv.storage.ragged import RaggedKV

SIZES = (16, 8)


def as_judge(plain):
    return RaggedKV(rounded(plain.keys), rounded(plain.values), plain.lengths)


def coded(plain):
    """An arena of some entries, and what it holds."""
    longest = max(n for row in plain.lengths for n in row)
    dense = [torch.zeros(len(plain.lengths), plain.kv_heads, longest, size) for size in SIZES]
    for row in range(len(plain.lengths)):
        for whole, part in zip(dense, plain.segments(row), strict=True):
            for head, entries in enumerate(part):
                whole[row, head, : len(entries)] = entries
    spans = [(0, longest, 0)] * (len(plain.lengths) * plain.kv_heads)
    return CodedArena.gathered(*dense, plain.lengths, spans, longest, number=INT8), as_judge(plain)


def same(arena, judge):
    assert (arena.sizes, arena.types) == (SIZES, (torch.float32,) * 2)
    check_entries(arena, judge)
    check_integrity(arena)


def check_integrity(arena):
    lines = sum(map(sum, arena.capacities))
    assert arena.keys.shape == (lines, 24)
    assert arena.values.shape == (lines, 16)
    assert arena.nbytes == lines * 40 == sum(arena.row_nbytes(r) for r in range(len(arena.lengths)))
    assert arena.table.tolist() == arena._lines()


@settings(deadline=None, max_examples=40)
@given(lengths_of, moves)
def test_any_sequence_of_changes_is_that_of_the_exact_storage(lengths, steps):
    arena, judge = check_changes(*coded(exact(lengths)), steps, same=same, stored=rounded)
    rows = [arena.lines.segments(row) for row in range(len(judge.lengths))]
    lines = RaggedKV.from_pieces([[keys] for keys, _ in rows], [[values] for _, values in rows])
    same(arena.of_lines(lines), judge)


def test_freed_rows_give_their_memory_back_and_take_nothing():
    arena, judge = coded(exact([(30, 20), (10, 40), (7, 7)]))
    bytes_before = arena.nbytes
    arena.free_rows([1])
    assert arena.nbytes < bytes_before
    for _ in range(40):
        new = torch.randn(3, 2, 1, 16), torch.randn(3, 2, 1, 8)
        arena.append(*new)
        judge = judge.append(*map(rounded, new))
        check_integrity(arena)
    assert arena.lengths == [judge.lengths[0], (0, 0), judge.lengths[2]]
    same(arena.select_rows([0, 2]), judge.select_rows([0, 2]))
    query = torch.randn(3, 4, 1, 16)
    out = ragged_decode(query, arena.table, arena.form)
    assert (out[1] == 0).all()
    keys, values = judge.segments(2)
    torch.testing.assert_close(out[2, 0, 2:], decode_segment(query[2, 2:, 0], keys[1], values[1], 0.25, None, None))


@given(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.sampled_from([8, 64, 80, 96, 128, 256]))
def test_a_line_is_what_the_number_format_stores(dtype, size):
    entries = (torch.randn(20, size) * torch.randn(size).exp() + 3 * torch.randn(size)).to(dtype)
    group = INT8.group_size(size)
    lines = to_lines(entries, group)
    assert lines.shape[1] == line_bytes(size, group) == -(-(size + 4 * size // group) // 8) * 8
    back = from_lines(lines, size, group, half_of(dtype), dtype)
    # Half a step of the group's range at most, beside what its numbers and the result lose to 16 bits.
    groups = entries.float().view(20, -1, group)
    step = (groups.amax(-1) - groups.amin(-1)) / 255
    rounding = 2 * torch.finfo(half_of(dtype)).eps * groups.abs().amax(-1)
    error = (back.float() - entries.float()).abs().view_as(groups).amax(-1)
    assert (error <= 0.51 * step + rounding).all()
    assert (error > 0.2 * step).float().mean() > 0.5  # it is that coarse, too
    again = from_lines(lines.view(4, 5, -1), size, group, half_of(dtype), torch.float32)
    assert torch.equal(again.to(dtype).flatten(0, 1), back)


@pytest.mark.parametrize("value", [0.0, 5.0, -1e4])
def test_a_line_of_one_number(value):
    entries = torch.full((1, 64), value)
    assert torch.allclose(from_lines(to_lines(entries, 64), 64, 64, torch.float16, torch.float32), entries, rtol=1e-3)


def test_lines_are_torchao_s():
    """The same codes, computed by a library, where it is given the groups' lowest values as origin."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    entries = torch.randn(40, 64) * torch.randn(64).exp() + 3
    lines = to_lines(entries, 32)
    scale, low = lines[:, 64:72].contiguous().view(torch.float16).unflatten(1, (2, 2)).float().unbind(-1)
    shifted = (entries.view(40, 2, 32) - low[..., None]).reshape(40, 64)
    arguments = ((1, 32), scale, torch.zeros_like(scale), torch.uint8, 0, 255)
    theirs = primitives.dequantize_affine(primitives.quantize_affine(shifted, *arguments), *arguments)
    difference = (from_lines(lines, 64, 32, torch.float16, torch.float32) - theirs).view(40, 2, 32) - low[..., None]
    # They multiply by the inverse of the scale: a value half-way may fall on the other side.
    assert (difference.abs() < 1e-4 * scale[..., None]).float().mean() > 0.999
    assert (difference.abs() < 1.01 * scale[..., None]).all()


@pytest.mark.parametrize(
    ("spec", "size", "does"),
    [
        (None, 128, False),
        ("int8", 128, True),
        ("int8", 80, True),
        ("int8:recent=0,group=16", 128, True),
        ("int8:recent=1", 128, False),
        ("int8:group=8", 128, False),  # 16 groups
        ("int8", 20, False),
        ("int4:recent=0", 128, False),
        ("fp8:recent=0", 128, False),
    ],
)
def test_what_fits(spec, size, does):
    assert fits(KVDtype.parse(spec), size) is does
