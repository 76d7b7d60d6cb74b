"""Which columns are held: bits, indices and ranges say the same."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from refreekv.kernels import kept_first
from refreekv.storage.columns import Columns, Levels, lasting

CPU = torch.device("cpu")


def lists_of(columns):
    return [head.tolist() for head in columns.tensors(CPU)]


@st.composite
def several(draw):
    """Rows of ascending columns under an end, in ranges or in an index for all or for each of three KV heads."""
    end = draw(st.integers(1, 70))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([0, 1, 3]))
        chosen = [sorted(draw(st.sets(st.integers(0, end - 1)))) for _ in range(groups)]
        heads = tuple(torch.tensor(own, dtype=torch.int32) for own in chosen)
        rows.append(Columns(heads=heads) if groups else Columns.of_ranges((0, end // 3), (end // 2, end)))
    return end, rows


@given(several())
def test_what_lasts_says_the_same(made):
    end, rows = made
    kept = lasting(rows, end)
    indices = 4 * sum(len(head) for row in rows for head in row.heads)
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for row in kept for part in parts(row)
    }
    groups = sum(len(row.heads) for row in rows)
    assert sum(storages.values()) == min(indices, groups * -(-end // 8))
    for mine, given_row in zip(kept, rows, strict=True):
        assert lists_of(mine) == lists_of(given_row)
        assert mine.counts == given_row.counts
        assert mine.for_heads(3) == given_row.for_heads(3)
        assert mine.as_ranges() == given_row.as_ranges()
        assert torch.equal(mine.padded(CPU), given_row.padded(CPU))
        assert lists_of(mine.extended(end, end + 5)) == lists_of(given_row.extended(end, end + 5))
        assert lists_of(mine.below(end // 2)) == lists_of(given_row.below(end // 2))
        every_other = Columns(heads=(torch.arange(0, max(mine.counts), 2, dtype=torch.int32),))
        assert lists_of(mine.take(every_other, CPU)) == lists_of(given_row.take(every_other, CPU))


@given(st.integers(1, 60), st.integers(0, 2**31), st.sampled_from([1, 3]), st.sampled_from([1, 3]))
def test_of_all_heads_at_once_it_is_the_same(end, seed, groups, chosen):
    """Columns that are views of lines, for all KV heads or for each, and what is kept of them."""
    generator = torch.Generator().manual_seed(seed)
    order, held, marks = kept_first(torch.rand(groups, end, generator=generator) < 0.7)
    there = Columns(bits=marks, held=tuple(held.tolist())).extended(end, end + 7)
    longest = max(there.counts)
    assert there.aligned.shape == there.padded(CPU).shape == (groups, longest)
    for line, own, first, n in zip(there.padded(CPU), lists_of(there), order, held.tolist(), strict=True):
        assert own == [*first[:n].tolist(), *range(end, end + 7)]
        assert line.tolist()[longest - len(own) :] == own
    # Of the columns that all heads hold, as a policy is not asked about what fills shorter ones up.
    real = torch.arange(longest) >= longest - min(there.counts)
    listed, kept, _ = kept_first((torch.rand(chosen, longest, generator=generator) < 0.5) & real)
    heads = tuple(line[:n] for line, n in zip(listed, kept.tolist(), strict=True))
    want = there.take(Columns(heads=heads), CPU)
    assert lists_of(there.take(Columns(heads=heads, listed=listed), CPU)) == lists_of(want)


def parts(row):
    return [part for part in (*row.heads, row.bits) if part is not None]


def test_bits_take_a_thirty_second_of_the_indices_of_everything():
    index = torch.arange(4096, dtype=torch.int32)
    (row,) = lasting([Columns(heads=(index,) * 8)], 4096)
    assert row.bits.nbytes == 8 * index.nbytes // 32


def test_what_was_read_in_few_bits_is_not_worth_more():
    rungs = torch.tensor([0, 3, 1, 2, 3, 1], dtype=torch.uint8)
    capped = Levels((rungs,), ((1, 2, 1, 2),)).at_most(2)
    assert capped.heads[0].tolist() == [0, 2, 1, 2, 2, 1]
    assert capped.heads[0].dtype == torch.uint8
    assert capped.counts == ((1, 2, 3, 0),)
