"""Chains of small operations that every decoder layer runs for each token, a kernel each.

At one token a row these chains take no time on the device but that of being launched: a
normalisation is eight launches, a rotary embedding ten, a gated activation two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels import pdl


@triton.jit
def _store_normed(values, weight, out, n, size, eps, ONE_ADDED: tl.constexpr):
    scale = tl.rsqrt(tl.sum(values * values, 0) / size + eps)
    w = tl.load(weight + n, n < size, 0.0)
    if ONE_ADDED:
        result = values * scale * (1.0 + w.to(tl.float32))
    else:
        # Rounded before the weight, as models do that multiply in their own precision.
        result = (values * scale).to(out.dtype.element_ty).to(tl.float32) * w.to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), n < size)


@triton.jit
def _rms_norm_kernel(
    x, weight, out, size, eps, stride, ONE_ADDED: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    pdl.in_turn(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + n, n < size, 0.0).to(tl.float32)
    _store_normed(values, weight, out + row * size, n, size, eps, ONE_ADDED)


@triton.jit
def _add_rms_norm_kernel(
    x, more, weight, total, out, size, eps, stride, stride_more, ONE_ADDED: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    pdl.in_turn(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + n, n < size, 0.0).to(tl.float32)
    values += tl.load(more + row * stride_more + n, n < size, 0.0).to(tl.float32)
    # Rounded first, as what is added up is normalised.
    values = values.to(out.dtype.element_ty)
    tl.store(total + row * size + n, values, n < size)
    _store_normed(values.to(tl.float32), weight, out + row * size, n, size, eps, ONE_ADDED)


@triton.jit
def _gated_kernel(
    gate, up, out, size, stride_gate, stride_up, GELU: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    pdl.in_turn(DEPENDENT)
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * stride_gate + n, n < size, 0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + n, n < size, 0.0)
    if GELU:
        inner = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        active = g / (1.0 + tl.exp(-inner))
    else:
        active = g / (1.0 + tl.exp(-g))
    active = active.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + n, (active * u.to(tl.float32)).to(out.dtype.element_ty), n < size)


@triton.jit
def _rotary_kernel(
    query, key, cos, sin, query_out, key_out, heads, kv_heads,
    sq_b, sq_h, sk_b, sk_h, sc_b, ss_b,
    HALF: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    pdl.in_turn(DEPENDENT)
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    d = tl.arange(0, BLOCK)
    real = d < HALF
    if head < heads:
        source, target = query + row * sq_b + head * sq_h, query_out + (row * heads + head) * 2 * HALF
    else:
        head = head - heads
        source, target = key + row * sk_b + head * sk_h, key_out + (row * kv_heads + head) * 2 * HALF
    low, high = tl.load(source + d, real, 0.0).to(tl.float32), tl.load(source + HALF + d, real, 0.0).to(tl.float32)
    cos_low, sin_low = tl.load(cos + row * sc_b + d, real, 0.0), tl.load(sin + row * ss_b + d, real, 0.0)
    cos_high = tl.load(cos + row * sc_b + HALF + d, real, 0.0)
    sin_high = tl.load(sin + row * ss_b + HALF + d, real, 0.0)
    kind = query_out.dtype.element_ty
    tl.store(target + d, (low * cos_low.to(tl.float32) - high * sin_low.to(tl.float32)).to(kind), real)
    tl.store(target + HALF + d, (high * cos_high.to(tl.float32) + low * sin_high.to(tl.float32)).to(kind), real)


def _rows(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[rows, n]``, the numbers of a row one after the other."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_added: bool) -> Tensor:
    """``x / rms(x)``, times ``weight`` or, in float32, times ``1 + weight``; over the last dimension of any ``x``."""
    flat = _rows(x)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(flat.shape[1])
    _rms_norm_kernel[(flat.shape[0],)](
        flat, weight, out, flat.shape[1], eps, flat.stride(0),
        ONE_ADDED=one_added, BLOCK=block, num_warps=max(1, min(16, block // 512)),
        **pdl.options(flat.shape[0], x, small=True),
    )  # fmt: skip
    return out.view(x.shape)


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float, one_added: bool) -> tuple[Tensor, Tensor]:
    """``x + more``, and `rms_norm` of it."""
    flat, others = _rows(x), _rows(more)
    total, out = (torch.empty_like(flat, memory_format=torch.contiguous_format) for _ in range(2))
    block = triton.next_power_of_2(flat.shape[1])
    _add_rms_norm_kernel[(flat.shape[0],)](
        flat, others, weight, total, out, flat.shape[1], eps, flat.stride(0), others.stride(0),
        ONE_ADDED=one_added, BLOCK=block, num_warps=max(1, min(16, block // 512)),
        **pdl.options(flat.shape[0], x, small=True),
    )  # fmt: skip
    return total.view(x.shape), out.view(x.shape)


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """``silu(gate) * up``, or with the tanh form of GELU."""
    size = gate.shape[-1]
    gates, ups = _rows(gate), _rows(up)
    out = torch.empty_like(gates, memory_format=torch.contiguous_format)
    block = 1024
    _gated_kernel[(triton.cdiv(size, block), gates.shape[0])](
        gates,
        ups,
        out,
        size,
        gates.stride(0),
        ups.stride(0),
        GELU=gelu,
        BLOCK=block,
        num_warps=4,
        **pdl.options(gates.shape[0], gate),
    )
    return out.view(gate.shape)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of one token a row: halves rotated against each other.

    ``query`` ``[B, H, 1, D]``, ``key`` ``[B, H_kv, 1, D]``, ``cos`` and ``sin`` ``[B | 1, 1, D]``.
    """
    batch, heads, _, size = query.shape
    kv_heads = key.shape[1]
    query_out = torch.empty(batch, heads, 1, size, dtype=query.dtype, device=query.device)
    key_out = torch.empty(batch, kv_heads, 1, size, dtype=key.dtype, device=key.device)
    step_cos, step_sin = (0 if t.shape[0] == 1 else t.stride(0) for t in (cos, sin))
    _rotary_kernel[(heads + kv_heads, batch)](
        query, key, cos, sin, query_out, key_out, heads, kv_heads,
        *query.stride()[:2], *key.stride()[:2], step_cos, step_sin,
        HALF=size // 2, BLOCK=triton.next_power_of_2(size // 2), num_warps=1,
        **pdl.options(batch, query, small=True),
    )  # fmt: skip
    return query_out, key_out
