"""Decode attention over segments of int8 lines, in Triton: the codes are factors as they are.

An element is ``middle + scale * code``, with codes from -128 to 127 here, so that the dot product of a query with
a key is that of each group's codes times its scale, and the sum of the query's elements times its middle; values
go the same way. What is shared out, in which parts, and how these are joined is as in `kernels.decode`.

Making numbers of codes is most of the work, and more of it than a GPU does while it waits for memory, unless it is
done well. Hence entries are rows here and the query heads of a KV head columns, of which a product needs no more
than eight; and sums over entries are left open until the last block.
"""

# Tuples of another length have another type, and Triton's have as many parts as a head has groups.
# mypy: disable-error-code="assignment"

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels import pdl, shared_memory
from refreekv.kernels.coded_storage import sizes_of
from refreekv.kernels.decode import BLOCK_N, PROGRAMS_PER_MULTIPROCESSOR, _at, _share, run_in_parts
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.probe import _capped
from refreekv.kernels.storage import TYPES
from refreekv.kernels.table import Format, check_query

REGISTERS = 65_536
"""Of a multiprocessor."""


@triton.jit
def _factors(codes, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Codes ``[BLOCK, elements]`` less 128 in a floating-point type, of which all have such numbers exactly."""
    if dtype == tl.float16:
        # At 1024 the last bit of a number is worth 1. There are no fast conversions to this type.
        numbers = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    else:
        numbers = (codes ^ 128).to(tl.int8, bitcast=True).to(dtype)
    # Always true, but has Triton convert codes as they were loaded, eight in a row, and then arrange them for
    # the product; else it arranges bytes, one by one.
    return tl.where((tl.arange(0, BLOCK) >= 0)[:, None], numbers, 0.0)


@triton.jit
def _numbers(numbers, at, HALF: tl.constexpr):
    """A group's scale, and what code 128 stands for."""
    both = tl.load(numbers + at)
    scale = both.to(tl.uint16).to(HALF, bitcast=True).to(tl.float32)
    low = (both >> 16).to(tl.uint16).to(HALF, bitcast=True).to(tl.float32)
    return scale, low + 128.0 * scale


@triton.jit
def _coded_decode_kernel(
    query, table, out, denominators,
    segments, kv_heads, group, window, scaling, softcap, sq_b, sq_h,
    HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    KEY_LINE: tl.constexpr, VALUE_LINE: tl.constexpr, KEY_HALF: tl.constexpr, VALUE_HALF: tl.constexpr,
    WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``WEIGHT`` is the type that weights, times the scales of values, are multiplied in."""
    pdl.in_turn(EARLY)
    held, blocks, ends, block, stop = _share(table, segments, window, BLOCK, BLOCK_S)
    head = tl.arange(0, BLOCK_G)
    d, dv = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    dtype = query.dtype.element_ty
    bytes_at = tl.pointer_type(tl.uint8)
    numbers_at = tl.pointer_type(tl.uint32)
    # Scales of values make weights small: in float16 this much larger they lose less, and none becomes infinite.
    LARGER: tl.constexpr = 64.0
    while block < stop:
        segment, first, end, visible, skipped = _at(block, table, held, blocks, ends, BLOCK_S)
        upto = tl.minimum(stop, end)
        # Lines begin at multiples of 8 bytes, which Triton cannot know of a number.
        keys, values = tl.load(table + segment * 4), tl.load(table + segment * 4 + 1)
        key_codes, value_codes = tl.multiple_of(keys.to(bytes_at), 8), tl.multiple_of(values.to(bytes_at), 8)
        key_numbers = tl.multiple_of((keys + HEAD).to(numbers_at), 8)
        value_numbers = tl.multiple_of((values + VALUE).to(numbers_at), 8)
        row = (segment // kv_heads).to(tl.int64)
        heads = (segment % kv_heads) * group + head
        # One for each group of elements.
        q, q_sums, results, middles = (), (), (), ()
        for g in tl.static_range(HEAD // KEY_GROUP):
            asked = query + row * sq_b + heads[None, :] * sq_h + g * KEY_GROUP + d[:, None]
            part = tl.load(asked, (head < group)[None, :] & (d < KEY_GROUP)[:, None], 0.0)
            q = q + (part,)
            q_sums = q_sums + (tl.sum(part.to(tl.float32), 0),)
        for _ in tl.static_range(VALUE // VALUE_GROUP):
            results = results + (tl.zeros([BLOCK_V, BLOCK_G], tl.float32),)
            middles = middles + (tl.zeros([BLOCK, BLOCK_G], tl.float32),)
        highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK, BLOCK_G], tl.float32)
        for start in range((block - first) * BLOCK, (upto - first) * BLOCK, BLOCK):
            n = start + tl.arange(0, BLOCK)
            inside = n < visible
            # Behind the end the last entry again, which will have no weight: this takes less than masks do.
            line = skipped + tl.minimum(n, visible - 1)
            logits = tl.zeros([BLOCK, BLOCK_G], tl.float32)
            for g in tl.static_range(HEAD // KEY_GROUP):
                key_at = line[:, None] * KEY_LINE + (g * KEY_GROUP + d)[None, :]
                if BLOCK_K == KEY_GROUP:
                    k = tl.load(key_codes + key_at)
                else:
                    k = tl.load(key_codes + key_at, (d < KEY_GROUP)[None, :], 0)
                scale, middle = _numbers(key_numbers, line * (KEY_LINE // 4) + g, KEY_HALF)
                product = tl.dot(_factors(k, dtype, BLOCK), q[g], input_precision="ieee")
                logits += product * scale[:, None] + middle[:, None] * q_sums[g][None, :]
            logits = _capped(logits * scaling, softcap, HAS_CAP)
            logits = tl.where(inside[:, None], logits, float("-inf"))
            # A block holds at least one entry, so this is finite from the first one on.
            higher = tl.maximum(highest, tl.max(logits, 0))
            p = tl.exp2(logits - higher[None, :])
            shrink = tl.exp2(highest - higher)[None, :]
            highest = higher
            total = total * shrink + p
            new_results, new_middles = (), ()
            for g in tl.static_range(VALUE // VALUE_GROUP):
                value_at = line[:, None] * VALUE_LINE + (g * VALUE_GROUP + dv)[None, :]
                if BLOCK_V == VALUE_GROUP:
                    v = tl.load(value_codes + value_at)
                else:
                    v = tl.load(value_codes + value_at, (dv < VALUE_GROUP)[None, :], 0)
                scale, middle = _numbers(value_numbers, line * (VALUE_LINE // 4) + g, VALUE_HALF)
                weights = (p * (scale * LARGER)[:, None]).to(WEIGHT)
                product = tl.dot(tl.trans(_factors(v, WEIGHT, BLOCK)), weights, input_precision="ieee")
                new_results = new_results + (results[g] * shrink + product,)
                new_middles = new_middles + (middles[g] * shrink + p * middle[:, None],)
            results, middles = new_results, new_middles
        slot = (tl.program_id(0) + segment) * group + head
        denominator = tl.sum(total, 0)
        tl.store(denominators + slot, highest + tl.log2(denominator), head < group)
        for g in tl.static_range(VALUE // VALUE_GROUP):
            result = results[g] * (1.0 / LARGER) + tl.sum(middles[g], 0)[None, :]
            tl.store(
                out + slot[None, :] * VALUE + g * VALUE_GROUP + dv[:, None],
                result / denominator[None, :],
                (head < group)[None, :] & (dv < VALUE_GROUP)[:, None],
            )
        block = upto


@on_its_device
def launch_coded_decode(
    query: Tensor,
    table: Tensor,
    form: Format,
    scaling: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
    programs: int | None = None,
    block: int | None = None,
    warps: int = 4,
    stages: int = 3,
) -> Tensor:
    """Run both kernels; parameters as in `kernels.ragged_decode` and `launch_ragged_decode`."""
    check_query(query, table, form, sinks)
    lines, value_size = sizes_of(form), form.sizes[1]
    names = ("HEAD", "KEY_GROUP", "VALUE_GROUP", "KEY_LINE", "VALUE_LINE", "KEY_HALF", "VALUE_HALF")
    options: dict[str, Any] = {name: lines[name] for name in names}
    weight = torch.promote_types(query.dtype, form.value_type)
    options["WEIGHT"] = TYPES[weight]
    options |= {name: max(16, lines[name]) for name in ("BLOCK_K", "BLOCK_V")}
    heads = max(8, triton.next_power_of_2(query.shape[0] * query.shape[1] // table.shape[0]))
    if block is None:
        widest = max(options["BLOCK_K"], options["BLOCK_V"]) * weight.itemsize
        bytes_each = (stages - 1) * (lines["KEY_LINE"] + lines["VALUE_LINE"]) + 2 * widest
        block = _block_for(
            bytes_each, heads * query.shape[-1] * query.element_size(), shared_memory.for_tiles(query.device)
        )
    # So many programs are to run on a multiprocessor at once, whatever registers Triton would like (220, 3.6).
    registers = REGISTERS // (PROGRAMS_PER_MULTIPROCESSOR * 32 * warps) // 8 * 8
    return run_in_parts(
        _coded_decode_kernel, query, table, value_size, scaling, window, softcap, sinks, programs, block,
        BLOCK_G=heads, **options, num_warps=warps, num_stages=stages, maxnreg=registers,
    )  # fmt: skip


@functools.cache
def _block_for(bytes_each: int, others: int, most: int) -> int:
    """Keys of a block: `BLOCK_N`, or fewer where ``most`` bytes of shared memory are too few for so many."""
    block = BLOCK_N
    while block > 16 and block * bytes_each + others > most:
        block //= 2
    return block
