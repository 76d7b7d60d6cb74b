"""What is before and after `kernels.paged_levels`: queries into code space, and the parts of the softmax joined."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels.packed_block import apart
from refreekv.kernels.packed_join import LARGEST
from refreekv.kernels.paged import Coded, Rows
from refreekv.kernels.probe import LOG2E

QUERIES = 16
"""Queries of one KV head that a program takes to code space."""

MOST_SHARES = 64
"""Programs for the entries of one row and head."""

TOLD = ("begins", "ends", "lengths", "tables", "slots", "block_table")
"""Arguments that tell of a step's rows: kernels are compiled once, however what they point to is aligned."""


@dataclass(frozen=True)
class Parts:
    """What programs left of the softmax: first that over exact entries, then that over each rung, in code space.

    Attributes
    ----------
    results, denominators : Tensor
        float32 ``[R, H_kv, shares, parts, queries of a row by heads of a group, D]``, and the same without ``D``.
    """

    results: Tensor
    denominators: Tensor

    @classmethod
    def empty(
        cls, rows: int, heads: int, shares: int, parts: int, most: int, size: int, device: torch.device
    ) -> "Parts":
        """Room for those of so many programs."""
        shape = rows, heads, shares, parts, most
        return cls(
            torch.empty(*shape, size, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )


@triton.jit(do_not_specialize=["begins", "ends", "slots", "rows"])
def _paged_prepare_kernel(
    query, begins, ends, slots, means, dual, bounds, out, scales, shifts, rows, group, most, scaling, sq_t, sq_h,
    dual_stride,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Some queries of one KV head: some of their channels in code space."""
    head, part, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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


def prepare(
    query: Tensor, rows: Rows, coded: Coded, layer: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in code space: as `kernels.packed_join.launch_prepare`, by row, KV head and query of the row.

    Returns
    -------
    query, scales, shifts : Tensor
        float32 ``[R, H_kv, queries of a row by heads of a group, D]``, and the same without ``D`` twice.
    """
    means, dual = coded.key_means[layer], coded.key_duals[layer]
    count, heads, size = len(rows.begins), means.shape[1], query.shape[2]
    group = query.shape[1] // heads
    most = group * rows.longest
    out = torch.empty(count, heads, most, size, dtype=torch.float32, device=query.device)
    scales, shifts = (torch.empty(count, heads, most, dtype=torch.float32, device=query.device) for _ in range(2))
    block_d, block_out = triton.next_power_of_2(size), 32
    _paged_prepare_kernel[(triton.cdiv(count * most, QUERIES), heads, triton.cdiv(size, block_out))](
        query, rows.begins, rows.ends, rows.slots, means, dual, coded.key_bounds[layer], out, scales, shifts,
        count, group, most, scaling, query.stride(0), query.stride(1), dual.stride(0),
        HEAD=size, BLOCK_D=block_d, BLOCK_OUT=block_out, BLOCK_IN=min(64, block_d), BLOCK=QUERIES,
        HAS_CAP=softcap is not None, EXACT=query.dtype.itemsize > 2, num_warps=4,
    )  # fmt: skip
    return out, scales, shifts


@triton.jit(do_not_specialize=["begins", "ends", "slots", "parts", "skipped"])
def _paged_join_kernel(
    partial, denominators, begins, ends, slots, means, sinks, out, coded_out,
    group, parts, so_t, so_h, skipped,
    HEAD: tl.constexpr, FIELDS: tl.constexpr, SIX: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    EACH: tl.constexpr, RUNGS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One query of one query head: its parts, weighted by their shares of the softmax."""
    row, head, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, most = tl.num_programs(1), tl.num_programs(2)
    begin = tl.load(begins + row)
    if m < (tl.load(ends + row) - begin) * group:
        first = (row * heads + head).to(tl.int64) * parts * most + m
        s = tl.arange(0, BLOCK_S)
        share = tl.load(denominators + first + s * most, s < parts, float("-inf"))
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
        unit = 1.0 / tl.where(total > 0, total, 1.0)
        d = tl.arange(0, BLOCK_D)
        result = tl.zeros([BLOCK_D], tl.float32)
        coded = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, parts, EACH):
            some = start + tl.arange(0, EACH)
            weights = tl.exp2(tl.load(denominators + first + some * most, some < parts, float("-inf")) - safe) * unit
            wanted = (weights > 0)[:, None] & (d < HEAD)[None, :]
            part_at = partial + (first + some * most)[:, None] * FIELDS + d[None, :]
            part = tl.load(part_at, wanted, 0.0)
            if SIX:
                # Of values of 6 bits the sums of the lower ones lie behind those of the upper ones.
                six = ((SIX >> (some % (RUNGS + 1))) & 1) == 1
                part += tl.load(part_at + HEAD, wanted & six[:, None], 0.0)
            exact = some % (RUNGS + 1) == 0
            result += tl.sum(part * tl.where(exact, weights, 0.0)[:, None], 0)
            coded += tl.sum(part * tl.where(exact, 0.0, weights)[:, None], 0)
        if RUNGS:
            mass = tl.sum(tl.where(s % (RUNGS + 1) == 0, 0.0, weight), 0) * unit
            own = tl.load(slots + row).to(tl.int64) * heads + head
            result += mass * tl.load(means + own * HEAD + d, d < HEAD, 0.0)
            at_coded = coded_out + ((token - skipped) * heads * group + query_head) * HEAD + d
            tl.store(at_coded, coded.to(coded_out.dtype.element_ty), d < HEAD)
        at = out + token * so_t + query_head * so_h + d
        tl.store(at, result.to(out.dtype.element_ty), d < HEAD)


def join(
    parts: Parts, rows: Rows, coded: Coded | None, layer: int, sinks: Tensor | None, output: Tensor, group: int
) -> None:
    """Join parts of the softmax into ``output`` ``[T, H, D]``, at the rows' queries."""
    count, heads, shares, each, most, fields = parts.results.shape
    size = output.shape[-1]
    coded_out, means, six, first, mine = output, parts.denominators, 0, 0, output
    block = at_once = max(2, triton.next_power_of_2(shares))
    if coded is not None:
        # To queries of others nothing may be added; beside a long prompt's these are a small part of all.
        make = torch.empty if rows.whole else torch.zeros
        if rows.span is not None:
            first, last = rows.span
            mine = output[first:last]
        coded_out = make(mine.shape, dtype=output.dtype, device=output.device)
        means = coded.value_means[layer]
        # Compiled once, for however many rows; and no more at once than there are registers for.
        block, at_once = triton.next_power_of_2(max(shares, MOST_SHARES) * each), 16
        six = sum(1 << (rung + 1) for rung, form in enumerate(coded.forms) if apart(form)[1])
    _paged_join_kernel[(count, heads, most)](
        parts.results, parts.denominators, rows.begins, rows.ends, rows.slots, means,
        output if sinks is None else sinks, output, coded_out, group, shares * each, output.stride(0), output.stride(1),
        first,
        HEAD=size, FIELDS=fields, SIX=six, BLOCK_D=max(16, triton.next_power_of_2(size)),
        BLOCK_S=block, EACH=at_once, RUNGS=each - 1, HAS_SINKS=sinks is not None, num_warps=4,
    )  # fmt: skip
    if coded is not None:
        mine.view(-1, size).addmm_(coded_out.view(-1, size), coded.rotation.T)
