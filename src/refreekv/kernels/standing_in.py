"""Stand-ins for evicted entries in four launches, and one that puts them in their places.

The judges are `core.stand_ins.stand_ins` and `put`. Keys are read twice and values once; the rows of
attention, which the torch version writes out several times, never leave the chip.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.stand_ins import TINY, TOO_MUCH, StandIns

CHUNK = 64
"""Entries that one program looks at."""

MOST = 16
"""Stand-ins of a head, at most: what one block of a product holds."""

SCAN = tl.constexpr(2048)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _parts(keep, start, length, count, CHUNK: tl.constexpr):
    """For a chunk's entries the part that each belongs to, and -1 if it stays."""
    before, total = tl.zeros([SCAN], tl.int32), tl.zeros([SCAN], tl.int32)
    # Counted anew by each program: a few bytes an entry, in place of a launch that adds up.
    for first in range(0, length, SCAN):
        n = first + tl.arange(0, SCAN)
        gone = (tl.load(keep + n, n < length, 1) == 0).to(tl.int32)
        total += gone
        before += tl.where(n < start, gone, 0)
    n = start + tl.arange(0, CHUNK)
    gone = tl.load(keep + n, n < length, 1) == 0
    number = tl.sum(before, 0) + tl.cumsum(gone.to(tl.int32), 0)
    return tl.where(gone, (number - 1) * count // tl.maximum(tl.sum(total, 0), 1), -1)


@triton.jit
def _queries(
    query, batch, kv_head, group, rows, sq_b, sq_h, sq_k, SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr
):
    row, d = tl.arange(0, R), tl.arange(0, D)
    head = kv_head * group + row % group
    lines = query + batch * sq_b + head * sq_h + (row // group).to(tl.int64) * sq_k
    return tl.load(lines[:, None] + d[None, :], (row < rows)[:, None] & (d < SIZE)[None, :], 0.0)


@triton.jit
def _entries(
    stored, batch, kv_head, start, length, s_b, s_h, s_n, SIZE: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr
):
    n, d = start + tl.arange(0, CHUNK), tl.arange(0, D)
    lines = stored + batch * s_b + kv_head * s_h + n.to(tl.int64) * s_n
    return tl.load(lines[:, None] + d[None, :], (n < length)[:, None] & (d < SIZE)[None, :], 0.0)


@triton.jit
def _logits(q, k, start, length, CHUNK: tl.constexpr):
    """``[R, CHUNK]`` in units of log 2; minus infinity behind the last entry."""
    n = start + tl.arange(0, CHUNK)
    product = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee") * LOG2E
    return tl.where((n < length)[None, :], product, float("-inf"))


@triton.jit
def _sums_kernel(
    query, key, keep, highs, sums, length, kv_heads, group, rows, count,
    sq_b, sq_h, sq_k, sk_b, sk_h, sk_n,
    HEAD: tl.constexpr, D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """By chunk and row: the largest logit, and the sums of exponentials over each part, and over all in the last."""
    chunk, chunks, pair = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    batch, kv_head, start = pair // kv_heads, pair % kv_heads, chunk * CHUNK
    q = _queries(query, batch, kv_head, group, rows, sq_b, sq_h, sq_k, HEAD, D, R)
    k = _entries(key, batch, kv_head, start, length, sk_b, sk_h, sk_n, HEAD, D, CHUNK)
    part = _parts(keep + pair * length, start, length, count, CHUNK)
    logits = _logits(q, k, start, length, CHUNK)
    high = tl.max(logits, 1)
    share = tl.exp2(logits - high[:, None])
    row = tl.arange(0, R)
    line = pair * chunks + chunk
    tl.store(highs + line * R + row, high)
    for p in tl.static_range(M):
        some = tl.sum(tl.where((part == p)[None, :], share, 0.0), 1)
        tl.store(sums + (line * (M + 1) + p) * R + row, some)
    tl.store(sums + (line * (M + 1) + M) * R + row, tl.sum(share, 1))


@triton.jit
def _weights_kernel(
    highs, sums, largest_out, inside_out, weight_out, wanted_out, chunks, rows, tiny,
    R: tl.constexpr, M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All chunks together; then what each row counts for each part."""
    pair = tl.program_id(0).to(tl.int64)
    row, some = tl.arange(0, R), tl.arange(0, BLOCK_C)
    largest = tl.full([R], float("-inf"), tl.float32)
    for first in range(0, chunks, BLOCK_C):
        here = (first + some < chunks)[:, None]
        lines = highs + (pair * chunks + first + some)[:, None] * R + row[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(lines, here, float("-inf")), 0))
    tl.store(largest_out + pair * R + row, largest)
    everything = _joined(highs, sums, largest, pair, chunks, M, R, M, BLOCK_C)
    for p in tl.static_range(M):
        total = _joined(highs, sums, largest, pair, chunks, p, R, M, BLOCK_C)
        share = tl.where(row < rows, total / tl.maximum(everything, tiny), 0.0)
        weight = share / tl.maximum(tl.sum(share, 0), tiny)
        line = (pair * M + p) * R + row
        tl.store(weight_out + line, weight)
        tl.store(inside_out + line, weight / tl.maximum(total, tiny))
        tl.store(wanted_out + line, (tl.log2(tl.maximum(total, tiny)) + largest) / LOG2E)


@triton.jit
def _joined(highs, sums, largest, pair, chunks, p, R: tl.constexpr, M: tl.constexpr, BLOCK_C: tl.constexpr):
    row, some = tl.arange(0, R), tl.arange(0, BLOCK_C)
    total = tl.zeros([R], tl.float32)
    for first in range(0, chunks, BLOCK_C):
        here, line = (first + some < chunks)[:, None], pair * chunks + first + some
        high = tl.load(highs + line[:, None] * R + row[None, :], here, float("-inf"))
        part = tl.load(sums + (line[:, None] * (M + 1) + p) * R + row[None, :], here, 0.0)
        total += tl.sum(part * tl.exp2(high - largest[None, :]), 0)
    return total


@triton.jit
def _means_kernel(
    query, key, value, keep, largest, inside, key_sums, value_sums, best_share, best_place,
    length, kv_heads, group, rows, count,
    sq_b, sq_h, sq_k, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
    MOST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """By chunk and part: its entries' keys and values, by the attention each gets of what the part gets."""
    chunk, chunks, pair = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    batch, kv_head, start = pair // kv_heads, pair % kv_heads, chunk * CHUNK
    q = _queries(query, batch, kv_head, group, rows, sq_b, sq_h, sq_k, HEAD, D, R)
    k = _entries(key, batch, kv_head, start, length, sk_b, sk_h, sk_n, HEAD, D, CHUNK)
    part = _parts(keep + pair * length, start, length, count, CHUNK)
    row = tl.arange(0, R)
    share = tl.exp2(_logits(q, k, start, length, CHUNK) - tl.load(largest + pair * R + row)[:, None])
    got = tl.zeros([CHUNK], tl.float32)
    line = pair * chunks + chunk
    n = start + tl.arange(0, CHUNK)
    for p in tl.static_range(M):
        own = tl.sum(share * tl.load(inside + (pair * M + p) * R + row)[:, None], 0)
        got = tl.where(part == p, own, got)
        mine = tl.where(part == p, own, -1.0)
        best = tl.max(mine, 0)
        tl.store(best_share + line * M + p, best)
        tl.store(best_place + line * M + p, tl.min(tl.where(mine == best, n, length), 0))
    which = tl.arange(0, MOST)
    weights = tl.where(which[:, None] == part[None, :], got[None, :], 0.0).to(k.dtype)
    v = _entries(value, batch, kv_head, start, length, sv_b, sv_h, sv_n, VALUE, DV, CHUNK)
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    out = (line * M + which)[:, None]
    real = (which < M)[:, None]
    tl.store(key_sums + out * D + d[None, :], tl.dot(weights, k, input_precision="ieee"), real)
    tl.store(value_sums + out * DV + dv[None, :], tl.dot(weights, v, input_precision="ieee"), real)


@triton.jit
def _finish_kernel(
    query, key_sums, value_sums, weight, wanted, best_share, best_place, keys_out, values_out, columns_out, real_out,
    length, kv_heads, group, rows, chunks, tiny, slack, sq_b, sq_h, sq_k,
    HEAD: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Means of whole parts, and the key moved along the mean query to where its logits are the wanted ones."""
    p, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    row, some, d, dv = tl.arange(0, R), tl.arange(0, BLOCK_C), tl.arange(0, D), tl.arange(0, DV)
    key, value = tl.zeros([D], tl.float32), tl.zeros([DV], tl.float32)
    best, place = tl.full([], -1.0, tl.float32), tl.full([], 0, tl.int32) + length - 1
    for first in range(0, chunks, BLOCK_C):
        here = first + some < chunks
        line = (pair * chunks + first + some) * M + p
        key += tl.sum(tl.load(key_sums + line[:, None] * D + d[None, :], here[:, None], 0.0), 0)
        value += tl.sum(tl.load(value_sums + line[:, None] * DV + dv[None, :], here[:, None], 0.0), 0)
        share = tl.load(best_share + line, here, -1.0)
        higher = tl.max(share, 0)
        candidate = tl.min(tl.where(here & (share == higher), tl.load(best_place + line, here, length), length), 0)
        place = tl.where(higher > best, candidate, place)
        best = tl.maximum(best, higher)
    q = _queries(query, batch, kv_head, group, rows, sq_b, sq_h, sq_k, HEAD, D, R).to(tl.float32)
    weights = tl.load(weight + (pair * M + p) * R + row)
    mean_query = tl.sum(q * weights[:, None], 0)
    along = tl.sum(q * mean_query[None, :], 1)
    missing = tl.load(wanted + (pair * M + p) * R + row) - tl.sum(q * key[None, :], 1)
    missing = tl.where(row < rows, missing, 0.0)
    step = tl.sum(weights * along * missing, 0) / tl.maximum(tl.sum(weights * along * along, 0), tiny)
    bounds = (weights > 0) & (along > tiny)
    step = tl.minimum(step, tl.min(tl.where(bounds, (missing + slack) / tl.where(bounds, along, 1.0), float("inf")), 0))
    out = pair * M + p
    kind = keys_out.dtype.element_ty
    tl.store(keys_out + out * HEAD + d, (key + step * mean_query).to(kind), d < HEAD)
    tl.store(values_out + out * VALUE + dv, value.to(kind), dv < VALUE)
    tl.store(columns_out + out, place.to(tl.int64))
    tl.store(real_out + out, (best >= 0.0).to(tl.uint8))


def launch_stand_ins(queries: Tensor, keys: Tensor, values: Tensor, keep: Tensor, count: int) -> StandIns:
    """`core.stand_ins.stand_ins` of a prompt without padding; all but ``keep`` is evicted.

    At most `MOST` of them, and 128 rows of queries a KV head.
    """
    batch, heads, probes, head = queries.shape
    kv_heads, length, value = keys.shape[1], keys.shape[2], values.shape[-1]
    group, pairs, chunks = heads // kv_heads, batch * kv_heads, triton.cdiv(length, CHUNK)
    rows = group * probes
    like: dict[str, Any] = {"dtype": torch.float32, "device": keys.device}
    sizes = {
        "D": max(16, triton.next_power_of_2(head)),
        "R": max(16, triton.next_power_of_2(rows)),
        "M": count,
    }
    dv = max(16, triton.next_power_of_2(value))
    highs = torch.empty(pairs, chunks, sizes["R"], **like)
    sums = torch.empty(pairs, chunks, count + 1, sizes["R"], **like)
    largest = torch.empty(pairs, sizes["R"], **like)
    inside, weight, wanted = torch.empty(3, pairs, count, sizes["R"], **like)
    key_sums = torch.empty(pairs, chunks, count, sizes["D"], **like)
    value_sums = torch.empty(pairs, chunks, count, dv, **like)
    best = torch.empty(pairs, chunks, count, **like)
    place = torch.empty(pairs, chunks, count, dtype=torch.int32, device=keys.device)
    shape = (batch, kv_heads, count)
    found = StandIns(
        torch.empty(shape, dtype=torch.int64, device=keys.device),
        torch.empty(*shape, head, dtype=keys.dtype, device=keys.device),
        torch.empty(*shape, value, dtype=values.dtype, device=keys.device),
        torch.empty(shape, dtype=torch.bool, device=keys.device),
    )
    keep = keep.contiguous().view(torch.uint8)
    numbers = (length, kv_heads, group, rows)
    strides = (*queries.stride()[:3], *keys.stride()[:3])
    _sums_kernel[(chunks, pairs)](
        queries, keys, keep, highs, sums, *numbers, count, *strides, HEAD=head, CHUNK=CHUNK, num_warps=4, **sizes
    )
    _weights_kernel[(pairs,)](
        highs,
        sums,
        largest,
        inside,
        weight,
        wanted,
        chunks,
        rows,
        TINY,
        R=sizes["R"],
        M=count,
        BLOCK_C=128,
        num_warps=8,
    )
    _means_kernel[(chunks, pairs)](
        queries, keys, values, keep, largest, inside, key_sums, value_sums, best, place, *numbers, count, *strides,
        *values.stride()[:3], HEAD=head, VALUE=value, DV=dv, MOST=MOST, CHUNK=CHUNK, num_warps=4, **sizes,
    )  # fmt: skip
    _finish_kernel[(count, pairs)](
        queries, key_sums, value_sums, weight, wanted, best, place, found.keys, found.values, found.columns,
        found.real.view(torch.uint8), *numbers, chunks, TINY, math.log(TOO_MUCH), *strides[:3],
        HEAD=head, VALUE=value, DV=dv, BLOCK_C=64, num_warps=8, **sizes,
    )  # fmt: skip
    return found


@triton.jit
def _put_kernel(
    columns, new_keys, new_values, real, keys, values, keep, length, kv_heads, count,
    sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    pair = line // count
    batch, kv_head = pair // kv_heads, pair % kv_heads
    if tl.load(real + line) != 0:
        column = tl.load(columns + line)
        d, dv = tl.arange(0, D), tl.arange(0, DV)
        key = keys + batch * sk_b + kv_head * sk_h + column * sk_n
        value = values + batch * sv_b + kv_head * sv_h + column * sv_n
        tl.store(key + d, tl.load(new_keys + line * HEAD + d, d < HEAD), d < HEAD)
        tl.store(value + dv, tl.load(new_values + line * VALUE + dv, dv < VALUE), dv < VALUE)
        tl.store(keep + pair * length + column, tl.full([], 1, tl.uint8))


def launch_put(chosen: StandIns, keys: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """`core.stand_ins.put`, and what is kept ``[B, H_kv, n]`` with the stand-ins."""
    keep = keep.clone(memory_format=torch.contiguous_format)
    head, value = keys.shape[-1], values.shape[-1]
    _put_kernel[(chosen.columns.numel(),)](
        chosen.columns, chosen.keys, chosen.values, chosen.real.view(torch.uint8), keys, values,
        keep.view(torch.uint8), keys.shape[2], keys.shape[1], chosen.columns.shape[2],
        *keys.stride()[:3], *values.stride()[:3],
        HEAD=head, VALUE=value, D=triton.next_power_of_2(head), DV=triton.next_power_of_2(value), num_warps=1,
    )  # fmt: skip
    return keep
