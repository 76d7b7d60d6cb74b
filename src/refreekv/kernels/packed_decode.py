"""Decode attention over exact entries and packed lines, in Triton: parts of one softmax, those of lines in code space.

A line is what `core.packed_lines` describes. Lines are read as 16-bit words. Shifted and masked, a word's field is the
middle of the mantissa of a float16 at 1024, and that number less the field's middle is a factor as it is: two
instructions for two codes. Values want a word of one entry beside that of the next, which is how 16-bit matrices are
transposed on their way from shared memory. Entries are rows and the query heads of a KV head columns, of which a
product needs no more than eight; sums over entries are left open until the last block.

The blocks of all segments of the exact table, then of each level's, are one list that is shared out as in
`kernels.decode`, with two differences: a block counts what it takes, which its bytes say, and each segment some more,
as going on to another one takes a while.
"""

# Tuples of another length have another type, and Triton's have as many parts as lines have tiles.
# mypy: disable-error-code="assignment, misc"

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat
from refreekv.kernels import pdl, shared_memory
from refreekv.kernels.decode import _held, multiprocessors
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.neighbours import share_of
from refreekv.kernels.packed_block import (
    UNIT,
    apart,
    constant,
    cost,
    level_of,
    lines_taken_on,
    nothing_yet,
    put_results,
    queries_of,
)
from refreekv.kernels.probe import _capped

REGISTERS = 65_536
"""Of a multiprocessor."""

WARPS = 12
"""That are to run on a multiprocessor at once, whatever registers Triton would like."""

SCRATCH = 1024
"""Bytes of shared memory of a program beside its blocks; Triton took so many."""

LEAST_ENTRIES = 256
"""Of a program's share, about: with fewer, what it takes to join the parts is more than what is gained."""


# -- sharing out --------------------------------------------------------------------------------


@triton.jit
def shared_out(table, segments, BLOCK: tl.constexpr, COST: tl.constexpr, EXTRA: tl.constexpr, BLOCK_S: tl.constexpr):
    """Entries of each segment, and what it counts in the list: its blocks' costs, and ``EXTRA`` in front of them."""
    held = _held(table, tl.arange(0, BLOCK_S), segments)
    return held, tl.where(held > 0, (held + BLOCK - 1) // BLOCK * COST + EXTRA, 0)


@triton.jit
def shares_of(work, programs, LEAST: tl.constexpr):
    """Between how many programs the list is divided, each of which gets ``LEAST`` at least: none has nothing."""
    # In 64 bits: work times programs may pass 2 ** 31 on long batches.
    return tl.maximum(tl.minimum(programs, work // LEAST), 1).to(tl.int64)


@triton.jit
def _find(at, held, counted, ends, BLOCK_S: tl.constexpr):
    """The segment that a place of the list is in: its number, where it begins and ends there, and its entries."""
    segment = tl.sum((ends <= at).to(tl.int32), 0)
    mine = tl.arange(0, BLOCK_S) == segment
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return segment, end - tl.sum(tl.where(mine, counted, 0), 0), end, tl.sum(tl.where(mine, held, 0), 0)


@triton.jit
def _own(at, stop, first, EXTRA: tl.constexpr, COST: tl.constexpr):
    """Which blocks of a segment that begins at ``first`` begin between two places of the list."""
    begin = (tl.maximum(at - first - EXTRA, 0) + COST - 1) // COST
    return begin, (tl.maximum(stop - first - EXTRA, 0) + COST - 1) // COST


# -- attention ----------------------------------------------------------------------------------


@triton.jit
def _exact(
    query, table, out, denominators, program, segments, at, stop, kv_heads, group, scaling, softcap, sq_b, sq_h,
    HEAD: tl.constexpr, VALUE: tl.constexpr, FIELDS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK: tl.constexpr, COST: tl.constexpr, EXTRA: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_CAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program's share of the exact entries."""
    held, counted = shared_out(table, segments, BLOCK, COST, EXTRA, BLOCK_S)
    ends = tl.cumsum(counted, 0)
    head = tl.arange(0, BLOCK_G)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    asking = head < group
    pointer = tl.pointer_type(query.dtype.element_ty)
    while at < stop:
        segment, first, end, visible = _find(at, held, counted, ends, BLOCK_S)
        upto = tl.minimum(stop, end)
        begin, finish = _own(at, upto, first, EXTRA, COST)
        # Allocations and lines are multiples of 16 bytes, which Triton cannot know of a number.
        keys = tl.multiple_of(tl.load(table + segment * 4).to(pointer), 16)
        values = tl.multiple_of(tl.load(table + segment * 4 + 1).to(pointer), 16)
        row = (segment // kv_heads).to(tl.int64)
        heads = (segment % kv_heads) * group + head
        asked = query + row * sq_b + heads[None, :] * sq_h + d[:, None]
        q = tl.load(asked, asking[None, :] & (d < HEAD)[:, None], 0.0)
        highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK, BLOCK_G], tl.float32)
        result = tl.zeros([BLOCK_V, BLOCK_G], tl.float32)
        for start in tl.range(begin * BLOCK, finish * BLOCK, BLOCK, num_stages=STAGES):
            n = start + tl.arange(0, BLOCK)
            inside = n < visible
            k = tl.load(keys + n[:, None] * HEAD + d[None, :], inside[:, None] & (d < HEAD)[None, :], 0.0)
            v = tl.load(values + n[None, :] * VALUE + dv[:, None], inside[None, :] & (dv < VALUE)[:, None], 0.0)
            logits = _capped(tl.dot(k, q, input_precision="ieee") * scaling, softcap, HAS_CAP)
            logits = tl.where(inside[:, None], logits, float("-inf"))
            # A block holds at least one entry, so this is finite from the first one on.
            higher = tl.maximum(highest, tl.max(logits, 0))
            p = tl.exp2(logits - higher[None, :])
            shrink = tl.exp2(highest - higher)[None, :]
            highest = higher
            total = total * shrink + p
            result = result * shrink + tl.dot(v, p.to(v.dtype), input_precision="ieee")
        slot = (program + segment) * group + head
        denominator = tl.where(finish > begin, tl.sum(total, 0), 1.0)
        asking_here = head < tl.where(finish > begin, group, 0)
        tl.store(denominators + slot, highest + tl.log2(denominator), asking_here)
        tl.store(
            out + slot[None, :].to(tl.int64) * FIELDS + dv[:, None],
            result * (1.0 / denominator)[None, :],
            asking_here[None, :] & (dv < VALUE)[:, None],
        )
        at = upto


@triton.jit
def _level(
    query, scales, shifts, table, out, denominators, program, segments, at, stop, before, group, softcap,
    HEAD: tl.constexpr, FIELDS: tl.constexpr, LINE: tl.constexpr, KEY_CHUNKS: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, HALF: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr, COST: tl.constexpr, EXTRA: tl.constexpr, BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr,
    ASSEMBLY: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program's share of a level; ``before`` are the segments of the tables before."""
    held, counted = shared_out(table, segments, BLOCK, COST, EXTRA, BLOCK_S)
    ends = tl.cumsum(counted, 0)
    head = tl.arange(0, BLOCK_G)
    asking = head < group
    dtype: tl.constexpr = tl.float16 if HALF else tl.float32
    while at < stop:
        segment, first, end, visible = _find(at, held, counted, ends, BLOCK_S)
        upto = tl.minimum(stop, end)
        begin, finish = _own(at, upto, first, EXTRA, COST)
        # Lines and segments begin at such multiples, which Triton cannot know of a number.
        lines = tl.load(table + segment * 4).to(tl.pointer_type(tl.uint16))
        lines = tl.multiple_of(lines, 16 if LINE % 16 == 0 else 8)
        factors = tl.multiple_of(tl.load(table + segment * 4 + 1).to(tl.pointer_type(tl.uint32)), 4)
        heads = segment * group + head  # rows and KV heads one after the other, as query heads are
        # From here on what the kernel before has written is read.
        pdl.in_turn(DEPENDENT)
        scale = tl.load(scales + heads, asking, 0.0) * UNIT
        shift = tl.load(shifts + heads, asking, 0.0)
        q, lacking = queries_of(query + heads.to(tl.int64) * HEAD, asking, KEYS, KEY_CHUNKS, dtype, BLOCK_G)
        highest, total, weighed, results = nothing_yet(VALUES, VALUE_CHUNKS, BLOCK, BLOCK_G)
        for start in range(begin * BLOCK, finish * BLOCK, BLOCK):
            n = start + tl.arange(0, BLOCK)
            highest, total, weighed, results = lines_taken_on(
                lines, factors, tl.minimum(n, visible - 1), n < visible, q, lacking, scale, shift, softcap,
                highest, total, weighed, results,
                KEYS, VALUES, LINE, KEY_CHUNKS, VALUE_CHUNKS, dtype, BLOCK, BLOCK_G, HAS_CAP, ASSEMBLY,
            )  # fmt: skip
        slot = (program + before + segment) * group + head
        denominator = tl.where(finish > begin, tl.sum(total, 0), 1.0)
        asking_here = head < tl.where(finish > begin, group, 0)
        sum_of_all = highest + tl.log2(denominator)
        # What the mean key adds is the same for all of the segment's entries.
        tl.store(denominators + slot, sum_of_all if HAS_CAP else sum_of_all + shift, asking_here)
        to = out + slot.to(tl.int64) * FIELDS
        put_results(to, asking_here, denominator, weighed, results, VALUES, VALUE_CHUNKS)
        at = upto


@triton.jit
def _packed_decode_kernel(
    query, asked, scales, shifts, claimed, tables, out, denominators,
    segments, kv_heads, group, scaling, softcap, sq_b, sq_h,
    HEAD: tl.constexpr, VALUE: tl.constexpr, FIELDS: tl.constexpr, LEVELS: tl.constexpr, COUNT: tl.constexpr,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
    EXACT_BLOCK: tl.constexpr, EXACT_COST: tl.constexpr, EXTRA: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr, ASSEMBLY: tl.constexpr, EXACT_STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr, MULTIPROCESSORS: tl.constexpr,
):  # fmt: skip
    # The tables and the queries are not of the kernel before, but of those that this one has waited for.
    totals = ()
    work = tl.zeros([], tl.int32)
    for i in tl.static_range(COUNT + 1):
        # They are looked up again where they are needed: there are no registers for those of all tables.
        _, counted = shared_out(
            tables[i], segments, EXACT_BLOCK if i == 0 else BLOCK,
            EXACT_COST if i == 0 else constant(LEVELS, i - 1, 5), EXTRA, BLOCK_S,
        )  # fmt: skip
        total = tl.sum(counted, 0)
        totals = totals + (total,)
        work += total
    shares = shares_of(work, tl.num_programs(0), LEAST)
    if MULTIPROCESSORS:
        # Before anything is claimed, what the kernel before has written.
        pdl.in_turn(DEPENDENT)
    place = tl.extra.cuda.smid() if ASSEMBLY else tl.program_id(0)
    program = share_of(claimed, shares, place, MULTIPROCESSORS)
    at = (tl.minimum(program, shares) * work // shares).to(tl.int32)
    stop = (tl.minimum(program + 1, shares) * work // shares).to(tl.int32)
    if at < tl.minimum(stop, totals[0]):
        _exact(
            query, tables[0], out, denominators, program, segments, at, tl.minimum(stop, totals[0]), kv_heads, group,
            scaling, softcap, sq_b, sq_h,
            HEAD, VALUE, FIELDS, BLOCK_D, BLOCK_V, BLOCK_G, EXACT_BLOCK, EXACT_COST, EXTRA, BLOCK_S, HAS_CAP,
            EXACT_STAGES,
        )  # fmt: skip
    for i in tl.static_range(COUNT):
        at, stop = tl.maximum(at - totals[i], 0), stop - totals[i]
        if at < tl.minimum(stop, totals[i + 1]):
            _level(
                asked, scales, shifts, tables[i + 1], out, denominators, program, segments, at,
                tl.minimum(stop, totals[i + 1]), (i + 1) * segments, group, softcap,
                HEAD, FIELDS, constant(LEVELS, i, 2), constant(LEVELS, i, 3), constant(LEVELS, i, 4),
                constant(LEVELS, i, 0), constant(LEVELS, i, 1), HALF, BLOCK_G, BLOCK, constant(LEVELS, i, 5), EXTRA,
                BLOCK_S, HAS_CAP, ASSEMBLY, DEPENDENT,
            )  # fmt: skip
    # Whoever comes next relies on all before it being over.
    pdl.in_turn(DEPENDENT)


def _stages(each: int, block_bytes: int, device: torch.device) -> int:
    """Of lines: three, so that a block is on its way while another one is computed with, where memory is enough.

    Two have a place for one block: its successor is asked for when it is done with.
    """
    # A multiprocessor has a KiB more than what a block may have, and takes one for each program.
    room = (shared_memory.bytes_of(device) + 1024) // each - 1024
    return 3 if 2 * block_bytes + SCRATCH <= room else 2


@dataclass(frozen=True)
class Parts:
    """What programs left of the softmax over entries of all tables.

    Attributes
    ----------
    tables : tuple of Tensor
        Of exact entries, then of each level; see `kernels.table`.
    results, denominators : Tensor
        ``[slots, group, elements]`` and ``[slots, group]``, float32.
    programs : int
        That the tables' blocks were shared out to.
    block, exact_block : int
        Entries of a block.
    costs : tuple of int
        What a block counts in the list, an exact one and those of each level.
    extra, least : int
        What a segment counts beside its blocks; the least share.
    """

    tables: tuple[Tensor, ...]
    results: Tensor
    denominators: Tensor
    programs: int
    block: int
    exact_block: int
    costs: tuple[int, ...]
    extra: int
    least: int


@on_its_device
def launch_packed_decode(
    query: Tensor,
    prepared: tuple[Tensor, Tensor, Tensor, Tensor],
    exact: Tensor,
    tables: Sequence[Tensor],
    forms: Sequence[PackedFormat],
    value_size: int,
    scaling: float,
    softcap: float | None,
    programs: int | None = None,
    block: int | None = None,
    exact_block: int = 16,
    extra: int = 24,
    beside: int = 0,
    least: int = LEAST_ENTRIES,
    joined: int = 16,
    warps: int | None = None,
    stages: int | None = None,
    each: int | None = None,
    assembly: bool | None = None,
    early: bool = True,
) -> Parts:
    """Each program's part of the attention.

    Parameters
    ----------
    query : Tensor
        ``[B, H, 1, D]``; its type decides that of the products with codes: float32 for float32, else float16.
    prepared : tuple of Tensor
        The queries in code space, of `launch_prepare`.
    exact, tables, forms, scaling, softcap
        As in `kernels.packed_attention`.
    value_size : int
        Head size of the values.
    programs, block, exact_block, extra, beside, least, joined, warps, stages, each, assembly, early
        To be measured; ``each`` programs have registers on a multiprocessor.
    """
    segments, (batch, heads, _, size) = exact.shape[0], query.shape
    group = heads * batch // segments
    half = query.dtype.itemsize == 2
    if query.stride(-1) != 1:
        query = query.contiguous()
    small = max(size, value_size) <= 128 and group <= 8
    if warps is None:
        # One warp waits for no other, and unpacks no value that another one does, too.
        warps = (1 if small else 2) if half else 4
    if block is None:
        block = 32 if half else 16
    if each is None:
        each = WARPS // warps
    if stages is None:
        longest = max((form.entry_bytes for form in forms), default=0)
        stages = _stages(each, block * longest, query.device) if half else 3
    if programs is None:
        programs = each * multiprocessors(query.device)
    levels = tuple(level_of(form, beside, joined) for form in forms)
    exact_cost = cost(exact_block * (size + value_size) * query.dtype.itemsize / block, beside)
    costs = (exact_cost, *(level[5] for level in levels))
    most = max(1, least // block) * max(costs)
    fields = value_size * (2 if any(apart(form)[1] for form in forms) else 1)
    places = len(prepared[3])
    slots = programs + segments * (1 + len(forms))
    results = torch.empty(slots, group, fields, dtype=torch.float32, device=query.device)
    denominators = torch.empty(slots, group, dtype=torch.float32, device=query.device)
    _packed_decode_kernel[(programs,)](
        query, *prepared, (exact, *tables), results, denominators, segments, segments // batch, group, scaling,
        1.0 if softcap is None else softcap, query.stride(0), query.stride(1),
        HEAD=size, VALUE=value_size, FIELDS=fields, LEVELS=levels,
        COUNT=len(forms), HALF=half, BLOCK_D=max(16, triton.next_power_of_2(size)),
        BLOCK_V=max(16, triton.next_power_of_2(value_size)), BLOCK_G=max(8, triton.next_power_of_2(group)),
        BLOCK=block, EXACT_BLOCK=exact_block, EXACT_COST=exact_cost, EXTRA=extra, LEAST=most,
        BLOCK_S=triton.next_power_of_2(max(segments, 2)),
        HAS_CAP=softcap is not None, ASSEMBLY=query.is_cuda if assembly is None else assembly,
        # Exact entries are few, and their blocks larger than those of lines.
        EXACT_STAGES=min(stages, 2) if half else stages,
        MULTIPROCESSORS=0 if programs % places else places, num_warps=warps, num_stages=stages,
        maxnreg=REGISTERS // (each * 32 * warps) // 8 * 8, **pdl.options(1 if early else batch, query),
    )  # fmt: skip
    return Parts((exact, *tables), results, denominators, programs, block, exact_block, costs, extra, most)
