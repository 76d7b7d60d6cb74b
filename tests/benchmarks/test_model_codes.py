"""Codes of keys that belong to the model: against float64 attention, brute force, and what they are for."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import codebooks as codes
from codebooks import round_trip
from model_codes import GROUPS, KeyCodes, filled, shared_widths
from refreekv.core.quantisation import SINKS, centre_of


def keys_and_queries(size, heads=2, group=3, count=400, seed=0):
    """Channels of very different spread, and queries that use them very differently."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(heads, 1, size, generator=generator).exp()
    keys = torch.randn(heads, count, size, generator=generator) * scale + 20 * torch.randn(
        heads, 1, size, generator=generator
    )
    use = (1.5 * torch.randn(heads, 1, 1, size, generator=generator)).exp()
    queries = torch.randn(heads, group, 90, size, generator=generator) * use
    return keys, queries.flatten(0, 1)


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_turning_keeps_products(size):
    keys, queries = keys_and_queries(size)
    own = KeyCodes.measured(keys[None], queries[None])
    asked = queries.unflatten(0, (2, 3)).flatten(1, 2)
    turned = own.turned_queries(asked) @ own.turned(keys).transpose(1, 2)
    wanted = asked @ (keys - own.centre[:, None]).transpose(1, 2)
    assert torch.allclose(turned, wanted, atol=1e-3 * float(wanted.abs().max()))
    assert torch.allclose(own.turned_back(own.turned(keys)), keys, atol=1e-3)
    # Seen one head at a time it is the same.
    assert torch.equal(own.of(1).turned(keys[1:]), own.turned(keys)[1:])


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=3), st.integers(0, 4))
def test_water_is_filled_best(costs, bits):
    widths = filled(costs, bits)
    assert sum(widths) == bits * len(costs)

    def lost(each):
        return sum(cost * codes.distortion(width) for cost, width in zip(costs, each, strict=True))

    every = itertools.product(range(9), repeat=len(costs))
    best = min(lost(each) for each in every if sum(each) == bits * len(costs))
    assert lost(widths) == pytest.approx(best, rel=1e-9)


def test_widths_are_monotone_and_bounded():
    costs = [1e9, 10.0, 1.0, 1e-9]
    before = (0,) * GROUPS
    for bits in range(1, 9):
        widths = filled(costs, bits)
        assert all(new >= old for new, old in zip(widths, before, strict=True))
        assert max(widths) <= 8
        before = widths
    assert before == (8,) * GROUPS


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("size", [64, 80, 128])
def test_products_are_better_than_with_a_plain_rotation(size, bits):
    """What the codes are for: as many bits, measured on other text of the same model, and less of the logits lost."""
    keys, queries = keys_and_queries(size)
    own = KeyCodes.measured(keys[None, :, :200], queries[None])
    asked = queries.unflatten(0, (2, 3)).flatten(1, 2)
    centre = centre_of(keys)

    def lost(back):
        return float((asked @ (back - keys).transpose(1, 2)).square().mean())

    assert lost(own.round_trip(keys, bits)) < 0.5 * lost(round_trip(keys, bits, centre))
    assert lost(own.round_trip(keys, bits, centre)) < 0.5 * lost(round_trip(keys, bits, centre))
    assert lost(own.round_trip(keys, bits + 1)) < lost(own.round_trip(keys, bits))


def test_error_is_that_of_the_widths():
    """Gaussian channels that are measured well: each group loses the distortion of its width."""
    keys, queries = keys_and_queries(128, count=3000)
    own = KeyCodes.measured(keys[None], queries[None])
    off = (own.turned(own.round_trip(keys, 4)) - own.turned(keys)).square().mean(1).unflatten(-1, (GROUPS, -1)).mean(-1)
    for lost, costs, widths in zip(off, own.cost, own.widths(4), strict=True):
        for one, cost, width in zip(lost.tolist(), costs.tolist(), widths, strict=True):
            assert one / cost == pytest.approx(codes.distortion(width), rel=0.25)


def test_channels_without_use_or_spread():
    keys, queries = keys_and_queries(64)
    keys[:, :, 5] = 3.0
    queries[:, :, 9] = 0.0
    own = KeyCodes.measured(keys[None], queries[None])
    back = own.round_trip(keys, 4)
    assert back.isfinite().all()
    assert own.round_trip(keys[:, :0], 4).shape == (2, 0, 64)
    without = KeyCodes.measured(keys[None], None)
    assert without.round_trip(keys, 6).isfinite().all()
    constant = KeyCodes.measured(torch.ones(1, 1, 20, 64), None)
    assert torch.allclose(constant.round_trip(torch.ones(1, 20, 64), 3), torch.ones(1, 20, 64), atol=1e-5)
    with pytest.raises(ValueError, match="30 elements do not split into 4"):
        KeyCodes.measured(torch.ones(1, 1, 20, 30), None)


def test_statistics_leave_sinks_out():
    keys, queries = keys_and_queries(64)
    other = keys.clone()
    other[:, :SINKS] = 1e4
    first, second = (KeyCodes.measured(part[None], queries[None]) for part in (keys, other))
    assert torch.equal(first.centre, second.centre)
    assert torch.equal(first.spread, second.spread)
    assert math.isfinite(float(second.cost.sum()))


def test_widths_that_heads_share():
    measured = [KeyCodes.measured(keys[None], queries[None]) for keys, queries in map(keys_and_queries, (64, 128))]
    widths = shared_widths(measured, 4)
    assert sum(widths) == 4 * GROUPS
    assert list(widths) == sorted(widths, reverse=True)
    # Of one head it is that head's own, and units do not matter.
    alone = measured[0].of(1)
    assert shared_widths([alone], 4) == alone.widths(4)[0]
    keys, _ = keys_and_queries(64)
    assert torch.equal(measured[0].round_trip(keys, 4), measured[0].round_trip(keys, 4, None, None))
    shared = measured[0].round_trip(keys, 4, None, widths)
    assert (shared - keys).square().mean() < 1.0 * keys.var()
