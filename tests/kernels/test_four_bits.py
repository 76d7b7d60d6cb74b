"""Products with weights of 4 bits against float64, with factors as they are and coded ones."""

import math

import pytest
import torch

from refreekv.core.four_bits import FourBits, readable, unpacked
from refreekv.kernels import four_bits
from refreekv.kernels.four_bits import Tiling


def random_codes(count, size, block=64, nested=False, device="cpu", book=None):
    """A matrix of random codes and factors, in a book that is not in order."""
    codes = torch.randint(0, 256, (count * size // 2,), dtype=torch.uint8)
    blocks = count * size // block
    if nested:
        factors = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        parts = torch.rand(256), torch.rand(-(-blocks // 256)), torch.tensor(0.25)
    else:
        factors, parts = torch.rand(blocks), None
    return FourBits(
        codes.to(device), torch.randn(16).to(device) if book is None else book, factors.to(device),
        None if parts is None else tuple(part.to(device) for part in parts), block, (count, size),
    )  # fmt: skip


def test_unpacking_by_hand():
    codes = torch.tensor([0x01, 0xF0] * 16, dtype=torch.uint8)
    book, factors = torch.arange(16.0), torch.tensor([1.0, 10.0])
    matrix = unpacked(FourBits(codes, book, factors, None, 32, (2, 32)), torch.float64)
    assert matrix[0, :4].tolist() == [0, 1, 15, 0]
    assert matrix[1, :4].tolist() == [0, 10, 150, 0]
    nested = torch.tensor([0.0] * 254 + [3, 5]), torch.tensor([2.0]), torch.tensor(0.5)
    bytes_ = torch.tensor([254, 255], dtype=torch.uint8)
    matrix = unpacked(FourBits(codes, book, bytes_, nested, 32, (2, 32)), torch.float64)
    assert matrix[:, 1].tolist() == [6.5, 10.5]


@pytest.mark.parametrize("counts", [(40,), (24, 9), (33, 16, 5)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_products_that_share_an_input(counts, nested, rows, dtype, close, device):
    size = 192 * 3
    x = torch.randn(rows, 1, size, device=device).to(dtype)
    book = torch.randn(16, device=device)
    weights = [random_codes(n, size, nested=nested, device=device, book=book) for n in counts]
    biases = [torch.randn(n, device=device).to(dtype) if nested else None for n in counts]
    tiling = Tiling(4, 256, 4, 4) if device == "cpu" else None
    got = four_bits.linears(x, weights, biases, tiling)
    for y, one, bias in zip(got, weights, biases, strict=True):
        want = x.double() @ unpacked(one, torch.float64).T
        close(y, want if bias is None else want + bias.double())


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_gated_layers(gelu, nested, rows, dtype, close, device):
    x = torch.randn(rows, 1, 320, device=device).to(dtype) / 5
    gate = random_codes(37, 320, nested=nested, device=device)
    up = random_codes(37, 320, nested=nested, device=device, book=gate.book)
    function = torch.nn.functional.gelu if gelu else torch.nn.functional.silu
    kind = {"approximate": "tanh"} if gelu else {}
    want = function(x.double() @ unpacked(gate, torch.float64).T, **kind) * (x.double() @ unpacked(up, torch.float64).T)
    tiling = Tiling(8, 128, 4, 4) if device == "cpu" else None
    close(four_bits.gated_linear(x, gate, up, gelu, tiling), want)


@pytest.mark.parametrize("block", [32, 4096])
@pytest.mark.parametrize("size", [32, 4096, 4128])
def test_blocks_of_any_size(block, size, dtype, close, device):
    """Blocks of weights may be shorter than a row, or go over several."""
    # Of two blocks at least, and of more than a program takes.
    rows = max(2 * block // math.gcd(block, size), 9)
    weights = random_codes(rows, size, block, device=device)
    x = torch.randn(1, 1, size, device=device).to(dtype)
    tiling = Tiling(8, 1024, 4, 4) if device == "cpu" else None
    (y,) = four_bits.linears(x, [weights], [None], tiling)
    close(y, x.double() @ unpacked(weights, torch.float64).T)


@pytest.mark.parametrize(
    ("shape", "block", "can"),
    [((8, 64), 64, True), ((8, 96), 64, True), ((8, 80), 64, False), ((8, 64), 16, False), ((2**20, 2**11), 64, False)],
)
def test_what_can_be_read(shape, block, can):
    nothing = torch.zeros(0)
    assert readable(FourBits(nothing, nothing, nothing, None, block, shape)) == can
