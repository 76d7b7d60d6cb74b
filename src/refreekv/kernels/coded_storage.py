"""Writing entries to segments of int8 lines, in Triton: they are encoded on the way, as `core.coded_lines` does it.

A segment is a line of the table that `core.arena` describes, a line of an entry what `core.coded_lines` does.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.coded_lines import line_bytes
from refreekv.kernels import pdl
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.storage import TYPES, _chosen, elements_first
from refreekv.kernels.table import Format, check_entries, check_spans


@triton.jit
def _encode(
    entries, step, source, target, line, real,
    SIZE: tl.constexpr, GROUP: tl.constexpr, LINE: tl.constexpr, HALF: tl.constexpr, TINY: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write entries ``source``, ``step`` elements apart, to lines of the segment at address ``target``."""
    g, e = tl.arange(0, BLOCK_GROUPS), tl.arange(0, BLOCK_E)
    d = g[:, None] * GROUP + e[None, :]
    whole = g < SIZE // GROUP
    there = whole[:, None] & (e < GROUP)[None, :]
    wanted = real[:, None, None] & there[None, :, :]
    x = tl.load(entries + source[:, None, None] * step + d[None, :, :], wanted, 0.0).to(tl.float32)
    # The numbers are rounded first and the codes computed for the rounded ones.
    low = tl.min(tl.where(there[None, :, :], x, float("inf")), 2).to(HALF)
    high = tl.max(tl.where(there[None, :, :], x, float("-inf")), 2)
    scale = tl.div_rn(high - low.to(tl.float32), 255.0).to(HALF)
    scale = tl.maximum(scale.to(tl.float32), TINY)
    steps = tl.div_rn(x - low.to(tl.float32)[:, :, None], scale[:, :, None])
    steps = tl.minimum(tl.maximum(steps, 0.0), 255.0)
    # At 1.5 * 2 ** 23 the last bit of a number is worth 1: added to that, steps are rounded, half to even.
    codes = (steps + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)
    # Lines begin at multiples of 8 bytes, which Triton cannot know of a number.
    lines = tl.multiple_of(target.to(tl.pointer_type(tl.uint8)), 8) + line * LINE
    tl.store(lines[:, None, None] + d[None, :, :], codes, wanted)
    first = scale.to(HALF).to(tl.uint16, bitcast=True).to(tl.uint32)
    second = low.to(tl.uint16, bitcast=True).to(tl.uint32)
    numbers = tl.multiple_of((target + SIZE).to(tl.pointer_type(tl.uint32)), 8) + line * (LINE // 4)
    tl.store(numbers[:, None] + g[None, :], first | (second << 16), real[:, None] & whole[None, :])


@triton.jit
def _coded_append_kernel(
    keys, values, table, tokens, kv_heads,
    sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    KEY_LINE: tl.constexpr, VALUE_LINE: tl.constexpr, KEY_HALF: tl.constexpr, VALUE_HALF: tl.constexpr,
    KEY_TINY: tl.constexpr, VALUE_TINY: tl.constexpr,
    KEY_GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    pdl.in_turn(EARLY)
    segment = tl.program_id(0)
    row, head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    length, capacity = tl.load(table + segment * 4 + 2), tl.load(table + segment * 4 + 3)
    key_out, value_out = tl.load(table + segment * 4), tl.load(table + segment * 4 + 1)
    # A segment without room, of a row that is finished, takes nothing.
    taken = tl.where(capacity > 0, tokens, 0)
    for start in range(0, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        real = t < taken
        line = (length + t) % tl.maximum(capacity, 1)
        source = t.to(tl.int64)
        _encode(
            keys + row * sk_b + head * sk_h, sk_n, source, key_out, line, real,
            HEAD, KEY_GROUP, KEY_LINE, KEY_HALF, KEY_TINY, KEY_GROUPS, BLOCK_K,
        )  # fmt: skip
        _encode(
            values + row * sv_b + head * sv_h, sv_n, source, value_out, line, real,
            VALUE, VALUE_GROUP, VALUE_LINE, VALUE_HALF, VALUE_TINY, VALUE_GROUPS, BLOCK_V,
        )  # fmt: skip
    # All threads have read the length before any of them gets here.
    tl.debug_barrier()
    tl.store(table + segment * 4 + 2, length + taken)


@triton.jit
def _coded_gather_kernel(
    keys, values, table, spans, end, kv_heads,
    sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    KEY_LINE: tl.constexpr, VALUE_LINE: tl.constexpr, KEY_HALF: tl.constexpr, VALUE_HALF: tl.constexpr,
    KEY_TINY: tl.constexpr, VALUE_TINY: tl.constexpr,
    KEY_GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    row, head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    length = tl.load(table + segment * 4 + 2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T < length:
        real, line = t < length, t.to(tl.int64)
        source = _chosen(spans, segment, t, length, end)
        _encode(
            keys + row * sk_b + head * sk_h, sk_n, source, tl.load(table + segment * 4), line, real,
            HEAD, KEY_GROUP, KEY_LINE, KEY_HALF, KEY_TINY, KEY_GROUPS, BLOCK_K,
        )  # fmt: skip
        _encode(
            values + row * sv_b + head * sv_h, sv_n, source, tl.load(table + segment * 4 + 1), line, real,
            VALUE, VALUE_GROUP, VALUE_LINE, VALUE_HALF, VALUE_TINY, VALUE_GROUPS, BLOCK_V,
        )  # fmt: skip


@on_its_device
def launch_coded_append(keys: Tensor, values: Tensor, table: Tensor, form: Format) -> None:
    """Put ``[B, H_kv, q, D]`` new entries behind each segment's last one."""
    check_entries(keys, values, table, form)
    keys, values = elements_first(keys), elements_first(values)
    block, warps = (1, 1) if keys.shape[2] == 1 else (16, 4)
    _coded_append_kernel[(table.shape[0],)](
        keys, values, table, keys.shape[2], keys.shape[1], *keys.stride()[:3], *values.stride()[:3],
        **sizes_of(form), BLOCK_T=block, num_warps=warps,
        **pdl.options(keys.shape[0] * keys.shape[2], keys),
    )  # fmt: skip


@on_its_device
def launch_coded_gather(
    keys: Tensor, values: Tensor, table: Tensor, spans: Tensor, end: int, longest: int, form: Format
) -> None:
    """Fill segments from dense ``[B, H_kv, n, D]``; parameters as in `kernels.gather`."""
    check_entries(keys, values, table, form)
    check_spans(spans, table, end, keys.shape[2])
    keys, values = elements_first(keys), elements_first(values)
    block = 32
    _coded_gather_kernel[(triton.cdiv(max(longest, 1), block), table.shape[0])](
        keys, values, table, spans, end, keys.shape[1], *keys.stride()[:3], *values.stride()[:3],
        **sizes_of(form), BLOCK_T=block, num_warps=4,
    )  # fmt: skip


def sizes_of(form: Format) -> dict[str, Any]:
    """What kernels are told of lines."""
    assert form.groups is not None
    found: dict[str, Any] = {"HEAD": form.sizes[0], "VALUE": form.sizes[1]}
    names = (("KEY", "K"), ("VALUE", "V"))
    for (name, short), size, half, group in zip(names, form.sizes, form.types, form.groups, strict=True):
        found |= {f"{name}_HALF": TYPES[half], f"{name}_TINY": torch.finfo(half).tiny}
        found |= {f"{name}_GROUP": group, f"{name}_LINE": line_bytes(size, group)}
        found |= {f"{name}_GROUPS": triton.next_power_of_2(size // group)}
        found |= {f"BLOCK_{short}": triton.next_power_of_2(group)}
    return found
