"""Products of a few rows with weight matrices: every weight is read once, as fast as memory gives it.

While a batch decodes, a linear layer is its weights' bytes and little else. Libraries' matrix
products are made for more rows; and the two or three products that share an input, each too small
to fill the device, are one launch here, as are the two of a gated layer and its activation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels import pdl


@triton.jit
def _one_row(x, weight, size, n, count, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``weight[n] @ x`` in float32: ``[1, BLOCK_N]``."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    lines = weight + n.to(tl.int64)[:, None] * size
    for start in range(0, size, BLOCK_K):
        inside = start + k < size
        w = tl.load(
            lines + (start + k)[None, :], (n < count)[:, None] & inside[None, :], 0.0, eviction_policy="evict_first"
        )
        total += w.to(tl.float32) * tl.load(x + start + k, inside, 0.0).to(tl.float32)[None, :]
    return tl.sum(total, 1)[None, :]


@triton.jit
def _some_rows(
    x, weight, size, m, rows, n, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """``x[m] @ weight[n].T`` in float32: ``[BLOCK_M, BLOCK_N]``."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lines = weight + n.to(tl.int64)[None, :] * size
    for start in range(0, size, BLOCK_K):
        inside = start + k < size
        w = tl.load(
            lines + (start + k)[:, None], (n < count)[None, :] & inside[:, None], 0.0, eviction_policy="evict_first"
        )
        part = tl.load(x + m[:, None] * size + (start + k)[None, :], (m < rows)[:, None] & inside[None, :], 0.0)
        total = tl.dot(part, w, total, input_precision="ieee")
    return total


@triton.jit
def _some_rows_turned(
    x, weight, size, m, rows, n, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The same as ``weight[n] @ x[m].T``: 64 columns fill what Hopper multiplies at once, a few rows do not."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    lines = weight + n.to(tl.int64)[:, None] * size
    for start in range(0, size, BLOCK_K):
        inside = start + k < size
        w = tl.load(
            lines + (start + k)[None, :], (n < count)[:, None] & inside[None, :], 0.0, eviction_policy="evict_first"
        )
        part = tl.load(x + m[None, :] * size + (start + k)[:, None], (m < rows)[None, :] & inside[:, None], 0.0)
        total = tl.dot(w, part, total, input_precision="ieee")
    return tl.trans(total)


@triton.jit
def _product(
    x, weight, size, m, rows, n, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    if BLOCK_M == 1:
        result = _one_row(x, weight, size, n, count, BLOCK_N, BLOCK_K)
    elif BLOCK_N >= 64:
        result = _some_rows_turned(x, weight, size, m, rows, n, count, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        result = _some_rows(x, weight, size, m, rows, n, count, BLOCK_M, BLOCK_N, BLOCK_K)
    return result


@triton.jit
def _linear_kernel(
    x, w0, w1, w2, b0, b1, b2, y0, y1, y2, n0, n1, n2, blocks0, blocks1, rows, size,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Up to three products with one input; each program makes a few columns of one of them."""
    pdl.in_turn(DEPENDENT)
    block = tl.program_id(0)
    if block < blocks0:
        weight, bias, y, count = w0, b0, y0, n0
    elif block < blocks0 + blocks1:
        weight, bias, y, count = w1, b1, y1, n1
        block -= blocks0
    else:
        weight, bias, y, count = w2, b2, y2, n2
        block -= blocks0 + blocks1
    n, m = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    result = _product(x, weight, size, m, rows, n, count, BLOCK_M, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        result += tl.load(bias + n, n < count, 0.0).to(tl.float32)[None, :]
    inside = (m < rows)[:, None] & (n < count)[None, :]
    tl.store(y + m[:, None] * count + n[None, :], result.to(y.dtype.element_ty), inside)


@triton.jit
def _gated_linear_kernel(
    x, gate, up, y, count, rows, size,
    GELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    pdl.in_turn(DEPENDENT)
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    kind = y.dtype.element_ty
    g = _product(x, gate, size, m, rows, n, count, BLOCK_M, BLOCK_N, BLOCK_K).to(kind).to(tl.float32)
    u = _product(x, up, size, m, rows, n, count, BLOCK_M, BLOCK_N, BLOCK_K).to(kind).to(tl.float32)
    inner = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
    active = (g / (1.0 + tl.exp(-inner))).to(kind).to(tl.float32)
    inside = (m < rows)[:, None] & (n < count)[None, :]
    tl.store(y + m[:, None] * count + n[None, :], (active * u).to(kind), inside)


class Tiling(NamedTuple):
    """How one launch is cut up: columns and length of a tile, warps, stages of software pipelining."""

    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3


def tiling_for(rows: int, columns: int, bytes_each: int) -> Tiling:
    """What was fastest on an H100, or within 2% of it; ``columns`` are those of all products of the launch."""
    if rows == 1:
        return Tiling(4, 1024)
    if bytes_each > 2:
        return Tiling(16, 64, 4, 3)
    # Of a narrow result blocks of 64 columns are too few for all multiprocessors.
    return Tiling(64, 128, 4, 5) if columns > 4096 else Tiling(32, 256, 4, 4)


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], tiling: Tiling | None = None
) -> list[Tensor]:
    """``x @ weight.T + bias`` for one to three weights ``[N, K]``.

    ``x`` is ``[B, 1, K]`` with a few dozen rows at most; results are ``[B, 1, N]``. Either all
    weights have a bias or none has.
    """
    rows, size = x.shape[0], x.shape[-1]
    tiling = tiling_for(rows, sum(len(w) for w in weights), x.element_size()) if tiling is None else tiling
    outs = [torch.empty(rows, 1, w.shape[0], dtype=x.dtype, device=x.device) for w in weights]
    counts = [w.shape[0] for w in weights]
    blocks = [triton.cdiv(n, tiling.block_n) for n in counts]
    spare = 3 - len(weights)
    w, y = [*weights, *[weights[0]] * spare], [*outs, *[outs[0]] * spare]
    has_bias = biases[0] is not None
    b = [*biases, *[biases[0]] * spare] if has_bias else w
    counts, blocks = [*counts, *[0] * spare], [*blocks, *[0] * spare]
    _linear_kernel[(sum(blocks),)](
        x, *w, *b, *y, *counts, blocks[0], blocks[1], rows, size, HAS_BIAS=has_bias, **_settings(x, tiling)
    )
    return outs


def gated_linear(x: Tensor, gate: Tensor, up: Tensor, gelu: bool, tiling: Tiling | None = None) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``, or with the tanh form of GELU; ``[B, 1, K]`` to ``[B, 1, N]``."""
    rows, size, count = x.shape[0], x.shape[-1], gate.shape[0]
    tiling = tiling_for(rows, 2 * count, x.element_size()) if tiling is None else tiling
    out = torch.empty(rows, 1, count, dtype=x.dtype, device=x.device)
    _gated_linear_kernel[(triton.cdiv(count, tiling.block_n),)](
        x, gate, up, out, count, rows, size, GELU=gelu, **_settings(x, tiling)
    )
    return out


def _settings(x: Tensor, tiling: Tiling) -> dict[str, Any]:
    rows = x.shape[0]
    return {
        **pdl.options(rows, x),
        "BLOCK_M": 1 if rows == 1 else max(16, triton.next_power_of_2(rows)),
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": tiling.block_k,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
