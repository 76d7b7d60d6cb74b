"""Changes to arenas, against the exact storage."""

import copy
import pickle

import torch
from hypothesis import strategies as st

from refreekv.storage.arena import growth_for
from refreekv.storage.ragged import RaggedKV

SIZES = (16, 8)


def exact(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    entries = sum(map(sum, lengths))
    keys, values = (torch.randn(entries, size, generator=generator) for size in SIZES)
    return RaggedKV(keys, values, lengths)


def check_entries(arena, judge):
    """Both hold the same, in whatever form one asks."""
    assert arena.lengths == judge.lengths
    for row in range(len(judge.lengths)):
        for mine, other in zip(arena.segments(row), judge.segments(row), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        for mine, other in zip(arena.rows()[row], judge.rows()[row], strict=True):
            assert torch.equal(mine, other)
    if judge.uniform and arena.uniform:
        assert all(torch.equal(a, b) for a, b in zip(arena.stacked(), judge.stacked(), strict=True))


def same(arena, judge):
    assert arena.kv_heads == judge.kv_heads
    check_entries(arena, judge)
    check_integrity(arena)


def check_integrity(arena):
    """What the host knows, what the table says and what is allocated agree."""
    lines = sum(map(sum, arena.capacities))
    assert arena.keys.shape[0] == arena.values.shape[0] == lines
    assert arena.nbytes == lines * sum(SIZES) * 4 == sum(arena.row_nbytes(r) for r in range(len(arena.lengths)))
    assert arena.table.tolist() == arena._lines()
    for lengths, capacities in zip(arena.lengths, arena.capacities, strict=True):
        assert all(length <= capacity for length, capacity in zip(lengths, capacities, strict=True))


lengths_of = st.integers(1, 3).flatmap(
    lambda heads: st.lists(st.tuples(*[st.integers(0, 40)] * heads), min_size=1, max_size=3)
)


moves = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 30)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
        st.tuples(st.just("truncate"), st.integers(0, 50)),
        st.tuples(st.just("drop"), st.integers(1, 20)),
        st.tuples(st.just("copy"), st.sampled_from(["deepcopy", "pickle"])),
    ),
    max_size=6,
)


def check_changes(arena, judge, steps, *, same, stored=lambda entries: entries):
    """Let an arena and its judge, which holds entries as ``stored``, go through the same; both as they are then."""
    same(arena, judge)
    for number, (what, how) in enumerate(steps):
        if what == "append":
            shape = (len(judge.lengths), judge.kv_heads, how)
            generator = torch.Generator().manual_seed(number)
            new = [torch.randn(*shape, size, generator=generator) for size in SIZES]
            judge, arena = judge.append(*map(stored, new)), arena.append(*new)
        elif what == "select":
            rows = [row % len(judge.lengths) for row in how]
            judge, arena = judge.select_rows(rows), arena.select_rows(rows)
        elif what == "truncate":
            wanted = [tuple(min(n, how + head) for head, n in enumerate(row)) for row in judge.lengths]
            judge, arena = judge.truncate(wanted), arena.truncate(wanted)
        elif what == "drop":
            how = min(how, *(n for row in judge.lengths for n in row))
            if arena.drop(how):
                judge = judge.truncate([[n - how for n in row] for row in judge.lengths])
            assert arena.left <= growth_for(arena.lengths) + 16
        else:
            before = arena
            arena = copy.deepcopy(arena) if how == "deepcopy" else pickle.loads(pickle.dumps(arena))
            before.keys.fill_(float("nan") if before.keys.is_floating_point() else 0x7F)
        same(arena, judge)
    return arena, judge
