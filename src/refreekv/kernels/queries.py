"""Which of a prompt's queries a policy asks, in Triton: a launch in the place of some twenty of a few numbers each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels.device_guard import on_its_device

BLOCK = 1024


@triton.jit
def _wanted(n, ordinals, real, length, seen, step, rows, HAS_REAL: tl.constexpr, HAS_SPREAD: tl.constexpr):
    """Whether each of these queries is asked."""
    ordinal = tl.load(ordinals + n, n < length, -1)
    wanted = ordinal >= seen - rows
    if HAS_SPREAD:
        wanted = wanted | ((ordinal + 1) % step == 0)
    if HAS_REAL:
        wanted = wanted & (tl.load(real + n, n < length, 0) != 0)
    return wanted & (n < length)


@triton.jit(
    do_not_specialize=["length", "count", "rows", "spread", "step_c", "step_o", "step_r"],
    do_not_specialize_on_alignment=["columns", "ordinals", "real"],  # of a turn, from any place on
)
def _asked_kernel(
    columns, ordinals, real, index_out, columns_out, ordinals_out, real_out, length, count, rows, spread,
    step_c, step_o, step_r, HAS_REAL: tl.constexpr, HAS_SPREAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns += row * step_c
    ordinals += row * step_o
    real += row * step_r
    seen = tl.load(ordinals + length - 1) + 1
    step = seen * 0 + 1
    if HAS_SPREAD:
        for _ in range(32):
            step = tl.where(seen // step > spread, step * 2, step)
    place = tl.arange(0, BLOCK)
    total = tl.sum(place * 0, 0)
    for start in range(0, length, BLOCK):
        wanted = _wanted(start + place, ordinals, real, length, seen, step, rows, HAS_REAL, HAS_SPREAD)
        total += tl.sum(wanted.to(tl.int32), 0)
    # Those that are asked come last, and before them as many of the others as there is room for: places of the first
    # of either, below 0 where some are left out.
    room = tl.maximum(count - total, 0)
    others, asked = room - (length - total), count - total
    for start in range(0, length, BLOCK):
        n = start + place
        wanted = _wanted(n, ordinals, real, length, seen, step, rows, HAS_REAL, HAS_SPREAD)
        other = (wanted == 0) & (n < length)
        before = tl.where(wanted, asked + tl.cumsum(wanted.to(tl.int32), 0), others + tl.cumsum(other.to(tl.int32), 0))
        to = before - 1
        there = (n < length) & (to >= 0)
        to += row * count
        tl.store(index_out + to, n.to(tl.int64), there)
        tl.store(columns_out + to, tl.load(columns + n, there, 0), there)
        tl.store(ordinals_out + to, tl.load(ordinals + n, there, 0), there)
        tl.store(real_out + to, wanted.to(tl.uint8), there)
        asked += tl.sum(wanted.to(tl.int32), 0)
        others += tl.sum(other.to(tl.int32), 0)


@on_its_device
def launch_asked(
    columns: Tensor, ordinals: Tensor, real: Tensor | None, rows: int, spread: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.asked`."""
    columns, ordinals = columns.long().contiguous(), ordinals.long().contiguous()
    shown = ordinals if real is None else real.contiguous().view(torch.uint8)
    length = columns.shape[1]
    count = min(count, length)
    batch = max(len(columns), len(ordinals), len(shown))
    index, own_columns, own_ordinals = columns.new_empty(3, batch, count).unbind()
    wanted = torch.empty(batch, count, dtype=torch.bool, device=columns.device)
    steps = [length if len(part) > 1 else 0 for part in (columns, ordinals, shown)]
    _asked_kernel[(batch,)](
        columns, ordinals, shown, index, own_columns, own_ordinals, wanted.view(torch.uint8), length, count, rows,
        spread, *steps, HAS_REAL=real is not None, HAS_SPREAD=spread > 0, BLOCK=BLOCK,
    )  # fmt: skip
    return index, own_columns, own_ordinals, wanted
