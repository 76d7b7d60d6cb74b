"""What is before and after `kernels.paged_levels`: the list, queries into code space; parts of the softmax joined."""

# Tuples of another length have another type.
# mypy: disable-error-code="assignment"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels.decode import multiprocessors
from refreekv.kernels.neighbours import none_claimed
from refreekv.kernels.packed_block import apart
from refreekv.kernels.packed_join import LARGEST
from refreekv.kernels.paged import Coded
from refreekv.kernels.paged_shares import AT_ONCE, Told, programs_of, write_places
from refreekv.kernels.probe import LOG2E

QUERIES = 16
"""Queries of one KV head that a program takes to code space."""

MANY, LARGE = 256, 128
"""Queries of all heads from which on results come out of code space in a product of their own, and the largest heads
that do not: the matrix of larger ones fits no program's registers."""

TOLD = ("begins", "ends", "lengths", "tables", "slots", "block_table")
"""Arguments that tell of a step's rows: kernels are compiled once, however what they point to is aligned."""


@dataclass(frozen=True)
class Parts:
    """What programs left of the softmax of segments: of each rung in code space, and of what is exact.

    Attributes
    ----------
    results, denominators : Tensor
        float32 ``[slots, queries of a row by heads of a group, D]``, and the same without ``D``: that of a program in
        a segment has the slot of both numbers' sum, as both only grow.
    """

    results: Tensor
    denominators: Tensor

    @classmethod
    def empty(cls, slots: int, most: int, size: int, device: torch.device) -> "Parts":
        """Room for so many."""
        return cls(
            torch.empty(slots, most, size, dtype=torch.float32, device=device),
            torch.empty(slots, most, dtype=torch.float32, device=device),
        )


@triton.jit
def _into_code_space(
    query, begins, ends, slots, means, dual, bounds, out, scales, shifts, block, head, part, rows, heads, group, most,
    scaling, sq_t, sq_h, dual_stride,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Some queries of one KV head: some of their channels in code space."""
    n = block * BLOCK + tl.arange(0, BLOCK)
    row, m = n // most, n % most
    there = row < rows
    begin = tl.load(begins + row, there, 0)
    asking = there & (m < (tl.load(ends + row, there, 0) - begin) * group)
    at = (begin + m // group).to(tl.int64) * sq_t + (head * group + m % group) * sq_h
    d = tl.arange(0, BLOCK_D)
    q = tl.load(query + at[:, None] + d[None, :], asking[:, None] & (d < HEAD)[None, :], 0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(q * q, 1))
    size = tl.maximum(norm * tl.load(bounds + head), 1e-30) * (1.0 / LARGEST)
    into = (row * heads + head).to(tl.int64) * most + m
    if part == 0:
        unit = scaling if HAS_CAP else scaling * LOG2E
        mean = means + (tl.load(slots + row, there, 0).to(tl.int64) * heads + head)[:, None] * HEAD + d[None, :]
        mean = tl.load(mean, asking[:, None] & (d < HEAD)[None, :], 0.0)
        tl.store(scales + into, size * unit, asking)
        tl.store(shifts + into, tl.sum(q * mean, 1) * unit, asking)
    o = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    result = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
    for start in tl.static_range(0, BLOCK_D, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        some = tl.load(query + at[:, None] + i[None, :], asking[:, None] & (i < HEAD)[None, :], 0.0).to(tl.float32)
        line = dual + head * dual_stride + o[None, :] * HEAD + i[:, None]
        matrix = tl.load(line, (o < HEAD)[None, :] & (i < HEAD)[:, None], 0.0)
        # 16 bits fit tf32 as they are; of the matrix it keeps as much as the result does in float16.
        result = tl.dot(some, matrix, result, input_precision="ieee" if EXACT else "tf32")
    tl.store(out + into[:, None] * HEAD + o[None, :], result / size[:, None], asking[:, None] & (o < HEAD)[None, :])


@triton.jit(do_not_specialize=[*TOLD, "rows"])
def _paged_prepare_kernel(
    query, begins, ends, lengths, slots, segments, coded, generated, starts, places, claimed, means, dual, bounds, out,
    scales, shifts, rows, heads, group, most, scaling, sq_t, sq_h, dual_stride,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, QUERIES: tl.constexpr,
    HAS_CAP: tl.constexpr, EXACT: tl.constexpr, RUNGS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    CODED_BLOCK: tl.constexpr, COST: tl.constexpr, EXTRA: tl.constexpr, AT_ONCE: tl.constexpr,
    MULTIPROCESSORS: tl.constexpr,
):  # fmt: skip
    """One part of the list, by the first programs; some queries in code space, by the others."""
    program = tl.program_id(0)
    if program == 0:
        none_claimed(claimed, MULTIPROCESSORS)
    for part in tl.static_range(RUNGS + 1):
        if program == part:
            write_places(
                begins, ends, lengths, slots, segments, coded, generated, starts, places, rows, heads,
                part, RUNGS, LEVELS, BLOCK, CODED_BLOCK, COST, EXTRA, AT_ONCE,
            )  # fmt: skip
    if RUNGS:  # noqa: SIM102, the outer one is decided when this is compiled
        if program > RUNGS:
            number = program - (RUNGS + 1)
            PARTS: tl.constexpr = (HEAD + BLOCK_OUT - 1) // BLOCK_OUT
            _into_code_space(
                query, begins, ends, slots, means, dual, bounds, out, scales, shifts,
                number // (PARTS * heads), number // PARTS % heads, number % PARTS, rows, heads, group, most,
                scaling, sq_t, sq_h, dual_stride,
                HEAD, BLOCK_D, BLOCK_OUT, BLOCK_IN, QUERIES, HAS_CAP, EXACT,
            )  # fmt: skip


def prepare(
    query: Tensor, told: Told, coded: Coded | None, heads: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The list, and queries in code space: as `kernels.packed_join.launch_prepare`, by row, KV head and query.

    Returns
    -------
    places, claimed, query, scales, shifts : Tensor
        int32 ``[parts of the list, R * H_kv]``, and for each multiprocessor a zero; float32
        ``[R, H_kv, queries of a row by heads of a group, D]``, and the same without ``D`` twice: of no use without
        codes.
    """
    rows, layer, size = told.rows, told.layer, query.shape[2]
    count, group, rungs = len(rows.begins), query.shape[1] // heads, len(told.levels)
    most = group * rows.longest
    places = torch.empty(rungs + 1, count * heads, dtype=torch.int32, device=query.device)
    claimed = torch.empty(multiprocessors(query.device), dtype=torch.int32, device=query.device)
    means = dual = bounds = out = scales = shifts = query
    programs, dual_stride, block_d, block_out = rungs + 1, 0, triton.next_power_of_2(size), 32
    if coded is not None:
        means, dual, bounds = coded.key_means[layer], coded.key_duals[layer], coded.key_bounds[layer]
        out = torch.empty(count, heads, most, size, dtype=torch.float32, device=query.device)
        scales, shifts = (torch.empty(count, heads, most, dtype=torch.float32, device=query.device) for _ in range(2))
        programs += triton.cdiv(count * most, QUERIES) * heads * triton.cdiv(size, block_out)
        dual_stride = dual.stride(0)
    _paged_prepare_kernel[(programs,)](
        query, rows.begins, rows.ends, rows.lengths, rows.slots, told.table.segments[layer], told.segments,
        told.generated, told.table.starts, places, claimed, means, dual, bounds, out, scales, shifts,
        count, heads, group, most, scaling, query.stride(0), query.stride(1), dual_stride,
        HEAD=size, BLOCK_D=block_d, BLOCK_OUT=block_out, BLOCK_IN=min(64, block_d), QUERIES=QUERIES,
        HAS_CAP=softcap is not None, EXACT=query.dtype.itemsize > 2, RUNGS=rungs, LEVELS=told.levels,
        BLOCK=told.block, CODED_BLOCK=told.coded_block, COST=told.cost, EXTRA=told.extra, AT_ONCE=AT_ONCE,
        MULTIPROCESSORS=len(claimed), num_warps=4,
    )  # fmt: skip
    return places, claimed, out, scales, shifts


@triton.jit(do_not_specialize=[*TOLD, "segments", "skipped"])
def _paged_join_kernel(
    partial, denominators, places, begins, ends, slots, means, sinks, back, out, coded_out,
    segments, group, programs, so_t, so_h, skipped,
    HEAD: tl.constexpr, FIELDS: tl.constexpr, SIX: tl.constexpr, BLOCK_D: tl.constexpr, EACH: tl.constexpr,
    RUNGS: tl.constexpr, LEAST: tl.constexpr, HAS_SINKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One query of one query head: its parts, weighted by their shares of the softmax; ``WHOLE``: out of code space."""
    row, head, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, most = tl.num_programs(1), tl.num_programs(2)
    begin = tl.load(begins + row)
    if m < (tl.load(ends + row) - begin) * group:
        segment = row * heads + head
        lows, counts = programs_of(places, segment, segments, programs, RUNGS, LEAST)
        # Parts of all are one list: their loads wait for each other no more than those of one do.
        firsts = ()
        parts = tl.zeros([], tl.int32)
        for r in tl.static_range(RUNGS + 1):
            firsts = firsts + (parts,)
            parts += counts[r]
        query_head = head * group + m % group
        token = (begin + m // group).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        if WHOLE:
            inside = (d < HEAD)[None, :] & (d < HEAD)[:, None]
            matrix = tl.load(back + d[:, None] * HEAD + d[None, :], inside, 0.0)
        highest = tl.full([], float("-inf"), tl.float32)
        total, mass = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
        if HAS_SINKS:
            highest = tl.load(sinks + query_head).to(tl.float32) * LOG2E
            total += 1.0
        result = tl.zeros([BLOCK_D], tl.float32)
        coded = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, parts, EACH):
            number = start + tl.arange(0, EACH)
            slot, of = number * 0, number * 0
            for r in tl.static_range(RUNGS + 1):
                mine = number >= firsts[r]
                slot = tl.where(mine, number - firsts[r] + lows[r] + r * segments + segment, slot)
                of = tl.where(mine, r, of)
            at = slot.to(tl.int64) * most + m
            share = tl.load(denominators + at, number < parts, float("-inf"))
            higher = tl.maximum(highest, tl.max(share, 0))
            # Nothing is there yet where this is infinite.
            safe = tl.where(higher > float("-inf"), higher, 0.0)
            shrink, weight = tl.exp2(highest - safe), tl.exp2(share - safe)
            highest = higher
            wanted = (weight > 0)[:, None] & (d < HEAD)[None, :]
            part_at = partial + at[:, None] * FIELDS + d[None, :]
            part = tl.load(part_at, wanted, 0.0)
            if SIX:
                # Of values of 6 bits the sums of the lower ones lie behind those of the upper ones.
                part += tl.load(part_at + HEAD, wanted & (((SIX >> of) & 1) == 1)[:, None], 0.0)
            in_codes = tl.where(of < RUNGS, weight, 0.0)
            result = result * shrink + tl.sum(part * (weight - in_codes)[:, None], 0)
            coded = coded * shrink + tl.sum(part * in_codes[:, None], 0)
            total = total * shrink + tl.sum(weight, 0)
            mass = mass * shrink + tl.sum(in_codes, 0)
        unit = 1.0 / tl.where(total > 0, total, 1.0)
        if RUNGS:
            own = tl.load(slots + row).to(tl.int64) * heads + head
            result += mass * tl.load(means + own * HEAD + d, d < HEAD, 0.0)
            if WHOLE:
                result += tl.sum(matrix.to(tl.float32) * coded[None, :], 1)
            else:
                at_coded = coded_out + ((token - skipped) * heads * group + query_head) * HEAD + d
                tl.store(at_coded, (coded * unit).to(coded_out.dtype.element_ty), d < HEAD)
        at = out + token * so_t + query_head * so_h + d
        tl.store(at, (result * unit).to(out.dtype.element_ty), d < HEAD)


def join(
    parts: Parts, told: Told, places: Tensor, coded: Coded | None, programs: int, sinks: Tensor | None, output: Tensor,
    group: int, whole: bool | None, each: int | None,
) -> None:  # fmt: skip
    """Join parts of the softmax that so many programs left into ``output`` ``[T, H, D]``, at the rows' queries."""
    rows, size, heads = told.rows, output.shape[-1], output.shape[1] // group
    count, most = len(rows.begins), parts.denominators.shape[1]
    if whole is None:
        whole = count * heads * most < MANY and size <= LARGE
    whole = whole and coded is not None
    if each is None:
        each = 64 if whole else 16
    coded_out, means, back, six, first, mine = output, parts.denominators, output, 0, 0, output
    if coded is not None:
        means, back = coded.value_means[told.layer], coded.rotation
        six = sum(1 << rung for rung, form in enumerate(coded.forms) if apart(form)[1])
    if coded is not None and not whole:
        # To queries of others nothing may be added; beside a long prompt's these are a small part of all.
        make = torch.empty if rows.whole else torch.zeros
        if rows.span is not None:
            first, last = rows.span
            mine = output[first:last]
        coded_out = make(mine.shape, dtype=output.dtype, device=output.device)
    _paged_join_kernel[(count, heads, most)](
        parts.results, parts.denominators, places, rows.begins, rows.ends, rows.slots, means,
        output if sinks is None else sinks, back, output, coded_out, count * heads, group, programs,
        output.stride(0), output.stride(1), first,
        HEAD=size, FIELDS=parts.results.shape[-1], SIX=six, BLOCK_D=max(16, triton.next_power_of_2(size)),
        EACH=each, RUNGS=len(told.levels), LEAST=told.least, HAS_SINKS=sinks is not None, WHOLE=whole, num_warps=4,
    )  # fmt: skip
    if coded is not None and not whole:
        mine.view(-1, size).addmm_(coded_out.view(-1, size), coded.rotation.T)
