"""Decode attention over segments of int8 lines, in Triton: the codes are factors as they are.

An element is ``middle + scale * code``, with codes from -128 to 127 here, so that the dot product of a query with
a key is that of each group's codes times its scale, and the sum of the query's elements times its middle; values
go the same way. What is shared out, in which parts, and how these are joined is as in `kernels.decode`.
"""

import functools
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels import early, room
from refreekv.kernels.coded_storage import format_of
from refreekv.kernels.decode import BLOCK_N, _at, _share, launch_parts, rows_of
from refreekv.kernels.probe import _capped


@triton.jit
def _codes(lines, at, there, dtype: tl.constexpr):
    """Codes less 128, which are exact in any type."""
    return (tl.load(lines + at, there, 0) ^ 128).to(tl.int8, bitcast=True).to(dtype)


@triton.jit
def _numbers(numbers, at, there, HALF: tl.constexpr):
    """A group's scale, and what code 128 stands for."""
    both = tl.load(numbers + at, there, 0)
    scale = both.to(tl.uint16).to(HALF, bitcast=True).to(tl.float32)
    low = (both >> 16).to(tl.uint16).to(HALF, bitcast=True).to(tl.float32)
    return scale, low + 128.0 * scale


@triton.jit
def _coded_decode_kernel(
    query, table, out, denominators,
    segments, kv_heads, group, window, scaling, softcap, sq_b, sq_h,
    HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    KEY_LINE: tl.constexpr, VALUE_LINE: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    early.in_turn(EARLY)
    held, blocks, ends, block, stop = _share(table, segments, window, BLOCK, BLOCK_S)
    head = tl.arange(0, BLOCK_G)
    d, dv = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    dtype = query.dtype.element_ty
    bytes_at = tl.pointer_type(tl.uint8)
    numbers_at = tl.pointer_type(tl.uint32)
    # Scales of values make weights small: in float16 by this factor they lose less, and none becomes infinite.
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
        q, sums, results = (), (), ()
        for g in tl.static_range(HEAD // KEY_GROUP):
            asked = query + row * sq_b + heads[:, None] * sq_h + g * KEY_GROUP + d[None, :]
            part = tl.load(asked, (head < group)[:, None] & (d < KEY_GROUP)[None, :], 0.0)
            q = q + (part,)
            sums = sums + (tl.sum(part.to(tl.float32), 1),)
        for g in tl.static_range(VALUE // VALUE_GROUP):
            results = results + (tl.zeros([BLOCK_G, BLOCK_V], tl.float32),)
        highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        for start in range((block - first) * BLOCK, (upto - first) * BLOCK, BLOCK):
            n = start + tl.arange(0, BLOCK)
            inside = n < visible
            line = skipped + n
            logits = tl.zeros([BLOCK_G, BLOCK], tl.float32)
            for g in tl.static_range(HEAD // KEY_GROUP):
                key_at = line[None, :] * KEY_LINE + (g * KEY_GROUP + d)[:, None]
                k = _codes(key_codes, key_at, inside[None, :] & (d < KEY_GROUP)[:, None], dtype)
                scale, middle = _numbers(key_numbers, line * (KEY_LINE // 4) + g, inside, HALF)
                product = tl.dot(q[g], k, input_precision="ieee")
                logits += product * scale[None, :] + sums[g][:, None] * middle[None, :]
            logits = _capped(logits * scaling, softcap, HAS_CAP)
            logits = tl.where(inside[None, :], logits, float("-inf"))
            # A block holds at least one entry, so this is finite from the first one on.
            higher = tl.maximum(highest, tl.max(logits, 1))
            p = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(p, 1)
            grown = ()
            for g in tl.static_range(VALUE // VALUE_GROUP):
                value_at = line[:, None] * VALUE_LINE + (g * VALUE_GROUP + dv)[None, :]
                v = _codes(value_codes, value_at, inside[:, None] & (dv < VALUE_GROUP)[None, :], dtype)
                scale, middle = _numbers(value_numbers, line * (VALUE_LINE // 4) + g, inside, HALF)
                weights = (p * (scale * LARGER)[None, :]).to(dtype)
                result = results[g] * shrink[:, None] + tl.sum(p * middle[None, :], 1)[:, None]
                grown = grown + (result + tl.dot(weights, v, input_precision="ieee") * (1.0 / LARGER),)
            results = grown
            highest = higher
        slot = (tl.program_id(0) + segment) * group + head
        tl.store(denominators + slot, highest + tl.log2(total), head < group)
        for g in tl.static_range(VALUE // VALUE_GROUP):
            tl.store(
                out + slot[:, None] * VALUE + g * VALUE_GROUP + dv[None, :],
                results[g] / total[:, None],
                (head < group)[:, None] & (dv < VALUE_GROUP)[None, :],
            )
        block = upto


def launch_coded_decode(
    query: Tensor,
    table: Tensor,
    value_size: int,
    scaling: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
    groups: Sequence[int],
    programs: int | None = None,
    block: int | None = None,
    warps: int = 4,
    stages: int = 3,
) -> Tensor:
    """Run both kernels; parameters as in `kernels.ragged_decode` and `launch_ragged_decode`."""
    options = format_of(query.shape[-1], value_size, groups, query)
    for name in ("TINY", "KEY_GROUPS", "VALUE_GROUPS"):
        del options[name]
    options |= {name: max(16, options[name]) for name in ("BLOCK_K", "BLOCK_V")}
    del options["VALUE"]
    if block is None:
        most = room.for_tiles(query.device)
        line = options["KEY_LINE"] + options["VALUE_LINE"]
        widest = query.shape[-1] + max(options["BLOCK_K"], options["BLOCK_V"])
        block = _block_for(line, widest * query.element_size(), rows_of(query, table), stages, most)
    return launch_parts(
        _coded_decode_kernel, query, table, value_size, scaling, window, softcap, sinks, programs, block,
        **options, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@functools.cache
def _block_for(line: int, widest: int, rows: int, stages: int, most: int) -> int:
    """Keys of a block: `BLOCK_N`, or fewer where ``most`` bytes of shared memory are too few for so many."""
    block = BLOCK_N
    while block > 16 and (stages - 1) * block * line + (block + rows) * widest > most:
        block //= 2
    return block
