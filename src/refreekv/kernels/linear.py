"""Products of one row with weight matrices: every weight is read once, as fast as memory gives it.

At one token and one row a linear layer is its weights' bytes and nothing else. Libraries' matrix
products are made for more rows; and the two or three products that share an input, each too small
to fill the device, are one launch here.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows(x, weight, size, n, rows, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``weight[n] @ x`` in float32."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    lines = weight + n.to(tl.int64)[:, None] * size
    for start in range(0, size, BLOCK_K):
        inside = start + k < size
        w = tl.load(
            lines + (start + k)[None, :], (n < rows)[:, None] & inside[None, :], 0.0, eviction_policy="evict_first"
        )
        total += w.to(tl.float32) * tl.load(x + start + k, inside, 0.0).to(tl.float32)[None, :]
    return tl.sum(total, 1)


@triton.jit
def _linear_kernel(
    x, w0, w1, w2, b0, b1, b2, y0, y1, y2, n0, n1, n2, blocks0, blocks1, size,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Up to three products with one input; each program makes a few numbers of one of them."""
    block = tl.program_id(0)
    if block < blocks0:
        weight, bias, y, rows = w0, b0, y0, n0
    elif block < blocks0 + blocks1:
        weight, bias, y, rows = w1, b1, y1, n1
        block -= blocks0
    else:
        weight, bias, y, rows = w2, b2, y2, n2
        block -= blocks0 + blocks1
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    result = _rows(x, weight, size, n, rows, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        result += tl.load(bias + n, n < rows, 0.0).to(tl.float32)
    tl.store(y + n, result.to(y.dtype.element_ty), n < rows)


@triton.jit
def _gated_linear_kernel(
    x, gate, up, y, rows, size, GELU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kind = y.dtype.element_ty
    g = _rows(x, gate, size, n, rows, BLOCK_N, BLOCK_K).to(kind).to(tl.float32)
    u = _rows(x, up, size, n, rows, BLOCK_N, BLOCK_K).to(kind).to(tl.float32)
    inner = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
    active = g / (1.0 + tl.exp(-inner))
    tl.store(y + n, (active.to(kind).to(tl.float32) * u).to(kind), n < rows)


BLOCK_N, BLOCK_K = 4, 1024


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    block_n: int = BLOCK_N,
    block_k: int = BLOCK_K,
) -> list[Tensor]:
    """``x @ weight.T + bias`` for one to three weights ``[N, K]``; ``x`` is ``[1, 1, K]``, results ``[1, 1, N]``."""
    outs = [torch.empty(1, 1, w.shape[0], dtype=x.dtype, device=x.device) for w in weights]
    rows = [w.shape[0] for w in weights]
    blocks = [triton.cdiv(n, block_n) for n in rows]
    spare = 3 - len(weights)
    w, y = [*weights, *[weights[0]] * spare], [*outs, *[outs[0]] * spare]
    has_bias = biases[0] is not None
    b = [*biases, *[biases[0]] * spare] if has_bias else w
    rows, blocks = [*rows, *[0] * spare], [*blocks, *[0] * spare]
    _linear_kernel[(sum(blocks),)](
        x, *w, *b, *y, *rows, blocks[0], blocks[1], x.shape[-1],
        HAS_BIAS=has_bias, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    return outs


def gated_linear(
    x: Tensor, gate: Tensor, up: Tensor, gelu: bool, block_n: int = BLOCK_N, block_k: int = BLOCK_K
) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``, or with the tanh form of GELU; ``[1, 1, K]`` to ``[1, 1, N]``."""
    out = torch.empty(1, 1, gate.shape[0], dtype=x.dtype, device=x.device)
    _gated_linear_kernel[(triton.cdiv(gate.shape[0], block_n),)](
        x, gate, up, out, gate.shape[0], x.shape[-1], GELU=gelu, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4
    )
    return out
