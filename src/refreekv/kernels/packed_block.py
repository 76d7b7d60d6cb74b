"""Packed lines in attention, in Triton: what is asked of a segment, a block of its lines, and what is left of it.

A line is what `core.packed_lines` describes; lines are read as 16-bit words. A code where the mantissa of a float16
is, beneath an exponent of nothing, is the number ``code * 2 ** -24`` as it is, which products take without a loss:
one instruction makes two of them. The middle that a code lacks is the same for a channel, so what it adds up to is
known before: to a logit by the query, to a result by the sum of the weights. Values want a word of one entry beside
that of the next, which is how 16-bit matrices are transposed on their way from shared memory.

Products need at least 16 words of a line. What is left of a plane of keys goes with the next one, in whose fields it
is read: a code of four bits is one of two bits and one of the other two. Entries are rows and the query heads of a KV
head columns, of which a product needs no more than eight; sums over entries are left open until the last block.
"""

# Tuples of another length have another type, and Triton's have as many parts as lines have tiles.
# mypy: disable-error-code="assignment, misc"

import functools
from typing import Any

import triton
import triton.language as tl

from refreekv.core.packed_lines import PackedFormat, Side, step
from refreekv.kernels.probe import _capped

UNIT = tl.constexpr(2.0**24)
"""What a field is to be multiplied with: of a float16 without an exponent, the lowest bit is one of so many parts."""


def _assembly(bits: int) -> str:
    """Fields of two 16-bit words in a register to as many registers of two float16."""
    each = 8 // bits
    last = 2 * each
    if bits == 8:
        return f"prmt.b32 $0, ${last}, 0, 0x4240; prmt.b32 $1, ${last}, 0, 0x4341;"
    lines = [f".reg .b32 y; shr.b32 y, ${last}, 8; "]
    for out in range(last):
        field = ((2**bits - 1) << (bits * (out % each))) * 0x10001
        lines.append(f"and.b32 ${out}, {f'${last}' if out < each else 'y'}, 0x{field:08x}; ")
    return "{ " + "".join(lines) + "}"


def _assembly_of_two_planes() -> str:
    """Codes of 6 bits as `_codes_of_six` has them, of a register of each of the three kinds of words."""
    lines = [".reg .b32 a, b, l, m; "]
    for out in range(8):
        upper, place = divmod(out, 4)
        if place == 0:
            shift = "shr.b32 {0}, {1}, 6; " if upper else "shl.b32 {0}, {1}, 2; "
            lines += [shift.format("a", "$8"), shift.format("b", "$9")]
        lines.append(f"shr.b32 l, $10, {8 * upper + 2 * (place % 2)}; ")
        four = 0x03C003C0 if place >= 2 else 0x003C003C
        two = 0x00300030 if place >= 2 else 0x00030003
        lines.append(f"and.b32 m, {'ab'[place % 2]}, 0x{four:08x}; lop3.b32 ${out}, l, 0x{two:08x}, m, 0xEA; ")
    return "{ " + "".join(lines) + "}"


ASSEMBLY_6, CONSTRAINTS_6 = tl.constexpr(_assembly_of_two_planes()), tl.constexpr(",".join(["=r"] * 8 + ["r"] * 3))
ASSEMBLY_8, ASSEMBLY_4, ASSEMBLY_2 = (tl.constexpr(_assembly(bits)) for bits in (8, 4, 2))
CONSTRAINTS_8, CONSTRAINTS_4, CONSTRAINTS_2 = (tl.constexpr(",".join(["=r"] * n + ["r"])) for n in (2, 4, 8))


@triton.constexpr_function
def constant(parts, *at):
    """A number out of tuples of tuples, which not every Triton takes for a constant by itself."""
    for i in at:
        parts = parts[i]
    return parts


@triton.constexpr_function
def tiles_of(bits):
    """Tiles of a chunk whose codes have so many bits."""
    return 8 if bits == 6 else 16 // bits


@triton.constexpr_function
def middle_of(bits, place):
    """What a tile's codes lack to their middle, where they are."""
    if bits == 6:
        return 31.5 * 16 ** (place % 4 // 2)
    return float(((2**bits - 1) << (bits * (place % (8 // bits)))) / 2)


# -- fields of words ------------------------------------------------------------------------------


@triton.jit
def _field(words, BITS: tl.constexpr, PLACE: tl.constexpr):
    """One field of each word as a float16, in plain Triton, which the interpreter knows."""
    EACH: tl.constexpr = 8 // BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << (BITS * (PLACE % EACH))
    moved = words if PLACE < EACH else words >> 8
    return (moved & MASK).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def fields_of(words, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """All fields of words, each times ``2 ** (bits * place - 24)`` of its place in a byte."""
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
def _code_of_six(first, second, lower, PLACE: tl.constexpr):
    words = second if PLACE % 2 else first
    high = (words >> 6 if PLACE >= 4 else words << 2) & (0x3C0 if PLACE % 4 >= 2 else 0x3C)
    low = (lower >> (8 * (PLACE // 4) + 2 * (PLACE % 2))) & (0x30 if PLACE % 4 >= 2 else 3)
    return (high | low).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def codes_of_six(first, second, lower, ASSEMBLY: tl.constexpr):
    """Codes of 6 bits, those of half of them times 16, of words of both halves of the upper plane and of the lower one.

    Those that fields of the lower one's words are of, in their order.
    """
    if ASSEMBLY:
        codes = tl.inline_asm_elementwise(
            ASSEMBLY_6, CONSTRAINTS_6, [first, second, lower],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        codes = (
            _code_of_six(first, second, lower, 0), _code_of_six(first, second, lower, 1),
            _code_of_six(first, second, lower, 2), _code_of_six(first, second, lower, 3),
            _code_of_six(first, second, lower, 4), _code_of_six(first, second, lower, 5),
            _code_of_six(first, second, lower, 6), _code_of_six(first, second, lower, 7),
        )  # fmt: skip
    return codes


@triton.jit
def _of_piece(n, CHUNKS: tl.constexpr, AT: tl.constexpr, PIECE: tl.constexpr, PLACE: tl.constexpr):
    """`_place` of the words of a chunk that are of one plane."""
    BITS: tl.constexpr = constant(CHUNKS, AT, 5, PIECE, 0)
    EACH: tl.constexpr = 8 // BITS
    USED: tl.constexpr = constant(CHUNKS, AT, 5, PIECE, 3)
    # A field may have two tiles, each of half of its bits.
    FIELD: tl.constexpr = PLACE * constant(CHUNKS, AT, 0) // BITS
    byte = constant(CHUNKS, AT, 5, PIECE, 2) + 2 * (n - constant(CHUNKS, AT, 5, PIECE, 1)) + FIELD // EACH
    field = byte + (FIELD % EACH) * USED
    later = field >= constant(CHUNKS, AT, 5, PIECE, 4)
    channel = field + tl.where(later, constant(CHUNKS, AT, 5, PIECE, 6), constant(CHUNKS, AT, 5, PIECE, 5))
    worth = tl.where(later, constant(CHUNKS, AT, 5, PIECE, 8), constant(CHUNKS, AT, 5, PIECE, 7))
    goes = channel + tl.where(later, constant(CHUNKS, AT, 5, PIECE, 10), constant(CHUNKS, AT, 5, PIECE, 9))
    return channel, goes, worth / (1 << (BITS * (FIELD % EACH))), byte < USED


@triton.jit
def _place(CHUNKS: tl.constexpr, AT: tl.constexpr, PLACE: tl.constexpr):
    """For a tile, a field of the words of a chunk: each one's channel, where its sum goes and whether it is one.

    And what the field's codes are worth; ``CHUNKS`` are those of `chunks`.
    """
    n = tl.arange(0, constant(CHUNKS, AT, 2))
    if constant(CHUNKS, AT, 0) == 6:
        channel = constant(CHUNKS, AT, 5, 0, 2) + 2 * n + PLACE // 4 + (PLACE % 4) * constant(CHUNKS, AT, 5, 0, 3)
        worth = channel * 0.0 + constant(CHUNKS, AT, 5, 0, 7) / (16 if PLACE % 4 >= 2 else 1)
        goes, real = channel, n >= 0
    else:
        channel, goes, worth, real = _of_piece(n, CHUNKS, AT, 0, PLACE)
    if constant(CHUNKS, AT, 6) == 2:
        other_channel, other_goes, other_worth, other_real = _of_piece(n, CHUNKS, AT, 1, PLACE)
        other = n >= constant(CHUNKS, AT, 5, 1, 1)
        channel, goes = tl.where(other, other_channel, channel), tl.where(other, other_goes, goes)
        worth, real = tl.where(other, other_worth, worth), tl.where(other, other_real, real)
    return channel, goes, worth, real


@triton.jit
def _words(
    lines, line, FIRST: tl.constexpr, COUNT: tl.constexpr, REAL: tl.constexpr, LINE: tl.constexpr, DIM: tl.constexpr
):
    """Some words of each line, of which ``REAL`` are real: ``[COUNT, BLOCK]``, or turned with ``DIM``."""
    n = tl.arange(0, COUNT)
    at = lines + tl.expand_dims(line * (LINE // 2), DIM) + tl.expand_dims(FIRST + n, 1 - DIM)
    return tl.load(at) if REAL == COUNT else tl.load(at, tl.expand_dims(n < REAL, 1 - DIM), 0)


@triton.jit
def _tiles(
    lines, line, CHUNKS: tl.constexpr, AT: tl.constexpr, LINE: tl.constexpr, ACROSS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The fields of the words of a chunk of each line: ``[BLOCK, n]`` each, or ``[n, BLOCK]``."""
    FIRST: tl.constexpr = constant(CHUNKS, AT, 1)
    COUNT: tl.constexpr = constant(CHUNKS, AT, 2)
    REAL: tl.constexpr = constant(CHUNKS, AT, 3)
    # The dimension that a vector lacks: lines' is that of the words.
    DIM: tl.constexpr = 0 if ACROSS else 1
    words = _words(lines, line, FIRST, COUNT, REAL, LINE, DIM)
    if constant(CHUNKS, AT, 0) == 6:
        second = _words(lines, line, FIRST + constant(CHUNKS, AT, 5, 0, 3) // 2, COUNT, REAL, LINE, DIM)
        lower = _words(lines, line, constant(CHUNKS, AT, 5, 0, 1), COUNT, REAL, LINE, DIM)
        tiles = codes_of_six(words, second, lower, ASSEMBLY)
    else:
        tiles = fields_of(words, constant(CHUNKS, AT, 0), ASSEMBLY)
    return tiles


# -- attention ------------------------------------------------------------------------------------


@triton.jit
def queries_of(at, asking, KEYS: tl.constexpr, KEY_CHUNKS: tl.constexpr, dtype: tl.constexpr, BLOCK_G: tl.constexpr):
    """The queries in code space that begin at ``at``, ``[BLOCK_G]``, in tiles as keys are; and what middles add."""
    q = ()
    lacking = tl.zeros([16, BLOCK_G], tl.float32)
    for i in tl.static_range(KEY_CHUNKS):
        for place in tl.static_range(tiles_of(constant(KEYS, i, 0))):
            channel, _, worth, real = _place(KEYS, i, place)
            part = tl.load(at[None, :] + channel[:, None], asking[None, :] & real[:, None], 0.0)
            part = (part * worth[:, None]).to(dtype)
            q = q + (part,)
            middle = tl.full([16, constant(KEYS, i, 2)], -middle_of(constant(KEYS, i, 0), place), dtype)
            lacking = tl.dot(middle, part, lacking, input_precision="ieee")
    # All rows are the same.
    return q, tl.max(lacking, 0) * (1.0 / UNIT)


@triton.jit
def nothing_yet(VALUES: tl.constexpr, VALUE_CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr):
    """The state in front of the first block: highest logit, weights' sums in two ways, and results."""
    results = ()
    for i in tl.static_range(VALUE_CHUNKS):
        for _ in tl.static_range(tiles_of(constant(VALUES, i, 0))):
            results = results + (tl.zeros([constant(VALUES, i, 2), BLOCK_G], tl.float32),)
    return (
        tl.full([BLOCK_G], float("-inf"), tl.float32),
        tl.zeros([BLOCK, BLOCK_G], tl.float32),
        tl.zeros([16, BLOCK_G], tl.float32),
        results,
    )


@triton.jit
def lines_taken_on(
    lines, factors, line, inside, q, lacking, scale, shift, softcap, highest, total, weighed, results,
    KEYS: tl.constexpr, VALUES: tl.constexpr, LINE: tl.constexpr, KEY_CHUNKS: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr, dtype: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_CAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The state after a block more; ``scale`` is that of `launch_prepare` times `UNIT`.

    Of lines that are not ``inside`` another is to be given, which will have no weight: this takes less than masks do.
    """
    both = tl.load(factors + line)
    key_factor = both.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    value_factor = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    counts = tl.where(inside, 1.0, 0.0)
    products = tl.zeros([BLOCK, BLOCK_G], tl.float32) + lacking[None, :]
    for i in tl.static_range(KEY_CHUNKS):
        tiles = _tiles(lines, line, KEYS, i, LINE, False, ASSEMBLY)
        for place in tl.static_range(tiles_of(constant(KEYS, i, 0))):
            products = tl.dot(tiles[place].to(dtype), q[constant(KEYS, i, 4) + place], products, input_precision="ieee")
    products *= key_factor[:, None]
    # Weights are about 1 at most with the value's factor in them, whatever that is: float16 has room for no more. The
    # bits of a float16 are its logarithm but for .09, and more where that is below -15.
    size = tl.where(inside, (both >> 16).to(tl.int32).to(tl.float32) * (1.0 / 1024) - 15.0, float("-inf"))
    unit = scale
    if HAS_CAP:
        products = _capped(products * scale[None, :] + shift[None, :], softcap, True)
        unit = tl.full([BLOCK_G], 1.0, tl.float32)
    # A block holds at least one entry, so this is finite from the first one on.
    higher = tl.maximum(highest, tl.max(tl.fma(products, unit[None, :], size[:, None]), 0))
    p = tl.exp2(tl.fma(products, unit[None, :], -higher[None, :]))
    shrink = tl.exp2(highest - higher)[None, :]
    total = tl.fma(p, counts[:, None], total * shrink)
    weights = (p * (value_factor * counts)[:, None]).to(dtype)
    weighed = tl.dot(tl.full([16, BLOCK], 1.0, dtype), weights, weighed * shrink, input_precision="ieee")
    new = ()
    for i in tl.static_range(VALUE_CHUNKS):
        tiles = _tiles(lines, line, VALUES, i, LINE, True, ASSEMBLY)
        for place in tl.static_range(tiles_of(constant(VALUES, i, 0))):
            before = results[constant(VALUES, i, 4) + place] * shrink
            new = new + (tl.dot(tiles[place].to(dtype), weights, before, input_precision="ieee"),)
    return higher, total, weighed, new


@triton.jit
def put_results(
    to, asking, denominator, weighed, results,
    VALUES: tl.constexpr, VALUE_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write results to where ``to``, ``[BLOCK_G]``, begins."""
    lacking, share = tl.max(weighed, 0), (1.0 / denominator)[None, :]
    for i in tl.static_range(VALUE_CHUNKS):
        for place in tl.static_range(tiles_of(constant(VALUES, i, 0))):
            _, goes, worth, real = _place(VALUES, i, place)
            result = (
                results[constant(VALUES, i, 4) + place] * UNIT
                - (lacking * middle_of(constant(VALUES, i, 0), place))[None, :]
            )
            tl.store(
                to[None, :] + goes[:, None], result * worth[:, None] * share,
                asking[None, :] & real[:, None],
            )  # fmt: skip


@functools.cache
def chunks(side: Side, start: int, joined: int) -> tuple[tuple[Any, ...], ...]:
    """The words of a side whose first byte is ``start``, in parts whose sizes are powers of two, 16 at least.

    Of each part: bits of a tile's fields, first word in the line, words, words that are the side's, tiles of the parts
    before; its pieces and how many; see `_piece`. What is left of a plane and all of the next are one part where
    ``joined`` words have room for them.
    """
    found: list[tuple[Any, ...]] = []
    planes, tiles, taken = side.planes, 0, 0
    if not joined and in_one(side):
        upper, lower = planes
        for at in range(0, lower.bytes // 2, 16):
            # In place of a piece: words of the lower plane, first channel, bytes of it, and what a code is worth.
            piece = (6, (start + lower.start) // 2 + at, 2 * at, lower.bytes, 0, 0, 0, step(6))
            found.append((6, (start + upper.start) // 2 + at, 16, 16, tiles, (piece,), 1))
            tiles += 8
        return tuple(found)
    for index, plane in enumerate(planes):
        words, at = plane.bytes // 2, taken
        taken = 0
        while at < words:
            left, bits = words - at, plane.bits
            pieces = [_piece(side, index, 0, 2 * at)]
            size = max(16, 1 << (left.bit_length() - 1))
            if index + 1 < len(planes) and left + (more := planes[index + 1].bytes // 2) <= joined:
                pieces.append(_piece(side, index + 1, left, 0))
                taken, bits, size = more, planes[index + 1].bits, max(16, 1 << (left + more - 1).bit_length())
            first = (start + plane.start) // 2 + at
            found.append((bits, first, size, min(size, left + taken), tiles, tuple(pieces), len(pieces)))
            at += size
            tiles += 16 // bits
    return tuple(found)


def in_one(side: Side) -> bool:
    """Whether values of width 6 are taken in one, and not first their upper bits and then the lower ones."""
    return set(side.widths) == {6} and side.size % 128 == 0


def apart(form: PackedFormat) -> tuple[int, int]:
    """Channels of values, from the first on, whose lower bits have sums of their own."""
    first, end = form.values.ends()[:2]
    return (0, 0) if first == end or in_one(form.values) else (first, end)


def _piece(side: Side, index: int, begins: int, byte: int) -> tuple[float, ...]:
    """What of a part is of one plane, from its word ``begins`` on, which has the plane's ``byte``.

    Bits of a field, ``begins``, ``byte``, the plane's bytes with codes, fields of its first range of channels, what a
    field's number lacks to its channel in the first and in the second range, what a code of theirs is worth, and
    where sums of theirs go, counted from the channel: those of the lower bits of width 6 lie behind those of all
    channels.
    """
    plane = side.planes[index]
    ranges = [(stop - first, first) for first, stop in plane.channels]
    widths = [side.widths[4 * first // side.size] for first, _ in plane.channels]
    worths = [step(width) * 2**shift for width, shift in zip(widths, plane.shifts, strict=True)]
    goes = [side.size if plane.bits == 2 and width == 6 else 0 for width in widths]
    length, first = ranges[0]
    second = ranges[-1][1] - length if len(ranges) == 2 else first
    return (
        plane.bits, begins, byte, plane.used, length, first, second, worths[0], worths[-1], goes[0], goes[-1],
    )  # fmt: skip


def cost(entry_bytes: float, beside: int) -> int:
    """What a block of entries of so many bytes takes, in 16 bytes each, with ``beside`` for what is not by bytes."""
    return max(1, round((entry_bytes + beside) / 16))


@functools.cache
def level_of(form: PackedFormat, beside: int = 0, joined: int = 16) -> tuple[Any, ...]:
    """What kernels are told of a format: chunks of keys and values, bytes of a line, how many chunks, and its cost."""
    keys, values = chunks(form.keys, 0, joined), chunks(form.values, form.keys.bytes, 0)
    return keys, values, form.line_bytes, len(keys), len(values), cost(form.entry_bytes, beside)
