"""Products with weights in blocks against float64, and unpacking against the plain version."""

import pytest
import torch

from refreekv import kernels
from refreekv.core.weight_blocks import FORMATS, BlockForm, WeightBlocks, unpacked
from refreekv.kernels import block_products, weight_blocks


def random_blocks(form, count, size, device="cpu"):
    """A matrix of random codes, with rows of different sizes."""
    low = torch.randint(0, 256, (count, size if form.bits == 8 else size // 2), dtype=torch.uint8)
    low = low.view(torch.int8) if form.bits == 8 else low
    high = torch.randint(0, 256, (count, size * form.high_bits // 8), dtype=torch.uint8) if form.high_bits else low[:0]
    scales = torch.rand(count, size // form.group).half()
    minima = -torch.rand(count, size // form.group).half() * 8 if form.has_minimum else scales[:0]
    rows = torch.ldexp(torch.ones(count), torch.randint(-8, 2, (count,)))
    return WeightBlocks(form, *(part.to(device) for part in (low, high, scales, minima, rows)))


FORMS = sorted({stored.form for stored in FORMATS.values()}, key=str)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("count", "size"), [(10, 768), (33, 1280)])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_few_rows(form, count, size, rows, dtype, close, device):
    blocks = random_blocks(form, count, size, device)
    x = torch.randn(rows, size, device=device).to(dtype)
    bias = torch.randn(count, device=device).to(dtype)
    want = x.double() @ unpacked(blocks, torch.float32).double().T
    scaled = lambda y: y.double() / want.abs().amax(0)  # noqa: E731 - each column counts alike
    close(scaled(block_products.product(x, blocks)).to(dtype), (want / want.abs().amax(0)).to(dtype))
    got = block_products.product(x, blocks, bias)
    assert (got.double() - want - bias.double()).norm() <= 3e-3 * want.norm()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_unpacking(form, dtype, device):
    blocks = random_blocks(form, 21, 640, device)
    want = unpacked(blocks, dtype)
    torch.testing.assert_close(block_products.unpack(blocks, dtype), want, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 40), (3, 5, 7)], ids=str)
def test_the_front_takes_any_number_of_rows(shape, monkeypatch, device):
    monkeypatch.setattr(weight_blocks, "UNPACKED", 3000)  # a few rows of the matrix at a time
    blocks = random_blocks(BlockForm(4, 32, 8, False), 50, 256, device)
    x, bias = torch.randn(*shape, 256, device=device), torch.randn(50, device=device)
    want = torch.nn.functional.linear(x, unpacked(blocks, torch.float32), bias)
    got = kernels.block_linear(x, blocks, bias)
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-5 * want.norm()
