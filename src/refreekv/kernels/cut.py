"""The Uni-Metric's cut of the position ranking, in three launches instead of two dozen.

Tests compare it with `core.selection.uni_metric_cut`. Sums and norms are float64, as there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.kernels.device_guard import on_its_device

CHUNK = 128
HEADS = 16
"""Heads that are looked at together."""


@triton.jit
def _squares(rows, head, heads, n, start, stop, length):
    """``[HEADS, n]`` squares of the entries from ``start`` to ``stop``; zeros elsewhere."""
    inside = (head < heads)[:, None] & ((n >= start) & (n < stop))[None, :]
    value = tl.load(rows + head.to(tl.int64)[:, None] * length + n[None, :], inside, 0.0).to(tl.float64)
    return value * value


@triton.jit
def _norms_of_ends(
    sums, rows, heads, length, first, chunks,
    INCLUDES_SINKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Mean norms of all that is ranked, and of nothing that is: what counts in any case is in both."""
    part, sink = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    full, none = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        here = (head < heads)[:, None] & (part < chunks)[None, :]
        held = tl.sum(tl.load(sums + head[:, None] * chunks + part[None, :], here, 0.0), 1)
        if INCLUDES_SINKS:
            base = tl.sum(_squares(rows, head, heads, sink, 0, first, length), 1)
            none += tl.sum(tl.sqrt(base), 0)
            held += base
        full += tl.sum(tl.sqrt(held), 0)
    return full / heads, none / heads


@triton.jit
def _sums_kernel(rows, sums, heads, length, first, CHUNK: tl.constexpr, HEADS: tl.constexpr):
    """``sums[b, h, chunk]``: squares of the chunk's entries that are ranked."""
    chunk, chunks, batch = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    head, n = tl.program_id(1) * HEADS + tl.arange(0, HEADS), chunk * CHUNK + tl.arange(0, CHUNK)
    held = tl.sum(_squares(rows + batch * heads * length, head, heads, n, first, length, length), 1)
    tl.store(sums + (batch * heads + head) * chunks + chunk, held, head < heads)


@triton.jit
def _norms_kernel(
    rows, sums, norms, heads, length, first,
    INCLUDES_SINKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """``norms[b, i]``: mean over heads of the norm of what is kept if the cut is at ``i``."""
    chunk, chunks, batch = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    rows += batch * heads * length
    sums += batch * heads * chunks
    n, part, sink = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    norm = tl.zeros([CHUNK], tl.float64)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        here = (head < heads)[:, None] & ((part > chunk) & (part < chunks))[None, :]
        after = tl.sum(tl.load(sums + head[:, None] * chunks + part[None, :], here, 0.0), 1)
        if INCLUDES_SINKS:
            after += tl.sum(_squares(rows, head, heads, sink, 0, first, length), 1)
        kept = tl.cumsum(_squares(rows, head, heads, n, first, length, length), 1, reverse=True)
        norm += tl.sum(tl.sqrt(kept + after[:, None]), 0)
    tl.store(norms + batch * length + n, norm / heads, n < length)


@triton.jit
def _cut_kernel(
    rows, sums, norms, cut_out, loss_out, heads, length, first, chunks, share,
    INCLUDES_SINKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    norms += batch * length
    full, none = _norms_of_ends(
        sums + batch * heads * chunks, rows + batch * heads * length, heads, length, first, chunks,
        INCLUDES_SINKS, BLOCK_C, BLOCK_S, HEADS,
    )  # fmt: skip
    # What is kept is as long as it does not pass this; what is no number passes nothing.
    enough = full * tl.load(share)
    short = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ranked = (n >= first) & (n < length)
        short += (ranked & ((tl.load(norms + n, ranked, 0.0) > enough) == 0)).to(tl.int32)
    kept = tl.minimum(tl.sum(short, 0) + ((none > enough) == 0).to(tl.int32), length - first)
    norm = tl.where(kept == 0, none, tl.load(norms + tl.minimum(length - kept, length - 1)))
    loss = 1.0 - norm / full
    tl.store(cut_out + batch, (length - kept).to(tl.int64))
    tl.store(loss_out + batch, tl.where(loss == loss, loss, 0.0))


@on_its_device
def launch_cut(rows: Tensor, sinks: int, threshold: float, includes_sinks: bool) -> tuple[Tensor, Tensor]:
    """`core.selection.uni_metric_cut` of rows without padding, and a threshold above 0."""
    batch, heads, length = rows.shape
    rows, first = rows.contiguous(), min(sinks, length)
    chunks, device = triton.cdiv(length, CHUNK), rows.device
    sums = torch.empty(batch, heads, chunks, dtype=torch.float64, device=device)
    norms = torch.empty(batch, length, dtype=torch.float64, device=device)
    cut = torch.empty(batch, dtype=torch.int64, device=device)
    loss = torch.empty(batch, dtype=torch.float64, device=device)
    # Strictly above a limit that is lower by a rounding, as in `core.selection`. A tensor, as numbers are float32.
    share = torch.full((1,), (1.0 - threshold) * (1.0 - 1e-12), dtype=torch.float64, device=device)
    blocks = {"BLOCK_C": triton.next_power_of_2(chunks), "BLOCK_S": triton.next_power_of_2(max(first, 1))}
    _sums_kernel[(chunks, triton.cdiv(heads, HEADS), batch)](rows, sums, heads, length, first, CHUNK=CHUNK, HEADS=HEADS)
    _norms_kernel[(chunks, batch)](
        rows, sums, norms, heads, length, first, INCLUDES_SINKS=includes_sinks, CHUNK=CHUNK, HEADS=HEADS, **blocks
    )
    _cut_kernel[(batch,)](
        rows, sums, norms, cut, loss, heads, length, first, chunks, share,
        INCLUDES_SINKS=includes_sinks, BLOCK=1024, HEADS=HEADS, num_warps=8, **blocks,
    )  # fmt: skip
    return cut, loss
