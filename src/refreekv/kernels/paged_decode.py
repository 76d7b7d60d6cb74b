"""`kernels.paged` in Triton: attention of a few queries a sequence over its kept entries and its tail.

A sequence's entries of one KV head, segment, list and tail, in blocks one after the other, are shared out to
a fixed number of programs, whatever they hold: the grid depends on the number of rows alone, and one CUDA
graph serves any table. A second kernel joins the parts.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels import shared_memory
from refreekv.kernels.decode import multiprocessors
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.paged import COLUMNS, UNIT, PagedTable, Pool, Rows
from refreekv.kernels.probe import LOG2E, _capped
from refreekv.kernels.storage import TYPES

BLOCK = 64
"""Entries of a block, where there is the shared memory."""

PROGRAMS = 16
"""Programs that are wanted for each multiprocessor: uneven ones even out."""

_COLUMNS = tl.constexpr(COLUMNS)
_UNIT = tl.constexpr(UNIT)


@triton.jit
def _taken_on(
    q, pool, at, seen, inside, highest, total, result, scaling, softcap,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, PRODUCT: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """A softmax taken on over some entries, whose first elements are ``at``."""
    d = tl.arange(0, BLOCK_D)
    k = tl.load(pool + at[None, :] + d[:, None], inside[None, :] & (d < HEAD)[:, None], 0.0)
    v = tl.load(pool + HEAD + at[:, None] + d[None, :], inside[:, None] & (d < HEAD)[None, :], 0.0)
    logits = _capped(tl.dot(q, k.to(PRODUCT), input_precision="ieee") * scaling, softcap, HAS_CAP)
    logits = tl.where(seen, logits, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    # Nothing was seen yet where this is infinite.
    safe = tl.where(higher > float("-inf"), higher, 0.0)
    p = tl.exp2(logits - safe[:, None])
    shrink = tl.exp2(highest - safe)
    total = total * shrink + tl.sum(p, 1)
    result = result * shrink[:, None] + tl.dot(p.to(PRODUCT), v.to(PRODUCT), input_precision="ieee")
    return higher, total, result


@triton.jit
def _line_at(line, pages, offsets, inside, block_stride, LINES: tl.constexpr, LAYERS: tl.constexpr, WIDTH: tl.constexpr):
    """First elements of lines in private pages, from the pool's beginning."""
    page = line // LINES
    block = tl.load(pages + page // LAYERS, inside, 0).to(tl.int64)
    return tl.load(offsets + page % LAYERS, inside, 0) * _UNIT + block * block_stride + (line % LINES) * WIDTH


@triton.jit
def _token_at(position, blocks, own, head, inside, block_stride, token_stride, head_stride, TOKENS: tl.constexpr):
    """First elements of tokens in ordinary blocks."""
    block = tl.load(blocks + position // TOKENS, inside, 0).to(tl.int64)
    return own * _UNIT + block * block_stride + (position % TOKENS) * token_stride + head * head_stride


@triton.jit
def _listed_at(
    position, blocks, own, replaced, head, inside, block_stride, token_stride, head_stride,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """First elements of listed entries: tokens, or lines of a tensor beside the pool."""
    there = position >= 0
    token = _token_at(
        tl.maximum(position, 0), blocks, own, head, inside & there, block_stride, token_stride, head_stride, TOKENS
    )
    return tl.where(there, token, replaced * _UNIT + (-1 - position) * WIDTH)


@triton.jit(do_not_specialize=["layer"])
def _attend_kernel(
    query, pool, offsets, block_table, begins, ends, lengths, tables, slots, segments, starts, pages,
    partial, denominators,
    layer, group, scaling, softcap, sq_t, sq_h, table_stride, page_stride, block_stride, token_stride, head_stride,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    LAYERS: tl.constexpr, TOKENS: tl.constexpr, PRODUCT: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """One share of one row's entries of one KV head."""
    row, head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, shares = tl.num_programs(1), tl.num_programs(2)
    begin = tl.load(begins + row)
    count = tl.load(ends + row) - begin
    if count > 0:
        slot = tl.load(slots + row).to(tl.int64)
        length = tl.load(lengths + row)
        segment = segments + (slot * heads + head) * _COLUMNS
        first, held = tl.load(segment).to(tl.int32), tl.load(segment + 1).to(tl.int32)
        listed = tl.load(segment + 3).to(tl.int32)
        start = tl.load(starts + slot)
        ordinary = (held + BLOCK - 1) // BLOCK
        tail = ordinary + (listed + BLOCK - 1) // BLOCK
        work = tail + (tl.maximum(length - start, 0) + BLOCK - 1) // BLOCK
        low, high = share * work // shares, (share + 1) * work // shares

        m = tl.arange(0, BLOCK_M)
        asking = m < count * group
        d = tl.arange(0, BLOCK_D)
        asked = query + (begin + m // group)[:, None].to(tl.int64) * sq_t + (head * group + m % group)[:, None] * sq_h
        q = tl.load(asked + d[None, :], asking[:, None] & (d < HEAD)[None, :], 0.0).to(PRODUCT)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        own = tl.load(offsets + layer)
        blocks = block_table + tl.load(tables + row).to(tl.int64) * table_stride
        n = tl.arange(0, BLOCK)

        for block in range(low, tl.minimum(high, ordinary)):
            entry = block * BLOCK + n
            inside = entry < held
            at = _line_at(
                first + entry, pages + slot * page_stride, offsets, inside, block_stride, LINES, LAYERS, 2 * HEAD
            )
            highest, total, result = _taken_on(
                q, pool, at, inside[None, :], inside, highest, total, result, scaling, softcap,
                HEAD, BLOCK_D, PRODUCT, HAS_CAP,
            )  # fmt: skip
        if listed > 0:
            positions = tl.load(segment + 2).to(tl.pointer_type(tl.int32))
            replaced = tl.load(segment + 4)
            for block in range(tl.maximum(low, ordinary), tl.minimum(high, tail)):
                entry = (block - ordinary) * BLOCK + n
                inside = entry < listed
                at = _listed_at(
                    tl.load(positions + entry, inside, 0), blocks, own, replaced, head, inside,
                    block_stride, token_stride, head_stride, TOKENS, 2 * HEAD,
                )  # fmt: skip
                highest, total, result = _taken_on(
                    q, pool, at, inside[None, :], inside, highest, total, result, scaling, softcap,
                    HEAD, BLOCK_D, PRODUCT, HAS_CAP,
                )  # fmt: skip
        for block in range(tl.maximum(low, tail), high):
            position = start + (block - tail) * BLOCK + n
            inside = position < length
            at = _token_at(position, blocks, own, head, inside, block_stride, token_stride, head_stride, TOKENS)
            # Of several queries the earlier ones do not see the later.
            seen = position[None, :] <= (length - count + m // group)[:, None]
            highest, total, result = _taken_on(
                q, pool, at, seen & inside[None, :], inside, highest, total, result, scaling, softcap,
                HEAD, BLOCK_D, PRODUCT, HAS_CAP,
            )  # fmt: skip

        found = total > 0
        slot_of = ((row * heads + head).to(tl.int64) * shares + share) * BLOCK_M + m
        tl.store(denominators + slot_of, tl.where(found, highest + tl.log2(total), float("-inf")), asking)
        tl.store(
            partial + slot_of[:, None] * HEAD + d[None, :],
            result / tl.where(found, total, 1.0)[:, None],
            (asking & found)[:, None] & (d < HEAD)[None, :],
        )


@triton.jit
def _join_kernel(
    partial, denominators, begins, ends, sinks, out,
    group, shares, so_t, so_h,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One query of one query head: its parts, weighted by their shares of the softmax."""
    row, head, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(begins + row)
    if m < (tl.load(ends + row) - begin) * group:
        s = tl.arange(0, BLOCK_S)
        d = tl.arange(0, BLOCK_D)
        slot = ((row * tl.num_programs(1) + head).to(tl.int64) * shares + s) * BLOCK_M + m
        share = tl.load(denominators + slot, s < shares, float("-inf"))
        highest = tl.max(share, 0)
        query_head = head * group + m % group
        if HAS_SINKS:
            sink = tl.load(sinks + query_head).to(tl.float32) * LOG2E
            highest = tl.maximum(highest, sink)
        safe = tl.where(highest > float("-inf"), highest, 0.0)
        weight = tl.exp2(share - safe)
        total = tl.sum(weight, 0)
        if HAS_SINKS:
            total += tl.exp2(sink - safe)
        part = tl.load(
            partial + slot[:, None] * HEAD + d[None, :], (weight > 0)[:, None] & (d < HEAD)[None, :], 0.0
        )
        result = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
        at = out + (begin + m // group).to(tl.int64) * so_t + query_head * so_h + d
        tl.store(at, result.to(out.dtype.element_ty), d < HEAD)


@triton.jit
def _move_kernel(
    pool, offsets, segments, slot, blocks, firsts, pages, slots,
    block_stride, token_stride, head_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    LAYERS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some listed entries of one layer and head, to their lines."""
    layer, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    segment = segments + ((layer.to(tl.int64) * slots + slot) * HEADS + head) * _COLUMNS
    listed = tl.load(segment + 3).to(tl.int32)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < listed:
        inside = entry < listed
        position = tl.load(tl.load(segment + 2).to(tl.pointer_type(tl.int32)) + entry, inside, 0)
        source = _listed_at(
            position, blocks, tl.load(offsets + layer), tl.load(segment + 4), head, inside,
            block_stride, token_stride, head_stride, TOKENS, WIDTH,
        )  # fmt: skip
        line = tl.load(firsts + tl.program_id(1)).to(tl.int32) + entry
        target = _line_at(line, pages, offsets, inside, block_stride, LINES, LAYERS, WIDTH)
        w = tl.arange(0, BLOCK_W)
        real = inside[:, None] & (w < WIDTH)[None, :]
        tl.store(pool + target[:, None] + w[None, :], tl.load(pool + source[:, None] + w[None, :], real), real)


@functools.cache
def _shares(rows: int, heads: int, device: torch.device) -> int:
    """Programs for the entries of one row and head."""
    wanted = PROGRAMS * multiprocessors(device)
    return max(4, min(64, triton.cdiv(wanted, rows * heads)))


@on_its_device
def launch_paged_attention(
    query: Tensor,
    pool: Pool,
    layer: int,
    block_table: Tensor,
    rows: Rows,
    table: PagedTable,
    output: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    shares: int | None = None,
    block: int | None = None,
    warps: int | None = None,
    stages: int = 3,
) -> None:
    """Run both kernels; parameters as in `kernels.paged.paged_attention`. The last four are to be measured."""
    count, size, heads = len(rows.begins), pool.size, pool.heads
    if not count:
        return
    group = query.shape[1] // heads
    block_m = max(16, triton.next_power_of_2(group * rows.longest))
    block_d = max(16, triton.next_power_of_2(size))
    product = torch.promote_types(query.dtype, pool.cache.dtype)
    if shares is None:
        shares = _shares(count, heads, query.device)
    if block is None:
        block = BLOCK
        # Of each stage but one a block's keys and values; and the queries.
        most = shared_memory.for_tiles(query.device)
        while block > 16 and (2 * (stages - 1) * block + block_m) * block_d * product.itemsize > most:
            block //= 2
    if warps is None:
        warps = 4 if block_m * block_d <= 8192 else 8
    partial = torch.empty(count, heads, shares, block_m, size, dtype=torch.float32, device=query.device)
    denominators = torch.empty(count, heads, shares, block_m, dtype=torch.float32, device=query.device)
    _attend_kernel[(count, heads, shares)](
        query, pool.cache, pool.offsets, block_table, rows.begins, rows.ends, rows.lengths, rows.tables, rows.slots,
        table.segments[layer], table.starts, table.pages, partial, denominators,
        layer, group, scaling, 1.0 if softcap is None else softcap, query.stride(0), query.stride(1),
        block_table.stride(0), table.pages.stride(0), *pool.shared_strides(),
        HEAD=size, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK=block, LINES=pool.lines, LAYERS=pool.layers,
        TOKENS=pool.tokens, PRODUCT=TYPES[product], HAS_CAP=softcap is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _join_kernel[(count, heads, group * rows.longest)](
        partial, denominators, rows.begins, rows.ends, query if sinks is None else sinks, output,
        group, shares, output.stride(0), output.stride(1),
        HEAD=size, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_S=max(2, triton.next_power_of_2(shares)),
        HAS_SINKS=sinks is not None, num_warps=4,
    )  # fmt: skip


@on_its_device
def launch_move(
    cache_of: Pool, table: PagedTable, slot: int, blocks: Tensor, firsts: Tensor, pages: Tensor, longest: int
) -> None:
    """Run the copy; parameters as in `kernels.paged.move_to_pages`."""
    pool, width = cache_of, 2 * cache_of.size
    if not longest:
        return
    _move_kernel[(triton.cdiv(longest, 16), pool.layers * pool.heads)](
        pool.cache, pool.offsets, table.segments, slot, blocks, firsts, pages, table.segments.shape[1],
        *pool.shared_strides(),
        HEADS=pool.heads, WIDTH=width, BLOCK_W=triton.next_power_of_2(width), BLOCK=16, LINES=pool.lines,
        LAYERS=pool.layers, TOKENS=pool.tokens, num_warps=4,
    )  # fmt: skip
