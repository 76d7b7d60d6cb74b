"""What is before and after decode attention over packed lines, in Triton: queries into code space, results out of it.

`core.packed_lines.PackedMaps` has the maps; parts of the softmax are those of `kernels.decode` (of exact entries) and
`kernels.packed_decode` (of each level).
"""

# Tuples of another length have another type, and Triton's have as many parts as there are levels.
# mypy: disable-error-code="assignment, misc"

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat
from refreekv.kernels import pdl
from refreekv.kernels.decode import _held
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.packed_decode import fields_of, part_of
from refreekv.kernels.probe import LOG2E

LARGEST = tl.constexpr(8192.0)
"""No element of a query in code space is larger: float16 has it also times four, and small ones keep their digits."""


@dataclass(frozen=True)
class Part:
    """What a kernel left of the softmax over one table's entries.

    Attributes
    ----------
    table : Tensor
        See `kernels.table`.
    parts, denominators : Tensor
        ``[slots, group, elements]`` and ``[slots, group]``, float32.
    programs, block : int
        That the table's blocks, of so many entries, were shared out to.
    """

    table: Tensor
    parts: Tensor
    denominators: Tensor
    programs: int
    block: int


@triton.jit
def _prepare_kernel(
    query, means, dual, bounds, out, scales, shifts,
    kv_heads, group, scaling, sq_b, sq_h, row_of_maps,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_G: tl.constexpr, HAS_CAP: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The query heads of one segment: some of their channels in code space."""
    pdl.in_turn(EARLY)
    segment, part = tl.program_id(0), tl.program_id(1)
    row, kv_head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    maps = row * row_of_maps + kv_head
    head = tl.arange(0, BLOCK_G)
    asking = head < group
    d = tl.arange(0, BLOCK_D)
    asked = query + row * sq_b + (kv_head * group + head)[:, None].to(tl.int64) * sq_h
    q = tl.load(asked + d[None, :], asking[:, None] & (d < HEAD)[None, :], 0.0).to(tl.float32)
    mean = tl.load(means + maps * HEAD + d, d < HEAD, 0.0)
    norm = tl.sqrt(tl.sum(q * q, 1))
    size = tl.maximum(norm * tl.load(bounds + maps), 1e-30) * (1.0 / LARGEST)
    heads = segment * group + head
    if part == 0:
        unit = scaling if HAS_CAP else scaling * LOG2E
        tl.store(scales + heads, size * unit, asking)
        tl.store(shifts + heads, tl.sum(q * mean[None, :], 1) * unit, asking)
    o = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    result = tl.zeros([BLOCK_G, BLOCK_OUT], tl.float32)
    for start in tl.static_range(0, BLOCK_D, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        some = tl.load(asked + i[None, :], asking[:, None] & (i < HEAD)[None, :], 0.0).to(tl.float32)
        line = dual + (maps * HEAD + o)[None, :] * HEAD + i[:, None]
        matrix = tl.load(line, (o < HEAD)[None, :] & (i < HEAD)[:, None], 0.0)
        result = tl.dot(some, matrix, result, input_precision="ieee" if EXACT else "tf32x3")
    tl.store(
        out + heads[:, None].to(tl.int64) * HEAD + o[None, :],
        result / size[:, None],
        asking[:, None] & (o < HEAD)[None, :],
    )


@triton.jit
def _slots(table, segment, segments, programs, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr):
    """The programs whose shares hold the segment's first and last block; none if they are the same."""
    all_segments = tl.arange(0, BLOCK_S)
    blocks = (_held(table, all_segments, segments, 0) + BLOCK - 1) // BLOCK
    work = tl.sum(blocks, 0)
    end = tl.sum(tl.where(all_segments <= segment, blocks, 0), 0)
    first = end - tl.sum(tl.where(all_segments == segment, blocks, 0), 0)
    some = tl.maximum(work, 1)
    shares = tl.minimum(programs, some).to(tl.int64)
    low = ((first + 1) * shares + some - 1) // some - 1
    high = (end * shares + some - 1) // some
    return low.to(tl.int32), tl.where(end > first, high, low).to(tl.int32)


@triton.jit
def _total(
    denominators, segment, low, high, group, head, asking, highest, total,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The running maximum of all parts' shares, and the sum of these."""
    for start in range(low, high, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        real = (program < high)[:, None] & asking[None, :]
        slot = (program + segment)[:, None].to(tl.int64) * group + head[None, :]
        share = tl.load(denominators + slot, real, float("-inf"))
        higher = tl.maximum(highest, tl.max(share, 0))
        safe = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp2(highest - safe) + tl.sum(tl.exp2(share - safe[None, :]), 0)
        highest = higher
    return highest, total


@triton.jit
def _sum_of_parts(
    parts, denominators, segment, low, high, group, head, asking, highest, element, real_element,
    ELEMENTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Elements ``[heads, n]`` of all parts' results by their shares, and the sum of these."""
    result = tl.zeros([head.shape[0], element.shape[0]], tl.float32)
    mass = tl.zeros([head.shape[0]], tl.float32)
    for start in range(low, high, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        real = (program < high)[:, None] & asking[None, :]
        slot = (program + segment)[:, None].to(tl.int64) * group + head[None, :]
        weight = tl.exp2(tl.load(denominators + slot, real, float("-inf")) - highest[None, :])
        at = parts + slot[:, :, None] * ELEMENTS + element[None, None, :]
        part = tl.load(at, real[:, :, None] & real_element[None, None, :], 0.0)
        result += tl.sum(part * weight[:, :, None], 0)
        mass += tl.sum(weight, 0)
    return result, mass


@triton.jit
def _channels(
    parts, denominators, segment, low, high, group, head, asking, highest, channel,
    EIGHT: tl.constexpr, SIX: tl.constexpr, FOUR: tl.constexpr, FIELDS: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Channels ``[heads, n]`` of a level's result, which has two fields of those of width 6; and its share."""
    # Channels of width 2 come behind the lower bits of those of width 6.
    field = tl.where(channel < FOUR, channel, channel + (SIX - EIGHT))
    result, share = _sum_of_parts(
        parts, denominators, segment, low, high, group, head, asking, highest, field, channel < VALUE, FIELDS, BLOCK_P
    )
    if SIX > EIGHT:
        lower, _ = _sum_of_parts(
            parts, denominators, segment, low, high, group, head, asking, highest,
            FOUR + channel - EIGHT, (channel >= EIGHT) & (channel < SIX), FIELDS, BLOCK_P,
        )  # fmt: skip
        result += lower
    return result, share


@triton.jit
def _packed_join_kernel(
    tables, parts, denominators, sinks, means, back, out,
    segments, kv_heads, group, programs, row_of_maps,
    LEVELS: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, COUNT: tl.constexpr, HAS_SINKS: tl.constexpr, EXACT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Some query heads of one segment; the first of ``COUNT`` parts is that of exact entries, the others of levels."""
    pdl.in_turn(EARLY)
    segment = tl.program_id(0)
    row, kv_head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    maps = row * row_of_maps + kv_head
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    asking = head < group
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + kv_head * group + head, asking, 0.0).to(tl.float32) * LOG2E
        total += 1.0
    lows, highs = (), ()
    for i in tl.static_range(COUNT):
        low, high = _slots(tables[i], segment, segments, programs[i], part_of(LEVELS, i, 4), BLOCK_S)
        highest, total = _total(
            denominators[i], segment, low, high, group, head, asking, highest, total, BLOCK_P=4 * BLOCK_P
        )
        lows = lows + (low,)
        highs = highs + (high,)
    # A segment without entries has no result but zero.
    highest = tl.where(highest > float("-inf"), highest, 0.0)
    weight = 1.0 / tl.where(total > 0, total, 1.0)
    dv = tl.arange(0, BLOCK_V)
    coded = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_H], tl.float32)
    for i in tl.static_range(1, COUNT):
        some, share = _channels(
            parts[i], denominators[i], segment, lows[i], highs[i], group, head, asking, highest, dv,
            part_of(LEVELS, i, 0), part_of(LEVELS, i, 1), part_of(LEVELS, i, 2), part_of(LEVELS, i, 3), VALUE, BLOCK_P,
        )  # fmt: skip
        coded += some
        mass += share
    for start in range(0, BLOCK_V, BLOCK_OUT):
        o = start + tl.arange(0, BLOCK_OUT)
        line = back + (maps * VALUE + o)[None, :] * VALUE + dv[:, None]
        matrix = tl.load(line, (o < VALUE)[None, :] & (dv < VALUE)[:, None], 0.0)
        result = tl.dot(coded, matrix, input_precision="ieee" if EXACT else "tf32x3")
        result += mass[:, None] * tl.load(means + maps * VALUE + o, o < VALUE, 0.0)[None, :]
        exact, _ = _sum_of_parts(
            parts[0], denominators[0], segment, lows[0], highs[0], group, head, asking, highest, o, o < VALUE,
            VALUE, BLOCK_P,
        )  # fmt: skip
        at = out + (segment * group + head)[:, None].to(tl.int64) * VALUE + o[None, :]
        result = (result + exact) * weight[:, None]
        tl.store(at, result.to(out.dtype.element_ty), asking[:, None] & (o < VALUE)[None, :])


@on_its_device
def launch_prepare(
    query: Tensor,
    means: Tensor,
    dual: Tensor,
    bounds: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
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
    """
    batch, heads, _, size = query.shape
    kv_heads = means.shape[1]
    if query.stride(-1) != 1:
        query = query.contiguous()
    out = torch.empty(batch, heads, size, dtype=torch.float32, device=query.device)
    scales, shifts = (torch.empty(batch, heads, dtype=torch.float32, device=query.device) for _ in range(2))
    block_d, group = triton.next_power_of_2(size), heads // kv_heads
    block_out = 32
    _prepare_kernel[(batch * kv_heads, triton.cdiv(size, block_out))](
        query, means, dual, bounds, out, scales, shifts, kv_heads, group, scaling, query.stride(0), query.stride(1),
        0 if means.shape[0] == 1 else kv_heads,
        HEAD=size, BLOCK_D=block_d, BLOCK_OUT=block_out, BLOCK_IN=min(64, block_d),
        BLOCK_G=triton.next_power_of_2(group), HAS_CAP=softcap is not None, EXACT=query.dtype.itemsize > 2,
        num_warps=4, **pdl.options(batch, query),
    )  # fmt: skip
    return out, scales, shifts


@on_its_device
def launch_packed_join(
    query: Tensor,
    found: Sequence[Part],
    forms: Sequence[PackedFormat],
    means: Tensor,
    back: Tensor,
    sinks: Tensor | None,
    heads_each: int | None = None,
    parts_each: int | None = None,
    warps: int = 4,
) -> Tensor:
    """Join parts of the softmax; the result of attention ``[B, 1, H, Dv]``.

    Parameters
    ----------
    query : Tensor
        ``[B, H, 1, D]``, for its shape and type.
    found : sequence of Part
        Of the exact entries, and of each level.
    forms : sequence of PackedFormat
        Of each level.
    means, back : Tensor
        ``value_mean`` and ``value_back`` of `PackedMaps`.
    sinks : Tensor, optional
        As ``sinks`` of `kernels.ragged_decode`.
    heads_each, parts_each, warps
        Query heads of a program, and parts that it loads at once: to be measured.
    """
    batch, heads = query.shape[:2]
    kv_heads, size = means.shape[1:]
    segments, group = batch * kv_heads, heads // kv_heads
    out = torch.empty(batch, 1, heads, size, dtype=query.dtype, device=query.device)
    block_v = triton.next_power_of_2(size)
    if heads_each is None:
        # Few segments: more programs, each with a query head of its own.
        heads_each = triton.next_power_of_2(group) if segments >= 64 else 1
    if parts_each is None:
        parts_each = max(2, min(16, 8192 // (heads_each * block_v)))
    # For each part: channels of 8, of at least 6 and of at least 4 bits, fields, entries of a block.
    fields = [(0, 0, 0, size), *((*form.values.ends(), fields_of(form.values)) for form in forms)]
    levels = tuple((*some, part.block) for some, part in zip(fields, found, strict=True))
    _packed_join_kernel[(segments, triton.cdiv(group, heads_each))](
        tuple(part.table for part in found), tuple(part.parts for part in found),
        tuple(part.denominators for part in found), query if sinks is None else sinks, means, back, out,
        segments, kv_heads, group, tuple(part.programs for part in found), 0 if means.shape[0] == 1 else kv_heads,
        LEVELS=levels, VALUE=size, BLOCK_V=block_v, BLOCK_OUT=32,
        BLOCK_H=heads_each, BLOCK_S=triton.next_power_of_2(max(segments, 2)), BLOCK_P=parts_each, COUNT=len(found),
        HAS_SINKS=sinks is not None, EXACT=query.dtype.itemsize > 2, num_warps=warps, **pdl.options(batch, query),
    )  # fmt: skip
    return out
