"""Writing to private pages in Triton: entries as they are, and coded lines; and reading what ordinary blocks hold."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.paged import COLUMNS, UNIT, PagedTable, Pool
from refreekv.kernels.paged_exact import line_at, listed_at, token_at

_COLUMNS = tl.constexpr(COLUMNS)
_UNIT = tl.constexpr(UNIT)


@triton.jit(do_not_specialize=["slot", "blocks", "slots", "opening"])
def _paged_move_kernel(
    pool, offsets, segments, slot, blocks, places, pages, slots, opening,
    block_stride, token_stride, head_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    LAYERS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some listed entries of one layer and head, to their lines."""
    layer, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    segment = segments + ((layer.to(tl.int64) * slots + slot) * HEADS + head) * _COLUMNS
    left_out = tl.load(places + tl.num_programs(1) + tl.program_id(1)).to(tl.int32)
    moved = tl.load(segment + 3).to(tl.int32) - left_out
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < moved:
        inside = entry < moved
        listed = tl.load(segment + 2).to(tl.pointer_type(tl.int32)) + tl.where(entry < opening, entry, entry + left_out)
        source = listed_at(
            tl.load(listed, inside, 0), blocks, tl.load(offsets + layer), tl.load(segment + 4), head, inside,
            block_stride, token_stride, head_stride, TOKENS, WIDTH,
        )  # fmt: skip
        line = tl.load(places + tl.program_id(1)).to(tl.int32) + entry
        target = line_at(line, pages, offsets, inside, block_stride, LINES, LAYERS, WIDTH)
        w = tl.arange(0, BLOCK_W)
        real = inside[:, None] & (w < WIDTH)[None, :]
        tl.store(pool + target[:, None] + w[None, :], tl.load(pool + source[:, None] + w[None, :], real), real)


@triton.jit(do_not_specialize=["pages", "first", "count"])
def _paged_spread_kernel(
    lines, factors, pool, offsets, pages, first, count, block_stride,
    LINE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, CODED_LINES: tl.constexpr, EACH: tl.constexpr,
    LAYERS: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """Some coded lines and their factors, to their pages."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    line = first + entry
    page = line // EACH
    block = tl.load(pages + page // LAYERS, inside, 0).to(tl.int64)
    at = (tl.load(offsets + page % LAYERS, inside, 0) * _UNIT + block * block_stride) * ITEM
    bytes_of = pool.to(tl.pointer_type(tl.uint8))
    into = (bytes_of + at + CODED_LINES * LINE).to(tl.pointer_type(tl.uint32)) + line % EACH
    tl.store(into, tl.load(factors.to(tl.pointer_type(tl.uint32)) + entry, inside), inside)
    w = tl.arange(0, BLOCK_W)
    real = inside[:, None] & (w < LINE // 8)[None, :]
    # Lines are multiples of 8 bytes.
    source = lines.to(tl.pointer_type(tl.int64)) + entry[:, None].to(tl.int64) * (LINE // 8) + w[None, :]
    target = (bytes_of + at + (line % EACH) * LINE).to(tl.pointer_type(tl.int64))
    tl.store(target[:, None] + w[None, :], tl.load(source, real), real)


@triton.jit(do_not_specialize=["blocks", "first", "prompt"])
def _paged_sum_kernel(
    pool, offsets, blocks, sums, first, prompt, block_stride, token_stride, head_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one layer and head added up, channel by channel."""
    layer, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    own = tl.load(offsets + layer)
    w = tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK, BLOCK_W], tl.float32)
    for start in range(0, EACH, BLOCK):
        position = first + tl.program_id(0) * EACH + start + tl.arange(0, BLOCK)
        inside = position < prompt
        at = token_at(position, blocks, own, head, inside, block_stride, token_stride, head_stride, TOKENS)
        total += tl.load(pool + at[:, None] + w[None, :], inside[:, None] & (w < WIDTH)[None, :], 0.0).to(tl.float32)
    into = sums + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * WIDTH
    tl.store(into + w, tl.sum(total, 0), w < WIDTH)


@triton.jit(do_not_specialize=["offsets", "blocks", "prompt"])
def _paged_read_kernel(
    pool, offsets, blocks, out, prompt, block_stride, token_stride, head_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one layer and head, copied."""
    layer, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < prompt
    own = tl.load(offsets + layer)
    at = token_at(position, blocks, own, head, inside, block_stride, token_stride, head_stride, TOKENS)
    w = tl.arange(0, BLOCK_W)
    real = inside[:, None] & (w < WIDTH)[None, :]
    into = (tl.program_id(1).to(tl.int64) * prompt + position)[:, None] * WIDTH + w[None, :]
    tl.store(out + into, tl.load(pool + at[:, None] + w[None, :], real), real)


@on_its_device
def launch_read(blocks: Tensor, pool: Pool, layers: slice, prompt: int) -> Tensor:
    """Copy what some layers hold of a prompt: ``[layers, H_kv, n, 2 * D]``."""
    offsets, width = pool.offsets[layers], 2 * pool.size
    out = torch.empty(len(offsets), pool.heads, prompt, width, dtype=pool.cache.dtype, device=pool.cache.device)
    _paged_read_kernel[(triton.cdiv(prompt, 32), len(offsets) * pool.heads)](
        pool.cache, offsets, blocks, out, prompt, *pool.shared_strides(),
        HEADS=pool.heads, WIDTH=width, BLOCK_W=triton.next_power_of_2(width), BLOCK=32, TOKENS=pool.tokens,
        num_warps=4,
    )  # fmt: skip
    return out


@on_its_device
def launch_sum(blocks: Tensor, pool: Pool, first: int, prompt: int) -> Tensor:
    """Add up the entries from position ``first`` on: ``[layers, H_kv, 2 * D]`` in float32."""
    width, segments, each = 2 * pool.size, pool.layers * pool.heads, 256
    programs = triton.cdiv(prompt - first, each)
    sums = torch.empty(programs, segments, width, dtype=torch.float32, device=pool.cache.device)
    _paged_sum_kernel[(programs, segments)](
        pool.cache, pool.offsets, blocks, sums, first, prompt, *pool.shared_strides(),
        HEADS=pool.heads, WIDTH=width, BLOCK_W=triton.next_power_of_2(width), EACH=each, BLOCK=16, TOKENS=pool.tokens,
        num_warps=4,
    )  # fmt: skip
    return sums.sum(0).view(pool.layers, pool.heads, width)


@on_its_device
def launch_move(
    pages: Tensor,
    pool: Pool,
    table: PagedTable,
    slot: int,
    blocks: Tensor,
    places: Tensor,
    longest: int,
    opening: int,
) -> None:
    """Run the copy; parameters as in `kernels.paged.move_to_pages`."""
    width = 2 * pool.size
    if not longest:
        return
    _paged_move_kernel[(triton.cdiv(longest, 16), pool.layers * pool.heads)](
        pool.cache, pool.offsets, table.segments, slot, blocks, places, pages, table.segments.shape[1], opening,
        *pool.shared_strides(),
        HEADS=pool.heads, WIDTH=width, BLOCK_W=triton.next_power_of_2(width), BLOCK=16, LINES=pool.lines,
        LAYERS=pool.layers, TOKENS=pool.tokens, num_warps=4,
    )  # fmt: skip


@on_its_device
def launch_spread(
    lines: Tensor, factors: Tensor, pool: Pool, form: PackedFormat, first: int, pages: Tensor, each: int | None = None
) -> None:
    """Copy coded lines ``[t, line_bytes]`` and factors ``[t, 4]`` to pages, the first of them to line ``first``.

    Of a page ``each`` lines are written; None: as many as it has.
    """
    most = pool.coded_lines(form)
    each = most if each is None else each
    _paged_spread_kernel[(triton.cdiv(len(lines), 32),)](
        lines, factors, pool.cache, pool.offsets, pages, first, len(lines), pool.cache.stride(0),
        LINE=form.line_bytes, BLOCK_W=triton.next_power_of_2(form.line_bytes // 8), BLOCK=32,
        CODED_LINES=most, EACH=each, LAYERS=pool.layers, ITEM=pool.cache.element_size(), num_warps=4,
    )  # fmt: skip
