"""What counts as padding, whether a prompt comes in one call or in chunks."""

import pytest
import torch

from refreekv.pruning.calls import AttentionCall
from refreekv.pruning.padding import Padding


def call(seen):
    """An attention call whose queries see columns ``[B, q, n]``."""
    query = torch.zeros(seen.shape[0], 2, seen.shape[1], 4)
    return AttentionCall(query, seen[:, None])


def masks(hidden, before, length):
    """What queries ``before .. length`` of rows see, some first columns of which are hidden: ``[B, q, n]``."""
    column, query = torch.arange(length), torch.arange(before, length)
    causal = column <= query[:, None]
    return causal & (column >= torch.tensor(hidden)[:, None, None])


def read(padding, hidden, before, length, chunk):
    for start in range(before, length, chunk):
        end = min(start + chunk, length)
        padding = padding.with_chunk(call(masks(hidden, start, end)), start, end)
    return padding


@pytest.mark.parametrize("chunk", [3, 7, 20])
def test_padding_is_what_nobody_saw_of_the_beginning(chunk):
    found = read(Padding(), (0, 4, 9), 0, 20, chunk)
    assert found.start == 0
    expected = torch.arange(20) < torch.tensor([[0], [4], [9]])
    assert torch.equal(~found.real_since(0), expected)
    done = found.at_end()
    assert torch.equal(done.stored, expected)
    assert done.start is done.seen is None


def test_without_masks_nothing_is_known_and_nothing_is_padding():
    query = torch.zeros(2, 2, 5, 4)
    found = Padding().with_chunk(AttentionCall(query, None), 0, 5)
    assert found.seen is found.real_since(0) is None
    assert found.start == 0
    assert found.at_end() == Padding()


def test_chunks_without_a_mask_saw_everything():
    query = torch.zeros(2, 2, 5, 4)
    found = Padding().with_chunk(AttentionCall(query, None), 0, 5)
    found = found.with_chunk(call(masks((0, 3), 5, 9)), 5, 9)
    assert not found.at_end().stored.any()


def test_a_hole_is_no_padding():
    seen = masks((2,), 0, 10)
    seen[:, :, 5] = False
    found = Padding().with_chunk(call(seen), 0, 10).at_end()
    assert found.stored.nonzero()[:, 1].tolist() == [0, 1]


def test_a_later_turn_adds_to_what_is_stored():
    """Its first column may be the last token generated, with padding behind it; the longest row has none."""
    first = read(Padding(), (0, 4), 0, 10, 10).at_end()
    seen = masks((0, 4), 10, 16)
    seen[1, :, 11:13] = False
    found = first.with_chunk(call(seen), 10, 16).at_end()
    assert found.stored[0].sum() == 0
    assert found.stored[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 11, 12]
    seen[1, :, 10] = False
    found = first.with_chunk(call(seen), 10, 16).at_end()
    assert found.stored[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 10, 11, 12]
    seen[0] = seen[1]
    found = first.with_chunk(call(seen), 10, 16).at_end()
    assert not found.stored[:, 10:].any(), "what no row has is no padding"


def test_rows_and_crops():
    found = read(Padding(), (0, 4), 0, 10, 10).at_end()
    assert found.of_rows([1, 1, 0]).stored.sum(1).tolist() == [4, 4, 0]
    assert found.cropped(3).stored.sum(1).tolist() == [0, 3]
    unfinished = read(Padding(), (0, 4), 0, 10, 5)
    assert unfinished.cropped(6) == Padding(), "a prompt that is cropped does not go on"
    assert torch.equal(unfinished.of_rows([1]).seen[0], unfinished.seen[1])
