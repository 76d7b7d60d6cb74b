"""Stand-ins by kernels; the torch version is the judge."""

import pytest
import torch

from refreekv.core.surrogates import make, put
from refreekv.kernels.surrogates import Tile, launch_put, launch_surrogates

CASES = {
    "plain": {},
    "one query head a KV head": {"heads": 2},
    "odd sizes": {"heads": 6, "probes": 5, "head": 80, "value": 48, "length": 333},
    "many": {"count": 7, "length": 1200},
    "one": {"count": 1},
    "short": {"length": 40},
}


def a_layer(device, dtype, *, heads=8, probes=16, head=64, value=64, length=700, count=4, evicted=0.7):
    batch, kv_heads = 2, 2
    # Views of what a projection writes: heads and positions the other way round.
    keys = torch.randn(batch, length, kv_heads, head, device=device).to(dtype).transpose(1, 2)
    values = torch.randn(batch, length, kv_heads, value, device=device).to(dtype).transpose(1, 2)
    # One in two of the queries, which share a direction, as those of a model do.
    queries = torch.randn(batch, heads, 2 * probes, head, device=device) * head**-0.5
    queries = (queries + torch.randn(batch, heads, 1, head, device=device) * head**-0.5)[:, :, 1::2]
    keep = torch.rand(batch, kv_heads, length, device=device) >= evicted
    keep[..., -3:] = True
    return queries, keys, values, keep, count


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_stand_ins(case, dtype, close, device):
    queries, keys, values, keep, count = a_layer(device, dtype, **case)
    got = launch_surrogates(queries, keys, values, keep, count)
    want = make(queries, keys, values, ~keep, count=count)
    assert torch.equal(got.real, want.real)
    assert got.real.all()
    # Two entries may get as much but for a rounding: then either place is right.
    assert (got.columns == want.columns).float().mean() > 0.9
    assert not keep.gather(-1, got.columns).any()
    close(got.values, want.values)
    for mine, other in zip(got.keys.flatten(0, 2), want.keys.flatten(0, 2), strict=True):
        assert (mine.double() - other.double()).norm() <= 3e-2 * other.double().norm()


@pytest.mark.parametrize("tile", [Tile(32, 2), Tile(16, 2)], ids=str)
def test_tiles_of_smaller_gpus(tile, close, dtype, device):
    queries, keys, values, keep, count = a_layer(device, dtype, head=80, length=1100)
    got = launch_surrogates(queries, keys, values, keep, count, tile)
    want = make(queries, keys, values, ~keep, count=count)
    assert (got.columns == want.columns).float().mean() > 0.9
    close(got.values, want.values)
    for mine, other in zip(got.keys.flatten(0, 2), want.keys.flatten(0, 2), strict=True):
        assert (mine.double() - other.double()).norm() <= 3e-2 * other.double().norm()


def test_heads_that_evict_little_or_nothing_have_fewer(device):
    queries, keys, values, keep, count = a_layer(device, torch.float16)
    keep[0] = True
    keep[1, 0] = True
    keep[1, 0, [5, 300]] = False
    got, want = launch_surrogates(queries, keys, values, keep, count), make(queries, keys, values, ~keep, count=4)
    assert torch.equal(got.real, want.real)
    assert got.real.sum(-1).tolist() == [[0, 0], [2, 4]]
    assert torch.equal(got.columns[got.real], want.columns[got.real])


def test_put(device):
    queries, keys, values, keep, count = a_layer(device, torch.float16)
    keep[0, 1] = True
    chosen = launch_surrogates(queries, keys, values, keep, count)
    mine, other = [keys.clone(), values.clone()], [keys.clone(), values.clone()]
    put(chosen, *other)
    kept = launch_put(chosen, *mine, keep)
    assert all(torch.equal(*pair) for pair in zip(mine, other, strict=True))
    assert not torch.equal(mine[0], keys)
    assert torch.equal(kept, keep.scatter(-1, chosen.columns, keep.gather(-1, chosen.columns) | chosen.real))
