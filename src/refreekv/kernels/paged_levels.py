"""`kernels.paged` in Triton: attention of a few queries a sequence over its kept entries, coded or not, and its tail.

What a sequence has of one KV head, in blocks one after the other (the lines of each rung, those that were coded later
behind the others of theirs, segment, list, tail), is shared out by bytes to a fixed number of programs, whatever it
holds: the grid depends on the number of rows alone, and one CUDA graph serves any table. A program leaves a part of the
softmax for each rung, in code space, and one for all that is exact; `kernels.paged_join` has what is before and after.

Lines are read by `kernels.packed_block`. A block of them lies within a page, so that it has one address.
"""

# Tuples of another length have another type, and Triton's have as many parts as lines have tiles.
# mypy: disable-error-code="assignment, misc"

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat
from refreekv.kernels import paged, shared_memory
from refreekv.kernels.decode import multiprocessors
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.packed_block import (
    UNIT,
    apart,
    constant,
    level_of,
    lines_taken_on,
    nothing_yet,
    put_results,
    queries_of,
)  # fmt: skip
from refreekv.kernels.paged import COLUMNS, PagedTable, Pool, Rows
from refreekv.kernels.paged_exact import line_at, listed_at, taken_on, token_at
from refreekv.kernels.paged_join import MOST_SHARES, TOLD, Parts, join, prepare
from refreekv.kernels.storage import TYPES

EXACT_BLOCK, BESIDE_CODES = 128, 32
"""Entries of a block, where there is the shared memory: where nothing is coded, and where something may be."""

CODED_BLOCK = 64
"""Lines of a block, at most."""

PROGRAMS = 16
"""Programs that are wanted for each multiprocessor: uneven ones even out."""

COST = 2048
"""Bytes that work is counted in."""

REGISTERS = 128
"""Of a thread, at most, where several rungs are read: so four programs have room on a multiprocessor."""

_COLUMNS = tl.constexpr(COLUMNS)
_UNIT = tl.constexpr(paged.UNIT)


# -- shares ---------------------------------------------------------------------------------------


@triton.jit
def _own(low, high, begin, count, COST: tl.constexpr):
    """Which of ``count`` blocks begin between two places of the list, of which each takes so much from ``begin`` on."""
    first = tl.minimum((tl.maximum(low - begin, 0) + COST - 1) // COST, count)
    stop = tl.minimum((tl.maximum(high - begin, 0) + COST - 1) // COST, count)
    return first, stop


@triton.jit
def _unit_of(line, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """The block that a line of coded pages is in; each page begins with a block of its own."""
    return line // LINES * ((LINES + BLOCK - 1) // BLOCK) + line % LINES // BLOCK


@triton.jit
def _page_at(page, pages, offsets, block_stride, LAYERS: tl.constexpr):
    """First element of a private page, from the pool's beginning."""
    there = tl.load(pages + page // LAYERS).to(tl.int64)
    return tl.load(offsets + page % LAYERS) * _UNIT + there * block_stride


@triton.jit
def _coded_page(
    unit, begin, own, later, layer, PER_PAGE: tl.constexpr, GENERATED: tl.constexpr, BLOCK: tl.constexpr,
    LAYERS: tl.constexpr,
):  # fmt: skip
    """The page of a block of a rung: behind its ``own`` ones those of tokens that were coded later."""
    page = (begin + unit) // PER_PAGE
    if GENERATED:
        block = (unit - own) // ((GENERATED + BLOCK - 1) // BLOCK)
        page = tl.where(unit < own, page, (later + block) * LAYERS + layer)
    return page


# -- attention ------------------------------------------------------------------------------------


@triton.jit
def _rung(
    asked, scales, shifts, bytes_of, offsets, pages, partial, denominators, first, count, own, later, layer, head,
    low, high, asking, softcap, block_stride,
    LEVEL: tl.constexpr, HEAD: tl.constexpr, FIELDS: tl.constexpr, LAYERS: tl.constexpr, ITEM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr, HAS_CAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Blocks ``low`` to ``high`` of a rung, counted from its first one; as `packed_decode` reads.

    The first ``own`` ones are those of its segment, the others those of tokens that were coded later.
    """
    KEYS: tl.constexpr = constant(LEVEL, 0)
    VALUES: tl.constexpr = constant(LEVEL, 1)
    LINE: tl.constexpr = constant(LEVEL, 2)
    KEY_CHUNKS: tl.constexpr = constant(LEVEL, 3)
    VALUE_CHUNKS: tl.constexpr = constant(LEVEL, 4)
    LINES: tl.constexpr = constant(LEVEL, 5)
    GENERATED: tl.constexpr = constant(LEVEL, 7)
    PER_PAGE: tl.constexpr = (LINES + BLOCK - 1) // BLOCK
    dtype: tl.constexpr = tl.float16 if HALF else tl.float32
    g = tl.arange(0, BLOCK_G)
    scale = tl.load(scales + g, asking, 0.0) * UNIT
    shift = tl.load(shifts + g, asking, 0.0)
    q, lacking = queries_of(asked + g * HEAD, asking, KEYS, KEY_CHUNKS, dtype, BLOCK_G)
    highest, total, weighed, results = nothing_yet(VALUES, VALUE_CHUNKS, BLOCK, BLOCK_G)
    begin = _unit_of(first, LINES, BLOCK)
    page = _coded_page(low, begin, own, later, layer, PER_PAGE, GENERATED, BLOCK, LAYERS)
    at = _page_at(page, pages, offsets, block_stride, LAYERS)
    for unit in range(low, high):
        page = (begin + unit) // PER_PAGE
        base = bytes_of + at * ITEM
        # Pages and lines begin at such multiples, which Triton cannot know of a number.
        lines = tl.multiple_of(base.to(tl.pointer_type(tl.uint16)), 16 if LINE % 16 == 0 else 8)
        factors = tl.multiple_of((base + LINES * LINE).to(tl.pointer_type(tl.uint32)), 4)
        # Looked up a block ahead: so lines are fetched as many blocks ahead as there are stages.
        following = tl.minimum(unit + 1, high - 1)
        following = _coded_page(following, begin, own, later, layer, PER_PAGE, GENERATED, BLOCK, LAYERS)
        at = _page_at(following, pages, offsets, block_stride, LAYERS)
        # In lines of the page; a segment ends and begins anywhere in it.
        least = tl.maximum(first - page * LINES, 0)
        last = tl.minimum(first + count - page * LINES, LINES) - 1
        start = (begin + unit) % PER_PAGE * BLOCK
        if GENERATED:
            inner = unit < own
            within = (unit - own) % ((GENERATED + BLOCK - 1) // BLOCK) * BLOCK
            start = tl.where(inner, start, head * GENERATED + within)
            least = tl.where(inner, least, head * GENERATED)
            last = tl.where(inner, last, head * GENERATED + GENERATED - 1)
        n = start + tl.arange(0, BLOCK)
        inside = (n >= least) & (n <= last)
        # Of others the next one in the segment, which will have no weight: this takes less than masks do.
        line = tl.minimum(tl.maximum(n, least), last)
        highest, total, weighed, results = lines_taken_on(
            lines, factors, line, inside, q, lacking, scale, shift, softcap, highest, total, weighed, results,
            KEYS, VALUES, LINE, KEY_CHUNKS, VALUE_CHUNKS, dtype, BLOCK, BLOCK_G, HAS_CAP, ASSEMBLY,
        )  # fmt: skip
    denominator = tl.sum(total, 0)
    sum_of_all = highest + tl.log2(denominator)
    # What the mean key adds is the same for all of the segment's entries.
    tl.store(denominators + g, sum_of_all if HAS_CAP else sum_of_all + shift, asking)
    put_results(partial + g * FIELDS, asking, denominator, weighed, results, VALUES, VALUE_CHUNKS)


@triton.jit(do_not_specialize=[*TOLD, "layer", "table_stride", "page_stride"])
def _paged_levels_kernel(
    query, asked, scales, shifts, pool, offsets, block_table, begins, ends, lengths, tables, slots, segments, coded,
    generated, starts, pages, partial, denominators,
    layer, group, most, scaling, softcap, sq_t, sq_h, table_stride, page_stride,
    block_stride, token_stride, head_stride,
    HEAD: tl.constexpr, FIELDS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    LINES: tl.constexpr, LAYERS: tl.constexpr, TOKENS: tl.constexpr, PRODUCT: tl.constexpr, HAS_CAP: tl.constexpr,
    RUNGS: tl.constexpr, LEVELS: tl.constexpr, COST: tl.constexpr, ITEM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_G: tl.constexpr, CODED_BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One share of what one row has of one KV head."""
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
        own_pages = pages + slot * page_stride
        work = tl.zeros([], tl.int32)
        firsts, counts, owns, units, places = (), (), (), (), ()
        later = 0
        if RUNGS:
            later = tl.load(generated + slot * 2)
        for r in tl.static_range(RUNGS):
            at_rung = coded + ((slot * heads + head) * RUNGS + r) * 2
            line, lines = tl.load(at_rung).to(tl.int32), tl.load(at_rung + 1).to(tl.int32)
            blocks_of = tl.where(
                lines > 0,
                _unit_of(line + lines - 1, constant(LEVELS, r, 5), CODED_BLOCK)
                + 1
                - _unit_of(line, constant(LEVELS, r, 5), CODED_BLOCK),
                0,
            )
            firsts, counts, owns, places = firsts + (line,), counts + (lines,), owns + (blocks_of,), places + (work,)
            if constant(LEVELS, r, 7):
                each = (constant(LEVELS, r, 7) + CODED_BLOCK - 1) // CODED_BLOCK
                blocks_of += tl.load(generated + slot * 2 + 1) * each
            units = units + (blocks_of,)
            work += blocks_of * constant(LEVELS, r, 6)
        packed = work
        held_blocks, listed_blocks = (held + BLOCK - 1) // BLOCK, (listed + BLOCK - 1) // BLOCK
        tail_blocks = (tl.maximum(length - start, 0) + BLOCK - 1) // BLOCK
        ordinary = packed + held_blocks * COST
        tail = ordinary + listed_blocks * COST
        work = tail + tail_blocks * COST
        # In 64 bits: work times shares may pass 2 ** 31 on long sequences.
        low = (share.to(tl.int64) * work // shares).to(tl.int32)
        high = ((share + 1).to(tl.int64) * work // shares).to(tl.int32)

        m = tl.arange(0, BLOCK_M)
        asking = m < count * group
        d = tl.arange(0, BLOCK_D)
        PARTS: tl.constexpr = RUNGS + 1
        slot_of = (((row * heads + head).to(tl.int64) * shares + share) * PARTS) * most
        mine = (row * heads + head).to(tl.int64) * most
        g = tl.arange(0, BLOCK_G)
        asking_g = g < count * group
        for r in tl.static_range(RUNGS):
            some, stop = _own(low, high, places[r], units[r], constant(LEVELS, r, 6))
            part_at = slot_of + (r + 1) * most
            if stop > some:
                _rung(
                    asked + mine * HEAD, scales + mine, shifts + mine, pool.to(tl.pointer_type(tl.uint8)), offsets,
                    own_pages, partial + part_at * FIELDS, denominators + part_at, firsts[r], counts[r], owns[r], later,
                    layer, head, some, stop, asking_g, softcap, block_stride,
                    constant(LEVELS, r), HEAD, FIELDS, LAYERS, ITEM, HALF, BLOCK_G, CODED_BLOCK, HAS_CAP, ASSEMBLY,
                )  # fmt: skip
            else:
                tl.store(denominators + part_at + g, tl.full([BLOCK_G], float("-inf"), tl.float32), asking_g)

        query_at = (begin + m // group)[:, None].to(tl.int64) * sq_t + (head * group + m % group)[:, None] * sq_h
        q = tl.load(query + query_at + d[None, :], asking[:, None] & (d < HEAD)[None, :], 0.0).to(PRODUCT)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        own = tl.load(offsets + layer)
        blocks = block_table + tl.load(tables + row).to(tl.int64) * table_stride
        n = tl.arange(0, BLOCK)
        some, stop = _own(low, high, packed, held_blocks, COST)
        for block in range(some, stop):
            entry = block * BLOCK + n
            inside = entry < held
            at = line_at(first + entry, own_pages, offsets, inside, block_stride, LINES, LAYERS, 2 * HEAD)
            highest, total, result = taken_on(
                q, pool, at, inside[None, :], inside, highest, total, result, scaling, softcap,
                HEAD, BLOCK_D, PRODUCT, HAS_CAP,
            )  # fmt: skip
        if listed > 0:
            positions = tl.load(segment + 2).to(tl.pointer_type(tl.int32))
            replaced = tl.load(segment + 4)
            some, stop = _own(low, high, ordinary, listed_blocks, COST)
            for block in range(some, stop):
                entry = block * BLOCK + n
                inside = entry < listed
                at = listed_at(
                    tl.load(positions + entry, inside, 0), blocks, own, replaced, head, inside,
                    block_stride, token_stride, head_stride, TOKENS, 2 * HEAD,
                )  # fmt: skip
                highest, total, result = taken_on(
                    q, pool, at, inside[None, :], inside, highest, total, result, scaling, softcap,
                    HEAD, BLOCK_D, PRODUCT, HAS_CAP,
                )  # fmt: skip
        some, stop = _own(low, high, tail, tail_blocks, COST)
        for block in range(some, stop):
            position = start + block * BLOCK + n
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
        tl.store(denominators + slot_of + m, tl.where(found, highest + tl.log2(total), float("-inf")), asking)
        tl.store(
            partial + (slot_of + m)[:, None] * FIELDS + d[None, :],
            result * unit[:, None],
            (asking & found)[:, None] & (d < HEAD)[None, :],
        )


@functools.cache
def _shares(rows: int, heads: int, device: torch.device) -> int:
    """Programs for the entries of one row and head."""
    wanted = PROGRAMS * multiprocessors(device)
    return max(4, min(MOST_SHARES, -(-wanted // (rows * heads))))


@functools.cache
def _levels(
    forms: tuple[PackedFormat, ...], page_bytes: int, block: int, generated: int, tokens: int
) -> tuple[tuple[Any, ...], ...]:
    """What the kernel is told of each rung: as `packed_decode`, lines of a page, and what a block costs.

    Then tokens of a private block in the rung of those that are coded later, 0 in others.
    """
    found = []
    for rung, form in enumerate(forms):
        cost = max(1, round(block * form.entry_bytes / COST))
        more = tokens if rung == generated else 0
        found.append((*level_of(form)[:5], page_bytes // form.entry_bytes, cost, more))
    return tuple(found)


@on_its_device
def launch_paged_levels(
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
    stages: int | None = None,
    coded_block: int | None = None,
    registers: int | None = None,
    assembly: bool | None = None,
) -> None:
    """Run the kernels; parameters as in `kernels.paged.paged_attention`, those from ``shares`` on to be measured."""
    count, size, heads = len(rows.begins), pool.size, pool.heads
    if not count:
        return
    coded, group = table.coded, query.shape[1] // heads
    forms = () if coded is None else coded.forms
    most = group * rows.longest
    block_m = max(16, triton.next_power_of_2(most))
    block_d = max(16, triton.next_power_of_2(size))
    product, item = torch.promote_types(query.dtype, pool.cache.dtype), pool.cache.element_size()
    if shares is None:
        shares = _shares(count, heads, query.device)
    if stages is None:
        stages = 2
    if block is None:
        block = BESIDE_CODES if forms else EXACT_BLOCK
        # Of each stage but one a block's keys and values; and the queries.
        free = shared_memory.for_tiles(query.device)
        while block > 16 and (2 * (stages - 1) * block + block_m) * block_d * product.itemsize > free:
            block //= 2
    if warps is None:
        # One rung's code is short enough that two warps fill the device; of several the registers are the limit.
        warps = (2 if len(forms) == 1 and product.itemsize == 2 else 4) if block_m * block_d <= 8192 else 8
    if registers is None and len(forms) > 1 and warps == 4:
        registers = REGISTERS
    if coded_block is None:
        coded_block = CODED_BLOCK if product.itemsize == 2 and most <= 16 else 16
    fields = size * (2 if any(apart(form)[1] for form in forms) else 1)
    parts = Parts.empty(count, heads, shares, 1 + len(forms), most, fields, query.device)
    asked = scales = shifts = query
    segments, generated, rung, tokens = table.segments[layer], table.starts, -1, 0
    if coded is not None:
        generated, rung = coded.generated, coded.rung
        tokens = pool.coded_tokens(forms[rung])
        asked, scales, shifts = prepare(query, rows, coded, layer, scaling, softcap)
        segments = coded.segments[layer]
    options: dict[str, Any] = {} if registers is None else {"maxnreg": registers}
    _paged_levels_kernel[(count, heads, shares)](
        query, asked, scales, shifts, pool.cache, pool.offsets, block_table, rows.begins, rows.ends, rows.lengths,
        rows.tables, rows.slots, table.segments[layer], segments, generated, table.starts, table.pages, parts.results,
        parts.denominators,
        layer, group, most, scaling, 1.0 if softcap is None else softcap, query.stride(0), query.stride(1),
        block_table.stride(0), table.pages.stride(0), *pool.shared_strides(),
        HEAD=size, FIELDS=parts.results.shape[-1], BLOCK_D=block_d, BLOCK_M=block_m, BLOCK=block,
        LINES=pool.lines, LAYERS=pool.layers, TOKENS=pool.tokens, PRODUCT=TYPES[product],
        HAS_CAP=softcap is not None, ITEM=item,
        HALF=product.itemsize == 2, ASSEMBLY=query.is_cuda if assembly is None else assembly,
        RUNGS=len(forms), LEVELS=_levels(forms, pool.lines * 2 * size * item, coded_block, rung, tokens),
        COST=max(1, block * 2 * size * item // COST), CODED_BLOCK=coded_block,
        BLOCK_G=max(8, triton.next_power_of_2(most)), **options,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    join(parts, rows, coded, layer, sinks, output, group)
