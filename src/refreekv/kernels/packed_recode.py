"""Lines of other formats made into lines of one, in Triton: in code space, so that no entry is decoded and coded whole.

Codes of all rungs of a ladder are of the same channels: what a line stands for in code space is read off by a table
that says where the bits of a channel are, whatever the format, and coded as `packed_storage` codes entries. Lines that
are of the format already are copied as they are.
"""

# Tuples of another length have another type, and Triton's have as many parts as lines have tiles.
# mypy: disable-error-code="assignment"

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.packed_lines import Side, step
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.packed_calls import Moved
from refreekv.kernels.packed_storage import _write_side, tables_of
from refreekv.kernels.sizes import blocks_of


@triton.jit
def _level(lines, rung, shown, first, where, steps, SIZE: tl.constexpr, OWN: tl.constexpr, TILE: tl.constexpr):
    """What lines at these addresses, each in its own rung, stand for at factor 1, in channels from the first one on."""
    place = tl.arange(0, TILE)
    at = rung[:, None] * SIZE + (first + place)[None, :]
    shown = shown[:, None] & (place < OWN)[None, :]
    steps_of = tl.load(steps + at, shown, 0.0)
    code = tl.zeros(at.shape, tl.int32)
    width = tl.zeros(at.shape, tl.int32)
    for plane in tl.static_range(2):
        # Bits from the lowest: 16 of the byte's number, 4 of the shift, 4 of how many bits, and how far they go up.
        told = tl.load(where + at * 2 + plane, shown, 0)
        bits = (told >> 20) & 15
        some = shown & (bits > 0)
        byte = tl.load(lines.to(tl.pointer_type(tl.uint8))[:, None] + (told & 65535), some, 0).to(tl.int32)
        code += ((byte >> ((told >> 16) & 15)) & ((1 << bits) - 1)) << (told >> 24)
        width += bits
    return (code.to(tl.float32) - 0.5 * ((1 << width) - 1).to(tl.float32)) * steps_of


@triton.jit
def _in_code_space(
    lines, rung, shown, factor, where, steps, SIZE: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One side of lines at these addresses in code space, by tiles."""
    w = ()
    for at in tl.static_range(TILES):
        level = _level(lines, rung, shown, at * (SIZE // TILES), where, steps, SIZE, SIZE // TILES, TILE)
        w = w + (level * factor[:, None],)
    return w


@triton.jit(do_not_specialize=["target", "kv_heads", "row_of_maps"], do_not_specialize_on_alignment=["starts"])
def _recode_kernel(
    table, sources, rungs, at, starts, target, kv_heads, key_worth, row_of_maps,
    key_where, key_steps, value_where, value_steps, lines, key_grid, value_grid, key_places, value_places,
    HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_TILES: tl.constexpr, KEY_TILE: tl.constexpr, KEY_WORDS: tl.constexpr,
    VALUE_TILES: tl.constexpr, VALUE_TILE: tl.constexpr, VALUE_WORDS: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    row, head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    length = tl.load(table + segment * 4 + 2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T < length:
        real = t < length
        number = tl.load(starts + segment) + t
        rung = tl.load(rungs + number, real, 0).to(tl.int32)
        place = tl.load(at + number, real, 0)
        same = rung == target
        # The whole storage of a rung is a segment of the table of sources; its capacity is the bytes of a line.
        earlier = tl.load(sources + rung * 4) + place * tl.load(sources + rung * 4 + 3)
        factors = (tl.load(sources + rung * 4 + 1) + place * 4).to(tl.pointer_type(tl.uint32))
        both = tl.load(factors, real, 0)
        key_factor = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        value_factor = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        line, line_words = t.to(tl.int64), tl.multiple_of(tl.load(lines + target * 4), 4)
        key_words = tl.multiple_of(tl.load(lines + target * 4 + 1), 2)
        value_words = tl.multiple_of(tl.load(lines + target * 4 + 2), 2)
        fine = tl.load(lines + target * 4 + 3)
        to = tl.multiple_of(tl.load(table + segment * 4).to(tl.pointer_type(tl.uint16)), 8) + line * line_words
        was, changed = earlier.to(tl.pointer_type(tl.uint16)), real & (same == 0)
        w = _in_code_space(earlier, rung, changed, key_factor, key_where, key_steps, HEAD, KEY_TILES, KEY_TILE)
        key_factor = _write_side(
            w, real, key_grid + target * 4 * KEY_TILES, key_places + target * 2 * KEY_TILES * KEY_TILE * KEY_WORDS,
            key_words, fine & 1, key_worth + (row * row_of_maps + head) * HEAD, to, same, was, True, True, HEAD,
            KEY_TILES, KEY_TILE, BLOCK_T, KEY_WORDS, BLOCK_W,
        )  # fmt: skip
        w = _in_code_space(
            earlier, rung, changed, value_factor, value_where, value_steps, VALUE, VALUE_TILES, VALUE_TILE
        )
        value_factor = _write_side(
            w, real, value_grid + target * 4 * VALUE_TILES,
            value_places + target * 2 * VALUE_TILES * VALUE_TILE * VALUE_WORDS, value_words, fine & 2, key_worth,
            to + key_words, same, was + key_words, False, True, VALUE, VALUE_TILES, VALUE_TILE, BLOCK_T,
            VALUE_WORDS, BLOCK_W,
        )  # fmt: skip
        new = key_factor.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        new |= value_factor.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        into = tl.load(table + segment * 4 + 1).to(tl.pointer_type(tl.uint32))
        tl.store(into + line, tl.where(same, both, new), real)


@functools.lru_cache(maxsize=32)
def _where(sides: tuple[Side, ...], starts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each channel's bits are in a line of each rung, int32 ``[R, size, 2]``, and its step ``[R, size]``."""
    size = sides[0].size
    told = torch.zeros(len(sides), size, 2, dtype=torch.int64)
    for rung, (side, start) in enumerate(zip(sides, starts, strict=True)):
        used = [0] * size
        for plane in side.planes:
            field = 0
            for (first, stop), up in zip(plane.channels, plane.shifts, strict=True):
                for channel in range(first, stop):
                    place, byte = divmod(field, plane.used)
                    low = start + plane.start + byte | place * plane.bits << 16
                    told[rung, channel, used[channel]] = low | plane.bits << 20 | up << 24
                    used[channel] += 1
                    field += 1
    steps = torch.stack(
        [torch.tensor([step(side.widths[4 * channel // size]) for channel in range(size)]) for side in sides]
    )
    with torch.inference_mode(False):
        return told.int().to(device), steps.float().to(device)


@on_its_device
def launch_recode(table: Tensor, given: Moved, block: int | None = None, warps: int = 4) -> None:
    """Fill the segments of ``table``; see `kernels.recode_lines`. ``block`` and ``warps`` are there to be measured."""
    given.check()
    form, maps, device = given.forms[given.target], given.maps, table.device
    kv_heads = maps.key_mean.shape[1]
    keys = _where(tuple(one.keys for one in given.forms), (0,) * len(given.forms), device)
    starts = tuple(one.keys.bytes for one in given.forms)
    values = _where(tuple(one.values for one in given.forms), starts, device)
    told = tables_of(tuple(given.forms), device)
    if block is None:  # as many lines as there are registers for
        block = 16 if max(form.key_size, form.value_size) > 128 else 32
    _recode_kernel[(blocks_of(max(given.longest, 1), block), table.shape[0])](
        table, given.sources, given.rungs, given.at, given.starts, given.target, kv_heads, maps.key_worth,
        0 if maps.key_worth.shape[0] == 1 else kv_heads, *keys, *values, *told,
        HEAD=form.key_size, VALUE=form.value_size, **told.side("key"), **told.side("value"), BLOCK_W=told.block,
        BLOCK_T=block, num_warps=warps,
    )  # fmt: skip
