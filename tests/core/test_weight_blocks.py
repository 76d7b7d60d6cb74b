"""Blocks of .gguf files against the package gguf's own numbers."""

import numpy as np
import pytest
import torch

from refreekv.core.weight_blocks import FORMATS, chosen, from_file, unpacked

gguf = pytest.importorskip("gguf")


def blocks(name, rows=5, columns=512, seed=0):
    """Random blocks as a file has them, and the numbers they stand for."""
    draw = np.random.default_rng(seed)
    stored = FORMATS[name]
    data = draw.integers(0, 256, (rows, columns // stored.weights, stored.bytes), dtype=np.uint8)
    # Scales are numbers, not any bits: of very different sizes.
    halves = {"Q6_K": [208]}.get(name, [0] if stored.form.offset or name == "Q8_0" else [0, 2])
    for start in halves:
        sizes = np.exp(draw.normal(-6, 2, data.shape[:2])).astype(np.float16)
        data[:, :, start : start + 2] = sizes[..., None].view(np.uint8)
    data = data.reshape(rows, -1)
    return torch.from_numpy(data), torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_the_file(name, seed):
    data, wanted = blocks(name, seed=seed)
    made = from_file(data, name)
    assert made.shape == wanted.shape == (5, 512)
    got = unpacked(made)
    if name.endswith("_K"):
        # Scales are rounded to 11 bits: as many as the largest term of a sum.
        size = 64 if name == "Q6_K" else 2 * 64
        largest = torch.maximum(
            made.scales.abs().amax(1), made.minima.abs().amax(1) if made.minima.numel() else made.rows * 0
        )
        assert ((got - wanted).abs().amax(1) <= 2.0**-11 * size * largest.float() * made.rows).all()
        assert (got - wanted).norm() <= 2**-11 * wanted.norm() * 2
    else:
        assert torch.equal(got, wanted)
    assert torch.equal(unpacked(made, torch.bfloat16), got.bfloat16())


@pytest.mark.parametrize("name", FORMATS)
def test_real_numbers_that_were_quantised(name):
    """By gguf's own quantiser, where it has one; of weights as models have them."""
    kind = gguf.GGMLQuantizationType[name]
    weights = np.random.default_rng(1).normal(0, 0.02, (8, 512)).astype(np.float32)
    try:
        data = gguf.quants.quantize(weights, kind)
    except NotImplementedError:
        pytest.skip(f"gguf does not write {name}")
    got = unpacked(from_file(torch.from_numpy(data), name))
    wanted = torch.from_numpy(gguf.quants.dequantize(data, kind))
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()
    assert (got - torch.from_numpy(weights)).norm() <= 0.1 * wanted.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_about_those_of_the_file(name):
    data, _ = blocks(name, rows=64, columns=4096)
    made = from_file(data, name)
    held = sum(part.nbytes for part in made[1:])
    assert held <= 1.16 * data.nbytes


@pytest.mark.parametrize("name", FORMATS)
def test_some_rows(name):
    data, _ = blocks(name)
    made = from_file(data, name)
    index = torch.tensor([3, 0, 3])
    assert torch.equal(unpacked(chosen(made, index)), unpacked(made)[index])


def test_rows_of_zeros():
    data, _ = blocks("Q4_K")
    made = from_file(torch.zeros_like(data), "Q4_K")
    assert torch.equal(unpacked(made), torch.zeros(5, 512))


def test_what_is_no_matrix():
    with pytest.raises(ValueError, match="no whole number of Q4_0's blocks of 18"):
        from_file(torch.zeros(2, 20, dtype=torch.uint8), "Q4_0")
    with pytest.raises(KeyError):
        from_file(torch.zeros(2, 20, dtype=torch.uint8), "IQ2_S")
