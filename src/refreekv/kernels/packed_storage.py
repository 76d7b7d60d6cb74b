"""Writing packed lines, in Triton: entries are centred, taken to code space and coded on their way.

A line is what `core.packed_lines` describes, a segment a line of the table that `kernels.table` does, with the address
of its first line and that of its first pair of factors.

What a format is, the kernel reads from tables: one that is compiled serves all formats, and one launch all rungs of a
ladder. Bits are put in their places by a product: a code's upper and its lower bits, each times the power of two that
moves them to their place in a 16-bit word, added up over the channels. All of that is exact. Rows of a tile lie within
a warp, so that what is summed over an entry's channels waits for no other.

Where all codes are bytes there is nothing to search and nothing to put together: a launch of such formats alone is
another compiled kernel, which takes an entry's largest element and writes bytes.
"""

# Tuples of another length have another type, and Triton's have as many parts as lines have tiles.
# mypy: disable-error-code="assignment"

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.packed_lines import HALF_RANGE, MOST, SIZES, PackedFormat, Side, step
from refreekv.core.quantisation import MOST_RUNGS
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.packed_block import constant
from refreekv.kernels.packed_calls import Transfer
from refreekv.kernels.sizes import power_of_2
from refreekv.kernels.storage import _chosen, elements_first

BLOCK_IN = 32
"""Channels of entries that are multiplied at a time."""

LARGEST_FACTOR = tl.constexpr(MOST)
SHARES = tl.constexpr(len(SIZES))
OF_SIZE = tl.constexpr(tuple((share,) for share in SIZES))
HALF = tl.constexpr(HALF_RANGE)
RUNGS = tl.constexpr(MOST_RUNGS)
TINY = tl.constexpr(2.0**-126)
"""The smallest normal float32."""
ROUNDS = tl.constexpr(1.5 * 2.0**23)
"""The last bit of such a number is worth 1: what is added to it is rounded, half to even."""


class Tables(NamedTuple):
    """What a kernel is told of the formats of a ladder, on a device; its tiles of channels have one width each.

    Attributes
    ----------
    lines : Tensor
        int32 ``[R, 4]``: of each format, 16-bit words of a line, of its keys and of its values; and 1 where its keys
        are bytes, 2 where its values are, 3 where both.
    key_grid, value_grid : Tensor
        float32 ``[R, tiles, 4]``, one tile where all codes are bytes: the largest code, the step of the levels, half
        of what lies between the outer ones, and one over all of that.
    key_places, value_places : Tensor
        float16 ``[R, tiles, 2, D, words]``, ``D`` a tile's places: what the upper bits of a channel's code, all but
        two, and what its lower two add to each word.
    """

    lines: Tensor
    key_grid: Tensor
    value_grid: Tensor
    key_places: Tensor
    value_places: Tensor

    @property
    def block(self) -> int:
        """Words that are put together at a time."""
        return math.gcd(self.key_places.shape[-1], self.value_places.shape[-1], 32)

    @property
    def in_bytes(self) -> bool:
        """Whether all codes of all formats are bytes: then each side is one tile."""
        return self.key_grid.shape[1] == self.value_grid.shape[1] == 1

    def side(self, name: str) -> dict[str, int]:
        """Tiles of keys or of values, places of each, and words that there is room for."""
        places = getattr(self, f"{name}_places")
        return {f"{name.upper()}_TILES": places.shape[1], f"{name.upper()}_TILE": places.shape[3],
                f"{name.upper()}_WORDS": places.shape[4]}  # fmt: skip


def _side_tables(sides: Sequence[Side]) -> tuple[Tensor, Tensor]:
    """`Tables.key_grid` and `Tables.key_places` of some formats."""
    tiles = 1 if all(side.in_bytes for side in sides) else len(sides[0].widths)
    size = sides[0].size // tiles
    tile, words = max(16, power_of_2(size)), -(-sides[0].size // 32) * 16
    grid, places = torch.zeros(len(sides), tiles, 4), torch.zeros(len(sides), tiles, 2, tile, words)
    for rung, side in enumerate(sides):
        for at, width in enumerate(side.widths[:tiles]):
            most = 2.0**width - 1
            span = most * step(width)
            grid[rung, at] = torch.tensor([most, step(width), span / 2, 1 / span])
        for plane in side.planes:
            field = 0
            for (first, stop), up in zip(plane.channels, plane.shifts, strict=True):
                for channel in range(first, stop):
                    place, byte = divmod(field, plane.used)
                    word, odd = divmod(plane.start + byte, 2)
                    worth, own = 2.0 ** (8 * odd + place * plane.bits), places[rung, channel // size, :, channel % size]
                    # Upper bits count 4 where they follow the lower two, which a code of 6 has in another plane.
                    whole = side.widths[4 * channel // side.size] == plane.bits
                    own[0, word] = worth if up else 4 * worth if whole and plane.bits > 2 else 0
                    own[1, word] = 0 if up else worth
                    field += 1
    return grid, places.half()


@functools.lru_cache(maxsize=64)
def tables_of(forms: tuple[PackedFormat, ...], device: torch.device) -> Tables:
    """The tables of these formats, of one pair of head sizes."""
    lines = [
        [form.line_bytes // 2, form.keys.bytes // 2, form.values.bytes // 2,
         form.keys.in_bytes + 2 * form.values.in_bytes] for form in forms
    ]  # fmt: skip
    with torch.inference_mode(False):
        key_grid, key_places = _side_tables([form.keys for form in forms])
        value_grid, value_places = _side_tables([form.values for form in forms])
        parts = torch.tensor(lines, dtype=torch.int32), key_grid, value_grid, key_places, value_places
        return Tables(*(part.to(device) for part in parts))


@triton.jit
def _levels(w, unit, grid, at: tl.constexpr):
    """Codes of a tile at ``unit``, the inverse of each entry's size, and their levels."""
    part = w * (unit * tl.load(grid + at * 4 + 3))[:, None] + 0.5
    code = (tl.minimum(tl.maximum(part, 0.0), 1.0) * tl.load(grid + at * 4) + ROUNDS) - ROUNDS
    return code, code * tl.load(grid + at * 4 + 1) - tl.load(grid + at * 4 + 2)


@triton.jit
def _sums(
    w, unit, grid, worth, HAS_WORTH: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Of each entry, what its codes at ``unit`` have in common with it, and what they hold themselves."""
    place = tl.arange(0, TILE)
    own: tl.constexpr = SIZE // TILES
    products = tl.zeros([BLOCK_T, TILE], tl.float32)
    norms = tl.zeros([BLOCK_T, TILE], tl.float32)
    for at in tl.static_range(TILES):
        _code, level = _levels(w[at], unit, grid, at)
        counted = level
        if HAS_WORTH:
            counted = level * tl.load(worth + at * own + place, place < own, 0.0)[None, :]
        elif own != TILE:
            counted = tl.where((place < own)[None, :], level, 0.0)
        products += w[at] * counted
        norms += level * counted
    return tl.sum(products, 1), tl.sum(norms, 1)


@triton.jit
def _farthest(w, TILES: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of each entry in code space the factor, as it is stored, and its inverse, with which codes of bytes reach it."""
    most = tl.zeros([BLOCK_T], tl.float32)
    for at in tl.static_range(TILES):
        most = tl.maximum(most, tl.max(tl.abs(w[at]), 1))
    factor = tl.minimum(most * (1.0 / HALF), LARGEST_FACTOR).to(tl.float16).to(tl.float32)
    return factor, tl.where(factor > 0.0, 1.0 / tl.maximum(factor, TINY), 0.0)


@triton.jit
def _write_bytes(w, real, to, SIZE: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Code one side of entries in code space, one tile, in bytes to the addresses ``to``: the factors."""
    place = tl.arange(0, TILE)
    factor, unit = _farthest(w, 1, TILE, BLOCK_T)
    part = w[0] * (unit * (1.0 / (2.0 * HALF)))[:, None] + 0.5
    # The last byte of such a number is what it was rounded to.
    code = (tl.minimum(tl.maximum(part, 0.0), 1.0) * 255.0 + ROUNDS).to(tl.int32, bitcast=True).to(tl.uint8)
    to = to.to(tl.pointer_type(tl.uint8))
    tl.store(to[:, None] + place[None, :], code, real[:, None] & (place < SIZE)[None, :])
    return factor


@triton.jit
def _write_side(
    w, real, grid, places, words, fine, worth, to, same, earlier, HAS_WORTH: tl.constexpr, COPIES: tl.constexpr,
    SIZE: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Code one side of entries in code space, by tiles, and write its words to the addresses ``to``: the factors.

    ``fine`` says whether all of the side's codes are bytes.
    With ``COPIES`` those that are the ``same`` get the words at the addresses ``earlier`` in the place of codes.
    """
    place = tl.arange(0, TILE)
    squares = tl.zeros([BLOCK_T, TILE], tl.float32)
    for at in tl.static_range(TILES):
        squares += w[at] * w[at]
    size = tl.sqrt_rn(tl.sum(squares, 1) * (1.0 / SIZE))
    best = tl.zeros([BLOCK_T], tl.float32) - 1.0
    factor = tl.zeros([BLOCK_T], tl.float32)
    unit = tl.zeros([BLOCK_T], tl.float32)
    if fine > 0:
        factor, unit = _farthest(w, TILES, TILE, BLOCK_T)
    # A loop of the program's own, as unrolled it takes four times as long to compile.
    for number in range(tl.where(fine > 0, 0, SHARES)):
        share = tl.full([], constant(OF_SIZE, 0, 0), tl.float32)
        for other in tl.static_range(1, SHARES):
            share = tl.where(number == other, constant(OF_SIZE, other, 0), share)
        tried = share * size
        tried = tl.where(tried > TINY, 1.0 / tl.maximum(tried, TINY), 0.0)
        products, norms = _sums(w, tried, grid, worth, HAS_WORTH, SIZE, TILES, TILE, BLOCK_T)
        # With the best factor, the error is what the entry holds, less this.
        gain = products * products / tl.maximum(norms, TINY)
        better = gain > best
        unit = tl.where(better, tried, unit)
        factor = tl.where(better, products / tl.maximum(norms, TINY), factor)
        best = tl.maximum(best, gain)
    for start in range(0, words, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        put = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
        for at in tl.static_range(TILES):
            code, _level = _levels(w[at], unit, grid, at)
            # All of these are whole numbers: upper bits, and the lower two.
            upper = (code * 0.25 - 0.375 + ROUNDS) - ROUNDS
            lower = code - 4.0 * upper
            from_at = places + (2 * at * TILE + place[:, None]) * WORDS + word[None, :]
            put = tl.dot(upper.to(tl.float16), tl.load(from_at), put)
            put = tl.dot(lower.to(tl.float16), tl.load(from_at + TILE * WORDS), put)
        put = put.to(tl.int32).to(tl.uint16)
        there = real[:, None] & (word < words)[None, :]
        if COPIES:
            put = tl.where(same[:, None], tl.load(earlier[:, None] + word[None, :], there & same[:, None], 0), put)
        tl.store(to[:, None] + word[None, :], put, there)
    return tl.minimum(tl.maximum(factor, 0.0), LARGEST_FACTOR)


@triton.jit
def _in_code_space(
    entries, step_of_entries, source, real, offsets, matrix, rest, SIZE: tl.constexpr, TILES: tl.constexpr,
    TILE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Entries ``source`` in code space, by tiles, by the sum of the matrix and another so many elements behind."""
    place = tl.arange(0, TILE)
    own: tl.constexpr = SIZE // TILES
    coded = ()
    for _ in tl.static_range(TILES):
        coded = coded + (tl.zeros([BLOCK_T, TILE], tl.float32),)
    for start in range(0, SIZE, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        x = tl.load(entries + source[:, None] * step_of_entries + i[None, :], real[:, None] & (i < SIZE)[None, :], 0.0)
        wanted = (place < own)[None, :] & (i < SIZE)[:, None]
        new = ()
        for at in tl.static_range(TILES):
            part = matrix + (at * own + place[None, :]) * SIZE + i[:, None]
            if EXACT:
                done = tl.dot(x, tl.load(part, wanted, 0.0), coded[at], input_precision="ieee")
            else:
                done = tl.dot(x, tl.load(part, wanted, 0.0), coded[at])
                done = tl.dot(x, tl.load(part + rest, wanted, 0.0), done)
            new = new + (done,)
        coded = new
    centred = ()
    for at in tl.static_range(TILES):
        centred = centred + (coded[at] - tl.load(offsets + at * own + place, place < own, 0.0)[None, :],)
    return centred


@triton.jit
def _of(tables, number):
    """Of as many pointers as there may be rungs, one."""
    found = tables[0]
    for other in tl.static_range(1, RUNGS):
        found = tl.where(number == other, tables[other], found)
    return found


@triton.jit
def _pack_entries(
    key_from, value_from, sk_n, sv_n, source, real, table, line, rung, means, maps, lines, key_grid,
    value_grid, key_places, value_places, key_offset, key_matrix, key_worth, value_offset, value_matrix, key_rest,
    value_rest, HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_TILES: tl.constexpr, KEY_TILE: tl.constexpr,
    KEY_WORDS: tl.constexpr, VALUE_TILES: tl.constexpr, VALUE_TILE: tl.constexpr, VALUE_WORDS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_T: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Code the entries ``source`` of one segment, as far as they are ``real``, to as many lines of a rung.

    ``table`` is the segment's line of its table.
    """
    w = _in_code_space(
        key_from, sk_n, source, real, key_offset + means * HEAD, key_matrix + maps * HEAD * HEAD, key_rest,
        HEAD, KEY_TILES, KEY_TILE, BLOCK_T, BLOCK_IN, EXACT,
    )  # fmt: skip
    # What is looked up only where it is needed takes no registers until then. Lines are a multiple of 8 bytes, planes
    # of 4.
    line_words = tl.multiple_of(tl.load(lines + rung * 4), 4)
    to = tl.multiple_of(tl.load(table).to(tl.pointer_type(tl.uint16)), 8) + line.to(tl.int64) * line_words
    if KEY_TILES == 1:
        key_factor = _write_bytes(w, real, to, HEAD, KEY_TILE, BLOCK_T)
    else:
        key_words = tl.multiple_of(tl.load(lines + rung * 4 + 1), 2)
        key_factor = _write_side(
            w, real, key_grid + rung * 4 * KEY_TILES, key_places + rung * 2 * KEY_TILES * KEY_TILE * KEY_WORDS,
            key_words, tl.load(lines + rung * 4 + 3) & 1, key_worth + maps * HEAD, to, real, to, True, False, HEAD,
            KEY_TILES, KEY_TILE, BLOCK_T, KEY_WORDS, BLOCK_W,
        )  # fmt: skip
    w = _in_code_space(
        value_from, sv_n, source, real, value_offset + means * VALUE, value_matrix + maps * VALUE * VALUE,
        value_rest, VALUE, VALUE_TILES, VALUE_TILE, BLOCK_T, BLOCK_IN, EXACT,
    )  # fmt: skip
    line_words = tl.multiple_of(tl.load(lines + rung * 4), 4)
    key_words = tl.multiple_of(tl.load(lines + rung * 4 + 1), 2)
    to = tl.multiple_of(tl.load(table).to(tl.pointer_type(tl.uint16)), 8) + line.to(tl.int64) * line_words
    to += key_words
    if VALUE_TILES == 1:
        value_factor = _write_bytes(w, real, to, VALUE, VALUE_TILE, BLOCK_T)
    else:
        value_words = tl.multiple_of(tl.load(lines + rung * 4 + 2), 2)
        value_factor = _write_side(
            w, real, value_grid + rung * 4 * VALUE_TILES,
            value_places + rung * 2 * VALUE_TILES * VALUE_TILE * VALUE_WORDS, value_words,
            tl.load(lines + rung * 4 + 3) & 2, key_worth, to, real, to, False, False, VALUE, VALUE_TILES, VALUE_TILE,
            BLOCK_T, VALUE_WORDS, BLOCK_W,
        )  # fmt: skip
    both = key_factor.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    both |= value_factor.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    tl.store(tl.load(table + 1).to(tl.pointer_type(tl.uint32)) + line, both, real)


# Another prompt's length, and more rows, are no reason to compile for seconds.
@triton.jit(do_not_specialize=["end", "kv_heads", "row_of_means", "row_of_maps", "blocks_0", "blocks_1", "blocks_2"])
def _pack_kernel(
    keys, values, arena, tables, starts, spans, lines, key_grid, value_grid, key_places, value_places, end, kv_heads,
    blocks_0, blocks_1, blocks_2,
    key_offset, key_matrix, key_worth, value_offset, value_matrix, row_of_means, row_of_maps, key_rest, value_rest,
    sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_TILES: tl.constexpr, KEY_TILE: tl.constexpr, KEY_WORDS: tl.constexpr,
    VALUE_TILES: tl.constexpr, VALUE_TILE: tl.constexpr, VALUE_WORDS: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_T: tl.constexpr, FROM_ARENA: tl.constexpr, HAS_STARTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    segment, block = tl.program_id(1), tl.program_id(0)
    # The blocks of the first rung, then those of the others, up to these numbers.
    rung = (block >= blocks_0).to(tl.int32) + (block >= blocks_1).to(tl.int32) + (block >= blocks_2).to(tl.int32)
    block -= tl.where(rung == 0, 0, tl.where(rung == 1, blocks_0, tl.where(rung == 2, blocks_1, blocks_2)))
    table, listed = _of(tables, rung), _of(spans, rung)
    row, head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    first = tl.load(_of(starts, rung) + segment) if HAS_STARTS else 0
    length = tl.load(table + segment * 4 + 2) - first
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    if block * BLOCK_T < length:
        real = t < length
        source = _chosen(listed, segment, t, length, end)
        if FROM_ARENA:
            key_from = tl.multiple_of(tl.load(arena + segment * 4).to(tl.pointer_type(keys.dtype.element_ty)), 16)
            value_from = tl.load(arena + segment * 4 + 1).to(tl.pointer_type(values.dtype.element_ty))
            value_from = tl.multiple_of(value_from, 16)
        else:
            key_from = keys + row * sk_b + head * sk_h
            value_from = values + row * sv_b + head * sv_h
        _pack_entries(
            key_from, value_from, sk_n, sv_n, source, real, table + segment * 4, (first + t).to(tl.int32), rung,
            row * row_of_means + head,
            row * row_of_maps + head, lines, key_grid, value_grid, key_places, value_places, key_offset, key_matrix,
            key_worth, value_offset, value_matrix, key_rest, value_rest, HEAD, VALUE, KEY_TILES, KEY_TILE, KEY_WORDS,
            VALUE_TILES, VALUE_TILE, VALUE_WORDS, BLOCK_W, BLOCK_IN, BLOCK_T, EXACT,
        )  # fmt: skip


def block_of(kind: torch.dtype) -> int:
    """Entries of a program."""
    return 64 if kind.itemsize == 2 else 32


def registers_of(kind: torch.dtype, form: PackedFormat) -> int | None:
    """Registers of a thread, at most: for three programs on a multiprocessor where they are enough."""
    return 168 if kind.itemsize == 2 and max(form.key_size, form.value_size) <= 128 else None


@on_its_device
def launch_pack(
    given: Transfer, more: Sequence[Transfer] = (), block: int | None = None, warps: int | None = None,
    stages: int = 2, registers: int | None = None, inner: int | None = None,
) -> None:  # fmt: skip
    """Write chosen entries to lines; see `kernels.pack_lines`.

    ``more`` are others of the same entries that go to lines of other formats, in the same launch. ``block``, entries of
    a program, ``warps``, ``stages``, ``registers`` and ``inner``, channels at a time, are there to be measured.
    """
    rungs = (given, *more)
    for each in rungs:
        each.check(packs=True)
    keys, values, source, table, form, maps, _, end, _, starts = given
    keys, values, kv_heads = elements_first(keys), elements_first(values), given.kv_heads
    strides = given._replace(keys=keys, values=values).strides
    told = tables_of(tuple(each.form for each in rungs), keys.device)
    # Entries of less than float32 in bytes, which leave registers for more of them.
    easy = told.in_bytes and keys.dtype.itemsize == 2 and max(form.key_size, form.value_size) <= 128
    if block is None:
        block = 128 if easy else block_of(keys.dtype)
    if warps is None:
        warps = block // 16 if easy else 4  # more would share out an entry's channels
    if registers is None:
        registers = 128 if easy else registers_of(keys.dtype, form)
    if inner is None:
        inner = 2 * BLOCK_IN if easy else BLOCK_IN
    every = [rungs[number] if number < len(rungs) else given for number in range(MOST_RUNGS)]
    firsts = tuple(table if each.starts is None else each.starts for each in every)
    ends = list(accumulate(-(-each.longest // block) for each in rungs))
    ends += [ends[-1]] * (MOST_RUNGS - len(ends))
    _pack_kernel[(max(ends[-1], 1), table.shape[0])](
        keys, values, table if source is None else source, tuple(each.table for each in every), firsts,
        tuple(each.spans for each in every), *told, end, kv_heads, *ends[:-1],
        maps.key_offset, maps.key_sum, maps.key_worth, maps.value_offset, maps.value_sum,
        0 if maps.key_mean.shape[0] == 1 else kv_heads, 0 if maps.key_matrix.shape[0] == 1 else kv_heads,
        maps.key_sum.stride(0), maps.value_sum.stride(0), *strides,
        HEAD=form.key_size, VALUE=form.value_size, **told.side("key"), **told.side("value"),
        BLOCK_W=told.block, BLOCK_IN=inner, BLOCK_T=block, FROM_ARENA=source is not None,
        HAS_STARTS=starts is not None, EXACT=keys.dtype.itemsize > 2, num_warps=warps, num_stages=stages,
        maxnreg=registers,
    )  # fmt: skip
