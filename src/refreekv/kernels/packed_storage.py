"""Writing packed lines, in Triton: entries are centred, taken to code space and coded on their way.

A line is what `core.packed_lines` describes, a segment a line of the table that `kernels.table` does, with the address
of its first line and that of its first pair of factors.
"""

# Tuples of another length have another type, and Triton's have as many parts as lines have tiles.
# mypy: disable-error-code="assignment"

import functools

import triton
import triton.language as tl

from refreekv.core.packed_lines import MOST, SIZES, PackedFormat, Side, step
from refreekv.kernels import shared_memory
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.packed_calls import Transfer
from refreekv.kernels.packed_decode import constant
from refreekv.kernels.storage import _chosen, elements_first

BLOCK_IN = 32
"""Channels of entries that are multiplied at a time."""

LARGEST_FACTOR = tl.constexpr(MOST)
SHARES = tl.constexpr(len(SIZES))
OF_SIZE = tl.constexpr(tuple((share,) for share in SIZES))
TINY = tl.constexpr(2.0**-126)
"""The smallest normal float32."""


@triton.jit
def _columns(CHUNKS: tl.constexpr, AT: tl.constexpr, PLACE: tl.constexpr):
    """Of a tile, a field of the bytes of a chunk: the channels, whether they are any, which are of the second range."""
    byte = constant(CHUNKS, AT, 3) + tl.arange(0, constant(CHUNKS, AT, 2))
    field = byte + PLACE * constant(CHUNKS, AT, 4)
    later = field >= constant(CHUNKS, AT, 6)
    channel = field + tl.where(later, constant(CHUNKS, AT, 8), constant(CHUNKS, AT, 7))
    return channel, byte < constant(CHUNKS, AT, 4), later


@triton.jit
def _counts(CHUNKS: tl.constexpr, AT: tl.constexpr, there, later):
    """Which channels of a tile count in it: one of width 6 is in two planes."""
    return there & (tl.where(later, constant(CHUNKS, AT, 14), constant(CHUNKS, AT, 13)) > 0)


@triton.jit
def _levels(CHUNKS: tl.constexpr, AT: tl.constexpr, w, unit, later):
    """Codes of a tile at ``unit``, the inverse of each entry's size, in the last bits of floats, and their levels."""
    most = tl.where(later, constant(CHUNKS, AT, 10), constant(CHUNKS, AT, 9)).to(tl.float32)
    steps = tl.where(later, constant(CHUNKS, AT, 12), constant(CHUNKS, AT, 11)).to(tl.float32)
    exactly = w * unit[:, None] * (1.0 / steps)[None, :] + (0.5 * most)[None, :]
    # At 1.5 * 2 ** 23 the last bit of a number is worth 1: added to that, numbers are rounded, half to even.
    rounded = tl.minimum(tl.maximum(exactly, 0.0), most[None, :]) + 12582912.0
    return rounded, (rounded - 12582912.0 - (0.5 * most)[None, :]) * steps[None, :]


@triton.jit
def _write_side(
    centred, real, worth, lines, line, same, earlier, HAS_WORTH: tl.constexpr, COPIES: tl.constexpr,
    SIZE: tl.constexpr, LINE: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Code one side of entries in code space, by tiles, and write its planes to ``line`` of ``lines``: the factors.

    With ``COPIES`` those that are the ``same`` get the bytes at the addresses ``earlier`` in the place of codes.
    """
    squares = tl.zeros([BLOCK_T], tl.float32)
    for c in tl.static_range(COUNT):
        for place in tl.static_range(8 // constant(CHUNKS, c, 0)):
            channel, there, later = _columns(CHUNKS, c, place)
            w = centred[constant(CHUNKS, c, 17) + place]
            squares += tl.sum(tl.where(_counts(CHUNKS, c, there, later)[None, :], w * w, 0.0), 1)
    size = tl.sqrt_rn(squares * (1.0 / SIZE))
    unit = tl.zeros([BLOCK_T], tl.float32)
    best = tl.zeros([BLOCK_T], tl.float32) - 1.0
    # A loop of the program's own, as unrolled it takes four times as long to compile.
    for number in range(SHARES):
        share = tl.full([], constant(OF_SIZE, 0, 0), tl.float32)
        for other in tl.static_range(1, SHARES):
            share = tl.where(number == other, constant(OF_SIZE, other, 0), share)
        tried = share * size
        tried = tl.where(tried > TINY, 1.0 / tl.maximum(tried, TINY), 0.0)
        products = tl.zeros([BLOCK_T], tl.float32)
        norms = tl.zeros([BLOCK_T], tl.float32)
        for c in tl.static_range(COUNT):
            for place in tl.static_range(8 // constant(CHUNKS, c, 0)):
                channel, there, later = _columns(CHUNKS, c, place)
                w = centred[constant(CHUNKS, c, 17) + place]
                _rounded, level = _levels(CHUNKS, c, w, tried, later)
                level = tl.where(_counts(CHUNKS, c, there, later)[None, :], level, 0.0)
                counted = level
                if HAS_WORTH:
                    counted = level * tl.load(worth + channel, there, 0.0)[None, :]
                products += tl.sum(w * counted, 1)
                norms += tl.sum(level * counted, 1)
        # With the best factor, the error is what the entry holds, less this.
        gain = products * products / tl.maximum(norms, TINY)
        unit = tl.where(gain > best, tried, unit)
        best = tl.maximum(best, gain)
    products = tl.zeros([BLOCK_T], tl.float32)
    norms = tl.zeros([BLOCK_T], tl.float32)
    for c in tl.static_range(COUNT):
        packed = tl.zeros([BLOCK_T, constant(CHUNKS, c, 2)], tl.int32)
        for place in tl.static_range(8 // constant(CHUNKS, c, 0)):
            channel, there, later = _columns(CHUNKS, c, place)
            shift = tl.where(later, constant(CHUNKS, c, 16), constant(CHUNKS, c, 15)).to(tl.int32)
            w = centred[constant(CHUNKS, c, 17) + place]
            rounded, level = _levels(CHUNKS, c, w, unit, later)
            code = rounded.to(tl.int32, bitcast=True) & 255
            level = tl.where(_counts(CHUNKS, c, there, later)[None, :], level, 0.0)
            counted = level
            if HAS_WORTH:
                counted = level * tl.load(worth + channel, there, 0.0)[None, :]
            products += tl.sum(w * counted, 1)
            norms += tl.sum(level * counted, 1)
            bits = (code >> shift[None, :]) & ((1 << constant(CHUNKS, c, 0)) - 1)
            packed |= tl.where(there[None, :], bits << (constant(CHUNKS, c, 0) * place), 0)
        byte = constant(CHUNKS, c, 3) + tl.arange(0, constant(CHUNKS, c, 2))
        to = lines + line[:, None] * LINE + (constant(CHUNKS, c, 1) + byte)[None, :]
        if COPIES:
            was = earlier.to(tl.pointer_type(tl.uint8))[:, None] + (constant(CHUNKS, c, 1) + byte)[None, :]
            copied = (real & same)[:, None] & (byte < constant(CHUNKS, c, 5))[None, :]
            packed = tl.where(same[:, None], tl.load(was, copied, 0).to(tl.int32), packed)
        tl.store(to, packed.to(tl.uint8), real[:, None] & (byte < constant(CHUNKS, c, 5))[None, :])
    return tl.minimum(tl.maximum(products / tl.maximum(norms, TINY), 0.0), LARGEST_FACTOR)


@triton.jit
def _pack_side(
    entries, step_of_entries, source, real, offsets, matrix, rest, worth, lines, line, HAS_WORTH: tl.constexpr,
    SIZE: tl.constexpr, LINE: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Code one side of entries ``source`` and write its planes to ``line`` of the segment at ``lines``: the factors.

    The matrix is the sum of that at ``matrix`` and another so many elements behind.
    """
    coded = ()
    for c in tl.static_range(COUNT):
        for _ in tl.static_range(8 // constant(CHUNKS, c, 0)):
            coded = coded + (tl.zeros([BLOCK_T, constant(CHUNKS, c, 2)], tl.float32),)
    for start in range(0, SIZE, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        at = entries + source[:, None] * step_of_entries + i[None, :]
        x = tl.load(at, real[:, None] & (i < SIZE)[None, :], 0.0)
        new = ()
        for c in tl.static_range(COUNT):
            for place in tl.static_range(8 // constant(CHUNKS, c, 0)):
                channel, there, _later = _columns(CHUNKS, c, place)
                at = matrix + channel[None, :] * SIZE + i[:, None]
                wanted = there[None, :] & (i < SIZE)[:, None]
                part = tl.load(at, wanted, 0.0)
                done = tl.dot(x, part, coded[constant(CHUNKS, c, 17) + place], input_precision="ieee")
                if not EXACT:
                    done = tl.dot(x, tl.load(at + rest, wanted, 0.0), done)
                new = new + (done,)
        coded = new
    centred = ()
    for c in tl.static_range(COUNT):
        for place in tl.static_range(8 // constant(CHUNKS, c, 0)):
            channel, there, _later = _columns(CHUNKS, c, place)
            w = coded[constant(CHUNKS, c, 17) + place] - tl.load(offsets + channel, there, 0.0)[None, :]
            centred = centred + (w,)
    return _write_side(
        centred, real, worth, lines, line, real, line, HAS_WORTH, False, SIZE, LINE, COUNT, CHUNKS, BLOCK_T
    )


# Another prompt's length, and more rows, are no reason to compile for seconds.
@triton.jit(do_not_specialize=["end", "kv_heads", "row_of_means", "row_of_maps"])
def _pack_kernel(
    keys, values, arena, table, starts, spans, end, kv_heads,
    key_offset, key_matrix, key_worth, value_offset, value_matrix, row_of_means, row_of_maps, key_rest, value_rest,
    sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, LINE: tl.constexpr, KEY_COUNT: tl.constexpr, VALUE_COUNT: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_T: tl.constexpr, FROM_ARENA: tl.constexpr, HAS_STARTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    row, head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    first = tl.load(starts + segment) if HAS_STARTS else 0
    length = tl.load(table + segment * 4 + 2) - first
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T < length:
        real = t < length
        source = _chosen(spans, segment, t, length, end)
        line = first + t.to(tl.int64)
        if FROM_ARENA:
            key_from = tl.load(arena + segment * 4).to(tl.pointer_type(keys.dtype.element_ty))
            value_from = tl.load(arena + segment * 4 + 1).to(tl.pointer_type(values.dtype.element_ty))
        else:
            key_from = keys + row * sk_b + head * sk_h
            value_from = values + row * sv_b + head * sv_h
        maps, means = row * row_of_maps + head, row * row_of_means + head
        lines = tl.load(table + segment * 4).to(tl.pointer_type(tl.uint8))
        key_factor = _pack_side(
            key_from, sk_n, source, real, key_offset + means * HEAD, key_matrix + maps * HEAD * HEAD, key_rest,
            key_worth + maps * HEAD, lines, line, True, HEAD, LINE, KEY_COUNT, KEYS, BLOCK_T, BLOCK_IN, EXACT,
        )  # fmt: skip
        value_factor = _pack_side(
            value_from, sv_n, source, real, value_offset + means * VALUE, value_matrix + maps * VALUE * VALUE,
            value_rest, key_worth, lines, line, False, VALUE, LINE, VALUE_COUNT, VALUES, BLOCK_T, BLOCK_IN, EXACT,
        )  # fmt: skip
        both = key_factor.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        both |= value_factor.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        factors = tl.load(table + segment * 4 + 1).to(tl.pointer_type(tl.uint32))
        tl.store(factors + line, both, real)


@functools.cache
def chunks(side: Side, start: int) -> tuple[tuple[float, ...], ...]:
    """The bytes of a side whose first byte is ``start``, in parts whose sizes are powers of two, 16 to 64.

    Of each part: bits of a field, first byte of the plane in the line, bytes, first byte in the plane, the plane's
    bytes with codes, and all of them; fields of the plane's first range of channels, what a field's number lacks to its
    channel in the first and in the second range; then by pairs, for both ranges: the largest
    code, the step, whether a channel counts here, and how far above the lowest bit of its code a field begins;
    tiles of the parts before.
    """
    found: list[tuple[float, ...]] = []
    tiles = 0
    for plane in side.planes:
        ranges = [(stop - first, first) for first, stop in plane.channels]
        widths = [side.widths[4 * first // side.size] for first, _ in plane.channels]
        counts = [int(plane.bits != 2 or width == 2) for width in widths]
        length, first = ranges[0]
        second = ranges[-1][1] - length if len(ranges) == 2 else first
        at = 0
        while at < plane.bytes:
            size = min(64, max(16, 1 << ((plane.bytes - at).bit_length() - 1)))
            found.append(
                (plane.bits, start + plane.start, size, at, plane.used, min(plane.bytes, at + size),
                 length, first, second, 2 ** widths[0] - 1, 2 ** widths[-1] - 1, step(widths[0]),
                 step(widths[-1]), counts[0], counts[-1], plane.shifts[0], plane.shifts[-1],
                 tiles)
            )  # fmt: skip
            at += size
            tiles += 8 // plane.bits
    return tuple(found)


@functools.cache
def _parts(form: PackedFormat) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...], int]:
    """`chunks` of keys and of values, and the most channels that both have places for."""
    both = chunks(form.keys, 0), chunks(form.values, form.keys.bytes)
    return *both, max(int(sum(part[2] * 8 // part[0] for part in some)) for some in both)


@on_its_device
def launch_pack(given: Transfer, block: int | None = None, warps: int | None = None) -> None:
    """Write chosen entries to lines; see `kernels.pack_lines`.

    ``block``, entries of a program, and ``warps`` are there to be measured.
    """
    given.check(packs=True)
    keys, values, source, table, form, maps, spans, end, longest, starts = given
    keys, values, kv_heads = elements_first(keys), elements_first(values), given.kv_heads
    strides = given._replace(keys=keys, values=values).strides
    key_chunks, value_chunks, columns = _parts(form)
    if block is None:
        block = 64 if keys.dtype.itemsize == 2 else 32
    # Of each stage the entries' and the matrices' part of what is multiplied next.
    if warps is None:
        # Registers for all of an entry's channels at once.
        warps = 4 if columns <= 128 else 8
    stage = BLOCK_IN * keys.element_size() * (block + len(maps.key_sum) * columns)
    stages = max(1, min(3, shared_memory.for_tiles(keys.device) // stage))
    _pack_kernel[(triton.cdiv(max(longest, 1), block), table.shape[0])](
        keys, values, table if source is None else source, table, table if starts is None else starts, spans, end,
        kv_heads, maps.key_offset, maps.key_sum, maps.key_worth, maps.value_offset, maps.value_sum,
        0 if maps.key_mean.shape[0] == 1 else kv_heads, 0 if maps.key_matrix.shape[0] == 1 else kv_heads,
        maps.key_sum.stride(0), maps.value_sum.stride(0), *strides,
        HEAD=form.key_size, VALUE=form.value_size, LINE=form.line_bytes, KEY_COUNT=len(key_chunks),
        VALUE_COUNT=len(value_chunks), KEYS=key_chunks, VALUES=value_chunks,
        BLOCK_IN=BLOCK_IN,
        BLOCK_T=block, FROM_ARENA=source is not None, HAS_STARTS=starts is not None,
        EXACT=keys.dtype.itemsize > 2, num_warps=warps, num_stages=stages,
    )  # fmt: skip
