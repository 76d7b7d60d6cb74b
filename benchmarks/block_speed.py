"""Products with weights in blocks on a GPU, against what memory and a product in bfloat16 take.

python benchmarks/block_speed.py                    # all formats, a Llama-3-8B's matrices
python benchmarks/block_speed.py --tune             # tiles, for whoever changes the kernel

us       one product of one row, from a CUDA graph over matrices that do not fit the L2 cache
floor    bytes of codes and scales / bandwidth of a copy
bf16     the same product of the same shape with weights in bfloat16 (torch)
unpack   making the matrix in bfloat16, as prompts need it
"""

import argparse
import itertools
from functools import partial

import torch

from devices import copy_bandwidth, device_seconds, header
from refreekv.core.weight_blocks import FORMATS, BlockForm, WeightBlocks
from refreekv.kernels import block_products
from refreekv.kernels.block_products import Tiling

SHAPES = {"q": (4096, 4096), "up": (14336, 4096), "down": (4096, 14336), "head": (128256, 4096)}
APART = 2**27
"""Bytes of all matrices of a measurement at least: more than the L2 cache."""


def matrix(form: BlockForm, count: int, size: int) -> WeightBlocks:
    """A random matrix."""
    codes = partial(torch.randint, 0, 256, dtype=torch.uint8, device="cuda")
    low = codes((count, size)).view(torch.int8) if form.bits == 8 else codes((count, size // 2))
    high = codes((count, size * form.high_bits // 8)) if form.high_bits else low[:0]
    scales = torch.rand(count, size // form.group, device="cuda").half()
    minima = scales.clone() if form.has_minimum else scales[:0]
    return WeightBlocks(form, low, high, scales, minima, torch.full((count,), 2.0**-8, device="cuda"))


def seconds(form: BlockForm, count: int, size: int, tiling: Tiling) -> tuple[float, int]:
    """Time of one product, and its bytes."""
    one = sum(part.nbytes for part in matrix(form, count, size)[1:])
    matrices = [matrix(form, count, size) for _ in range(max(2, APART // one + 1))]
    x = torch.randn(1, size, device="cuda", dtype=torch.bfloat16)
    calls = [partial(block_products.product, x, blocks, tiling=tiling) for blocks in matrices]
    return device_seconds(calls), one


def main() -> None:
    """Parse the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="Q4_0,Q4_K,Q5_K,Q6_K,Q8_0")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tune", action="store_true", help="try tiles and print the fastest")
    given = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{header()}; copy {bandwidth / 1e12:.2f} TB/s")
    for name, shape in itertools.product(given.formats.split(","), given.shapes.split(",")):
        form, (count, size) = FORMATS[name].form, SHAPES[shape]
        tilings = [Tiling()]
        if given.tune:
            tilings = [Tiling(*one) for one in itertools.product((1, 2, 4, 8, 16), (8, 16, 32, 64), (2, 4, 8))]
            # Codes that a program has at a time, two in each element of a block.
            tilings = [one for one in tilings if one.block_n * one.block_g * form.group // 2 <= 8192]
        timed = {tiling: seconds(form, count, size, tiling) for tiling in tilings}
        best = min(timed, key=lambda tiling: timed[tiling][0])
        taken, one = timed[best]
        floor = one / bandwidth
        plain = [torch.randn(count, size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        x = torch.randn(1, size, device="cuda", dtype=torch.bfloat16)
        bf16 = device_seconds([partial(torch.nn.functional.linear, x, w) for w in plain])
        blocks = matrix(form, count, size)
        unpack = device_seconds([partial(block_products.unpack, blocks, torch.bfloat16)])
        print(
            f"{name:5s} {shape:5s} {taken * 1e6:8.1f} us  floor {floor * 1e6:7.1f} us  {taken / floor:5.2f} x  "
            f"bf16 {bf16 * 1e6:7.1f} us  unpack {unpack * 1e6:8.1f} us  {tuple(best)}",
            flush=True,
        )
        del plain


if __name__ == "__main__":
    main()
