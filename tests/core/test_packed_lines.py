"""Packed lines: steps of the grids, planes, factors, and that each entry codes alone."""

import re

import pytest
import torch

from refreekv.core.packed_lines import PackedFormat, Side, grid_error, step
from refreekv.core.packed_maps import PackedMaps

LAYOUTS = ["8888", "6666", "6442", "4444", "4422", "2222", "8642", "6444"]


def widths(text):
    return tuple(int(width) for width in text)


@pytest.mark.parametrize(
    ("bits", "best", "error"), [(2, 0.9957, 0.11885), (4, 0.3352, 0.011543), (8, 0.03076, 8.77e-5)]
)
def test_steps_are_those_of_max_1960(bits, best, error):
    """J. Max, Quantizing for minimum distortion (1960), table II; 8 bits: Jayant and Noll, Digital Coding (1984)."""
    assert step(bits) == pytest.approx(best, rel=2e-3)
    assert grid_error(bits, step(bits)) == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_the_error_of_a_grid_is_that_of_samples(bits):
    x = torch.randn(2_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for factor in (0.7, 1.0, 1.3):
        distance = factor * step(bits)
        code = (x / distance + (2**bits - 1) / 2).round().clamp(0, 2**bits - 1)
        found = (x - (code - (2**bits - 1) / 2) * distance).square().mean().item()
        assert grid_error(bits, distance) == pytest.approx(found, rel=2e-2)
        assert grid_error(bits, distance) >= grid_error(bits, step(bits))


@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_come_back_from_planes(size, layout):
    side = Side(size, widths(layout))
    most = side.by_channel({width: 2.0**width for width in (8, 6, 4, 2)}, torch.empty(0))
    codes = (torch.rand(37, size) * most).to(torch.uint8)
    packed = side.pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (37, side.bytes)
    assert torch.equal(side.unpack(packed), codes)
    assert side.bytes <= size * sum(widths(layout)) / 32 + 3 * 3  # at most 3 bytes to fill up each plane


def test_the_planes_are_what_the_docstring_says():
    """Of a head of 16: width 8 for the first 4 channels, then 6, 4 and 2."""
    side = Side(16, (8, 6, 4, 2))
    codes = torch.tensor([[200, 1, 2, 3, 0b101101, 0b010010, 63, 0, 9, 10, 11, 12, 0, 1, 2, 3]], dtype=torch.uint8)
    eight, four, two = side.planes
    assert [(plane.start, plane.used, plane.bytes) for plane in side.planes] == [(0, 4, 4), (4, 4, 4), (8, 2, 4)]
    assert (eight.channels, four.channels, two.channels) == (((0, 4),), ((4, 8), (8, 12)), ((4, 8), (12, 16)))
    upper = [0b1011, 0b0100, 15, 0]
    lower = [0b01, 0b10, 3, 0]
    assert side.pack(codes).tolist() == [
        [200, 1, 2, 3]
        + [low + 16 * high for low, high in zip(upper, [9, 10, 11, 12], strict=True)]
        + [lower[0] + 4 * lower[2] + 16 * 0 + 64 * 2, lower[1] + 4 * lower[3] + 16 * 1 + 64 * 3, 0, 0]
    ]


@pytest.mark.parametrize(("layout", "most"), [("8888", 6e-5), ("6666", 1.2e-3), ("4444", 1.2e-2), ("2222", 0.12)])
def test_gaussian_entries_come_back_with_the_error_of_the_grid(layout, most):
    form = PackedFormat(128, 64, widths(layout), widths(layout))
    keys, values = 7.0 * torch.randn(4000, 128), 0.003 * torch.randn(4000, 64)
    back = form.unpack(*form.pack(keys, values), torch.float64)
    for entries, found in zip((keys, values), back, strict=True):
        error = (found - entries).square().mean() / entries.square().mean()
        assert 0.5 * most < error < most


@pytest.mark.parametrize("size", [16, 80, 128])
def test_codes_of_eight_bits_reach_as_far_as_the_entry_does(size):
    """Also where one channel is far out: no element is off by much more than half a step between levels."""
    entries = torch.randn(300, size)
    entries[::3, 2] = 40.0
    entries[7], entries[8] = 0.0, 1e30
    side = Side(size, (8, 8, 8, 8))
    codes, factors = side.encode(entries)
    back = side.levels(codes, torch.float64) * factors[:, None].double()
    ordinary = torch.arange(300) != 8
    # The factor is a float16: rounded, it cuts the outermost element off by a 16th of a step.
    most = entries.abs().amax(-1, keepdim=True) / 255 * (1 + 1 / 8)
    assert ((back - entries).abs() <= most)[ordinary].all()
    assert factors[7] == 0
    assert factors[8] == 65504


def test_the_factor_makes_the_squared_error_least():
    form = PackedFormat(64, 64, widths("4422"), widths("4444"))
    keys, values = torch.randn(50, 64).double() * 3, torch.randn(50, 64).double()
    lines, factors = form.pack(keys, values)
    best = (form.unpack(lines, factors, torch.float64)[0] - keys).square().sum(-1)
    for change in (0.999, 1.001):
        other = factors.double() * change
        worse = (form.unpack(lines, other, torch.float64)[0] - keys).square().sum(-1)
        assert (worse > best).all()


def test_entries_code_alone():
    form = PackedFormat(64, 80, widths("6442"), widths("4444"))
    keys, values = torch.randn(30, 64), torch.randn(30, 80)
    lines, factors = form.pack(keys, values)
    for part in (slice(0, 1), slice(7, 19)):
        some_lines, some_factors = form.pack(keys[part], values[part])
        assert torch.equal(some_lines, lines[part])
        assert torch.equal(some_factors, factors[part])


def test_zeros_and_huge_entries():
    form = PackedFormat(64, 64, widths("4444"), widths("4444"))
    entries = torch.stack([torch.zeros(64), torch.full((64,), 1e30)])
    _, factors = form.pack(entries, entries)
    assert factors[0].tolist() == [0.0, 0.0]
    assert torch.isfinite(factors).all()
    assert torch.equal(form.unpack(*form.pack(entries, entries), torch.float64)[0][0], torch.zeros(64).double())


@pytest.mark.parametrize(("sizes", "keys", "values", "bytes_of_line"), [
    ((128, 128), "4444", "4444", 128), ((128, 128), "6666", "4444", 160), ((128, 128), "8888", "8888", 256),
    ((64, 64), "4444", "4444", 64), ((128, 128), "6442", "4444", 128), ((80, 80), "4444", "4444", 80),
    ((64, 64), "6444", "4444", 72),
])  # fmt: skip
def test_bytes_of_a_line(sizes, keys, values, bytes_of_line):
    form = PackedFormat(*sizes, widths(keys), widths(values))
    assert (form.line_bytes, form.entry_bytes) == (bytes_of_line, bytes_of_line + 4)
    assert PackedFormat.from_numbers(form.numbers) == form


@pytest.mark.parametrize(("arguments", "message"), [
    ((72, 64, (4,) * 4, (4,) * 4), "multiple of 16 elements, not 72"),
    ((64, 64, (4, 4, 4, 5), (4,) * 4), "four out of (8, 6, 4, 2)"),
    ((64, 64, (4,) * 4, (2, 4, 4, 4)), "must not increase"),
])  # fmt: skip
def test_formats_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedFormat(*arguments)


def test_maps_keep_products_and_values():
    """A query's product with a key is that in code space and with the mean; a value comes back."""
    matrix = torch.randn(1, 2, 32, 32) + 3 * torch.eye(32)
    rotation = torch.linalg.qr(torch.randn(1, 2, 32, 32))[0]
    maps = PackedMaps.of(torch.randn(1, 2, 32), matrix, torch.randn(1, 2, 32), rotation, torch.float16)
    query, key, value = (torch.randn(2, 32, dtype=torch.float64) for _ in range(3))
    for head in range(2):
        coded = maps.key_matrix[0, head].double() @ (key[head] - maps.key_mean[0, head])
        asked = maps.key_dual[0, head].double() @ query[head]
        product = asked @ coded + query[head] @ maps.key_mean[0, head].double()
        assert product.item() == pytest.approx((query[head] @ key[head]).item(), rel=1e-4, abs=1e-4)
        assert asked.abs().max() <= maps.key_bound[0, head] * query[head].norm() * (1 + 1e-6)
        coded = maps.value_matrix[0, head].double() @ (value[head] - maps.value_mean[0, head])
        back = maps.value_back[0, head].double() @ coded + maps.value_mean[0, head]
        torch.testing.assert_close(back, value[head], rtol=1e-4, atol=1e-4)
