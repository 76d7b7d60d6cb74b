"""`kernels.paged` in Triton: attention of a few queries a sequence over its kept entries, coded or not, and its tail.

What all rows have of all KV heads, in blocks one after the other (the lines of each rung, those that were coded later
behind the others of theirs; then what is exact: segments, lists, tails), is one list that is shared out by bytes to as
many programs as run at once, so that one CUDA graph serves any table, and long rows and heads that keep much take no
longer than others. A program leaves a part of the softmax for each segment of the list that it has a share of, those of
rungs in code space; `kernels.paged_join` has what is before, the list itself, and after.

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
from refreekv.kernels.neighbours import share_of
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
from refreekv.kernels.packed_decode import REGISTERS, WARPS, shares_of
from refreekv.kernels.paged import COLUMNS, PagedTable, Pool, Rows
from refreekv.kernels.paged_exact import line_at, listed_at, taken_on, token_at
from refreekv.kernels.paged_join import TOLD, Parts, join, prepare
from refreekv.kernels.paged_shares import (
    AT_ONCE,
    EXTRA,
    Told,
    cost,
    exact_blocks,
    place_of,
    rung_blocks,
    segment_at,
    unit_of,
    work_of,
)
from refreekv.kernels.storage import TYPES

EXACT_BLOCK, BESIDE_CODES = 128, 16
"""Entries of a block, where there is the shared memory: where nothing is coded, and where something may be."""

CODED_BLOCK = 32
"""Lines of a block, at most."""

THREAD_REGISTERS = 255
"""That a thread can have."""

LEAST_ENTRIES = 32
"""Of a program's share, about: a block."""

ROOT = 1.5
"""Of few segments a multiprocessor gets so many programs, times the root of the segments, and not all that have room.

With fewer shares than programs nothing puts neighbours side by side, and each has parts to join.
"""

BESIDE = 2048
"""Bytes that a block of lines counts beside its own: not all of its time is memory's."""

_COLUMNS = tl.constexpr(COLUMNS)
_UNIT = tl.constexpr(paged.UNIT)


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
    begin = unit_of(first, LINES, BLOCK)
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


@triton.jit
def _exact(
    query, pool, offsets, blocks, pages, segment, partial, denominators, row_begin, count, length, start, low, high,
    layer, head, group, scaling, softcap, sq_t, sq_h, block_stride, token_stride, head_stride,
    HEAD: tl.constexpr, FIELDS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    LINES: tl.constexpr, LAYERS: tl.constexpr, TOKENS: tl.constexpr, PRODUCT: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Blocks ``low`` to ``high`` of what a row has of a KV head as it is: of its segment, its list and its tail."""
    first, held, held_blocks, listed, listed_blocks, tail_blocks = exact_blocks(segment, length, start, True, BLOCK)
    m, d, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
    asking = m < count * group
    query_at = (row_begin + m // group)[:, None].to(tl.int64) * sq_t + (head * group + m % group)[:, None] * sq_h
    q = tl.load(query + query_at + d[None, :], asking[:, None] & (d < HEAD)[None, :], 0.0).to(PRODUCT)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    own = tl.load(offsets + layer)
    for block in range(low, tl.minimum(high, held_blocks)):
        entry = block * BLOCK + n
        inside = entry < held
        at = line_at(first + entry, pages, offsets, inside, block_stride, LINES, LAYERS, 2 * HEAD)
        highest, total, result = taken_on(
            q, pool, at, inside[None, :], inside, highest, total, result, scaling, softcap,
            HEAD, BLOCK_D, PRODUCT, HAS_CAP,
        )  # fmt: skip
    if listed > 0:
        positions = tl.load(segment + 2).to(tl.pointer_type(tl.int32))
        replaced = tl.load(segment + 4)
        for block in range(tl.maximum(low - held_blocks, 0), tl.minimum(high - held_blocks, listed_blocks)):
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
    before = held_blocks + listed_blocks
    for block in range(tl.maximum(low - before, 0), tl.minimum(high - before, tail_blocks)):
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
    tl.store(denominators + m, tl.where(found, highest + tl.log2(total), float("-inf")), asking)
    tl.store(
        partial + m[:, None] * FIELDS + d[None, :], result * unit[:, None],
        (asking & found)[:, None] & (d < HEAD)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=[*TOLD, "layer", "segments_of_all", "table_stride", "page_stride"])
def _paged_levels_kernel(
    query, asked, scales, shifts, pool, offsets, block_table, begins, ends, lengths, tables, slots, segments, coded,
    generated, starts, pages, places, claimed, partial, denominators,
    layer, segments_of_all, heads, group, most, scaling, softcap, sq_t, sq_h, table_stride, page_stride,
    block_stride, token_stride, head_stride,
    HEAD: tl.constexpr, FIELDS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    LINES: tl.constexpr, LAYERS: tl.constexpr, TOKENS: tl.constexpr, PRODUCT: tl.constexpr, HAS_CAP: tl.constexpr,
    RUNGS: tl.constexpr, LEVELS: tl.constexpr, COST: tl.constexpr, EXTRA: tl.constexpr, LEAST: tl.constexpr,
    ITEM: tl.constexpr, HALF: tl.constexpr, BLOCK_G: tl.constexpr, CODED_BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr,
    AT_ONCE: tl.constexpr, MULTIPROCESSORS: tl.constexpr,
):  # fmt: skip
    """A share of the list of all blocks."""
    work = work_of(places, segments_of_all, RUNGS)
    shares = shares_of(work, tl.num_programs(0), LEAST)
    place = tl.extra.cuda.smid() if ASSEMBLY else tl.program_id(0)
    program = share_of(claimed, shares, place, MULTIPROCESSORS)
    at = (tl.minimum(program, shares) * work // shares).to(tl.int32)
    stop = (tl.minimum(program + 1, shares) * work // shares).to(tl.int32)
    for r in tl.static_range(RUNGS + 1):
        own = places + r * segments_of_all
        length_of_list = tl.load(own + segments_of_all - 1)
        here, upto = tl.maximum(at, 0), tl.minimum(stop, length_of_list)
        segment = tl.zeros([], tl.int32)
        if here < upto:
            segment = segment_at(own, here, segments_of_all, AT_ONCE)
        while here < upto:
            begin, end = place_of(own, segment)
            if end > here:
                row, head = segment // heads, segment % heads
                row_begin = tl.load(begins + row)
                count = tl.load(ends + row) - row_begin
                slot = tl.load(slots + row).to(tl.int64)
                own_pages = pages + slot * page_stride
                part = (program + r * segments_of_all + segment).to(tl.int64) * most
                EACH: tl.constexpr = COST if r == RUNGS else constant(LEVELS, r, 6)
                low = (tl.maximum(here - begin - EXTRA, 0) + EACH - 1) // EACH
                high = (tl.maximum(tl.minimum(upto, end) - begin - EXTRA, 0) + EACH - 1) // EACH
                if r == RUNGS:
                    _exact(
                        query, pool, offsets, block_table + tl.load(tables + row).to(tl.int64) * table_stride,
                        own_pages, segments + (slot * heads + head) * _COLUMNS, partial + part * FIELDS,
                        denominators + part, row_begin, count, tl.load(lengths + row), tl.load(starts + slot),
                        low, high, layer, head, group, scaling, softcap, sq_t, sq_h,
                        block_stride, token_stride, head_stride,
                        HEAD, FIELDS, BLOCK_D, BLOCK_M, BLOCK, LINES, LAYERS, TOKENS, PRODUCT, HAS_CAP,
                    )  # fmt: skip
                else:
                    first, lines, own_blocks, _ = rung_blocks(
                        coded, generated, slot, (slot * heads + head) * RUNGS + r, True, constant(LEVELS, r),
                        CODED_BLOCK,
                    )  # fmt: skip
                    g = tl.arange(0, BLOCK_G)
                    asking = g < count * group
                    if high > low:
                        mine = segment.to(tl.int64) * most
                        _rung(
                            asked + mine * HEAD, scales + mine, shifts + mine, pool.to(tl.pointer_type(tl.uint8)),
                            offsets, own_pages, partial + part * FIELDS, denominators + part, first, lines, own_blocks,
                            tl.load(generated + slot * 2), layer, head, low, high, asking, softcap, block_stride,
                            constant(LEVELS, r), HEAD, FIELDS, LAYERS, ITEM, HALF, BLOCK_G, CODED_BLOCK, HAS_CAP,
                            ASSEMBLY,
                        )  # fmt: skip
                    else:
                        tl.store(denominators + part + g, tl.full([BLOCK_G], float("-inf"), tl.float32), asking)
                here = tl.minimum(upto, end)
            segment += 1
        at, stop = at - length_of_list, stop - length_of_list


@functools.cache
def _levels(
    forms: tuple[PackedFormat, ...], page_bytes: int, block: int, beside: int, generated: int, tokens: int
) -> tuple[tuple[Any, ...], ...]:
    """What the kernel is told of each rung: as `packed_decode`, lines of a page, and what a block costs.

    Then tokens of a private block in the rung of those that are coded later, 0 in others.
    """
    found = []
    for rung, form in enumerate(forms):
        more = tokens if rung == generated else 0
        found.append(
            (*level_of(form)[:5], page_bytes // form.entry_bytes, cost(block * form.entry_bytes + beside), more)
        )
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
    programs: int | None = None,
    block: int | None = None,
    warps: int | None = None,
    stages: int = 2,
    coded_block: int | None = None,
    each: int | None = None,
    extra: int = EXTRA,
    beside: int = BESIDE,
    least: int = LEAST_ENTRIES,
    assembly: bool | None = None,
    whole: bool | None = None,
    joined: int | None = None,
) -> None:
    """Run the kernels; parameters as in `kernels.paged.paged_attention`, those from ``programs`` on to be measured."""
    count, size, heads = len(rows.begins), pool.size, pool.heads
    if not count:
        return
    coded, group = table.coded, query.shape[1] // heads
    forms = () if coded is None else coded.forms
    most = group * rows.longest
    block_m = max(16, triton.next_power_of_2(most))
    block_d = max(16, triton.next_power_of_2(size))
    product, item = torch.promote_types(query.dtype, pool.cache.dtype), pool.cache.element_size()
    half = product.itemsize == 2
    small, limited = block_m * block_d <= 2048, bool(forms) and half

    def tile_bytes(block: int) -> int:
        return int((2 * (stages - 1) * block + block_m) * block_d * product.itemsize)

    if block is None:
        block = BESIDE_CODES if forms else EXACT_BLOCK
        # Of each stage but one a block's keys and values; and the queries.
        free = shared_memory.for_tiles(query.device)
        while block > 16 and tile_bytes(block) > free:
            block //= 2
    if warps is None:
        if forms and half and block_m * block_d <= 4096:
            # One warp waits for no other, and unpacks no value that another one does, too.
            warps = 1 if small else 2
        else:
            warps = 4 if block_m * block_d <= 8192 else 8
    if coded_block is None:
        coded_block = CODED_BLOCK if half and most <= 16 else 16
    if each is None:
        # Of what is not told its registers, which may take all that a thread can have, as many as have room for sure:
        # with more than run at once the last ones would have a round of their own.
        room = shared_memory.programs_for(tile_bytes(block), query.device)
        each = max(1, WARPS // warps if limited else min(room, REGISTERS // (THREAD_REGISTERS * 32 * warps)))
    if programs is None:
        few = max(2, round(ROOT * (count * heads) ** 0.5)) if limited else each
        programs = min(each, few) * multiprocessors(query.device)
    fields = size * (2 if any(apart(form)[1] for form in forms) else 1)
    segments, generated, rung, tokens = table.segments[layer], table.starts, -1, 0
    if coded is not None:
        generated, rung = coded.generated, coded.rung
        tokens = pool.coded_tokens(forms[rung])
        segments = coded.segments[layer]
    levels = _levels(forms, pool.lines * 2 * size * item, coded_block, beside, rung, tokens)
    exact_cost = cost(block * 2 * size * item)
    least_work = max(1, least // coded_block) * max(level[6] for level in levels) if forms else exact_cost
    told = Told(rows, table, layer, segments, generated, levels, block, coded_block, exact_cost, extra, least_work)
    parts = Parts.empty(programs + count * heads * (1 + len(forms)), most, fields, query.device)
    places, claimed, asked, scales, shifts = prepare(query, told, coded, heads, scaling, softcap)
    # Registers that so many warps have on a multiprocessor.
    most_registers = min(THREAD_REGISTERS, REGISTERS // (each * 32 * warps) // 8 * 8)
    options: dict[str, Any] = {"maxnreg": most_registers} if limited else {}
    _paged_levels_kernel[(programs,)](
        query, asked, scales, shifts, pool.cache, pool.offsets, block_table, rows.begins, rows.ends, rows.lengths,
        rows.tables, rows.slots, table.segments[layer], segments, generated, table.starts, table.pages, places,
        claimed, parts.results, parts.denominators,
        layer, count * heads, heads, group, most, scaling, 1.0 if softcap is None else softcap,
        query.stride(0), query.stride(1), block_table.stride(0), table.pages.stride(0), *pool.shared_strides(),
        HEAD=size, FIELDS=fields, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK=block,
        LINES=pool.lines, LAYERS=pool.layers, TOKENS=pool.tokens, PRODUCT=TYPES[product],
        HAS_CAP=softcap is not None, ITEM=item, HALF=half,
        ASSEMBLY=query.is_cuda if assembly is None else assembly,
        RUNGS=len(forms), LEVELS=levels, COST=exact_cost, EXTRA=extra, LEAST=least_work, CODED_BLOCK=coded_block,
        AT_ONCE=AT_ONCE, MULTIPROCESSORS=0 if programs % len(claimed) else len(claimed),
        BLOCK_G=max(8, triton.next_power_of_2(most)), **options,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    join(parts, told, places, coded, programs, sinks, output, group, whole, joined)
