"""Reading packed lines back, in Triton: codes to entries in full precision, the opposite of `packed_storage`."""

# Tuples of another length have another type, and Triton's have as many parts as lines have tiles.
# mypy: disable-error-code="assignment"

import functools

import triton
import triton.language as tl

from refreekv.core.packed_lines import Side, step
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.packed_block import constant
from refreekv.kernels.packed_calls import Transfer
from refreekv.kernels.sizes import blocks_of, power_of_2
from refreekv.kernels.storage import TYPES, _chosen


@triton.jit
def _add_plane(
    decoded, lines, line, real, matrix, matrix_channel, matrix_element,
    SIZE: tl.constexpr, LINE: tl.constexpr, PLANES: tl.constexpr, AT: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add to decoded entries what one plane of their lines stands for."""
    BITS: tl.constexpr = constant(PLANES, AT, 0)
    USED: tl.constexpr = constant(PLANES, AT, 2)
    BYTES: tl.constexpr = constant(PLANES, AT, 3)
    d = tl.arange(0, BLOCK_D)
    # Loops of the program's own: unrolled, more numbers are underway than a thread has registers for. And no loads
    # ahead, as the matrix would lie in shared memory twice.
    for start in tl.range(0, USED, BYTES, num_stages=1):
        byte = start + tl.arange(0, BYTES)
        at = lines + line[:, None] * LINE + (constant(PLANES, AT, 1) + byte)[None, :]
        packed = tl.load(at, real[:, None] & (byte < USED)[None, :], 0).to(tl.int32)
        for place in tl.range(0, 8 // BITS, num_stages=1):
            field = byte + place * USED
            later = field >= constant(PLANES, AT, 4)
            channel = field + tl.where(later, constant(PLANES, AT, 6), constant(PLANES, AT, 5))
            steps = tl.where(later, constant(PLANES, AT, 8), constant(PLANES, AT, 7)).to(tl.float32)
            shift = tl.where(later, constant(PLANES, AT, 10), constant(PLANES, AT, 9)).to(tl.int32)
            bits = (packed >> (BITS * place)) & ((1 << BITS) - 1)
            # Of a code in two planes each has a part, and each part its middle. All of them are exact in 16 bits.
            level = (bits.to(tl.float32) - 0.5 * ((1 << BITS) - 1)) * (1 << shift)[None, :].to(tl.float32)
            to = matrix + channel[:, None] * matrix_channel + d[None, :] * matrix_element
            part = tl.load(to, (byte < USED)[:, None] & (d < SIZE)[None, :], 0.0) * steps[:, None]
            if EXACT:
                # Levels are exact in 10 bits: three products give what float32 gives, and compile much faster.
                decoded = tl.dot(level, part, decoded, input_precision="tf32x3")
            else:
                high = part.to(TYPE)
                decoded = tl.dot(level.to(TYPE), high, decoded)
                decoded = tl.dot(level.to(TYPE), (part - high.to(tl.float32)).to(TYPE), decoded)
    return decoded


@triton.jit
def _unpack_side(
    lines, line, real, factor, mean, matrix, matrix_channel, matrix_element, entries, step_of_entries, place,
    SIZE: tl.constexpr, LINE: tl.constexpr, COUNT: tl.constexpr, PLANES: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Decode one side of some lines of the segment at ``lines`` and write it to the entries at ``place``.

    The element ``(channel, element)`` of the matrix is that many steps of the two kinds from its begin.
    """
    d = tl.arange(0, BLOCK_D)
    decoded = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for plane in tl.static_range(COUNT):
        decoded = _add_plane(
            decoded, lines, line, real, matrix, matrix_channel, matrix_element, SIZE, LINE, PLANES, plane, TYPE,
            BLOCK_D, EXACT,
        )  # fmt: skip
    centre = tl.load(mean + d, d < SIZE, 0.0)
    at = entries + place[:, None] * step_of_entries + d[None, :]
    tl.store(at, (decoded * factor[:, None] + centre[None, :]).to(TYPE), real[:, None] & (d < SIZE)[None, :])


# Another prompt's length, and more rows, are no reason to compile for seconds.
@triton.jit(do_not_specialize=["end", "kv_heads", "row_of_means", "row_of_maps"])
def _unpack_kernel(
    keys, values, arena, table, starts, spans, end, kv_heads,
    key_mean, key_dual, value_mean, value_back, row_of_means, row_of_maps,
    sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, LINE: tl.constexpr, KEY_COUNT: tl.constexpr, VALUE_COUNT: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr, TO_ARENA: tl.constexpr, HAS_STARTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    row, head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    first = tl.load(starts + segment) if HAS_STARTS else 0
    length = tl.load(table + segment * 4 + 2) - first
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T < length:
        real = t < length
        place = _chosen(spans, segment, t, length, end).to(tl.int64)
        line = first + t.to(tl.int64)
        if TO_ARENA:
            # Allocations, and lines below, begin at such multiples, which Triton cannot know of a number.
            key_to = tl.multiple_of(tl.load(arena + segment * 4).to(tl.pointer_type(KEY_TYPE)), 16)
            value_to = tl.multiple_of(tl.load(arena + segment * 4 + 1).to(tl.pointer_type(VALUE_TYPE)), 16)
        else:
            key_to = keys + row * sk_b + head * sk_h
            value_to = values + row * sv_b + head * sv_h
        maps, means = row * row_of_maps + head, row * row_of_means + head
        lines = tl.load(table + segment * 4).to(tl.pointer_type(tl.uint8))
        lines = tl.multiple_of(lines, 16 if LINE % 16 == 0 else 8)
        both = tl.load(tl.load(table + segment * 4 + 1).to(tl.pointer_type(tl.uint32)) + line, real, 0)
        key_factor = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        value_factor = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        _unpack_side(
            lines, line, real, key_factor, key_mean + means * HEAD, key_dual + maps * HEAD * HEAD, HEAD, 1, key_to,
            sk_n, place, HEAD, LINE, KEY_COUNT, KEYS, KEY_TYPE, BLOCK_T, BLOCK_D, EXACT,
        )  # fmt: skip
        _unpack_side(
            lines, line, real, value_factor, value_mean + means * VALUE, value_back + maps * VALUE * VALUE, 1, VALUE,
            value_to, sv_n, place, VALUE, LINE, VALUE_COUNT, VALUES, VALUE_TYPE, BLOCK_T, BLOCK_V, EXACT,
        )  # fmt: skip


@functools.cache
def planes_of(side: Side, start: int, most: int) -> tuple[tuple[float, ...], ...]:
    """The planes of a side whose first byte is ``start``.

    Of each: bits of a field, the plane's first byte in the line, its bytes with codes, and how many of them are taken
    at a time, ``most`` of them at most; fields of its first range of channels; then by pairs, for both ranges: what a
    field's number lacks to its channel, the step, and how far above the lowest bit of its code a field begins.
    """
    found: list[tuple[float, ...]] = []
    for plane in side.planes:
        ranges = [(stop - first, first) for first, stop in plane.channels]
        widths = [side.widths[4 * first // side.size] for first, _ in plane.channels]
        length, first = ranges[0]
        second = ranges[-1][1] - length if len(ranges) == 2 else first
        found.append(
            (plane.bits, start + plane.start, plane.used, min(most, max(16, plane.used & -plane.used)), length, first,
             second, step(widths[0]), step(widths[-1]), plane.shifts[0], plane.shifts[-1])
        )  # fmt: skip
    return tuple(found)


@on_its_device
def launch_unpack(
    given: Transfer, block: int | None = None, warps: int = 4, at_once: int | None = None,
    registers: int | None = None,
) -> None:  # fmt: skip
    """Write what lines stand for to chosen entries; see `kernels.unpack_lines`.

    ``block``, lines of a program, ``warps``, bytes of a line that are decoded ``at_once`` and ``registers`` of a thread
    are there to be measured.
    """
    given.check(packs=False)
    keys, values, target, table, form, maps, spans, end, longest, starts = given
    if target is None and not keys.stride(-1) == values.stride(-1) == 1:
        raise ValueError("lines are decoded to entries whose elements lie one after the other")
    exact = max(keys.dtype.itemsize, values.dtype.itemsize) > 2
    if block is None:  # float32 tiles of heads of 256 are too large for the smaller GPUs
        block = 32 if exact and max(form.key_size, form.value_size) > 128 else 64
    if at_once is None:  # as many rows of a matrix as there are registers for
        at_once = 16 if exact or max(form.key_size, form.value_size) > 128 else 32
    keys_of, values_of = planes_of(form.keys, 0, at_once), planes_of(form.values, form.keys.bytes, at_once)
    _unpack_kernel[(blocks_of(max(longest, 1), block), table.shape[0])](
        keys, values, table if target is None else target, table, table if starts is None else starts, spans, end,
        given.kv_heads, maps.key_mean, maps.key_dual, maps.value_mean, maps.value_back,
        0 if maps.key_mean.shape[0] == 1 else given.kv_heads, 0 if maps.key_dual.shape[0] == 1 else given.kv_heads,
        *given.strides,
        HEAD=form.key_size, VALUE=form.value_size, LINE=form.line_bytes, KEY_COUNT=len(keys_of),
        VALUE_COUNT=len(values_of), KEYS=keys_of, VALUES=values_of,
        KEY_TYPE=TYPES[keys.dtype], VALUE_TYPE=TYPES[values.dtype],
        BLOCK_D=power_of_2(form.key_size), BLOCK_V=power_of_2(form.value_size),
        BLOCK_T=block, TO_ARENA=target is not None, HAS_STARTS=starts is not None, EXACT=exact, num_warps=warps,
        maxnreg=registers,
    )  # fmt: skip
