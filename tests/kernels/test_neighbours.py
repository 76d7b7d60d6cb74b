"""Shares of a list that programs of one multiprocessor claim: each is one program's, wherever these run."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'refreekv[dev]'")

import triton
import triton.language as tl

from refreekv.kernels.neighbours import none_claimed, share_of

PLACES = 4


@triton.jit
def _begin_kernel(claimed, PLACES: tl.constexpr):
    none_claimed(claimed, PLACES)


@triton.jit
def _claim_kernel(claimed, places, shares, out, PLACES: tl.constexpr):
    tl.store(out + tl.program_id(0), share_of(claimed, shares, tl.load(places + tl.program_id(0)), PLACES))


def shares_at(places, shares, count, device):
    claimed = torch.full((count or 1,), 7, dtype=torch.int32, device=device)
    _begin_kernel[(1,)](claimed, count or 1)
    out = torch.full((len(places),), -1, dtype=torch.int32, device=device)
    at = torch.tensor(places, dtype=torch.int32, device=device)
    _claim_kernel[(len(places),)](claimed, at, shares, out, count)
    return out.tolist()


@pytest.mark.parametrize(
    "places",
    [
        [0, 1, 2, 3] * 3,  # as they are spread out on an idle device
        [2] * 12,  # all on one
        [0, 0, 0, 0, 0, 1, 3, 3, 3, 3, 3, 3],
        [5, 6, 7, 4] * 3,  # numbers beyond the count
    ],
)
def test_each_share_is_one_programs(device, places):
    found = shares_at(places, 12, PLACES, device)
    assert sorted(found) == list(range(12))


def test_neighbours_are_on_one_multiprocessor(device):
    places = [3, 1, 0, 2] * 3
    found = shares_at(places, 12, PLACES, device)
    assert all(share // 3 == place for share, place in zip(found, places, strict=True))


def test_few_shares_are_spread_out(device):
    """Else the first multiprocessors would have all of them."""
    assert shares_at([0, 1, 2, 3] * 3, 5, PLACES, device) == list(range(12))
    assert shares_at([0, 1, 2, 3] * 3, 12, 0, device) == list(range(12))
