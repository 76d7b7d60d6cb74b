"""The arena does what the exact storage does, in place and with growth, whatever happens to it."""

import pytest
import torch
from hypothesis import given, settings

from helpers.arenas import SIZES, check_changes, check_integrity, exact, lengths_of, moves, same
from refreekv.kernels import ragged_decode
from refreekv.kernels.reference import decode_segment
from refreekv.storage.arena import KVArena, growth_for


@settings(deadline=None, max_examples=40)
@given(lengths_of, moves)
def test_any_sequence_of_changes_is_that_of_the_exact_storage(lengths, steps):
    judge = exact(lengths)
    check_changes(KVArena.of(judge), judge, steps, same=same)


def test_appending_one_by_one_moves_rarely_and_keeps_the_table():
    arena = KVArena.of(exact([(400, 300), (350, 50)]))
    table, moved, judge = arena.table, 0, exact([(400, 300), (350, 50)])
    for step in range(60):
        new = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 8)
        before = arena.keys.data_ptr()
        arena.append(*new)
        judge = judge.append(*new)
        moved += arena.keys.data_ptr() != before
        assert arena.table is table, step
    same(arena, judge)
    assert 1 <= moved <= 60 // 16


def test_room_is_at_most_three_percent():
    lengths = [(1000, 3000), (2000, 2000)]
    arena = KVArena.of(exact(lengths))
    kept = sum(map(sum, lengths)) * sum(SIZES) * 4
    assert kept < arena.nbytes <= 1.03 * kept
    assert growth_for([(5, 5)]) == 16


def test_taking_back_much_gives_its_memory_back():
    arena = KVArena.of(exact([(1000, 3000), (2000, 2000)]))
    arena.append(*(torch.randn(2, 2, 300, size) for size in SIZES))
    assert not arena.drop(290)
    check_integrity(arena)
    before = arena.keys.data_ptr()
    assert arena.drop(10)
    assert arena.keys.data_ptr() == before
    assert arena.lengths == [(1290, 3290), (2290, 2290)]


@pytest.mark.parametrize(("kept", "growth"), [(4096, 16), (4080, 16), (4046, 50), (2048, 51)])
def test_a_prompt_of_which_little_goes_comes_to_hold_no_more_than_it_had(kept, growth):
    keys, values = torch.randn(1, 2, 4096, 16), torch.randn(1, 2, 4096, 8)
    arena = KVArena.gathered(keys, values, [(kept, kept)], [(0, 0, 4096 - kept)] * 2, 4096)
    assert arena.capacities == [(kept + growth,) * 2]


def test_freed_rows_give_their_memory_back_and_take_nothing():
    arena, judge = KVArena.of(exact([(30, 20), (10, 40), (7, 7)])), exact([(30, 20), (10, 40), (7, 7)])
    bytes_before = arena.nbytes
    arena.free_rows([1])
    assert arena.nbytes < bytes_before
    assert arena.row_nbytes(1) == 0
    for _ in range(40):
        new = torch.randn(3, 2, 1, 16), torch.randn(3, 2, 1, 8)
        arena.append(*new)
        judge = judge.append(*new)
        check_integrity(arena)
    assert arena.lengths == [judge.lengths[0], (0, 0), judge.lengths[2]]
    same(arena.select_rows([0, 2]), judge.select_rows([0, 2]))
    query = torch.randn(3, 4, 1, 16)
    out = ragged_decode(query, arena.table, arena.form)
    assert (out[1] == 0).all()
    keys, values = judge.segments(2)
    want = decode_segment(query[2, 2:, 0], keys[1], values[1], 0.25, None, None)
    torch.testing.assert_close(out[2, 0, 2:], want)
    assert arena.drop(5)
    check_integrity(arena)
    shorter = arena.truncate([(9, 8), (7, 7), (6, 5)])
    for some, expected in ((shorter, [(9, 8), (0, 0), (6, 5)]), (arena.select_rows([1, 2]), [(0, 0), (42, 42)])):
        assert some.lengths == expected
        check_integrity(some)
        some.append(*(torch.randn(len(expected), 2, 1, size) for size in SIZES))
        assert some.lengths[0 if some is not shorter else 1] == (0, 0)
    arena.free_rows([0, 1, 2])
    assert arena.nbytes == 0
    arena.append(torch.randn(3, 2, 1, 16), torch.randn(3, 2, 1, 8))
    assert arena.lengths == [(0, 0)] * 3


def test_a_lent_table_is_the_arenas_own():
    arena = KVArena.of(exact([(5,), (9,)]))
    place = torch.zeros_like(arena.table)
    arena.lend_table(place)
    arena.append(torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 8))
    assert place[:, 2].tolist() == [6, 10]
    arena.take_table_back()
    arena.append(torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 8))
    assert place[:, 2].tolist() == [6, 10]
    check_integrity(arena)


@pytest.mark.parametrize("tail", [0, 3])
def test_gathered_from_dense_without_another_copy(tail):
    keys, values = torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 8)
    some = torch.arange(0, 40, 3, dtype=torch.int32)
    spans = [(some.data_ptr(), len(some), 0), (0, 4, 20)]
    end = 50 - tail
    arena = KVArena.gathered(keys, values, [(len(some) + tail, 30)], spans, end)
    wanted = [torch.cat([some.long(), torch.arange(end, 50)]), torch.cat([torch.arange(4), torch.arange(24, 50)])]
    for head in range(2):
        assert torch.equal(arena.segments(0)[0][head], keys[0, head][wanted[head]])
        assert torch.equal(arena.segments(0)[1][head], values[0, head][wanted[head]])


def test_how_many_sequences_fit_at_half_the_budget():
    """Room included: 8 KV heads of 128 in bfloat16, 8,192 tokens, 32 layers, 24 GB of K/V."""
    empty = torch.empty(0, 128, dtype=torch.bfloat16)
    kept = 32 * KVArena.like(empty, empty, [(4096,) * 8]).nbytes
    full = 32 * 2 * 8 * 8192 * 128 * 2
    assert int(24e9 // kept) >= 1.9 * int(24e9 // full)
