"""Products with weights of 4 bits on a GPU, against bitsandbytes' and what memory takes.

python benchmarks/four_bits_speed.py                    # a layer of Llama-3-70B's shape, one row, and more rows
python benchmarks/four_bits_speed.py --tune             # tiles, for whoever changes the kernel

us       one product, from a CUDA graph over matrices that do not fit the L2 cache
floor    bytes of codes and factors / bandwidth of a copy
library  bitsandbytes' product; of several matrices: one product each, and of a gated layer no activation
"""

import argparse
import itertools
from functools import partial

import torch

from devices import copy_bandwidth, device_seconds, header
from refreekv.core.four_bits import MOST_ROWS, NESTED_BLOCK, FourBits, unpacked
from refreekv.kernels import four_bits
from refreekv.kernels.four_bits import Tiling

SHAPES = {
    "qkv": ((8192, 8192), (1024, 8192), (1024, 8192)),
    "o": ((8192, 8192),),
    "gated": ((28672, 8192), (28672, 8192)),
    "down": ((8192, 28672),),
    "qkv of 8b": ((4096, 4096), (1024, 4096), (1024, 4096)),
    "gated of 8b": ((14336, 4096), (14336, 4096)),
    "down of 8b": ((4096, 14336),),
}
APART = 2**28
"""Bytes of all matrices of a measurement at least: more than the L2 cache."""


def matrix(count: int, size: int, book: torch.Tensor, nested: bool, block: int = 64) -> FourBits:
    """A random matrix."""
    codes = torch.randint(0, 256, (count * size // 2,), dtype=torch.uint8, device="cuda")
    blocks = count * size // block
    if not nested:
        return FourBits(codes, book, torch.rand(blocks, device="cuda"), None, block, (count, size))
    factors = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
    parts = torch.rand(256, device="cuda"), torch.rand(-(-blocks // NESTED_BLOCK), device="cuda"), book.sum()
    return FourBits(codes, book, factors, parts, block, (count, size))


def held(weights: list[FourBits]) -> int:
    """Bytes of matrices."""
    parts = [part for one in weights for part in (one.codes, one.factors, *(one.nested or ()))]
    return sum(part.nbytes for part in parts)


def ours(x: torch.Tensor, weights: list[FourBits], gated: bool, tiling: Tiling | None = None) -> list[torch.Tensor]:
    """Our product."""
    if gated:
        return [four_bits.gated_linear(x, *weights, gelu=False, tiling=tiling)]
    return four_bits.linears(x, weights, [None] * len(weights), tiling)


def library(x: torch.Tensor, weights: list[FourBits]) -> list[torch.Tensor]:
    """Bitsandbytes' product."""
    nested = [one.nested for one in weights]
    return [
        torch.ops.bitsandbytes.gemm_4bit.default(
            x, one.codes.view(-1, 1), torch.Size(one.shape), one.factors, one.block, "nf4", bias=None
        )
        if parts is None
        else torch.ops.bitsandbytes.gemm_4bit.default(
            x, one.codes.view(-1, 1), torch.Size(one.shape), parts[1], one.block, "nf4", bias=None,
            absmax_8bit=one.factors, absmax_code=parts[0], absmax_offset=parts[2],
        )
        for one, parts in zip(weights, nested, strict=True)
    ]  # fmt: skip


def error(x: torch.Tensor, weights: list[FourBits], gated: bool, tiling: Tiling | None = None) -> float:
    """Relative error of our product, of the first matrix or the gated layer."""
    want = [x.double().flatten(1) @ unpacked(one, torch.float32).double().T for one in weights]
    exact = torch.nn.functional.silu(want[0]) * want[1] if gated else want[0]
    got = ours(x, weights, gated, tiling)[0].flatten(1).double()
    return float((got - exact).norm() / exact.norm())


def tilings() -> list[Tiling]:
    """What is tried."""
    found = []
    for block_n, block_k, warps in itertools.product((2, 4, 8, 16), (1024, 2048, 4096, 8192), (4, 8, 16)):
        rows = block_n * block_k // 32 // (32 * warps)  # a thread's, at a time
        if rows in (2, 4, 8) and block_k <= 1024 * warps:
            # As many programs as have room, or one more than without a bound for registers.
            for registers, threads in ((None, 512), (128, 512), (96, 640), (80, 768)):
                found.append(Tiling(block_n, block_k, warps, max(1, threads // (32 * warps)), registers))
    return found


def main() -> None:
    """Parse the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, range(1, MOST_ROWS + 1))))
    parser.add_argument("--nested", action="store_true", help="factors that are codes themselves")
    parser.add_argument("--tune", action="store_true", help="try tiles and print all of them, the fastest last")
    given = parser.parse_args()
    try:
        from bitsandbytes.functional import get_4bit_type
    except ImportError:
        get_4bit_type = None
    bandwidth = copy_bandwidth()
    print(f"{header()}; copy {bandwidth / 1e12:.2f} TB/s")
    book = get_4bit_type("nf4", device="cuda") if get_4bit_type else torch.linspace(-1, 1, 16, device="cuda")
    for name in given.shapes.split(","):
        gated, shapes = name.startswith("gated"), SHAPES[name]
        make = partial(matrix, book=book, nested=given.nested)
        size = held([make(*shape) for shape in shapes])
        sets = [[make(*shape) for shape in shapes] for _ in range(max(2, APART // size + 1))]
        for rows in map(int, given.rows.split(",")):
            x = torch.randn(rows, 1, shapes[0][1], device="cuda", dtype=torch.bfloat16)
            floor = size / bandwidth
            timed: dict[Tiling | None, float] = {}
            for tiling in tilings() if given.tune else [None]:
                calls = [partial(ours, x, one, gated, tiling) for one in sets]
                timed[tiling] = device_seconds(calls)
            for tiling in sorted(timed, key=lambda one: -timed[one]):
                taken = timed[tiling]
                what = tuple(tiling or four_bits.tiling_for(rows, shapes[0][1], gated=gated))
                print(f"  {name} x {rows}: {taken * 1e6:.1f} us, {taken / floor:.2f} x, {what}", flush=True)
            off = error(x, sets[0], gated, tiling)
            theirs = "–"
            if get_4bit_type:
                theirs = f"{device_seconds([partial(library, x, one) for one in sets]) * 1e6:.1f}"
            print(
                f"{name:12s} {rows} rows {timed[tiling] * 1e6:8.1f} us  floor {floor * 1e6:7.1f} us  "
                f"{timed[tiling] / floor:5.2f} x  library {theirs} us  error {off:.1e}",
                flush=True,
            )
        del sets


if __name__ == "__main__":
    main()
