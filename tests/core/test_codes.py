"""Codebooks, packed codes and rotations: against sums over the density, against bits written out, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refreekv.core import codes
from refreekv.core.quantisation import KVDtype, centre_of, line_bytes, round_trip
from refreekv.core.rotation import rotate, rotation

SIZES = [1, 7, 8, 64, 80, 96, 128, 256]


def normal_density(at):
    return torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("bits", codes.WIDTHS)
def test_codebooks_are_stationary_and_lose_what_is_said(bits):
    """Each level is the mean of its cell, and cells end half-way: by a fine sum over the density, without formulas."""
    levels = codes.codebook(bits)
    assert torch.equal(levels, levels.sort().values)
    grid = torch.linspace(-12, 12, 2_400_001, dtype=torch.float64)
    weight = normal_density(grid) * (grid[1] - grid[0])
    cell = torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2)
    mass = torch.zeros_like(levels).index_add_(0, cell, weight)
    means = torch.zeros_like(levels).index_add_(0, cell, weight * grid) / mass
    assert torch.allclose(means, levels, atol=2e-4)
    lost = float((weight * (grid - levels[cell]).square()).sum())
    assert codes.distortion(bits) == pytest.approx(lost, rel=1e-3)


def test_distortion_is_that_of_the_literature():
    """Max, "Quantizing for minimum distortion" (1960), table I."""
    for bits, known in ((0, 1.0), (1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)):
        assert codes.distortion(bits) == pytest.approx(known, rel=3e-3)
    with pytest.raises(ValueError, match="1 to 8 bits, got 9"):
        codes.codebook(9)


@settings(deadline=None)
@given(st.sampled_from(list(codes.WIDTHS)), st.integers(1, 70), st.integers(0, 5), st.integers(0, 99))
def test_packed_codes_are_a_string_of_bits(bits, size, count, seed):
    generator = torch.Generator().manual_seed(seed)
    given_codes = torch.randint(0, 2**bits, (count, size), generator=generator, dtype=torch.uint8)
    packed = codes.pack(given_codes, bits)
    assert packed.shape == (count, codes.packed_bytes(size, bits)) == (count, math.ceil(size * bits / 8))
    for line, wanted in zip(packed.tolist(), given_codes.tolist(), strict=True):
        written = sum(one << (bits * at) for at, one in enumerate(wanted))
        assert sum(byte << (8 * at) for at, byte in enumerate(line)) == written
    assert torch.equal(codes.unpack(packed, bits, size), given_codes)


@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthogonal_and_flat(size):
    matrix = rotation(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    odd = size // (size & -size)
    # No channel keeps more than its share, twice that where a cosine is in it.
    assert float(matrix.square().max()) * size <= (1 if odd == 1 else 2) + 1e-9
    rotation.cache_clear()
    assert torch.equal(rotation(size), matrix)
    entries = torch.randn(3, size, dtype=torch.float64)
    assert torch.allclose(rotate(rotate(entries), back=True), entries, atol=1e-12)
    assert rotate(entries).dtype == torch.float64
    assert rotate(entries.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_attention_does_not_see_centring_and_rotation(size):
    """In float64, with entries that are not coded: the same output, whatever is taken out."""
    generator = torch.Generator().manual_seed(size)
    query, keys, values = (torch.randn(n, size, generator=generator, dtype=torch.float64) for n in (5, 40, 40))
    keys += 100 * torch.randn(size, generator=generator, dtype=torch.float64)
    plain = (query @ keys.T / math.sqrt(size)).softmax(-1) @ values
    key_mean, value_mean = centre_of(keys), centre_of(values)
    logits = rotate(query) @ rotate(keys - key_mean).T / math.sqrt(size)
    turned = rotate(logits.softmax(-1) @ rotate(values - value_mean), back=True) + value_mean
    assert torch.allclose(plain, turned, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_error_is_that_of_the_codebook_whatever_the_bias(bits, size, dtype):
    """Few channels hold large constants, as Qwen2's keys do: the error stays that of the spread about them."""
    generator = torch.Generator().manual_seed(bits)
    entries = torch.randn(2, 600, size, generator=generator)
    spread = float(entries.var())
    entries[..., :3] += torch.tensor([120.0, -60.0, 30.0])
    rounded = entries.to(dtype)
    back = round_trip(rounded, bits, centre_of(rounded))
    assert back.dtype == dtype
    error = (back.double() - rounded.double())[..., 3:].square().mean() / spread
    if dtype == torch.float32:
        assert 0.9 < error / codes.distortion(bits) < 1.03
    else:  # The result is rounded, too, and with it what is left of eight bits.
        assert error < 1.03 * codes.distortion(bits) + torch.finfo(dtype).eps ** 2


@pytest.mark.parametrize("bits", [None, 2, 8])
def test_entries_without_spread(bits):
    entries = torch.stack([torch.zeros(64), torch.full((64,), 5.0), torch.full((64,), -1e4)])
    back = round_trip(entries, bits, torch.zeros(64))
    assert torch.equal(back[0], entries[0])
    off = (back - entries)[1:].norm(dim=-1) / entries[1:].norm(dim=-1)
    assert (off < (0.5 if bits == 2 else 0.05)).all()
    assert torch.equal(round_trip(entries, bits, entries[1])[1], entries[1])
    assert round_trip(entries[:0], bits, entries[1]).shape == (0, 64)


@pytest.mark.parametrize("bits", [None, 3, 4, 8])
def test_entries_are_coded_alone(bits):
    entries, centre = torch.randn(1, 50, 80), torch.randn(80)
    together = round_trip(entries, bits, centre)
    apart = torch.cat([round_trip(entries[:, at : at + 10], bits, centre) for at in range(0, 50, 10)], dim=1)
    assert torch.allclose(together, apart, atol=1e-6)


def test_mean_of_real_entries_behind_the_sinks():
    entries = torch.randn(2, 3, 20, 8)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, :9] = False
    entries[1, :, :9] = float("nan")
    found = centre_of(entries, real[:, None])
    assert torch.allclose(found[0], entries[0, :, 4:].mean(1), atol=1e-6)
    assert torch.allclose(found[1], entries[1, :, 13:].mean(1), atol=1e-6)
    assert torch.allclose(centre_of(entries[0]), entries[0, :, 4:].mean(1), atol=1e-6)
    few = entries[0, :, :3]
    assert torch.allclose(centre_of(few), few.mean(1), atol=1e-6)
    assert torch.allclose(centre_of(few, torch.ones(1, 3, dtype=torch.bool)), few.mean(1), atol=1e-6)


def test_bytes_of_entries():
    assert [line_bytes(128, bits) for bits in (None, 2, 3, 4, 5, 6, 8)] == [130, 34, 50, 66, 82, 98, 130]
    assert line_bytes(7, 4) == 6
    assert KVDtype("k6v4").widths == (6, 4)
    assert KVDtype("k6v4").entry_bytes((128, 128)) == 98 + 66
    assert KVDtype("fp8").widths == (None, None)
