"""Codes of a model's own for keys, in float64; for how they are measured see test_key_codes_measured.py."""

import copy
import pickle

import pytest
import torch

from refreekv.core.key_codes import KeyCodes, Moments
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import SINKS, KVDtype, centre_of

SIZES = [64, 80, 96, 128, 256]


def text(size, seed=0, rows=1, length=700, heads=2, group=3):
    """Keys whose channels differ tenfold in spread, behind large constants, and queries that use few of them."""
    generator = torch.Generator().manual_seed(size)  # the model's
    spread = torch.randn(heads, 1, size, generator=generator).exp()
    constants = 50 * torch.randn(heads, 1, size, generator=generator) * (torch.rand(size, generator=generator) < 0.05)
    interest = torch.randn(heads, 1, 1, size, generator=generator).exp()
    own = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, heads, length, size, generator=own) * spread + constants
    queries = torch.randn(rows, heads, group, 90, size, generator=own) * interest
    return keys, queries.flatten(1, 2)


@pytest.mark.parametrize("size", SIZES)
def test_products_with_queries_are_what_they_were(size):
    keys, queries = text(size)
    matrix = Moments.of(keys, queries).codes().matrix
    mean = centre_of(keys[0]).double()
    coded = (keys[0].double() - mean[:, None]) @ matrix.mT
    asked = queries[0].unflatten(0, (2, -1)).flatten(1, 2).double() @ torch.linalg.inv(matrix)
    products = asked @ coded.mT + (queries[0].unflatten(0, (2, -1)).flatten(1, 2).double() @ mean[..., None])
    want = queries[0].unflatten(0, (2, -1)).flatten(1, 2).double() @ keys[0].double().mT
    torch.testing.assert_close(products, want, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("size", SIZES)
def test_channels_in_code_space_are_alike_and_sorted_by_what_they_cost(size):
    keys, queries = text(size)
    codes = Moments.of(keys, queries).codes()
    entries = keys[0, :, SINKS:].double()
    coded = (entries - entries.mean(1, keepdim=True)) @ codes.matrix.mT
    torch.testing.assert_close(coded.square().mean(1), torch.ones(2, size, dtype=torch.float64), rtol=1e-5, atol=0)
    # [2, 4]: a mean error of one in a quarter's channels costs the queries so much
    back = torch.linalg.inv(codes.matrix)
    asked = queries[0].unflatten(0, (2, -1)).flatten(1, 2).double() @ back
    costs = asked.square().mean(1).unflatten(-1, (4, -1)).sum(-1)
    torch.testing.assert_close(codes.power.double(), costs, rtol=0.3, atol=0)
    assert (costs.diff(dim=-1) < 0).all()
    assert (costs[:, 0] > 20 * costs[:, 3]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_maps_are_those_of_the_matrix(size, dtype):
    keys, queries = text(size, rows=2)
    codes = Moments.of(keys, queries).codes()
    means = keys.mean(2).to(dtype), torch.randn(2, 2, 32)
    maps = codes.maps(*means, dtype)
    plain = PackedMaps.rotated(*means, dtype)
    want = PackedMaps.of(plain.key_mean, codes.matrix[None], plain.value_mean, plain.value_matrix, dtype)
    for name in ("key_mean", "key_matrix", "key_dual", "value_mean", "value_matrix", "value_back", "key_bound"):
        torch.testing.assert_close(getattr(maps, name), getattr(want, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps.key_offset, want.key_offset, rtol=1e-5, atol=1e-4)
    assert torch.equal(maps.key_sum, want.key_sum)
    again = codes.maps(means[0] + 1, means[1], dtype)
    assert again.key_matrix is maps.key_matrix
    assert again.of_type(torch.float32).key_sum.dtype == torch.float32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [4, 6])
def test_they_lose_less_of_the_products_than_rotations(size, bits):
    """On other text than they were measured on, at the same bytes."""
    codes = Moments.of(*text(size)).codes()
    keys, queries = text(size, seed=1)
    asked = queries[0].unflatten(0, (2, -1)).flatten(1, 2)
    mean, value_mean = centre_of(keys), torch.zeros(1, 2, size)
    lost = []
    for maps, sorted_keys in (
        (PackedMaps.rotated(mean, value_mean, torch.float32), False),
        (codes.maps(mean, value_mean, torch.float32), True),
    ):
        form = KVDtype(f"int{bits}").form((size, size), sorted_keys=sorted_keys)
        entries = (keys[0] - mean[0, :, None]) @ maps.key_matrix[0].mT
        own, factors = form.keys.encode(entries)
        back = form.keys.levels(own, torch.float32) * factors[..., None].float() @ maps.key_dual[0] + mean[0, :, None]
        lost.append((asked @ (back - keys[0]).mT).square().mean(dim=(1, 2)))
        # Planes are filled up to four bytes each, which takes some where a quarter has 20 channels.
        filling = 8 if sorted_keys and size == 80 else 0
        assert form.entry_bytes == KVDtype(f"int{bits}").form((size, size)).entry_bytes + filling
    assert lost[1].mean() < 0.5 * lost[0].mean()


def test_moments_add_up():
    keys, queries = text(64, rows=3)
    whole, parts = Moments.of(keys, queries), [Moments.of(keys[i : i + 1], queries[i : i + 1]) for i in range(3)]
    for one, other in zip(whole, parts[0].plus(parts[1]).plus(parts[2]), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), check_dtype=False)
    twice = parts[0].scaled(2, 2)
    assert twice.codes() is parts[0].codes()


def test_equal_codes_are_one_object():
    codes = Moments.of(*text(64)).codes()
    assert KeyCodes.known(codes.order.int(), codes.weight.clone(), codes.spread.clone()) is codes
    assert copy.deepcopy(codes) is codes
    assert pickle.loads(pickle.dumps(codes)) is codes
    assert KeyCodes.known(codes.order, codes.weight, 2 * codes.spread) is not codes


def test_channels_that_never_move_and_heads_that_nothing_asks():
    keys, queries = text(64)
    keys[..., 3], queries[..., 5], queries[:, 3:] = 7.0, 0.0, 0.0
    codes = Moments.of(keys, queries).codes()
    assert torch.isfinite(torch.linalg.inv(codes.matrix)).all()
    assert codes.order[0, -1] == 3
    still = Moments.of(torch.zeros(1, 2, 20, 64), torch.zeros(1, 6, 4, 64)).codes()
    assert torch.isfinite(torch.linalg.inv(still.matrix)).all()


def test_what_is_no_code_is_refused():
    codes = Moments.of(*text(64)).codes()
    parts = codes.order, codes.weight, codes.spread
    twice = codes.order.clone()
    twice[0, 0] = twice[0, 1]
    for wrong, what in (
        ((twice, *parts[1:]), "each channel once"),
        ((parts[0], 0 * parts[1], parts[2]), "above zero"),
        ((parts[0], parts[1], parts[2] / 0), "no numbers"),
        ((parts[0][:, :62], *parts[1:]), "4 groups"),
        ((parts[0], parts[1][:1], parts[2]), "4 groups"),
    ):
        with pytest.raises(ValueError, match=what):
            KeyCodes.known(*wrong)
    with pytest.raises(ValueError, match="do not split"):
        Moments.of(torch.zeros(1, 2, 9, 10), torch.zeros(1, 2, 9, 10)).codes()
