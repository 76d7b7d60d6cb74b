"""Surrogates of evicted entries in five launches, and one that puts them in their places.

The judges are `core.surrogates.make` and `put`. Keys are read twice and values once; the rows of
attention, which the torch version writes out several times, never leave the chip. A program runs over
one split of the keys, a chunk at a time, and keeps its sums on the chip until the split's end.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.surrogates import TINY, TOO_MUCH, Surrogates
from refreekv.kernels import shared_memory
from refreekv.kernels.device_guard import on_its_device

SPLIT = 512
"""Entries of a split: 8 heads of 8,192 entries are about a program a multiprocessor of an H100."""

WARPS = 4
"""Of a program that runs over a split."""

MOST = 16
"""Surrogates of a head, at most: what one block of a product holds."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _count_kernel(keep, before, length, chunks, CHUNK: tl.constexpr, LINES: tl.constexpr):
    """``before[pair, chunk]``: evicted entries in front of each chunk, and all of them behind the last one."""
    pair = tl.program_id(0).to(tl.int64)
    keep += pair * length
    before += pair * (chunks + 1)
    line, place = tl.arange(0, LINES), tl.arange(0, CHUNK)
    total = tl.full([], 0, tl.int32)
    for first in range(0, chunks, LINES):
        n = (first + line)[:, None] * CHUNK + place[None, :]
        gone = tl.sum((tl.load(keep + n, n < length, 1) == 0).to(tl.int32), 1)
        tl.store(before + first + line, total + tl.cumsum(gone, 0) - gone, first + line < chunks)
        total += tl.sum(gone, 0)
    tl.store(before + chunks, total)


@triton.jit
def _parts(keep, before, chunk, total, length, count, CHUNK: tl.constexpr):
    """For a chunk's entries the part that each belongs to, and -1 if it stays."""
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    gone = tl.load(keep + n, n < length, 1) == 0
    number = tl.load(before + chunk) + tl.cumsum(gone.to(tl.int32), 0)
    return tl.where(gone, (number - 1) * count // total, -1)


@triton.jit
def _queries(
    query, batch, kv_head, group, rows, sq_b, sq_h, sq_k, SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr
):
    row, d = tl.arange(0, R), tl.arange(0, D)
    head = kv_head * group + row % group
    lines = query + batch * sq_b + head * sq_h + (row // group).to(tl.int64) * sq_k
    return tl.load(lines[:, None] + d[None, :], (row < rows)[:, None] & (d < SIZE)[None, :], 0.0)


@triton.jit
def _entries(stored, chunk, length, s_n, SIZE: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    n, d = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, D)
    lines = stored + n.to(tl.int64)[:, None] * s_n + d[None, :]
    return tl.load(lines, (n < length)[:, None] & (d < SIZE)[None, :], 0.0)


@triton.jit
def _logits(q, k, chunk, length, CHUNK: tl.constexpr):
    """``[R, CHUNK]`` in units of log 2; minus infinity behind the last entry."""
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    product = tl.dot(q, tl.trans(k), input_precision="ieee") * LOG2E
    return tl.where((n < length)[None, :], product, float("-inf"))


@triton.jit
def _sums_kernel(
    query, key, keep, before, highs, sums, length, kv_heads, group, rows, chunks, count,
    sq_b, sq_h, sq_k, sk_b, sk_h, sk_n,
    HEAD: tl.constexpr, D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MOST: tl.constexpr,
    CHUNK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """By split and row: the largest logit, and the sums of exponentials over each part, and over all in the last."""
    split, splits, pair = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    q = _queries(query, batch, kv_head, group, rows, sq_b, sq_h, sq_k, HEAD, D, R).to(key.dtype.element_ty)
    key += batch * sk_b + kv_head * sk_h
    keep += pair * length
    before += pair * (chunks + 1)
    total = tl.maximum(tl.load(before + chunks), 1)
    row, which = tl.arange(0, R), tl.arange(0, MOST)
    high = tl.full([R], float("-inf"), tl.float32)
    everything = tl.zeros([R], tl.float32)
    by_part = tl.zeros([R, MOST], tl.float32)
    for chunk in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, chunks)):
        k = _entries(key, chunk, length, sk_n, HEAD, D, CHUNK)
        part = _parts(keep, before, chunk, total, length, count, CHUNK)
        logits = _logits(q, k, chunk, length, CHUNK)
        higher = tl.maximum(high, tl.max(logits, 1))
        share = tl.exp2(logits - higher[:, None])
        old = tl.exp2(high - higher)
        high = higher
        everything = everything * old + tl.sum(share, 1)
        by_part *= old[:, None]
        for p in tl.static_range(M):
            some = tl.sum(tl.where((part == p)[None, :], share, 0.0), 1)
            by_part += tl.where((which == p)[None, :], some[:, None], 0.0)
    line = pair * splits + split
    tl.store(highs + line * R + row, high)
    out = sums + (line * (M + 1) + which[None, :]) * R + row[:, None]
    tl.store(out, by_part, (which < M)[None, :] & (row < R)[:, None])
    tl.store(sums + (line * (M + 1) + M) * R + row, everything)


@triton.jit
def _weights_kernel(
    highs, sums, largest_out, inside_out, weight_out, wanted_out, splits, rows, tiny,
    R: tl.constexpr, M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """All splits together; then what each row counts for one part."""
    p, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, some = tl.arange(0, R), tl.arange(0, BLOCK_S)
    largest = tl.full([R], float("-inf"), tl.float32)
    everything, total = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    for first in range(0, splits, BLOCK_S):
        here, line = (first + some < splits)[:, None], (pair * splits + first + some)[:, None]
        high = tl.load(highs + line * R + row[None, :], here, float("-inf"))
        mine = tl.load(sums + (line * (M + 1) + p) * R + row[None, :], here, 0.0)
        whole = tl.load(sums + (line * (M + 1) + M) * R + row[None, :], here, 0.0)
        higher = tl.maximum(largest, tl.max(high, 0))
        old, new = tl.exp2(largest - higher), tl.exp2(high - higher[None, :])
        everything = everything * old + tl.sum(whole * new, 0)
        total = total * old + tl.sum(mine * new, 0)
        largest = higher
    share = tl.where(row < rows, total / tl.maximum(everything, tiny), 0.0)
    weight = share / tl.maximum(tl.sum(share, 0), tiny)
    line = (pair * M + p) * R + row
    tl.store(largest_out + line, largest)
    tl.store(weight_out + line, weight)
    tl.store(inside_out + line, weight / tl.maximum(total, tiny))
    tl.store(wanted_out + line, (tl.log2(tl.maximum(total, tiny)) + largest) / LOG2E)


@triton.jit
def _means_kernel(
    query, key, value, keep, before, largest, inside, key_sums, value_sums, best_share, best_place,
    length, kv_heads, group, rows, chunks, count,
    sq_b, sq_h, sq_k, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
    MOST: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """By split and part: its entries' keys and values, by the attention each gets of what the part gets."""
    split, splits, pair = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    q = _queries(query, batch, kv_head, group, rows, sq_b, sq_h, sq_k, HEAD, D, R).to(key.dtype.element_ty)
    key += batch * sk_b + kv_head * sk_h
    value += batch * sv_b + kv_head * sv_h
    keep += pair * length
    before += pair * (chunks + 1)
    total = tl.maximum(tl.load(before + chunks), 1)
    row, which, place = tl.arange(0, R), tl.arange(0, MOST), tl.arange(0, CHUNK)
    high = tl.load(largest + pair * M * R + row)
    inside += pair * M * R
    keys, values = tl.zeros([MOST, D], tl.float32), tl.zeros([MOST, DV], tl.float32)
    # Of the entries in each place of a chunk the one that gets most so far.
    highest = tl.full([MOST, CHUNK], -1.0, tl.float32)
    where = tl.zeros([MOST, CHUNK], tl.int32) + length
    for chunk in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, chunks)):
        k = _entries(key, chunk, length, sk_n, HEAD, D, CHUNK)
        v = _entries(value, chunk, length, sv_n, VALUE, DV, CHUNK)
        part = _parts(keep, before, chunk, total, length, count, CHUNK)
        # Keys times queries, and not the other way round: sums over rows then lie within few threads.
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * LOG2E
        weights = tl.load(inside + tl.maximum(part, 0)[:, None] * R + row[None, :])
        got = tl.sum(tl.exp2(logits - high[None, :]) * weights, 1)
        mine = which[:, None] == part[None, :]
        weighted = tl.where(mine, got[None, :], 0.0)
        keys = tl.dot(weighted.to(k.dtype), k, keys, input_precision="ieee")
        values = tl.dot(weighted.to(v.dtype), v, values, input_precision="ieee")
        better = mine & (got[None, :] > highest)
        where = tl.where(better, chunk * CHUNK + place[None, :], where)
        highest = tl.where(better, got[None, :], highest)
    best = tl.max(highest, 1)
    place_of_best = tl.min(tl.where(highest == best[:, None], where, length), 1)
    d, dv, real = tl.arange(0, D), tl.arange(0, DV), which < M
    out = (pair * splits + split) * M + which
    tl.store(key_sums + out[:, None] * D + d[None, :], keys, real[:, None])
    tl.store(value_sums + out[:, None] * DV + dv[None, :], values, real[:, None])
    tl.store(best_share + out, best, real)
    tl.store(best_place + out, place_of_best, real)


@triton.jit
def _finish_kernel(
    query, key_sums, value_sums, weight, wanted, best_share, best_place, keys_out, values_out, columns_out, real_out,
    length, kv_heads, group, rows, splits, tiny, slack, sq_b, sq_h, sq_k,
    HEAD: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Means of whole parts, and the key moved along the mean query to where its logits are the wanted ones."""
    p, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    row, some, d, dv = tl.arange(0, R), tl.arange(0, BLOCK_S), tl.arange(0, D), tl.arange(0, DV)
    key, value = tl.zeros([D], tl.float32), tl.zeros([DV], tl.float32)
    best, place = tl.full([], -1.0, tl.float32), tl.full([], 0, tl.int32) + length - 1
    for first in range(0, splits, BLOCK_S):
        here = first + some < splits
        line = (pair * splits + first + some) * M + p
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


class Tile(NamedTuple):
    """Entries that a program looks at together, and stages of software pipelining."""

    chunk: int
    stages: int


def tile_for(queries: Tensor, keys: Tensor, values: Tensor) -> Tile | None:
    """The largest tile that the device's shared memory takes; None if it takes none."""
    rows = _block(queries.shape[1] // keys.shape[1] * queries.shape[2])
    head, value = _block(keys.shape[-1]), _block(values.shape[-1])
    size = max(keys.element_size(), values.element_size())
    # The first one was measured on an H100, in bfloat16; the others are there to fit.
    for tile in (Tile(64, 3), Tile(64, 2), Tile(32, 2), Tile(16, 2)):
        # Of each stage but one the chunk's keys, values and weights; and the queries, which stay.
        chunk = tile.chunk * ((head + value) * size + rows * 4)
        if (tile.stages - 1) * chunk + rows * head * size <= shared_memory.for_tiles(keys.device):
            return tile
    return None


def _block(count: int) -> int:
    return max(16, int(triton.next_power_of_2(count)))


@on_its_device
def launch_surrogates(
    queries: Tensor, keys: Tensor, values: Tensor, keep: Tensor, count: int, tile: Tile | None = None
) -> Surrogates:
    """`core.surrogates.make` of a prompt without padding; all but ``keep`` is evicted.

    At most `MOST` of them, 128 rows of queries a KV head, and only where there is a tile (`tile_for`).
    """
    tile = tile or tile_for(queries, keys, values)
    if tile is None:
        raise ValueError(f"no tile of {keys.dtype} keys of {keys.shape[-1]} fits the device; use core.surrogates")
    batch, heads, probes, head = queries.shape
    kv_heads, length, value = keys.shape[1], keys.shape[2], values.shape[-1]
    group, pairs, chunks = heads // kv_heads, batch * kv_heads, triton.cdiv(length, tile.chunk)
    rows, splits = group * probes, triton.cdiv(length, SPLIT)
    like: dict[str, Any] = {"dtype": torch.float32, "device": keys.device}
    sizes = {"D": _block(head), "R": _block(rows), "M": count}
    dv = _block(value)
    before = torch.empty(pairs, chunks + 1, dtype=torch.int32, device=keys.device)
    highs = torch.empty(pairs, splits, sizes["R"], **like)
    sums = torch.empty(pairs, splits, count + 1, sizes["R"], **like)
    largest, inside, weight, wanted = torch.empty(4, pairs, count, sizes["R"], **like)
    key_sums = torch.empty(pairs, splits, count, sizes["D"], **like)
    value_sums = torch.empty(pairs, splits, count, dv, **like)
    best = torch.empty(pairs, splits, count, **like)
    place = torch.empty(pairs, splits, count, dtype=torch.int32, device=keys.device)
    shape = (batch, kv_heads, count)
    found = Surrogates(
        torch.empty(shape, dtype=torch.int64, device=keys.device),
        torch.empty(*shape, head, dtype=keys.dtype, device=keys.device),
        torch.empty(*shape, value, dtype=values.dtype, device=keys.device),
        torch.empty(shape, dtype=torch.bool, device=keys.device),
    )
    keep = keep.contiguous().view(torch.uint8)
    numbers = (length, kv_heads, group, rows)
    strides = (*queries.stride()[:3], *keys.stride()[:3])
    passing: dict[str, Any] = {
        "HEAD": head, "MOST": MOST, "CHUNK": tile.chunk, "SPLIT": SPLIT // tile.chunk,
        "num_warps": WARPS, "num_stages": tile.stages, **sizes,
    }  # fmt: skip
    _count_kernel[(pairs,)](keep, before, length, chunks, CHUNK=tile.chunk, LINES=128, num_warps=8)
    _sums_kernel[(splits, pairs)](
        queries, keys, keep, before, highs, sums, *numbers, chunks, count, *strides, **passing
    )
    _weights_kernel[(count, pairs)](
        highs, sums, largest, inside, weight, wanted, splits, rows, TINY, R=sizes["R"], M=count, BLOCK_S=32, num_warps=4
    )
    _means_kernel[(splits, pairs)](
        queries, keys, values, keep, before, largest, inside, key_sums, value_sums, best, place,
        *numbers, chunks, count, *strides, *values.stride()[:3], VALUE=value, DV=dv, **passing,
    )  # fmt: skip
    _finish_kernel[(count, pairs)](
        queries, key_sums, value_sums, weight, wanted, best, place, found.keys, found.values, found.columns,
        found.real.view(torch.uint8), *numbers, splits, TINY, math.log(TOO_MUCH), *strides[:3],
        HEAD=head, VALUE=value, DV=dv, BLOCK_S=32, num_warps=8, **sizes,
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


@on_its_device
def launch_put(chosen: Surrogates, keys: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """`core.surrogates.put`, and what is kept ``[B, H_kv, n]`` with the surrogates."""
    keep = keep.clone(memory_format=torch.contiguous_format)
    head, value = keys.shape[-1], values.shape[-1]
    _put_kernel[(chosen.columns.numel(),)](
        chosen.columns, chosen.keys, chosen.values, chosen.real.view(torch.uint8), keys, values,
        keep.view(torch.uint8), keys.shape[2], keys.shape[1], chosen.columns.shape[2],
        *keys.stride()[:3], *values.stride()[:3],
        HEAD=head, VALUE=value, D=triton.next_power_of_2(head), DV=triton.next_power_of_2(value), num_warps=1,
    )  # fmt: skip
    return keep
