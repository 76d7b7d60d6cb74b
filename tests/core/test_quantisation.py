"""Rotations, means and number formats, in float64. Planes and grids: tests/core/test_packed_lines.py."""

import math

import pytest
import torch

from helpers.live_bytes import LiveBytes
from refreekv.core.packed_lines import grid_error, step
from refreekv.core.quantisation import BLOCK, PIECE, KVDtype, centre_of, round_trip
from refreekv.core.rotation import rotate, rotation

SIZES = [1, 7, 8, 64, 80, 96, 128, 256]


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
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_error_is_that_of_the_grid_whatever_the_bias(bits, size, dtype):
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
        # One scale an entry takes part of the spread of its size out, and the best of several sizes more of it.
        # Levels of 8 bits reach as far as each entry does, which is not as far as the best grid for all of them.
        assert (0.5 if bits < 8 else 0.3) < error / grid_error(bits, step(bits)) < 1
    else:  # The result is rounded, too, and with it what is left of eight bits.
        assert error < 1.06 * grid_error(bits, step(bits)) + torch.finfo(dtype).eps ** 2


@pytest.mark.parametrize("bits", [2, 8])
def test_entries_without_spread(bits):
    entries = torch.stack([torch.zeros(64), torch.full((64,), 5.0), torch.full((64,), -1e4)])
    back = round_trip(entries, bits, torch.zeros(64))
    assert torch.equal(back[0], entries[0])
    off = (back - entries)[1:].norm(dim=-1) / entries[1:].norm(dim=-1)
    assert (off < (0.5 if bits == 2 else 0.05)).all()
    assert torch.equal(round_trip(entries, bits, entries[1])[1], entries[1])
    assert round_trip(entries[:0], bits, entries[1]).shape == (0, 64)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
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


@pytest.mark.parametrize("length", [4 * PIECE, 4 * PIECE + BLOCK + 5])
def test_the_mean_of_many_entries_takes_no_copy_of_them(length):
    """In blocks: on CUDA PyTorch adds up many numbers for few sums in memory of their own size and more."""
    entries = torch.randn(1, 2, length, 16).bfloat16()
    real = torch.ones(1, length, dtype=torch.bool)
    real[0, :9] = False
    entries[:, :, :9] = float("nan")
    with LiveBytes() as bytes_of:
        found = centre_of(entries, real[:, None])
    assert bytes_of.peak < 1.5 * entries[:, :, :PIECE].numel() * 2 + 24 * length < 0.8 * entries.nbytes
    wanted = entries[:, :, 13:].double().mean(2)
    assert torch.equal(found, wanted.bfloat16()) or (found - wanted).abs().max() < 1e-4
    assert (centre_of(entries[:, :, 9:]) - wanted).abs().max() < 1e-4


def test_bytes_of_entries():
    """Codes, a scale for the key and one for the value, filled up to a multiple of 8 bytes without the scales."""
    both = [KVDtype(kind).entry_bytes((128, 128)) for kind in ("int2", "int4", "int6", "int8", "k6v4")]
    assert both == [2 * 32 + 4, 2 * 64 + 4, 2 * 96 + 4, 2 * 128 + 4, 96 + 64 + 4]
    assert KVDtype("k6v4").widths == (6, 4)
    assert KVDtype("int8").widths == (8, 8)
    number = KVDtype("int4", recent=10)
    assert [number.coded(n) for n in (3, 14, 15, 100, 100.5)] == [0, 0, 1, 86, 86.5]


@pytest.mark.parametrize(
    ("kv_dtype", "error", "fragment"),
    [
        ("int9", ValueError, "must be int8, int6, int4 or int2, or such widths of keys and values as in k6v4, got"),
        ("int5", ValueError, "got 'int5'"),
        ("k6", ValueError, "as in k6v4, got 'k6'"),
        ("fp8", ValueError, "got 'fp8': fp8 was taken out: int8 loses less in the same bytes"),
        ("int8:group=8", ValueError, "'group=8' is none of recent=N: entries have one scale each"),
        ("int4:recent=-1", ValueError, "'recent=-1' is none of recent=N"),
        ("int4:window=8", ValueError, "'window=8' is none of"),
        (4, TypeError, "kv_dtype must be a name such as 'int4'"),
    ],
)
def test_refusals(kv_dtype, error, fragment):
    with pytest.raises(error, match=fragment):
        KVDtype.parse(kv_dtype)
    with pytest.raises(ValueError, match="recent must be a whole number of at least 0, got True"):
        KVDtype("int4", recent=True)


def test_heads_that_cannot_be_packed():
    with pytest.raises(ValueError, match="a multiple of 16 elements, and this model's keys have 40"):
        KVDtype("int4").form((40, 64))


def test_specifications_round_trip():
    for text in ("int4", "int8", "int8:recent=0", "int8:recent=128", "k6v4", "int2:recent=0"):
        assert str(KVDtype.parse(text)) == text
    assert KVDtype("int8") == KVDtype("int8", recent=64)
    assert KVDtype.parse(None) is None
