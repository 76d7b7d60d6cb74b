"""Products with weights in blocks (`core.weight_blocks`): each code is read once, and no weight is written out.

A row of the input is one program's beside a few columns of the result: what decodes has few rows. Many rows are
worth the weights in 16 bits, some of them at a time: `unpack` makes these in one pass.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.weight_blocks import WeightBlocks
from refreekv.kernels import pdl
from refreekv.kernels.device_guard import on_its_device

MOST_ROWS = 8
"""Rows that are multiplied with codes; more of them with unpacked weights."""


class Tiling(NamedTuple):
    """How a product is cut up: columns of the result, and groups of weights, that a program takes at a time; warps."""

    block_n: int = 4
    block_g: int = 32
    warps: int = 4


@triton.jit
def _codes(low, high, line, j, inside, half, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """Codes of weights 2j and 2j + 1 of rows ``line``, offsets taken off: two blocks of the shape of ``j``, float32."""
    pair = tl.load(low + line * half + j, inside, 0, eviction_policy="evict_first").to(tl.int32)
    if BITS == 8:  # both in 16 bits, with their signs
        even, odd = (pair << 24) >> 24, pair >> 8
    else:
        even, odd = pair & 15, pair >> 4
        if BITS == 6:  # two bits each: two pairs in a byte
            upper = tl.load(high + line * (half // 2) + j // 2, inside, 0).to(tl.int32) >> ((j % 2) * 4)
            even, odd = even | (upper & 3) << 4, odd | ((upper >> 2) & 3) << 4
        if BITS == 5:  # one bit each: four pairs in a byte
            upper = tl.load(high + line * (half // 4) + j // 4, inside, 0).to(tl.int32) >> ((j % 4) * 2)
            even, odd = even | (upper & 1) << 4, odd | ((upper >> 1) & 1) << 4
    return (even - OFFSET).to(tl.float32), (odd - OFFSET).to(tl.float32)


@triton.jit
def _product_kernel(
    x, low, high, scales, minima, rows, bias, y, count, groups,
    BITS: tl.constexpr, PAIRS: tl.constexpr, OFFSET: tl.constexpr, HAS_MINIMUM: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """``y[m, n] = sum over k of x[m, k] * weight[n, k]``; groups have ``PAIRS`` pairs of weights."""
    pdl.in_turn(DEPENDENT)
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line, half = n.to(tl.int64), groups * PAIRS
    pairs = tl.arange(0, PAIRS)
    total = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    for start in range(0, groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        inside = (n < count)[:, None] & (g < groups)[None, :]
        # [BLOCK_N, BLOCK_G, PAIRS]: a group is in one thread, and has its scale once.
        j = (g[:, None] * PAIRS + pairs[None, :])[None, :, :]
        even, odd = _codes(low, high, line[:, None, None], j, inside[:, :, None], half, BITS, OFFSET)
        there = (g < groups)[None, :, None]
        first = tl.load(x + m * 2 * half + 2 * j, there, 0.0).to(tl.float32)
        second = tl.load(x + m * 2 * half + 2 * j + 1, there, 0.0).to(tl.float32)
        at = line[:, None] * groups + g[None, :]
        total += tl.load(scales + at, inside, 0.0).to(tl.float32) * tl.sum(even * first + odd * second, 2)
        if HAS_MINIMUM:
            total += tl.load(minima + at, inside, 0.0).to(tl.float32) * tl.sum(first + second, 2)
    result = tl.sum(total, 1) * tl.load(rows + n, n < count, 0.0)
    if HAS_BIAS:
        result += tl.load(bias + n, n < count, 0.0).to(tl.float32)
    tl.store(y + m * count + n, result.to(y.dtype.element_ty), n < count)


@triton.jit
def _unpack_kernel(
    low, high, scales, minima, rows, out, count, groups,
    BITS: tl.constexpr, PAIRS: tl.constexpr, OFFSET: tl.constexpr, HAS_MINIMUM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    line, half = n.to(tl.int64)[:, None], groups * PAIRS
    inside = (n < count)[:, None] & (j < half)[None, :]
    even, odd = _codes(low, high, line, j[None, :], inside, half, BITS, OFFSET)
    group = line * groups + (j // PAIRS)[None, :]
    scale = tl.load(scales + group, inside, 0.0).to(tl.float32)
    even, odd = even * scale, odd * scale
    if HAS_MINIMUM:
        minimum = tl.load(minima + group, inside, 0.0).to(tl.float32)
        even, odd = even + minimum, odd + minimum
    row = tl.load(rows + n, n < count, 0.0)[:, None]
    both = tl.interleave(even * row, odd * row)  # [BLOCK_N, 2 * BLOCK_J]
    column = tl.program_id(1) * 2 * BLOCK_J + tl.arange(0, 2 * BLOCK_J)
    inside = (n < count)[:, None] & (column < 2 * half)[None, :]
    tl.store(out + line * (2 * half) + column[None, :], both.to(out.dtype.element_ty), inside)


@on_its_device
def product(x: Tensor, blocks: WeightBlocks, bias: Tensor | None = None, tiling: Tiling | None = None) -> Tensor:
    """``x @ weight.T + bias`` for ``x`` of ``[M, K]``, contiguous: ``[M, N]``, in the type of ``x``."""
    count, size = blocks.shape
    tiling = Tiling() if tiling is None else tiling
    out = torch.empty(x.shape[0], count, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(count, tiling.block_n), x.shape[0])
    _product_kernel[grid](
        x, *_planes(blocks), out if bias is None else bias, out, count, size // blocks.form.group,
        **_constants(blocks), HAS_BIAS=bias is not None, BLOCK_N=tiling.block_n, BLOCK_G=tiling.block_g,
        num_warps=tiling.warps,
        **pdl.options(x.shape[0], x),
    )  # fmt: skip
    return out


def unpack(blocks: WeightBlocks, dtype: torch.dtype) -> Tensor:
    """The matrix ``[N, K]`` in numbers."""
    return _unpack(blocks.low, blocks, dtype)


@on_its_device
def _unpack(low: Tensor, blocks: WeightBlocks, dtype: torch.dtype) -> Tensor:
    count, size = blocks.shape
    out = torch.empty(count, size, dtype=dtype, device=low.device)
    grid = (triton.cdiv(count, 8), triton.cdiv(size // 2, 256))
    _unpack_kernel[grid](
        *_planes(blocks),
        out,
        count,
        size // blocks.form.group,
        **_constants(blocks),
        BLOCK_N=8,
        BLOCK_J=256,
        num_warps=4,
    )
    return out


def _planes(blocks: WeightBlocks) -> list[Tensor]:
    """Tensors of the kernels' first arguments; one that is not there is stood for by another."""
    form, low, high, scales, minima, rows = blocks
    if form.bits == 8:
        low = low.view(torch.int16)
    return [low, high if form.high_bits else low, scales, minima if form.has_minimum else scales, rows]


def _constants(blocks: WeightBlocks) -> dict[str, int | bool]:
    form = blocks.form
    return {"BITS": form.bits, "PAIRS": form.group // 2, "OFFSET": form.offset, "HAS_MINIMUM": form.has_minimum}
