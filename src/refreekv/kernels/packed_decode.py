"""Decode attention over exact entries and packed lines, in Triton: parts of one softmax, those of lines in code space.

A line is what `core.packed_lines` describes. Lines are read as 16-bit words. Shifted and masked, a word's field is the
middle of the mantissa of a float16 at 1024, and that number less the field's middle is a factor as it is: two
instructions for two codes. Values want a word of one entry beside that of the next, which is how 16-bit matrices are
transposed on their way from shared memory. Entries are rows and the query heads of a KV head columns, of which a
product needs no more than eight; sums over entries are left open until the last block.

The blocks of all segments of the exact table, then of each level's, are one list that is shared out as in
`kernels.decode`, with one difference: going on to another segment takes a while, so each counts some blocks more.
"""

# Tuples of another length have another type, and Triton's have as many parts as lines have tiles.
# mypy: disable-error-code="assignment, misc"

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat, Side, step
from refreekv.kernels import pdl
from refreekv.kernels.decode import _held, multiprocessors
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.probe import _capped

LEAST_FACTOR = tl.constexpr(2.0**-24)
"""The smallest float16, which no factor but zero is below."""

REGISTERS = 65_536
"""Of a multiprocessor."""

WARPS = 12
"""That are to run on a multiprocessor at once, whatever registers Triton would like."""

LEAST_BLOCKS = tl.constexpr(4)
"""Of a program's share: with fewer, what it takes to join the parts is more than what is gained."""


def _assembly(bits: int) -> str:
    """Fields of two 16-bit words in a register to as many registers of two float16."""
    each = 8 // bits
    lines = [f".reg .b32 y, z, m; shl.b32 y, ${2 * each}, 1; shr.b32 z, ${2 * each}, 7; "]
    for out in range(2 * each):
        place = out % each
        field = (2**bits - 1) << (1 + bits * place)
        middle = 1024 + ((2**bits - 1) << (bits * place))
        sign = int(torch.tensor(float(-middle), dtype=torch.float16).view(torch.int16)) & 0xFFFF
        source = "y" if out < each else "z"
        lines.append(
            f"lop3.b32 ${out}, {source}, 0x{field:04x}{field:04x}, 0x64006400, 0xEA; "
            f"mov.b32 m, 0x{sign:04x}{sign:04x}; add.rn.f16x2 ${out}, ${out}, m; "
        )
    return "{ " + "".join(lines) + "}"


ASSEMBLY_8, ASSEMBLY_4, ASSEMBLY_2 = (tl.constexpr(_assembly(bits)) for bits in (8, 4, 2))
CONSTRAINTS_8, CONSTRAINTS_4, CONSTRAINTS_2 = (tl.constexpr(",".join(["=r"] * n + ["r"])) for n in (2, 4, 8))


@triton.constexpr_function
def constant(parts, *at):
    """A number out of tuples of tuples, which not every Triton takes for a constant by itself."""
    for i in at:
        parts = parts[i]
    return parts


@triton.jit
def _field(words, BITS: tl.constexpr, PLACE: tl.constexpr):
    """One field of each word as a float16, in plain Triton, which the interpreter knows."""
    EACH: tl.constexpr = 8 // BITS
    AT: tl.constexpr = BITS * (PLACE % EACH)
    MASK: tl.constexpr = ((1 << BITS) - 1) << (AT + 1)
    MIDDLE: tl.constexpr = 1024 + (((1 << BITS) - 1) << AT)
    moved = words << 1 if PLACE < EACH else words >> 7
    return ((moved & MASK) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - MIDDLE


@triton.jit
def _fields(words, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """All fields of words, less their middles, each times ``2 ** (1 + bits * place)`` of its place in a byte."""
    # One `return` for all: older Tritons take the type of the first one for that of all.
    if ASSEMBLY:
        if BITS == 8:
            fields = tl.inline_asm_elementwise(
                ASSEMBLY_8, CONSTRAINTS_8, [words], (tl.float16, tl.float16), is_pure=True, pack=2
            )
        elif BITS == 4:
            fields = tl.inline_asm_elementwise(
                ASSEMBLY_4, CONSTRAINTS_4, [words], (tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True, pack=2,
            )  # fmt: skip
        else:
            fields = tl.inline_asm_elementwise(
                ASSEMBLY_2, CONSTRAINTS_2, [words],
                (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True, pack=2,
            )  # fmt: skip
    else:
        if BITS == 8:
            fields = _field(words, 8, 0), _field(words, 8, 1)
        elif BITS == 4:
            fields = _field(words, 4, 0), _field(words, 4, 1), _field(words, 4, 2), _field(words, 4, 3)
        else:
            fields = (
                _field(words, 2, 0), _field(words, 2, 1), _field(words, 2, 2), _field(words, 2, 3),
                _field(words, 2, 4), _field(words, 2, 5), _field(words, 2, 6), _field(words, 2, 7),
            )  # fmt: skip
    return fields


@triton.jit
def _where(CHUNKS: tl.constexpr, AT: tl.constexpr, PLACE: tl.constexpr):
    """For a tile, a field of the words of a chunk: each one's channel, where its sum goes and whether it is one.

    And what the field's codes are worth; ``CHUNKS`` are those of `chunks`.
    """
    BITS: tl.constexpr = constant(CHUNKS, AT, 0)
    EACH: tl.constexpr = 8 // BITS
    USED: tl.constexpr = constant(CHUNKS, AT, 5)
    byte = constant(CHUNKS, AT, 3) + 2 * tl.arange(0, constant(CHUNKS, AT, 2)) + PLACE // EACH
    field = byte + (PLACE % EACH) * USED
    later = field >= constant(CHUNKS, AT, 6)
    channel = field + tl.where(later, constant(CHUNKS, AT, 8), constant(CHUNKS, AT, 7))
    worth = tl.where(later, constant(CHUNKS, AT, 10), constant(CHUNKS, AT, 9)) / (2 << (BITS * (PLACE % EACH)))
    goes = channel + tl.where(later, constant(CHUNKS, AT, 13), constant(CHUNKS, AT, 11))
    return channel, goes, worth, byte < USED


@triton.jit
def _words(lines, line, CHUNKS: tl.constexpr, AT: tl.constexpr, LINE: tl.constexpr, ACROSS: tl.constexpr):
    """The words of a chunk of each line: ``[BLOCK, n]``, or ``[n, BLOCK]``."""
    n = tl.arange(0, constant(CHUNKS, AT, 2))
    DIM: tl.constexpr = 0 if ACROSS else 1
    # The dimension that a vector lacks: lines' is that of the words.
    at = lines + tl.expand_dims(line * (LINE // 2), DIM) + tl.expand_dims(constant(CHUNKS, AT, 1) + n, 1 - DIM)
    if constant(CHUNKS, AT, 4) == constant(CHUNKS, AT, 2):
        words = tl.load(at)
    else:
        words = tl.load(at, tl.expand_dims(n < constant(CHUNKS, AT, 4), 1 - DIM), 0)
    return words


# -- sharing out --------------------------------------------------------------------------------


@triton.jit
def blocks_of(table, segments, BLOCK: tl.constexpr, EXTRA: tl.constexpr, BLOCK_S: tl.constexpr):
    """Entries of each segment, and what it counts in the list: its blocks, and ``EXTRA`` in front of them."""
    held = _held(table, tl.arange(0, BLOCK_S), segments)
    return held, tl.where(held > 0, (held + BLOCK - 1) // BLOCK + EXTRA, 0)


@triton.jit
def shares_of(work, programs):
    """Between how many programs the list is divided; none of them has nothing."""
    # In 64 bits: blocks times programs may pass 2 ** 31 on long batches.
    return tl.maximum(tl.minimum(programs, work // LEAST_BLOCKS), 1).to(tl.int64)


@triton.jit
def _find(block, held, blocks, ends, BLOCK_S: tl.constexpr):
    """The segment that a block is of: its number, where it begins and ends in the list, and its entries."""
    segment = tl.sum((ends <= block).to(tl.int32), 0)
    mine = tl.arange(0, BLOCK_S) == segment
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return segment, end - tl.sum(tl.where(mine, blocks, 0), 0), end, tl.sum(tl.where(mine, held, 0), 0)


# -- attention ----------------------------------------------------------------------------------


@triton.jit
def _exact(
    query, table, out, denominators, held, blocks, ends, block, stop, kv_heads, group, scaling, softcap, sq_b, sq_h,
    HEAD: tl.constexpr, VALUE: tl.constexpr, FIELDS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK: tl.constexpr, EXTRA: tl.constexpr, BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """A program's share of the exact entries."""
    head = tl.arange(0, BLOCK_G)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    asking = head < group
    pointer = tl.pointer_type(query.dtype.element_ty)
    while block < stop:
        segment, first, end, visible = _find(block, held, blocks, ends, BLOCK_S)
        upto = tl.minimum(stop, end)
        begin, finish = tl.maximum(block - first - EXTRA, 0), upto - first - EXTRA
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
        for start in range(begin * BLOCK, finish * BLOCK, BLOCK):
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
        slot = (tl.program_id(0) + segment) * group + head
        denominator = tl.where(finish > begin, tl.sum(total, 0), 1.0)
        asking_here = head < tl.where(finish > begin, group, 0)
        tl.store(denominators + slot, highest + tl.log2(denominator), asking_here)
        tl.store(
            out + slot[None, :].to(tl.int64) * FIELDS + dv[:, None],
            result / denominator[None, :],
            asking_here[None, :] & (dv < VALUE)[:, None],
        )
        block = upto


@triton.jit
def _level(
    query, scales, shifts, table, out, denominators, held, blocks, ends, block, stop, before, group, softcap,
    HEAD: tl.constexpr, FIELDS: tl.constexpr, LINE: tl.constexpr, KEY_CHUNKS: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, HALF: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr, EXTRA: tl.constexpr, BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr, ASSEMBLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program's share of a level; ``before`` are the segments of the tables before."""
    head = tl.arange(0, BLOCK_G)
    asking = head < group
    dtype: tl.constexpr = tl.float16 if HALF else tl.float32
    while block < stop:
        segment, first, end, visible = _find(block, held, blocks, ends, BLOCK_S)
        upto = tl.minimum(stop, end)
        begin, finish = tl.maximum(block - first - EXTRA, 0), upto - first - EXTRA
        # Lines and segments begin at such multiples, which Triton cannot know of a number.
        lines = tl.load(table + segment * 4).to(tl.pointer_type(tl.uint16))
        lines = tl.multiple_of(lines, 16 if LINE % 16 == 0 else 8)
        factors = tl.multiple_of(tl.load(table + segment * 4 + 1).to(tl.pointer_type(tl.uint32)), 4)
        heads = segment * group + head  # rows and KV heads one after the other, as query heads are
        # From here on what the kernel before has written is read.
        pdl.in_turn(DEPENDENT)
        scale = tl.load(scales + heads, asking, 0.0)
        shift = tl.load(shifts + heads, asking, 0.0)
        q, results = (), ()
        for i in tl.static_range(KEY_CHUNKS):
            for place in tl.static_range(16 // constant(KEYS, i, 0)):
                channel, _, worth, real = _where(KEYS, i, place)
                asked = query + heads[None, :].to(tl.int64) * HEAD + channel[:, None]
                part = tl.load(asked, asking[None, :] & real[:, None], 0.0) * worth[:, None]
                q = q + (part.to(dtype),)
        for i in tl.static_range(VALUE_CHUNKS):
            for _ in tl.static_range(16 // constant(VALUES, i, 0)):
                results = results + (tl.zeros([constant(VALUES, i, 2), BLOCK_G], tl.float32),)
        highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK, BLOCK_G], tl.float32)
        for start in range(begin * BLOCK, finish * BLOCK, BLOCK):
            n = start + tl.arange(0, BLOCK)
            inside = n < visible
            # Behind the end the last entry again, which will have no weight: this takes less than masks do.
            line = tl.minimum(n, visible - 1)
            both = tl.load(factors + line)
            key_factor = both.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            value_factor = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            products = tl.zeros([BLOCK, BLOCK_G], tl.float32)
            for i in tl.static_range(KEY_CHUNKS):
                tiles = _fields(_words(lines, line, KEYS, i, LINE, False), constant(KEYS, i, 0), ASSEMBLY)
                for place in tl.static_range(16 // constant(KEYS, i, 0)):
                    tile = tiles[place].to(dtype)
                    products = tl.dot(tile, q[constant(KEYS, i, 12) + place], products, input_precision="ieee")
            logits = products * key_factor[:, None] * scale[None, :]
            if HAS_CAP:
                logits = _capped(logits + shift[None, :], softcap, True)
            logits = tl.where(inside[:, None], logits, float("-inf"))
            # Weights are at most 1 with the value's factor in them, whatever that is: float16 has room for no more.
            seen = logits + tl.log2(tl.maximum(value_factor, LEAST_FACTOR))[:, None]
            # A block holds at least one entry, so this is finite from the first one on.
            higher = tl.maximum(highest, tl.max(seen, 0))
            p = tl.exp2(logits - higher[None, :])
            shrink = tl.exp2(highest - higher)[None, :]
            highest = higher
            total = total * shrink + p
            weights = (p * value_factor[:, None]).to(dtype)
            new_results = ()
            for i in tl.static_range(VALUE_CHUNKS):
                tiles = _fields(_words(lines, line, VALUES, i, LINE, True), constant(VALUES, i, 0), ASSEMBLY)
                for place in tl.static_range(16 // constant(VALUES, i, 0)):
                    product = tl.dot(tiles[place].to(dtype), weights, input_precision="ieee")
                    new_results = new_results + (results[constant(VALUES, i, 12) + place] * shrink + product,)
            results = new_results
        slot = (tl.program_id(0) + before + segment) * group + head
        denominator = tl.where(finish > begin, tl.sum(total, 0), 1.0)
        asking_here = head < tl.where(finish > begin, group, 0)
        sum_of_all = highest + tl.log2(denominator)
        # What the mean key adds is the same for all of the segment's entries.
        tl.store(denominators + slot, sum_of_all if HAS_CAP else sum_of_all + shift, asking_here)
        for i in tl.static_range(VALUE_CHUNKS):
            for place in tl.static_range(16 // constant(VALUES, i, 0)):
                _, goes, worth, real = _where(VALUES, i, place)
                tl.store(
                    out + slot[None, :].to(tl.int64) * FIELDS + goes[:, None],
                    results[constant(VALUES, i, 12) + place] * worth[:, None] / denominator[None, :],
                    asking_here[None, :] & real[:, None],
                )
        block = upto


@triton.jit
def _packed_decode_kernel(
    query, asked, scales, shifts, tables, out, denominators,
    segments, kv_heads, group, scaling, softcap, sq_b, sq_h,
    HEAD: tl.constexpr, VALUE: tl.constexpr, FIELDS: tl.constexpr, LEVELS: tl.constexpr, COUNT: tl.constexpr,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
    EXACT_BLOCK: tl.constexpr, EXTRA: tl.constexpr, BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr,
    ASSEMBLY: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    # The tables and the queries are not of the kernel before, but of those that this one has waited for.
    held, blocks, ends = (), (), ()
    work = tl.zeros([], tl.int32)
    for i in tl.static_range(COUNT + 1):
        some, counted = blocks_of(tables[i], segments, EXACT_BLOCK if i == 0 else BLOCK, EXTRA, BLOCK_S)
        held = held + (some,)
        blocks = blocks + (counted,)
        ends = ends + (tl.cumsum(counted, 0),)
        work += tl.sum(counted, 0)
    shares = shares_of(work, tl.num_programs(0))
    block = (tl.minimum(tl.program_id(0), shares) * work // shares).to(tl.int32)
    stop = (tl.minimum(tl.program_id(0) + 1, shares) * work // shares).to(tl.int32)
    _exact(
        query, tables[0], out, denominators, held[0], blocks[0], ends[0], block,
        tl.minimum(stop, tl.sum(blocks[0], 0)), kv_heads, group, scaling, softcap, sq_b, sq_h,
        HEAD, VALUE, FIELDS, BLOCK_D, BLOCK_V, BLOCK_G, EXACT_BLOCK, EXTRA, BLOCK_S, HAS_CAP,
    )  # fmt: skip
    for i in tl.static_range(COUNT):
        done = tl.sum(blocks[i], 0)
        block, stop = tl.maximum(block - done, 0), stop - done
        _level(
            asked, scales, shifts, tables[i + 1], out, denominators, held[i + 1], blocks[i + 1], ends[i + 1],
            block, tl.minimum(stop, tl.sum(blocks[i + 1], 0)), (i + 1) * segments, group, softcap,
            HEAD, FIELDS, constant(LEVELS, i, 2), constant(LEVELS, i, 3), constant(LEVELS, i, 4),
            constant(LEVELS, i, 0), constant(LEVELS, i, 1), HALF, BLOCK_G, BLOCK, EXTRA, BLOCK_S, HAS_CAP, ASSEMBLY,
            DEPENDENT,
        )  # fmt: skip
    # Whoever comes next relies on all before it being over.
    pdl.in_turn(DEPENDENT)


@functools.cache
def chunks(side: Side, start: int) -> tuple[tuple[float, ...], ...]:
    """The words of a side whose first byte is ``start``, in parts whose sizes are powers of two, 16 at least.

    Of each part: bits of a field, first word in the line, words, first byte in the plane, words that are the plane's;
    the plane's bytes with codes, fields of its first range of channels, what a field's number lacks to its channel in
    the first and in the second range, what a code of theirs is worth, where sums go, counted from the channel, of the
    first range, tiles of the parts before, and where those of the second one go. Sums of the lower bits of width 6 lie
    behind those of all channels.
    """
    found = []
    tiles = 0
    for plane in side.planes:
        ranges = [(stop - first, first) for first, stop in plane.channels]
        widths = [side.widths[4 * first // side.size] for first, _ in plane.channels]
        worths = [step(width) * 2**shift for width, shift in zip(widths, plane.shifts, strict=True)]
        goes = [side.size if plane.bits == 2 and width == 6 else 0 for width in widths]
        length, first = ranges[0]
        second = ranges[-1][1] - length if len(ranges) == 2 else first
        words, at = plane.bytes // 2, 0
        while at < words:
            size = max(16, 1 << ((words - at).bit_length() - 1))
            found.append(
                (plane.bits, (start + plane.start) // 2 + at, size, 2 * at, min(size, words - at),
                 plane.used, length, first, second, worths[0], worths[-1], goes[0], tiles, goes[-1])
            )  # fmt: skip
            at += size
            tiles += 16 // plane.bits
    return tuple(found)


@functools.cache
def _level_of(form: PackedFormat) -> tuple[Any, ...]:
    """What the kernel is told of a level."""
    keys, values = chunks(form.keys, 0), chunks(form.values, form.keys.bytes)
    return keys, values, form.line_bytes, len(keys), len(values)


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
    block, exact_block, extra : int
        Entries of a block, and blocks that a segment counts beside its own.
    """

    tables: tuple[Tensor, ...]
    results: Tensor
    denominators: Tensor
    programs: int
    block: int
    exact_block: int
    extra: int


@on_its_device
def launch_packed_decode(
    query: Tensor,
    prepared: tuple[Tensor, Tensor, Tensor],
    exact: Tensor,
    tables: Sequence[Tensor],
    forms: Sequence[PackedFormat],
    value_size: int,
    scaling: float,
    softcap: float | None,
    programs: int | None = None,
    block: int | None = None,
    exact_block: int = 16,
    extra: int = 2,
    warps: int | None = None,
    stages: int = 3,
    registers: int | None = None,
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
    programs, block, exact_block, extra, warps, stages, registers, assembly, early
        To be measured.
    """
    segments, (batch, heads, _, size) = exact.shape[0], query.shape
    group = heads * batch // segments
    half = query.dtype.itemsize == 2
    if query.stride(-1) != 1:
        query = query.contiguous()
    if warps is None:
        warps = 2 if half else 4
    if block is None:
        block = 64 if half and max(size, value_size) <= 128 else 32 if half else 16
    if programs is None:
        programs = (WARPS // warps) * multiprocessors(query.device)
    if registers is None:
        registers = REGISTERS // (WARPS // warps * 32 * warps) // 8 * 8
    fields = value_size * (2 if any(6 in form.value_widths for form in forms) else 1)
    slots = programs + segments * (1 + len(forms))
    results = torch.empty(slots, group, fields, dtype=torch.float32, device=query.device)
    denominators = torch.empty(slots, group, dtype=torch.float32, device=query.device)
    _packed_decode_kernel[(programs,)](
        query, *prepared, (exact, *tables), results, denominators, segments, segments // batch, group, scaling,
        1.0 if softcap is None else softcap, query.stride(0), query.stride(1),
        HEAD=size, VALUE=value_size, FIELDS=fields, LEVELS=tuple(_level_of(form) for form in forms),
        COUNT=len(forms), HALF=half, BLOCK_D=max(16, triton.next_power_of_2(size)),
        BLOCK_V=max(16, triton.next_power_of_2(value_size)), BLOCK_G=max(8, triton.next_power_of_2(group)),
        BLOCK=block, EXACT_BLOCK=exact_block, EXTRA=extra, BLOCK_S=triton.next_power_of_2(max(segments, 2)),
        HAS_CAP=softcap is not None, ASSEMBLY=query.is_cuda if assembly is None else assembly,
        num_warps=warps, num_stages=stages, maxnreg=registers, **pdl.options(1 if early else batch, query),
    )  # fmt: skip
    return Parts((exact, *tables), results, denominators, programs, block, exact_block, extra)
