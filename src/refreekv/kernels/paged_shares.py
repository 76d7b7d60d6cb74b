"""What rows of `kernels.paged` have of KV heads as one list of blocks, in Triton: how long each part is, and whose.

The list is that of the blocks of the first rung, of all segments (a row's KV head each) one after the other, then of
the others, then of what is exact. A block counts what it takes, which its bytes say, and each segment some more, as
going on to another one takes a while. Where each segment of each part of the list ends is written down once a layer,
`places`; from there programs find what is theirs, and those who join the parts find whose these are.
"""

# Tuples of another length have another type.
# mypy: disable-error-code="assignment"

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels.packed_block import constant
from refreekv.kernels.packed_decode import shares_of
from refreekv.kernels.paged import COLUMNS, PagedTable, Rows

UNIT = 128
"""Bytes that work is counted in: so that it has room in 32 bits, up to 275 GB that a step reads in one layer."""

EXTRA = 24
"""What a segment counts beside its blocks: about a block's time goes by before the first one."""

AT_ONCE = 512
"""Segments that are counted together, or looked through."""

_COLUMNS = tl.constexpr(COLUMNS)


@dataclass(frozen=True)
class Told:
    """What kernels are told of the list.

    Attributes
    ----------
    rows, table, layer : Rows, PagedTable, int
        As in `kernels.paged.paged_attention`.
    segments, generated : Tensor
        The layer's of `Coded`; without codes anything.
    levels : tuple
        Of each rung what the kernel is told, see `paged_levels`.
    block, coded_block : int
        Entries of a block, exact and coded.
    cost, extra, least : int
        What an exact block counts, a segment beside its blocks, and a share at least.
    """

    rows: Rows
    table: PagedTable
    layer: int
    segments: Tensor
    generated: Tensor
    levels: tuple[tuple[Any, ...], ...]
    block: int
    coded_block: int
    cost: int
    extra: int
    least: int


def cost(block_bytes: float) -> int:
    """What a block of so many bytes counts."""
    return max(1, round(block_bytes / UNIT))


# -- how many blocks ------------------------------------------------------------------------------


@triton.jit
def unit_of(line, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """The block that a line of coded pages is in; each page begins with a block of its own."""
    return line // LINES * ((LINES + BLOCK - 1) // BLOCK) + line % LINES // BLOCK


@triton.jit
def rung_blocks(coded, generated, slot, at, asked, LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    """First line and lines of a segment in a rung, the blocks that these are in, and those of all that it has there.

    ``at`` is the segment's number in the table of all rungs; behind its lines come those that were coded later.
    """
    LINES: tl.constexpr = constant(LEVEL, 5)
    GENERATED: tl.constexpr = constant(LEVEL, 7)
    line = tl.load(coded + at * 2, asked, 0).to(tl.int32)
    lines = tl.load(coded + at * 2 + 1, asked, 0).to(tl.int32)
    last = unit_of(tl.maximum(line + lines - 1, 0), LINES, BLOCK)
    own = tl.where(lines > 0, last + 1 - unit_of(line, LINES, BLOCK), 0)
    blocks = own
    if GENERATED:
        blocks += tl.load(generated + slot * 2 + 1, asked, 0) * ((GENERATED + BLOCK - 1) // BLOCK)
    return line, lines, own, blocks


@triton.jit
def exact_blocks(segment, length, start, asked, BLOCK: tl.constexpr):
    """First line, lines and blocks of an exact segment, listed entries and their blocks, and blocks of its tail."""
    first = tl.load(segment, asked, 0).to(tl.int32)
    held = tl.load(segment + 1, asked, 0).to(tl.int32)
    listed = tl.load(segment + 3, asked, 0).to(tl.int32)
    tail = tl.maximum(length - start, 0)
    return (
        first, held, (held + BLOCK - 1) // BLOCK, listed, (listed + BLOCK - 1) // BLOCK, (tail + BLOCK - 1) // BLOCK,
    )  # fmt: skip


@triton.jit
def write_places(
    begins, ends, lengths, slots, segments, coded, generated, starts, places, rows, heads,
    PART: tl.constexpr, RUNGS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, CODED_BLOCK: tl.constexpr,
    COST: tl.constexpr, EXTRA: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Where the segments of one part of the list end, counted from its beginning."""
    before = tl.zeros([], tl.int32)
    for first in range(0, rows * heads, AT_ONCE):
        number = first + tl.arange(0, AT_ONCE)
        there = number < rows * heads
        row, head = number // heads, number % heads
        asked = there & (tl.load(ends + row, there, 0) > tl.load(begins + row, there, 0))
        slot = tl.load(slots + row, asked, 0).to(tl.int64)
        if PART == RUNGS:
            _, _, held, _, listed, tail = exact_blocks(
                segments + (slot * heads + head) * _COLUMNS, tl.load(lengths + row, asked, 0),
                tl.load(starts + slot, asked, 0), asked, BLOCK,
            )  # fmt: skip
            blocks, each = held + listed + tail, COST
        else:
            _, _, _, blocks = rung_blocks(
                coded, generated, slot, (slot * heads + head) * RUNGS + PART, asked, constant(LEVELS, PART), CODED_BLOCK
            )
            each = constant(LEVELS, PART, 6)
        work = tl.where(asked & (blocks > 0), blocks * each + EXTRA, 0)
        tl.store(places + PART * rows * heads + number, before + tl.cumsum(work, 0), there)
        before += tl.sum(work, 0)


# -- whose they are -------------------------------------------------------------------------------


@triton.jit
def work_of(places, segments, RUNGS: tl.constexpr):
    """The whole list's length."""
    work = tl.zeros([], tl.int32)
    for part in tl.static_range(RUNGS + 1):
        work += tl.load(places + (part + 1) * segments - 1)
    return work


@triton.jit
def segment_at(ends, at, segments, AT_ONCE: tl.constexpr):
    """The segment that a place within a part of the list is in."""
    found = tl.zeros([], tl.int32)
    for first in range(0, segments, AT_ONCE):
        number = first + tl.arange(0, AT_ONCE)
        found += tl.sum((tl.load(ends + number, number < segments, at + 1) <= at).to(tl.int32), 0)
    return found


@triton.jit
def place_of(ends, segment):
    """Where a segment begins and ends within its part of the list."""
    begin = tl.load(ends + tl.maximum(segment - 1, 0))
    return tl.where(segment > 0, begin, 0), tl.load(ends + segment)


@triton.jit
def programs_of(places, segment, segments, programs, RUNGS: tl.constexpr, LEAST: tl.constexpr):
    """Which programs have shares of a segment: of each part of the list the first one, and how many."""
    work = work_of(places, segments, RUNGS)
    shares = shares_of(work, programs, LEAST)
    work = tl.maximum(work, 1)
    before = tl.zeros([], tl.int32)
    lows, counts = (), ()
    for part in tl.static_range(RUNGS + 1):
        own = places + part * segments
        begin, end = place_of(own, segment)
        # A program's share begins at ``program * work // shares``.
        low = (((before + begin + 1) * shares - 1) // work).to(tl.int32)
        high = (((before + end) * shares - 1) // work).to(tl.int32)
        lows, counts = lows + (low,), counts + (tl.where(end > begin, high - low + 1, 0),)
        before += tl.load(own + segments - 1)
    return lows, counts
