"""Probe reductions in Triton: attention of many queries, reduced per position while keys stream by.

Two kernels. The first finds each query's softmax denominator, split along the keys. The second
takes a block of keys, holds it, runs all queries that can see it past it, and writes three
numbers a key. No row ever leaves the chip. The query heads of one KV head are rows of one
matrix, so that each key is read once for all of them, in each of the two kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _capped(logits, softcap, HAS_CAP: tl.constexpr):
    """Logits in units of log 2, after Gemma 2's soft cap if there is one."""
    if HAS_CAP:
        x = 2.0 * logits / softcap
        # tanh by one exponential, from the side that cannot overflow.
        e = tl.exp2(-tl.abs(x) * LOG2E)
        logits = softcap * tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    return logits * LOG2E


@triton.jit
def _denominator_kernel(
    query, key, query_columns, columns, valid, out,
    probes, group, length, kv_heads, split_keys, rows,
    scaling, softcap,
    sq_b, sq_h, sq_k, sk_b, sk_h, sk_n, sc_b, sv_b, sv_h,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """``out[b, h, split, row]``: log2 of the sum of exponentials over one split of the keys."""
    pair = tl.program_id(2).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    first = tl.program_id(1) * split_keys
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Row = query * group + head of the group: rows that are near see nearly the same keys.
    probe, head = row // group, kv_head * group + row % group
    d = tl.arange(0, BLOCK_D)
    real = row < rows
    at = tl.load(query_columns + batch * sc_b + probe, real, -1)
    lines = query + batch * sq_b + head * sq_h + probe.to(tl.int64) * sq_k
    q = tl.load(lines[:, None] + d[None, :], real[:, None] & (d < HEAD)[None, :], 0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    stop = tl.minimum(first + split_keys, length)
    # A key is never in a column before its index: what follows the newest query is hidden from all.
    stop = tl.minimum(stop, tl.max(at) + 1)
    for start in range(first, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < stop
        line = key + batch * sk_b + kv_head * sk_h + n.to(tl.int64) * sk_n
        k = tl.load(line[None, :] + d[:, None], inside[None, :] & (d < HEAD)[:, None], 0.0)
        if HAS_VALID:
            inside = inside & (tl.load(valid + batch * sv_b + kv_head * sv_h + n, inside, 0) != 0)
        column = tl.load(columns + n, n < stop, 0) if HAS_COLUMNS else n
        logits = _capped(tl.dot(q, k, input_precision="ieee") * scaling, softcap, HAS_CAP)
        logits = tl.where(inside[None, :] & (column[None, :] <= at[:, None]), logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # A row that has seen nothing yet: keep its exponentials away from inf - inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        highest = higher
    result = tl.where(total > 0, highest + tl.log2(total), float("-inf"))
    tl.store(out + (pair * tl.num_programs(1) + tl.program_id(1)) * rows + row, result, real)


@triton.jit
def _reduce_kernel(
    query, key, query_columns, columns, valid, denominators, peak_out, mean_out, squares_out,
    probes, group, length, kv_heads, rows, distance,
    scaling, softcap,
    sq_b, sq_h, sq_k, sk_b, sk_h, sk_n, sc_b, sv_b, sv_h,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, HAS_VALID: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Peak, mean and sum of squares of one block of keys over all rows."""
    pair = tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = n < length
    line = key + batch * sk_b + kv_head * sk_h + n.to(tl.int64) * sk_n
    k = tl.load(line[None, :] + d[:, None], inside[None, :] & (d < HEAD)[:, None], 0.0)
    column = tl.load(columns + n, inside, 0) if HAS_COLUMNS else n
    oldest = tl.min(tl.where(inside, column, 2147483647))
    if HAS_VALID:
        inside = inside & (tl.load(valid + batch * sv_b + kv_head * sv_h + n, inside, 0) != 0)
    # The first query that counts any of these keys; with queries in order the work starts there.
    every = tl.arange(0, BLOCK_P)
    columns_of = tl.load(query_columns + batch * sc_b + every, every < probes, -1)
    first = tl.min(tl.where(columns_of >= oldest + distance, every, probes), 0)
    counting = (columns_of[:, None] >= column[None, :] + distance) & inside[None, :]
    count = group * tl.sum(counting.to(tl.int32), 0)
    # Reduced over rows once, at the end: reductions across warps in each step would be what takes time.
    peak = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first * group // BLOCK_M * BLOCK_M, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        real = row < rows
        probe, head = row // group, kv_head * group + row % group
        at = tl.load(query_columns + batch * sc_b + probe, real, -1)
        lines = query + batch * sq_b + head * sq_h + probe.to(tl.int64) * sq_k
        q = tl.load(lines[:, None] + d[None, :], real[:, None] & (d < HEAD)[None, :], 0.0)
        whole = tl.load(denominators + pair * rows + row, real, float("inf"))
        logits = _capped(tl.dot(q, k, input_precision="ieee") * scaling, softcap, HAS_CAP)
        counted = real[:, None] & inside[None, :] & (column[None, :] + distance <= at[:, None])
        # Only what is visible is exponentiated: a hidden logit may lie far above the denominator.
        p = tl.exp2(tl.where(counted, logits - whole[:, None], float("-inf")))
        peak = tl.maximum(peak, p)
        total += p
        squares += p * p
    out = pair * length + n
    tl.store(peak_out + out, tl.max(peak, 0), n < length)
    tl.store(mean_out + out, tl.sum(total, 0) / tl.maximum(count, 1).to(tl.float32), n < length)
    tl.store(squares_out + out, tl.sum(squares, 0), n < length)


def launch_probe_reductions(
    query: Tensor,
    key: Tensor,
    query_columns: Tensor,
    columns: Tensor | None,
    valid: Tensor | None,
    query_real: Tensor | None,
    scaling: float,
    distance: int,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run both kernels; parameters as in `core.reductions.probe_reductions`, without defaults."""
    batch, heads, probes, head_size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = group * probes
    if query.stride(-1) != 1:
        query = query.contiguous()
    if key.stride(-1) != 1:
        key = key.contiguous()
    # A query at padding stands before every key.
    at = query_columns if query_real is None else query_columns.where(query_real, -1)
    at = at.expand(batch, probes).to(torch.int32).contiguous()
    shown = None
    if valid is not None:
        shown = (valid[:, None] if valid.dim() == 2 else valid).expand(batch, kv_heads, length).contiguous()
        shown = shown.view(torch.uint8)
    place = None if columns is None else columns.to(torch.int32)
    block_d = max(16, triton.next_power_of_2(head_size))
    block_m, block_n = min(64, max(16, triton.next_power_of_2(rows))), 64
    wide = query.dtype == torch.float32 or block_d > 128
    if wide:
        block_m, block_n = min(block_m, 32), 32
    blocks = triton.cdiv(rows, block_m)
    # Enough programs to fill the device several times over, each with enough keys to be worth it.
    splits = max(1, min(triton.cdiv(1024, batch * kv_heads * blocks), triton.cdiv(length, 512)))
    split_keys = triton.cdiv(triton.cdiv(length, splits), block_n) * block_n
    splits = triton.cdiv(length, split_keys)
    partial = query.new_empty(batch, kv_heads, splits, rows, dtype=torch.float32)
    strides = (*query.stride()[:3], *key.stride()[:3], at.stride(0))
    strides += (0, 0) if shown is None else shown.stride()[:2]
    settings = {
        "HEAD": head_size,
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "HAS_VALID": shown is not None,
        "HAS_COLUMNS": place is not None,
        "HAS_CAP": softcap is not None,
        "num_warps": 4,
    }
    inputs = (query, key, at, at if place is None else place, at if shown is None else shown)
    cap = 1.0 if softcap is None else softcap
    _denominator_kernel[(blocks, splits, batch * kv_heads)](
        *inputs, partial, probes, group, length, kv_heads, split_keys, rows, scaling, cap, *strides, **settings
    )
    whole = partial[:, :, 0] if splits == 1 else torch.logsumexp(partial * 0.6931471805599453, 2) / 0.6931471805599453
    if sink_logits is not None:
        sink = sink_logits.float().view(1, kv_heads, 1, group) * 1.4426950408889634
        whole = torch.logaddexp2(whole.view(batch, kv_heads, probes, group), sink).flatten(2)
    # A query that saw nothing has no denominator; nothing it sees is counted either.
    shape = (batch, kv_heads, length)
    peak, mean, squares = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(3))
    _reduce_kernel[(triton.cdiv(length, block_n), batch * kv_heads)](
        *inputs, whole.contiguous(), peak, mean, squares, probes, group, length, kv_heads, rows, distance,
        scaling, cap, *strides, BLOCK_P=triton.next_power_of_2(max(probes, 2)), **{**settings, "num_warps": 8},
    )  # fmt: skip
    return peak, mean, squares
