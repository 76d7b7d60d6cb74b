"""`kernels.paged` in Triton: attention of a few queries a sequence over its kept entries and its tail.

A sequence's entries of one KV head, segment, list and tail, in blocks one after the other, are shared out to
a fixed number of programs, whatever they hold: the grid depends on the number of rows alone, and one CUDA
graph serves any table. A second kernel joins the parts. What codes say is left in code space, and rotated back for
all heads together.
"""

# Tuples of another length have another type, and Triton's have as many parts as there are planes.
# mypy: disable-error-code="assignment"

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat, step
from refreekv.kernels import shared_memory
from refreekv.kernels.decode import multiprocessors
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.paged import COLUMNS, UNIT, PagedTable, Pool, Rows
from refreekv.kernels.paged_exact import line_at, listed_at, taken_on, token_at
from refreekv.kernels.probe import LOG2E, _capped
from refreekv.kernels.storage import TYPES

BLOCK = 128
"""Entries of a block, where there is the shared memory."""

CODED_BLOCK = 128
"""Coded entries of a block."""

PROGRAMS = 16
"""Programs that are wanted for each multiprocessor: uneven ones even out."""

_COLUMNS = tl.constexpr(COLUMNS)
_UNIT = tl.constexpr(UNIT)


@triton.jit
def _field(byte, shift: tl.constexpr, mask: tl.constexpr, LIFT: tl.constexpr, PRODUCT: tl.constexpr):
    """A field of bytes as a number: its bits in the mantissa of ``LIFT``, a power of two, where they fit there.

    In bfloat16 it stays so much higher, see `_base`.
    """
    x = (byte.to(tl.int32) >> shift) & mask
    if LIFT == 1024:
        number = (x | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
    elif LIFT == 128 and mask < 128:
        number = (x | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        number = x.to(tl.float32).to(PRODUCT)
    return number


@triton.jit
def _part_of(asked, asking, first: tl.constexpr, count: tl.constexpr, BLOCK_P: tl.constexpr, PRODUCT: tl.constexpr):
    """Some channels of queries in code space."""
    c = tl.arange(0, BLOCK_P)
    return tl.load(asked + first + c[None, :], asking[:, None] & (c < count)[None, :], 0.0).to(PRODUCT)


@triton.jit
def _coded_products(
    whole, halves, quarters, bytes_of, at, inside,
    BITS: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
    LIFT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Queries times the codes of keys, which are `_base` above their levels."""
    if BITS == 8:
        c = tl.arange(0, BLOCK_D)
        k = tl.load(bytes_of + at[None, :] + c[:, None], inside[None, :] & (c < HEAD)[:, None], 0)
        product = tl.dot(whole[0], _field(k, 0, 255, LIFT, PRODUCT), input_precision="ieee")
    else:
        c = tl.arange(0, BLOCK_H)
        k = tl.load(bytes_of + at[None, :] + c[:, None], inside[None, :] & (c < HEAD // 2)[:, None], 0)
        product = tl.dot(halves[0], _field(k, 0, 15, LIFT, PRODUCT), input_precision="ieee")
        product = tl.dot(halves[1], _field(k, 4, 15, LIFT, PRODUCT), product, input_precision="ieee")
        if BITS == 6:
            c = tl.arange(0, BLOCK_Q)
            low = at + HEAD // 2
            k = tl.load(bytes_of + low[None, :] + c[:, None], inside[None, :] & (c < HEAD // 4)[:, None], 0)
            product *= 4.0
            product = tl.dot(quarters[0], _field(k, 0, 3, LIFT, PRODUCT), product, input_precision="ieee")
            product = tl.dot(quarters[1], _field(k, 2, 3, LIFT, PRODUCT), product, input_precision="ieee")
            product = tl.dot(quarters[2], _field(k, 4, 3, LIFT, PRODUCT), product, input_precision="ieee")
            product = tl.dot(quarters[3], _field(k, 6, 3, LIFT, PRODUCT), product, input_precision="ieee")
    return product


@triton.jit(do_not_specialize=["layer"])
def _attend_kernel(
    query, rotated, pool, offsets, block_table, begins, ends, lengths, tables, slots, segments, coded, means, starts,
    pages, partial, coded_partial, masses, denominators,
    layer, group, most, scaling, softcap, sq_t, sq_h, table_stride, page_stride,
    block_stride, token_stride, head_stride,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    LAYERS: tl.constexpr, TOKENS: tl.constexpr, PRODUCT: tl.constexpr, HAS_CAP: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr,
    KEY_BASE: tl.constexpr, VALUE_BASE: tl.constexpr, KEY_BYTES: tl.constexpr, LINE: tl.constexpr,
    CODED_LINES: tl.constexpr, ITEM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_V: tl.constexpr, CODED_BLOCK: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """One share of one row's entries of one KV head. ``KEY_BITS`` 0: nothing is coded."""
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
        packed = 0
        if KEY_BITS:
            coded_segment = coded + (slot * heads + head) * 2
            coded_first, coded_count = tl.load(coded_segment).to(tl.int32), tl.load(coded_segment + 1).to(tl.int32)
            packed = (coded_count + CODED_BLOCK - 1) // CODED_BLOCK
        ordinary = packed + (held + BLOCK - 1) // BLOCK
        tail = ordinary + (listed + BLOCK - 1) // BLOCK
        work = tail + (tl.maximum(length - start, 0) + BLOCK - 1) // BLOCK
        low, high = share * work // shares, (share + 1) * work // shares

        m = tl.arange(0, BLOCK_M)
        asking = m < count * group
        d = tl.arange(0, BLOCK_D)
        asked = (begin + m // group)[:, None].to(tl.int64) * sq_t + (head * group + m % group)[:, None] * sq_h
        q = tl.load(query + asked + d[None, :], asking[:, None] & (d < HEAD)[None, :], 0.0).to(PRODUCT)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        own = tl.load(offsets + layer)
        blocks = block_table + tl.load(tables + row).to(tl.int64) * table_stride
        n = tl.arange(0, BLOCK)

        if KEY_BITS:
            # Codes come first, so that their sums are rescaled once more and no more.
            of = rotated + (begin + m // group)[:, None].to(tl.int64) * (heads * group * HEAD)
            of += (head * group + m % group)[:, None] * HEAD
            whole = (_part_of(of, asking, 0, HEAD, BLOCK_D, PRODUCT),)
            halves, quarters = whole, whole
            if KEY_BITS != 8:
                halves = (
                    _part_of(of, asking, 0, HEAD // 2, BLOCK_H, PRODUCT),
                    _part_of(of, asking, HEAD // 2, HEAD // 2, BLOCK_H, PRODUCT),
                )
            if KEY_BITS == 6:
                quarters = (
                    _part_of(of, asking, 0, HEAD // 4, BLOCK_Q, PRODUCT),
                    _part_of(of, asking, HEAD // 4, HEAD // 4, BLOCK_Q, PRODUCT),
                    _part_of(of, asking, 2 * (HEAD // 4), HEAD // 4, BLOCK_Q, PRODUCT),
                    _part_of(of, asking, 3 * (HEAD // 4), HEAD // 4, BLOCK_Q, PRODUCT),
                )
            base = tl.sum(whole[0].to(tl.float32), 1) * KEY_BASE
            mean = tl.load(means + (slot * heads + head) * HEAD + d, d < HEAD, 0.0)
            of_mean = tl.sum(q.to(tl.float32) * mean[None, :], 1)
            v = tl.arange(0, BLOCK_V)
            low_half = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            high_half = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            weights = tl.zeros([BLOCK_M], tl.float32)
            bytes_of = pool.to(tl.pointer_type(tl.uint8))
            entry_of = tl.arange(0, CODED_BLOCK)
            for block in range(low, tl.minimum(high, packed)):
                entry = block * CODED_BLOCK + entry_of
                inside = entry < coded_count
                line = coded_first + entry
                page = line // CODED_LINES
                there = tl.load(pages + slot * page_stride + page // LAYERS, inside, 0).to(tl.int64)
                at = (tl.load(offsets + page % LAYERS, inside, 0) * _UNIT + there * block_stride) * ITEM
                factors = (bytes_of + at + CODED_LINES * LINE).to(tl.pointer_type(tl.uint32))
                factor = tl.load(factors + line % CODED_LINES, inside, 0)
                key_factor = (factor & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                value_factor = (factor >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                at += (line % CODED_LINES) * LINE
                product = _coded_products(
                    whole,
                    halves,
                    quarters,
                    bytes_of,
                    at,
                    inside,
                    KEY_BITS,
                    HEAD,
                    BLOCK_D,
                    BLOCK_H,
                    BLOCK_Q,
                    LIFT,
                    PRODUCT,
                )
                logits = (product - base[:, None]) * (key_factor * KEY_STEP)[None, :] + of_mean[:, None]
                logits = _capped(logits * scaling, softcap, HAS_CAP)
                logits = tl.where(inside[None, :], logits, float("-inf"))
                higher = tl.maximum(highest, tl.max(logits, 1))
                safe = tl.where(higher > float("-inf"), higher, 0.0)
                p = tl.exp2(logits - safe[:, None])
                shrink = tl.exp2(highest - safe)
                total = total * shrink + tl.sum(p, 1)
                weight = (p * value_factor[None, :]).to(PRODUCT)
                weights = weights * shrink + tl.sum(weight.to(tl.float32), 1)
                wanted = inside[:, None] & (v < (HEAD * VALUE_BITS // 8))[None, :]
                content = tl.load(bytes_of + at[:, None] + KEY_BYTES + v[None, :], wanted, 0)
                low_half *= shrink[:, None]
                if VALUE_BITS == 8:
                    low_half = tl.dot(weight, _field(content, 0, 255, LIFT, PRODUCT), low_half, input_precision="ieee")
                else:
                    high_half *= shrink[:, None]
                    low_half = tl.dot(weight, _field(content, 0, 15, LIFT, PRODUCT), low_half, input_precision="ieee")
                    high_half = tl.dot(weight, _field(content, 4, 15, LIFT, PRODUCT), high_half, input_precision="ieee")
                highest = higher
            coded_highest, coded_mass = highest, total

        result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for block in range(tl.maximum(low, packed), tl.minimum(high, ordinary)):
            entry = (block - packed) * BLOCK + n
            inside = entry < held
            at = line_at(
                first + entry, pages + slot * page_stride, offsets, inside, block_stride, LINES, LAYERS, 2 * HEAD
            )
            highest, total, result = taken_on(
                q, pool, at, inside[None, :], inside, highest, total, result, scaling, softcap,
                HEAD, BLOCK_D, PRODUCT, HAS_CAP,
            )  # fmt: skip
        if listed > 0:
            positions = tl.load(segment + 2).to(tl.pointer_type(tl.int32))
            replaced = tl.load(segment + 4)
            for block in range(tl.maximum(low, ordinary), tl.minimum(high, tail)):
                entry = (block - ordinary) * BLOCK + n
                inside = entry < listed
                at = listed_at(
                    tl.load(positions + entry, inside, 0), blocks, own, replaced, head, inside,
                    block_stride, token_stride, head_stride, TOKENS, 2 * HEAD,
                )  # fmt: skip
                highest, total, result = taken_on(
                    q, pool, at, inside[None, :], inside, highest, total, result, scaling, softcap,
                    HEAD, BLOCK_D, PRODUCT, HAS_CAP,
                )  # fmt: skip
        for block in range(tl.maximum(low, tail), high):
            position = start + (block - tail) * BLOCK + n
            inside = position < length
            at = token_at(position, blocks, own, head, inside, block_stride, token_stride, head_stride, TOKENS)
            # Of several queries the earlier ones do not see the later.
            seen = position[None, :] <= (length - count + m // group)[:, None]
            highest, total, result = taken_on(
                q, pool, at, seen & inside[None, :], inside, highest, total, result, scaling, softcap,
                HEAD, BLOCK_D, PRODUCT, HAS_CAP,
            )  # fmt: skip

        found = total > 0
        unit = 1.0 / tl.where(found, total, 1.0)
        slot_of = ((row * heads + head).to(tl.int64) * shares + share) * most + m
        real = asking & found
        tl.store(denominators + slot_of, tl.where(found, highest + tl.log2(total), float("-inf")), asking)
        tl.store(
            partial + slot_of[:, None] * HEAD + d[None, :], result * unit[:, None], real[:, None] & (d < HEAD)[None, :]
        )
        if KEY_BITS:
            unit *= tl.exp2(coded_highest - tl.where(found, highest, 0.0))
            tl.store(masses + slot_of, coded_mass * unit, real)
            unit *= VALUE_STEP
            less = weights * VALUE_BASE
            PART: tl.constexpr = HEAD * VALUE_BITS // 8
            at = coded_partial + slot_of[:, None] * HEAD + v[None, :]
            wanted = real[:, None] & (v < PART)[None, :]
            tl.store(at, (low_half - less[:, None]) * unit[:, None], wanted)
            if VALUE_BITS != 8:
                tl.store(at + PART, (high_half - less[:, None]) * unit[:, None], wanted)


@triton.jit
def _join_kernel(
    partial, coded_partial, masses, denominators, begins, ends, slots, means, sinks, out, coded_out,
    group, shares, so_t, so_h,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, HAS_SINKS: tl.constexpr,
    CODED: tl.constexpr,
):  # fmt: skip
    """One query of one query head: its parts, weighted by their shares of the softmax."""
    row, head, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    begin = tl.load(begins + row)
    if m < (tl.load(ends + row) - begin) * group:
        s = tl.arange(0, BLOCK_S)
        d = tl.arange(0, BLOCK_D)
        slot = ((row * heads + head).to(tl.int64) * shares + s) * tl.num_programs(2) + m
        share = tl.load(denominators + slot, s < shares, float("-inf"))
        highest = tl.max(share, 0)
        query_head = head * group + m % group
        token = (begin + m // group).to(tl.int64)
        if HAS_SINKS:
            sink = tl.load(sinks + query_head).to(tl.float32) * LOG2E
            highest = tl.maximum(highest, sink)
        safe = tl.where(highest > float("-inf"), highest, 0.0)
        weight = tl.exp2(share - safe)
        total = tl.sum(weight, 0)
        if HAS_SINKS:
            total += tl.exp2(sink - safe)
        weight = weight / tl.where(total > 0, total, 1.0)
        wanted = (weight > 0)[:, None] & (d < HEAD)[None, :]
        part = tl.load(partial + slot[:, None] * HEAD + d[None, :], wanted, 0.0)
        result = tl.sum(part * weight[:, None], 0)
        if CODED:
            mass = tl.sum(tl.load(masses + slot, weight > 0, 0.0) * weight, 0)
            own = tl.load(slots + row).to(tl.int64) * heads + head
            result += mass * tl.load(means + own * HEAD + d, d < HEAD, 0.0)
            part = tl.load(coded_partial + slot[:, None] * HEAD + d[None, :], wanted, 0.0)
            at = coded_out + (token * heads * group + query_head) * HEAD + d
            tl.store(at, tl.sum(part * weight[:, None], 0).to(coded_out.dtype.element_ty), d < HEAD)
        at = out + token * so_t + query_head * so_h + d
        tl.store(at, result.to(out.dtype.element_ty), d < HEAD)


@functools.cache
def _shares(rows: int, heads: int, device: torch.device) -> int:
    """Programs for the entries of one row and head."""
    wanted = PROGRAMS * multiprocessors(device)
    return max(4, min(64, -(-wanted // (rows * heads))))


def _base(bits: int, lift: int) -> float:
    """How much higher than a level, in steps, the number is that products are taken of (see `_field`)."""
    times = {8: 0, 6: 5, 4: 1}[bits] if lift == 128 else 0
    return float(times * lift) + (2.0**bits - 1.0) / 2


@functools.cache
def _coding(form: PackedFormat, pool_lines: int, item: int, product: torch.dtype) -> dict[str, Any]:
    """What the kernel is told of coded lines."""
    (keys,), (values,) = set(form.key_widths), set(form.value_widths)
    size = form.value_size
    lift = {torch.bfloat16: 128, torch.float16: 1024}.get(product, 0)
    return {
        "KEY_BITS": keys, "VALUE_BITS": values, "KEY_STEP": step(keys), "VALUE_STEP": step(values),
        "KEY_BASE": _base(keys, lift), "VALUE_BASE": _base(values, lift), "LIFT": lift, "KEY_BYTES": form.keys.bytes,
        "LINE": form.line_bytes, "CODED_LINES": pool_lines * 2 * size * item // form.entry_bytes, "ITEM": item,
        "BLOCK_H": max(16, triton.next_power_of_2(size // 2)), "BLOCK_Q": max(16, triton.next_power_of_2(size // 4)),
        "BLOCK_V": max(16, triton.next_power_of_2(size * values // 8)), "CODED_BLOCK": CODED_BLOCK,
    }  # fmt: skip


NOTHING_CODED = {
    "KEY_BITS": 0, "VALUE_BITS": 0, "KEY_STEP": 0.0, "VALUE_STEP": 0.0, "KEY_BASE": 0.0, "VALUE_BASE": 0.0,
    "KEY_BYTES": 0, "LINE": 0, "CODED_LINES": 0, "ITEM": 0, "BLOCK_H": 0, "BLOCK_Q": 0, "BLOCK_V": 0, "CODED_BLOCK": 0,
    "LIFT": 0,
}  # fmt: skip


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
    stages: int = 2,
) -> None:
    """Run the kernels; parameters as in `kernels.paged.paged_attention`. The last four are to be measured."""
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
    device, slots = query.device, (count, heads, shares, group * rows.longest)
    partial = torch.empty(*slots, size, dtype=torch.float32, device=device)
    denominators = torch.empty(slots, dtype=torch.float32, device=device)
    coded, rotated, coded_out, coded_partial, masses = table.coded, query, query, partial, denominators
    segments = key_means = value_means = denominators
    options: dict[str, Any] = NOTHING_CODED
    if coded is not None:
        options = _coding(coded.forms[0], pool.lines, pool.cache.element_size(), product)
        rotated = torch.matmul(query, coded.rotation)  # [T, H, D]
        # Of queries that are in no row nothing may be added.
        coded_out = torch.zeros(query.shape, dtype=query.dtype, device=device)
        coded_partial, masses = torch.empty_like(partial), torch.empty_like(denominators)
        segments, key_means = coded.segments[layer], coded.key_means[layer]
        value_means = coded.value_means[layer]
    _attend_kernel[(count, heads, shares)](
        query, rotated, pool.cache, pool.offsets, block_table, rows.begins, rows.ends, rows.lengths, rows.tables,
        rows.slots, table.segments[layer], segments, key_means, table.starts, table.pages, partial, coded_partial,
        masses, denominators,
        layer, group, group * rows.longest, scaling, 1.0 if softcap is None else softcap,
        query.stride(0), query.stride(1),
        block_table.stride(0), table.pages.stride(0), *pool.shared_strides(),
        HEAD=size, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK=block, LINES=pool.lines, LAYERS=pool.layers,
        TOKENS=pool.tokens, PRODUCT=TYPES[product], HAS_CAP=softcap is not None, **options,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _join_kernel[(count, heads, group * rows.longest)](
        partial, coded_partial, masses, denominators, rows.begins, rows.ends, rows.slots, value_means,
        query if sinks is None else sinks, output, coded_out,
        group, shares, output.stride(0), output.stride(1),
        HEAD=size, BLOCK_D=block_d, BLOCK_S=max(2, triton.next_power_of_2(shares)),
        HAS_SINKS=sinks is not None, CODED=coded is not None, num_warps=4,
    )  # fmt: skip
    if coded is not None:
        flat = output.view(-1, size)
        flat.addmm_(coded_out.view(-1, size), coded.rotation.T)
