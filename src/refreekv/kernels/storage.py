"""Moving entries into, within and between segments of an arena, in Triton.

A segment is a line of the table that `storage.arena` describes: key address, value address, length,
capacity.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels import pdl
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.sizes import blocks_of, power_of_2
from refreekv.kernels.table import Format, check_entries, check_move, check_spans, check_take_out

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit(do_not_specialize=["kv_heads"], do_not_specialize_on_alignment=["tokens"])
def _append_kernel(
    keys, values, table, tokens, kv_heads,
    sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    pdl.in_turn(DEPENDENT)
    segment = tl.program_id(0)
    row, head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    length, capacity = tl.load(table + segment * 4 + 2), tl.load(table + segment * 4 + 3)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    key_out = tl.multiple_of(tl.load(table + segment * 4).to(tl.pointer_type(KEY_TYPE)), 16)
    value_out = tl.multiple_of(tl.load(table + segment * 4 + 1).to(tl.pointer_type(VALUE_TYPE)), 16)
    # A segment of a row that is finished has no capacity and takes nothing.
    taken = tl.minimum(tokens, capacity - length)
    for start in range(0, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        real = t < taken
        line = length + t
        source = t.to(tl.int64)
        k = keys + row * sk_b + head * sk_h + source[:, None] * sk_n + d[None, :]
        v = values + row * sv_b + head * sv_h + source[:, None] * sv_n + dv[None, :]
        in_key, in_value = real[:, None] & (d < HEAD)[None, :], real[:, None] & (dv < VALUE)[None, :]
        tl.store(key_out + line[:, None] * HEAD + d[None, :], tl.load(k, in_key).to(KEY_TYPE), in_key)
        tl.store(value_out + line[:, None] * VALUE + dv[None, :], tl.load(v, in_value).to(VALUE_TYPE), in_value)
    # All threads have read the length before any of them gets here.
    tl.debug_barrier()
    tl.store(table + segment * 4 + 2, length + taken)


@triton.jit
def _chosen(spans, segment, t, length, end):
    """Where the entries of a segment are in the prompt, as `kernels.gather` explains."""
    index = tl.load(spans + segment * 3)
    first, skip = tl.load(spans + segment * 3 + 1), tl.load(spans + segment * 3 + 2)
    # With an index ``first`` is its length and the entries from ``end`` on follow; else a gap follows.
    indexed = tl.where(index != 0, tl.minimum(first, length), 0)
    behind = tl.where(index != 0, end - first, skip)
    listed = tl.load(index.to(tl.pointer_type(tl.int32)) + t, t < indexed, 0)
    return tl.where(t < indexed, listed.to(tl.int64), tl.where(t < first, t, t + behind))


@triton.jit(do_not_specialize=["end", "kv_heads"])
def _gather_kernel(
    keys, values, table, spans, end, kv_heads,
    sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    row, head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    length = tl.load(table + segment * 4 + 2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T < length:
        real = t < length
        source = _chosen(spans, segment, t, length, end)
        d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        key_out = tl.multiple_of(tl.load(table + segment * 4).to(tl.pointer_type(KEY_TYPE)), 16)
        value_out = tl.multiple_of(tl.load(table + segment * 4 + 1).to(tl.pointer_type(VALUE_TYPE)), 16)
        k = keys + row * sk_b + head * sk_h + source[:, None] * sk_n + d[None, :]
        v = values + row * sv_b + head * sv_h + source[:, None] * sv_n + dv[None, :]
        in_key, in_value = real[:, None] & (d < HEAD)[None, :], real[:, None] & (dv < VALUE)[None, :]
        line = t.to(tl.int64)
        tl.store(key_out + line[:, None] * HEAD + d[None, :], tl.load(k, in_key).to(KEY_TYPE), in_key)
        tl.store(value_out + line[:, None] * VALUE + dv[None, :], tl.load(v, in_value).to(VALUE_TYPE), in_value)


@triton.jit
def _copy(old, new, length, BYTES: tl.constexpr, LANE: tl.constexpr):
    """Copy a program's words of what one segment holds: of 8 bytes, or of 4 where an entry is no multiple of 8."""
    WORD: tl.constexpr = 8 if BYTES % 8 == 0 else 4
    # Segments begin where lines do.
    ALIGNED: tl.constexpr = 16 if BYTES % 16 == 0 else WORD
    pointer = tl.pointer_type(tl.int64 if BYTES % 8 == 0 else tl.int32)
    words = length * BYTES // WORD
    first = tl.program_id(0).to(tl.int64) * LANE
    if first < words:
        word = first + tl.arange(0, LANE)
        old_words = tl.multiple_of(old.to(pointer), ALIGNED)
        new_words = tl.multiple_of(new.to(pointer), ALIGNED)
        tl.store(new_words + word, tl.load(old_words + word, word < words), word < words)


@triton.jit
def _move_kernel(source, target, LANE: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr):
    """Copy what both tables' segments hold."""
    segment = tl.program_id(1)
    length = tl.minimum(tl.load(source + segment * 4 + 2), tl.load(target + segment * 4 + 2))
    _copy(tl.load(source + segment * 4), tl.load(target + segment * 4), length, KEY_BYTES, LANE)
    _copy(tl.load(source + segment * 4 + 1), tl.load(target + segment * 4 + 1), length, VALUE_BYTES, LANE)


@triton.jit
def _copy_all(old, new, length, BYTES: tl.constexpr, LANE: tl.constexpr):
    """Copy a program's share of what one segment holds, whatever its length: as `_copy`, again and again."""
    WORD: tl.constexpr = 8 if BYTES % 8 == 0 else 4
    ALIGNED: tl.constexpr = 16 if BYTES % 16 == 0 else WORD
    pointer = tl.pointer_type(tl.int64 if BYTES % 8 == 0 else tl.int32)
    words = length * BYTES // WORD
    old_words = tl.multiple_of(old.to(pointer), ALIGNED)
    new_words = tl.multiple_of(new.to(pointer), ALIGNED)
    for first in range(tl.program_id(0).to(tl.int64) * LANE, words, tl.num_programs(0) * LANE):
        word = first + tl.arange(0, LANE)
        tl.store(new_words + word, tl.load(old_words + word, word < words), word < words)


@triton.jit
def _fetch_kernel(source, target, segments, LANE: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr):
    """Copy what the source's segments hold, by a number of programs that does not depend on how much that is."""
    for segment in range(segments):
        line = segment * 4
        length = tl.minimum(tl.load(source + line + 2), tl.load(target + line + 3))
        _copy_all(tl.load(source + line), tl.load(target + line), length, KEY_BYTES, LANE)
        _copy_all(tl.load(source + line + 1), tl.load(target + line + 1), length, VALUE_BYTES, LANE)
        if tl.program_id(0) == 0:
            tl.store(target + line + 2, length)


@triton.jit
def _close_up(base, first, count, length, BYTES: tl.constexpr, LANE: tl.constexpr):
    """Move what lies behind ``count`` entries from ``first`` on over them, the front part first."""
    WORD: tl.constexpr = 8 if BYTES % 8 == 0 else 4
    words = base.to(tl.pointer_type(tl.int64 if WORD == 8 else tl.int32))
    to, behind = first * (BYTES // WORD), (first + count) * (BYTES // WORD)
    left = (length - first - count) * (BYTES // WORD)
    for start in range(0, left, LANE):
        word = start + tl.arange(0, LANE)
        part = tl.load(words + behind + word, word < left)
        # A part is read before any of it is written over. What is read later lies behind all that is written by then.
        tl.debug_barrier()
        tl.store(words + to + word, part, word < left)


@triton.jit(do_not_specialize=["segments"])
def _take_out_kernel(table, told, segments, LANE: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr):
    segment = tl.program_id(0)
    first, count = tl.load(told + segment), tl.load(told + segments + segment)
    length = tl.load(table + segment * 4 + 2)
    if count > 0:
        _close_up(tl.load(table + segment * 4), first, count, length, KEY_BYTES, LANE)
        _close_up(tl.load(table + segment * 4 + 1), first, count, length, VALUE_BYTES, LANE)
        # All threads have read the length before any of them gets here.
        tl.debug_barrier()
        tl.store(table + segment * 4 + 2, length - count)


FETCHING = 32
"""Programs that fetch: enough to keep the bus to host memory busy, and few enough to leave the others in peace."""


def _sizes(form: Format) -> dict[str, Any]:
    """What kernels that write entries as they are are told of the segments."""
    (head, value), (key_type, value_type) = form.sizes, form.types
    blocks = {"BLOCK_D": power_of_2(head), "BLOCK_V": power_of_2(value)}
    return {"HEAD": head, "VALUE": value, "KEY_TYPE": TYPES[key_type], "VALUE_TYPE": TYPES[value_type], **blocks}


def elements_first(entries: Tensor) -> Tensor:
    """The same, with an entry's elements one after the other."""
    return entries if entries.stride(-1) == 1 else entries.contiguous()


@on_its_device
def launch_append(keys: Tensor, values: Tensor, table: Tensor, form: Format) -> None:
    """Put ``[B, H_kv, q, D]`` new entries behind each segment's last one."""
    check_entries(keys, values, table, form)
    keys, values = elements_first(keys), elements_first(values)
    _append_kernel[(table.shape[0],)](
        keys, values, table, keys.shape[2], keys.shape[1], *keys.stride()[:3], *values.stride()[:3],
        **_sizes(form),
        BLOCK_T=1 if keys.shape[2] == 1 else 16, num_warps=1 if keys.shape[2] == 1 else 4,
        **pdl.options(keys.shape[0] * keys.shape[2], keys, small=True),
    )  # fmt: skip


@on_its_device
def launch_gather(
    keys: Tensor, values: Tensor, table: Tensor, spans: Tensor, end: int, longest: int, form: Format
) -> None:
    """Fill segments from dense ``[B, H_kv, n, D]``; parameters as in `kernels.gather`."""
    check_entries(keys, values, table, form)
    check_spans(spans, table, end, keys.shape[2])
    keys, values = elements_first(keys), elements_first(values)
    block = 64
    _gather_kernel[(blocks_of(max(longest, 1), block), table.shape[0])](
        keys, values, table, spans, end, keys.shape[1], *keys.stride()[:3], *values.stride()[:3],
        **_sizes(form), BLOCK_T=block, num_warps=8,
    )  # fmt: skip


@on_its_device
def launch_move(source: Tensor, target: Tensor, key_bytes: int, value_bytes: int, longest: int) -> None:
    """Copy the entries of each segment of one table to that of another; bytes are those of one entry."""
    check_move(source, target, key_bytes, value_bytes)
    lane = 2048
    words = max(size // (8 if size % 8 == 0 else 4) for size in (key_bytes, value_bytes))
    blocks = blocks_of(max(longest, 1) * words, lane)
    _move_kernel[(blocks, source.shape[0])](
        source, target, LANE=lane, KEY_BYTES=key_bytes, VALUE_BYTES=value_bytes, num_warps=8
    )


@on_its_device
def launch_take_out(table: Tensor, told: Tensor, key_bytes: int, value_bytes: int, lane: int = 2048) -> None:
    """Take entries out of segments; parameters as in `kernels.take_out`."""
    check_take_out(table, told, key_bytes, value_bytes)
    _take_out_kernel[(table.shape[0],)](
        table, told, table.shape[0], LANE=lane, KEY_BYTES=key_bytes, VALUE_BYTES=value_bytes, num_warps=8, num_stages=1
    )


@on_its_device
def launch_fetch(source: Tensor, target: Tensor, key_bytes: int, value_bytes: int, programs: int = FETCHING) -> None:
    """Copy as many entries as the source's table says by then; parameters as in `kernels.fetch`."""
    check_move(source, target, key_bytes, value_bytes)
    _fetch_kernel[(programs,)](
        source, target, source.shape[0], LANE=2048, KEY_BYTES=key_bytes, VALUE_BYTES=value_bytes, num_warps=8
    )
