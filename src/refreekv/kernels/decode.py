"""Decode attention over ragged segments in Triton: every kept byte is read once.

The keys of all segments, in blocks, are one list; each program takes an equal share of it,
wherever segments begin and end in there. So long and short heads cost what they hold, and the grid
is the same at any length: one CUDA graph serves all. A program leaves one partial softmax for each
segment it touches, at slot ``program + segment`` (which no other pair shares, as both only grow
along the list); a second kernel joins them.

A segment is a line of the table that `storage.arena` describes: key address, value address, length,
capacity.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels import pdl, shared_memory
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.probe import LOG2E, _capped
from refreekv.kernels.storage import TYPES
from refreekv.kernels.table import Format, check_query

BLOCK_N = 64
"""Keys of one block, the unit that work is shared out in, where the device has the shared memory."""

PROGRAMS_PER_MULTIPROCESSOR = 3


@triton.jit
def _held(table, segment, segments):
    """Entries of each segment."""
    return tl.load(table + segment * 4 + 2, segment < segments, 0).to(tl.int32)


@triton.jit
def _share(table, segments, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of all segments the entries, their blocks, where these end in the list; and this program's part of it."""
    held = _held(table, tl.arange(0, BLOCK_S), segments)
    blocks = (held + BLOCK - 1) // BLOCK
    ends = tl.cumsum(blocks, 0)
    work = tl.sum(blocks, 0)
    # No share is empty, so that every slot between a segment's first and last one is written. In 64
    # bits: blocks times programs may pass 2 ** 31 on long batches.
    shares = tl.maximum(tl.minimum(tl.num_programs(0), work), 1).to(tl.int64)
    start = (tl.minimum(tl.program_id(0), shares) * work // shares).to(tl.int32)
    stop = (tl.minimum(tl.program_id(0) + 1, shares) * work // shares).to(tl.int32)
    return held, blocks, ends, start, stop


@triton.jit
def _at(block, held, blocks, ends, BLOCK_S: tl.constexpr):
    """The segment that a block is of: its number, first and last block, and its entries."""
    segment = tl.sum((ends <= block).to(tl.int32), 0)
    mine = tl.arange(0, BLOCK_S) == segment
    end = tl.sum(tl.where(mine, ends, 0), 0)
    first = end - tl.sum(tl.where(mine, blocks, 0), 0)
    return segment, first, end, tl.sum(tl.where(mine, held, 0), 0)


@triton.jit
def _decode_kernel(
    query, table, out, denominators,
    segments, kv_heads, group, scaling, softcap, sq_b, sq_h,
    HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr,
    PRODUCT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """``PRODUCT`` is the type that queries and keys are multiplied in: wide enough for both."""
    pdl.in_turn(DEPENDENT)
    held, blocks, ends, block, stop = _share(table, segments, BLOCK, BLOCK_S)
    head = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    while block < stop:
        segment, first, end, visible = _at(block, held, blocks, ends, BLOCK_S)
        upto = tl.minimum(stop, end)
        # Allocations and lines are multiples of 16 bytes, which Triton cannot know of a number.
        keys = tl.multiple_of(tl.load(table + segment * 4).to(tl.pointer_type(KEY_TYPE)), 16)
        values = tl.multiple_of(tl.load(table + segment * 4 + 1).to(tl.pointer_type(VALUE_TYPE)), 16)
        row = (segment // kv_heads).to(tl.int64)
        heads = (segment % kv_heads) * group + head
        q = tl.load(
            query + row * sq_b + heads[:, None] * sq_h + d[None, :], (head < group)[:, None] & (d < HEAD)[None, :], 0.0
        ).to(PRODUCT)
        highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        result = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
        for start in range((block - first) * BLOCK, (upto - first) * BLOCK, BLOCK):
            n = start + tl.arange(0, BLOCK)
            inside = n < visible
            k = tl.load(keys + n[None, :] * HEAD + d[:, None], inside[None, :] & (d < HEAD)[:, None], 0.0)
            v = tl.load(values + n[:, None] * VALUE + dv[None, :], inside[:, None] & (dv < VALUE)[None, :], 0.0)
            logits = _capped(tl.dot(q, k.to(PRODUCT), input_precision="ieee") * scaling, softcap, HAS_CAP)
            logits = tl.where(inside[None, :], logits, float("-inf"))
            # A block holds at least one entry, so this is finite from the first one on.
            higher = tl.maximum(highest, tl.max(logits, 1))
            p = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(p, 1)
            result = result * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            highest = higher
        slot = (tl.program_id(0) + segment) * group + head
        tl.store(denominators + slot, highest + tl.log2(total), head < group)
        tl.store(
            out + slot[:, None] * VALUE + dv[None, :],
            result / total[:, None],
            (head < group)[:, None] & (dv < VALUE)[None, :],
        )
        block = upto


@triton.jit
def _join_kernel(
    partial, denominators, table, sinks, out,
    segments, kv_heads, group, programs,
    VALUE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, HAS_SINKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One query head: its partial results, weighted by their shares of the softmax."""
    pdl.in_turn(DEPENDENT)
    segment, head = tl.program_id(0), tl.program_id(1)
    all_segments = tl.arange(0, BLOCK_S)
    blocks = (_held(table, all_segments, segments) + BLOCK - 1) // BLOCK
    work = tl.sum(blocks, 0)
    end = tl.sum(tl.where(all_segments <= segment, blocks, 0), 0)
    first = end - tl.sum(tl.where(all_segments == segment, blocks, 0), 0)
    # The programs whose shares hold the segment's first and last block.
    some = tl.maximum(work, 1)
    shares = tl.minimum(programs, some).to(tl.int64)
    low = ((first + 1) * shares + some - 1) // some - 1
    high = (end * shares + some - 1) // some
    low, high = low.to(tl.int32), tl.where(end > first, high, low).to(tl.int32)
    dv = tl.arange(0, BLOCK_V)
    if HAS_SINKS:
        highest = tl.load(sinks + (segment % kv_heads) * group + head).to(tl.float32) * LOG2E
        total = highest * 0.0 + 1.0
    else:
        highest = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
    result = tl.zeros([BLOCK_V], tl.float32)
    for start in range(low, high, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        real = program < high
        slot = (program + segment).to(tl.int64) * group + head
        share = tl.load(denominators + slot, real, float("-inf"))
        part = tl.load(partial + slot[:, None] * VALUE + dv[None, :], real[:, None] & (dv < VALUE)[None, :], 0.0)
        higher = tl.maximum(highest, tl.max(share, 0))
        weight = tl.exp2(share - higher)
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weight, 0)
        result = result * shrink + tl.sum(part * weight[:, None], 0)
        highest = higher
    # A segment without entries has no result but zero.
    result = tl.where(total > 0, result / tl.where(total > 0, total, 1.0), 0.0)
    line = (segment.to(tl.int64) * group + head) * VALUE
    tl.store(out + line + dv, result.to(out.dtype.element_ty), dv < VALUE)


@on_its_device
def launch_ragged_decode(
    query: Tensor,
    table: Tensor,
    form: Format,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    programs: int | None = None,
    block: int | None = None,
    warps: int = 4,
    stages: int | None = None,
) -> Tensor:
    """Run both kernels; parameters as in `kernels.ragged_decode`, without defaults.

    ``programs`` is how many programs share the keys; None: as many as the device runs at once.
    ``block``, ``warps`` and ``stages`` (of software pipelining) are there to be measured.
    """
    check_query(query, table, form, sinks)
    head_size, value_size = form.sizes
    product = torch.promote_types(query.dtype, form.key_type)
    widest = max(product.itemsize, form.value_type.itemsize)
    if stages is None:
        stages = 3 if widest * (head_size + value_size) <= 512 else 2
    block_d, block_v = (max(16, triton.next_power_of_2(size)) for size in (head_size, value_size))
    block_g = max(16, triton.next_power_of_2(query.shape[0] * query.shape[1] // table.shape[0]))
    if block is None:
        block = _block_for(block_d, block_v, block_g, widest, stages, shared_memory.for_tiles(query.device))
    return run_in_parts(
        _decode_kernel, query, table, value_size, scaling, softcap, sinks, programs, block,
        HEAD=head_size, KEY_TYPE=TYPES[form.key_type], VALUE_TYPE=TYPES[form.value_type], PRODUCT=TYPES[product],
        BLOCK_D=block_d, BLOCK_V=block_v, BLOCK_G=block_g, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def run_in_parts(
    kernel: Any,
    query: Tensor,
    table: Tensor,
    value_size: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    programs: int | None,
    block: int,
    **options: Any,
) -> Tensor:
    """Run a kernel that leaves each program's part of the results, with the options that are its own; and join them."""
    batch, heads = query.shape[:2]
    segments = table.shape[0]
    kv_heads = segments // batch
    group = heads // kv_heads
    if query.stride(-1) != 1:
        query = query.contiguous()
    if programs is None:
        programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(query.device)
    slots = programs + segments
    partial = torch.empty(slots, group, value_size, dtype=torch.float32, device=query.device)
    denominators = torch.empty(slots, group, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, 1, heads, value_size, dtype=query.dtype, device=query.device)
    block_s = triton.next_power_of_2(max(segments, 2))
    # Parts of a segment, if all are equally long: one round of loads, where rounds would wait for each other.
    parts = min(64, max(16, triton.next_power_of_2(triton.cdiv(programs, segments) + 2)))
    kernel[(programs,)](
        query, table, partial, denominators, segments, kv_heads, group, scaling,
        1.0 if softcap is None else softcap, query.stride(0), query.stride(1),
        VALUE=value_size, BLOCK=block, BLOCK_S=block_s, HAS_CAP=softcap is not None,
        **options, **pdl.options(batch, query),
    )  # fmt: skip
    _join_kernel[(segments, group)](
        partial, denominators, table, query if sinks is None else sinks, out, segments, kv_heads, group,
        programs, VALUE=value_size, BLOCK_V=max(16, triton.next_power_of_2(value_size)), BLOCK=block, BLOCK_S=block_s,
        BLOCK_P=parts, HAS_SINKS=sinks is not None, num_warps=4, **pdl.options(batch, query),
    )  # fmt: skip
    return out


@functools.cache
def _block_for(block_d: int, block_v: int, block_g: int, bytes_each: int, stages: int, most: int) -> int:
    """Keys of a block: `BLOCK_N`, or fewer where ``most`` bytes of shared memory are too few for so many."""
    block = BLOCK_N
    # Of each stage but one a block's keys and values; and the queries.
    while block > 16 and ((stages - 1) * block * (block_d + block_v) + block_g * block_d) * bytes_each > most:
        block //= 2
    return block


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
