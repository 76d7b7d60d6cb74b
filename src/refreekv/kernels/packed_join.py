"""What is before and after decode attention over packed lines, in Triton: queries into code space, results out of it.

`core.packed_maps.PackedMaps` has the maps; parts of the softmax are those of `kernels.packed_decode`.
"""

# Tuples of another length have another type, and Triton's have as many parts as there are levels.
# mypy: disable-error-code="assignment, misc"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat
from refreekv.kernels import pdl
from refreekv.kernels.decode import multiprocessors
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.neighbours import none_claimed
from refreekv.kernels.packed_block import apart, constant
from refreekv.kernels.packed_decode import Parts, shared_out, shares_of
from refreekv.kernels.probe import LOG2E

MANY = 64
"""Segments from which on results come out of code space in a kernel of its own: of few, a launch less is more."""

LARGEST = tl.constexpr(8192.0)
"""No element of a query in code space is larger: float16 has it also times four, and small ones keep their digits."""


@triton.jit
def _prepare_kernel(
    query, means, dual, bounds, out, scales, shifts, claimed,
    rows, kv_heads, group, scaling, sq_b, sq_h, row_of_means, row_of_maps,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, HAS_CAP: tl.constexpr, EXACT: tl.constexpr, CHAINED: tl.constexpr,
    MULTIPROCESSORS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head in some rows: some of their channels in code space."""
    pdl.in_turn(DEPENDENT)
    if CHAINED and not DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        none_claimed(claimed, MULTIPROCESSORS)
    first_row, kv_head, part = tl.program_id(0) * BLOCK_R, tl.program_id(1), tl.program_id(2)
    maps = first_row.to(tl.int64) * row_of_maps + kv_head
    n = tl.arange(0, BLOCK_R * BLOCK_G)
    row, head = (first_row + n // BLOCK_G).to(tl.int64), n % BLOCK_G
    asking = (head < group) & (row < rows)
    d = tl.arange(0, BLOCK_D)
    asked = query + row[:, None] * sq_b + (kv_head * group + head)[:, None].to(tl.int64) * sq_h
    q = tl.load(asked + d[None, :], asking[:, None] & (d < HEAD)[None, :], 0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(q * q, 1))
    size = tl.maximum(norm * tl.load(bounds + maps), 1e-30) * (1.0 / LARGEST)
    heads = (row * kv_heads + kv_head) * group + head
    if part == 0:
        unit = scaling if HAS_CAP else scaling * LOG2E
        mean = means + (row * row_of_means + kv_head)[:, None] * HEAD + d[None, :]
        mean = tl.load(mean, asking[:, None] & (d < HEAD)[None, :], 0.0)
        tl.store(scales + heads, size * unit, asking)
        tl.store(shifts + heads, tl.sum(q * mean, 1) * unit, asking)
    o = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    result = tl.zeros([BLOCK_R * BLOCK_G, BLOCK_OUT], tl.float32)
    for start in tl.static_range(0, BLOCK_D, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        some = tl.load(asked + i[None, :], asking[:, None] & (i < HEAD)[None, :], 0.0).to(tl.float32)
        line = dual + (maps * HEAD + o)[None, :] * HEAD + i[:, None]
        matrix = tl.load(line, (o < HEAD)[None, :] & (i < HEAD)[:, None], 0.0)
        # 16 bits fit tf32 as they are; of the matrix it keeps as much as the result does in float16.
        result = tl.dot(some, matrix, result, input_precision="ieee" if EXACT else "tf32")
    tl.store(out + heads[:, None] * HEAD + o[None, :], result / size[:, None], asking[:, None] & (o < HEAD)[None, :])


@triton.jit
def _program_of(block, work, shares):
    """Whose share a block of the list is in."""
    return (((block + 1) * shares + work - 1) // work - 1).to(tl.int32)


@triton.jit
def _weighed(share, part, result, mass, rest, highest):
    """Results ``[heads, n]`` and their mass with other parts ``[P, heads, n]`` by their shares ``[P, heads]``.

    ``rest`` is what else counts in the sum of all, at the same maximum.
    """
    higher = tl.maximum(highest, tl.max(share, 0))
    # Nothing is there yet where this is infinite.
    safe = tl.where(higher > float("-inf"), higher, 0.0)
    shrink = tl.exp2(highest - safe)
    weight = tl.exp2(share - safe[None, :])
    result = result * shrink[:, None] + tl.sum(part * weight[:, :, None], 0)
    return result, mass * shrink + tl.sum(weight, 0), rest * shrink, higher, shrink


@triton.jit
def _places(
    tables, segment, segments, programs, COUNT: tl.constexpr, BLOCK: tl.constexpr, EXACT_BLOCK: tl.constexpr,
    COSTS: tl.constexpr, EXTRA: tl.constexpr, LEAST: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Which programs have parts of a segment: for each table the first one, and how many."""
    all_segments = tl.arange(0, BLOCK_S)
    firsts, lasts = (), ()
    work = tl.zeros([], tl.int32)
    for i in tl.static_range(COUNT + 1):
        _, counted = shared_out(
            tables[i], segments, EXACT_BLOCK if i == 0 else BLOCK, constant(COSTS, i), EXTRA, BLOCK_S
        )
        end = work + tl.sum(tl.where(all_segments <= segment, counted, 0), 0)
        # Where the first and the last block begin.
        firsts = firsts + (end - tl.sum(tl.where(all_segments == segment, counted, 0), 0) + EXTRA,)
        lasts = lasts + (end - constant(COSTS, i),)
        work += tl.sum(counted, 0)
    shares = shares_of(work, programs, LEAST)
    work = tl.maximum(work, 1)
    lows, counts = (), ()
    for i in tl.static_range(COUNT + 1):
        low = _program_of(firsts[i], work, shares)
        lows = lows + (low,)
        counts = counts + (tl.where(lasts[i] >= firsts[i], _program_of(lasts[i], work, shares) + 1 - low, 0),)
    return lows, counts


@triton.jit
def _sums(
    parts, denominators, segment, segments, group, head, asking, o, lows, counts, highest, rest,
    LEVELS: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, FIELDS: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Results in code space ``[BLOCK_H, BLOCK_V]``, their mass, exact ones in channels ``o``, and the mass of all."""
    dv = tl.arange(0, BLOCK_V)
    coded = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_H], tl.float32)
    # Parts of all levels are one list: their loads wait for each other no more than those of one level do.
    begins = ()
    count = tl.zeros([], tl.int32)
    for i in tl.static_range(1, COUNT + 1):
        begins = begins + (count,)
        count += counts[i]
    for start in range(0, count, BLOCK_P):
        number = start + tl.arange(0, BLOCK_P)
        slot, first_six, end_six = number * 0, number * 0, number * 0
        for i in tl.static_range(COUNT):
            mine = number >= begins[i]
            slot = tl.where(mine, number - begins[i] + lows[i + 1] + (i + 1) * segments + segment, slot)
            first_six = tl.where(mine, constant(LEVELS, i, 0), first_six)
            end_six = tl.where(mine, constant(LEVELS, i, 1), end_six)
        real = (number < count)[:, None] & asking[None, :]
        slot = slot[:, None].to(tl.int64) * group + head[None, :]
        share = tl.load(denominators + slot, real, float("-inf"))
        at = parts + slot[:, :, None] * FIELDS + dv[None, None, :]
        part = tl.load(at, real[:, :, None] & (dv < VALUE)[None, None, :], 0.0)
        if FIELDS > VALUE:
            lower = (dv[None, :] >= first_six[:, None]) & (dv[None, :] < end_six[:, None])
            part += tl.load(at + VALUE, real[:, :, None] & lower[:, None, :], 0.0)
        coded, mass, rest, highest, _shrink = _weighed(share, part, coded, mass, rest, highest)
    exact = tl.zeros([BLOCK_H, BLOCK_OUT], tl.float32)
    exact_mass = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, counts[0], BLOCK_P):
        number = start + tl.arange(0, BLOCK_P)
        real = (number < counts[0])[:, None] & asking[None, :]
        slot = (number + lows[0] + segment)[:, None].to(tl.int64) * group + head[None, :]
        share = tl.load(denominators + slot, real, float("-inf"))
        at = parts + slot[:, :, None] * FIELDS + o[None, None, :]
        part = tl.load(at, real[:, :, None] & (o < VALUE)[None, None, :], 0.0)
        exact, exact_mass, rest, highest, shrink = _weighed(share, part, exact, exact_mass, rest, highest)
        coded *= shrink[:, None]
        mass *= shrink
    return coded, mass, exact, rest + mass + exact_mass


@triton.jit
def _packed_join_kernel(
    tables, parts, denominators, sinks, means, back, out, coded_out,
    segments, kv_heads, group, programs, row_of_means, row_of_maps,
    LEVELS: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
    EXACT_BLOCK: tl.constexpr, COSTS: tl.constexpr, EXTRA: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, HAS_SINKS: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some query heads of one segment: some channels of the result if ``WHOLE``, else what `_back_kernel` needs."""
    segment = tl.program_id(0)
    row, kv_head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    maps = row * row_of_maps + kv_head
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    asking = head < group
    dv = tl.arange(0, BLOCK_V)
    o = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    # What the kernel before does not write is fetched while that still runs.
    lows, counts = _places(tables, segment, segments, programs, COUNT, BLOCK, EXACT_BLOCK, COSTS, EXTRA, LEAST, BLOCK_S)
    if WHOLE:
        matrix = tl.load(
            back + (maps * VALUE + o)[None, :] * VALUE + dv[:, None], (o < VALUE)[None, :] & (dv < VALUE)[:, None], 0.0
        )
    mean = tl.load(means + (row * row_of_means + kv_head) * VALUE + o, o < VALUE, 0.0)
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    rest = tl.zeros([BLOCK_H], tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + kv_head * group + head, asking, 0.0).to(tl.float32) * LOG2E
        rest += 1.0
    pdl.in_turn(DEPENDENT)
    coded, mass, exact, total = _sums(
        parts, denominators, segment, segments, group, head, asking, o, lows, counts, highest, rest,
        LEVELS, COUNT, VALUE, FIELDS, BLOCK_V, BLOCK_OUT, BLOCK_H, BLOCK_P,
    )  # fmt: skip
    # A segment without entries has no result but zero.
    each = (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    at = (segment * group + head)[:, None].to(tl.int64) * VALUE
    result = mass[:, None] * mean[None, :] + exact
    if WHOLE:
        result += tl.dot(coded, matrix, input_precision="ieee" if EXACT else "tf32x3")
    else:
        tl.store(coded_out + at + dv[None, :], coded * each, asking[:, None] & (dv < VALUE)[None, :])
    tl.store(out + at + o[None, :], (result * each).to(out.dtype.element_ty), asking[:, None] & (o < VALUE)[None, :])


@triton.jit
def _back_kernel(
    coded, beside, back, out, rows, kv_heads, group, row_of_maps,
    VALUE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr, EXACT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head in some rows: some channels of results out of code space, and what is beside."""
    first_row, kv_head = tl.program_id(0) * BLOCK_R, tl.program_id(1)
    n = tl.arange(0, BLOCK_R * BLOCK_G)
    row, head = (first_row + n // BLOCK_G).to(tl.int64), n % BLOCK_G
    asking = (head < group) & (row < rows)
    dv, o = tl.arange(0, BLOCK_V), tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    maps = first_row.to(tl.int64) * row_of_maps + kv_head
    matrix = tl.load(
        back + (maps * VALUE + o)[None, :] * VALUE + dv[:, None], (o < VALUE)[None, :] & (dv < VALUE)[:, None], 0.0
    )
    at = ((row * kv_heads + kv_head) * group + head)[:, None] * VALUE
    pdl.in_turn(DEPENDENT)
    some = tl.load(coded + at + dv[None, :], asking[:, None] & (dv < VALUE)[None, :], 0.0)
    there = asking[:, None] & (o < VALUE)[None, :]
    result = tl.load(beside + at + o[None, :], there, 0.0)
    result += tl.dot(some, matrix, input_precision="ieee" if EXACT else "tf32x3")
    tl.store(out + at + o[None, :], result.to(out.dtype.element_ty), there)


@on_its_device
def launch_prepare(
    query: Tensor,
    means: Tensor,
    dual: Tensor,
    bounds: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries in code space.

    Parameters
    ----------
    query : Tensor
        ``[B, H, 1, D]``.
    means, dual, bounds : Tensor
        ``key_mean``, ``key_dual`` and ``key_bound`` of `PackedMaps`.
    scaling : float
        Factor on the logits.
    softcap : float, optional
        Whether there is one decides the unit of logits: they are in units of log 2 if not.

    Returns
    -------
    query, scales, shifts : Tensor
        ``[B, H, D]`` float32, of a size that float16 has room for; what the product with a key is to be multiplied
        with, ``[B, H]``; and the logits that the mean key adds.
    claimed : Tensor
        int32: a zero for each multiprocessor, see `kernels.neighbours`.
    """
    batch, heads, _, size = query.shape
    kv_heads = means.shape[1]
    if query.stride(-1) != 1:
        query = query.contiguous()
    out = torch.empty(batch, heads, size, dtype=torch.float32, device=query.device)
    scales, shifts = (torch.empty(batch, heads, dtype=torch.float32, device=query.device) for _ in range(2))
    claimed = torch.empty(multiprocessors(query.device), dtype=torch.int32, device=query.device)
    block_d, block_g = triton.next_power_of_2(size), triton.next_power_of_2(heads // kv_heads)
    # Rows that share maps share a program, as many as a product has room for.
    rows = min(max(1, 16 // block_g), triton.next_power_of_2(batch)) if dual.shape[0] == 1 else 1
    block_out = 32
    _prepare_kernel[(triton.cdiv(batch, rows), kv_heads, triton.cdiv(size, block_out))](
        query, means, dual, bounds, out, scales, shifts, claimed, batch, kv_heads, heads // kv_heads, scaling,
        query.stride(0), query.stride(1), *(0 if part.shape[0] == 1 else kv_heads for part in (means, dual)),
        HEAD=size, BLOCK_D=block_d, BLOCK_OUT=block_out, BLOCK_IN=min(64, block_d), BLOCK_R=rows, BLOCK_G=block_g,
        HAS_CAP=softcap is not None, EXACT=query.dtype.itemsize > 2, CHAINED=pdl.options(1, query)["DEPENDENT"],
        MULTIPROCESSORS=len(claimed), num_warps=4, **pdl.options(batch, query, small=True),
    )  # fmt: skip
    return out, scales, shifts, claimed


@on_its_device
def launch_packed_join(
    query: Tensor,
    found: Parts,
    forms: Sequence[PackedFormat],
    means: Tensor,
    back: Tensor,
    sinks: Tensor | None,
    whole: bool | None = None,
    heads_each: int | None = None,
    out_each: int | None = None,
    parts_each: int | None = None,
    warps: int | None = None,
    early: bool = True,
) -> Tensor:
    """Join parts of the softmax; the result of attention ``[B, 1, H, Dv]``.

    Parameters
    ----------
    query : Tensor
        ``[B, H, 1, D]``, for its shape and type.
    found : Parts
        Of all programs.
    forms : sequence of PackedFormat
        Of each level.
    means, back : Tensor
        ``value_mean`` and ``value_back`` of `PackedMaps`.
    sinks : Tensor, optional
        As ``sinks`` of `kernels.ragged_decode`.
    whole, heads_each, out_each, parts_each, warps, early
        Whether one kernel does it all, query heads and channels of a program, and parts that it loads at once: to be
        measured.
    """
    batch, heads = query.shape[:2]
    kv_heads, size = means.shape[1:]
    segments, group = batch * kv_heads, heads // kv_heads
    out = torch.empty(batch, 1, heads, size, dtype=query.dtype, device=query.device)
    block_v = triton.next_power_of_2(size)
    if whole is None:
        whole = segments < MANY
    if heads_each is None:
        heads_each = 1
    if out_each is None:
        out_each = 32 if whole else block_v
    if parts_each is None:
        # Those of a segment, if all are equally long; but no more than there are registers for.
        most = 64 if whole else triton.next_power_of_2(triton.cdiv(found.programs, segments) + 1 + len(forms))
        parts_each = max(2, min(most, 8192 // (heads_each * block_v)))
    if warps is None:
        warps = 4
    exact, options = query.dtype.itemsize > 2, pdl.options(1 if early else batch, query)
    # Results in code space, and what is beside them: the mean values and exact entries.
    coded, beside = (out, out) if whole else torch.empty(2, *out.shape, dtype=torch.float32, device=query.device)
    steps = [0 if part.shape[0] == 1 else kv_heads for part in (means, back)]
    _packed_join_kernel[(segments, triton.cdiv(group, heads_each), triton.cdiv(size, out_each) if whole else 1)](
        found.tables, found.results, found.denominators, query if sinks is None else sinks, means, back,
        out if whole else beside, coded, segments, kv_heads, group, found.programs, *steps,
        LEVELS=tuple(apart(form) for form in forms), COUNT=len(forms), VALUE=size,
        FIELDS=found.results.shape[-1], BLOCK=found.block, EXACT_BLOCK=found.exact_block, COSTS=found.costs,
        EXTRA=found.extra, LEAST=found.least, BLOCK_V=block_v, BLOCK_OUT=out_each, BLOCK_H=heads_each,
        BLOCK_S=triton.next_power_of_2(max(segments, 2)), BLOCK_P=parts_each, HAS_SINKS=sinks is not None,
        EXACT=exact, WHOLE=whole, num_warps=warps, **options,
    )  # fmt: skip
    if not whole:
        block_g = triton.next_power_of_2(group)
        rows = min(max(1, 16 // block_g), triton.next_power_of_2(batch)) if back.shape[0] == 1 else 1
        block_out = min(32, block_v)
        _back_kernel[(triton.cdiv(batch, rows), kv_heads, triton.cdiv(size, block_out))](
            coded, beside, back, out, batch, kv_heads, group, steps[1],
            VALUE=size, BLOCK_V=block_v, BLOCK_OUT=block_out, BLOCK_R=rows, BLOCK_G=block_g, EXACT=exact,
            num_warps=4, **options,
        )  # fmt: skip
    return out
