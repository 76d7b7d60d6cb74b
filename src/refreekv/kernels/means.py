"""Mean entries, in Triton: what is taken out of a head's entries before they are coded, of keys and values at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.quantisation import SINKS
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.sizes import blocks_of, power_of_2
from refreekv.kernels.storage import elements_first

CHUNK, BLOCK, WARPS = 256, 64, 4
"""Entries of a program, entries that it adds up at a time, and its warps."""
CHUNKS = 32
"""Sums of chunks that are added up at a time."""
MAPPED = 32
"""Channels of a mean that a program takes to code space."""


@triton.jit
def _add(entries, out, first, stop, step, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of entries from the first one on."""
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(first, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        at = entries + n.to(tl.int64)[:, None] * step + d[None, :]
        total += tl.load(at, (n < stop)[:, None] & (d < SIZE)[None, :], 0.0).to(tl.float32)
    tl.store(out + d, tl.sum(total, 0), d < SIZE)


@triton.jit(do_not_specialize=["length", "first", "kv_heads"])
def _sums_of_entries_kernel(
    keys, values, sums, length, first, kv_heads, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    HEAD: tl.constexpr, VALUE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``sums[b, h, chunk]``: of a chunk's keys, and behind them of its values."""
    chunk, segment = tl.program_id(0), tl.program_id(1)
    row, head = (segment // kv_heads).to(tl.int64), segment % kv_heads
    out = sums + (segment.to(tl.int64) * tl.num_programs(0) + chunk) * (HEAD + VALUE)
    start = first + chunk * CHUNK
    stop = tl.minimum(start + CHUNK, length)
    if tl.program_id(2) == 0:
        _add(keys + row * sk_b + head * sk_h, out, start, stop, sk_n, HEAD, BLOCK_D, BLOCK)
    else:
        _add(values + row * sv_b + head * sv_h, out + HEAD, start, stop, sv_n, VALUE, BLOCK_V, BLOCK)


@triton.jit(do_not_specialize=["chunks", "count"])
def _means_of_entries_kernel(
    sums, key_mean, value_mean, chunks, count, HEAD: tl.constexpr, VALUE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of all chunks over the number of entries."""
    segment, d, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
    sums += segment * chunks * (HEAD + VALUE)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, chunks, BLOCK):
        chunk = start + part
        at = sums + chunk[:, None] * (HEAD + VALUE) + d[None, :]
        total += tl.load(at, (chunk < chunks)[:, None] & (d < HEAD + VALUE)[None, :], 0.0)
    mean = tl.div_rn(tl.sum(total, 0), count.to(tl.float32) + tl.zeros([BLOCK_D], tl.float32))
    tl.store(key_mean + segment * HEAD + d, mean.to(key_mean.dtype.element_ty), d < HEAD)
    at = value_mean + segment * VALUE + d - HEAD
    tl.store(at, mean.to(value_mean.dtype.element_ty), (d >= HEAD) & (d < HEAD + VALUE))


@triton.jit
def _mapped(mean, matrix, wide, offset, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """A mean in float32, by the first program, and some of its channels in code space."""
    d, start = tl.arange(0, BLOCK_D), tl.program_id(2) * BLOCK
    own = tl.load(mean + d, d < SIZE, 0.0).to(tl.float32)
    tl.store(wide + d, own, d < tl.where(start == 0, SIZE, 0))
    channel = start + tl.arange(0, BLOCK)
    there = (channel < SIZE)[:, None] & (d < SIZE)[None, :]
    part = tl.load(matrix + channel[:, None] * SIZE + d[None, :], there, 0.0)
    tl.store(offset + channel, tl.sum(part * own[None, :], 1), channel < SIZE)


@triton.jit(do_not_specialize=["kv_heads"])
def _mapped_means_kernel(
    key_mean, value_mean, key_matrix, value_matrix, key_wide, value_wide, key_offset, value_offset, kv_heads,
    HEAD: tl.constexpr, VALUE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    head = segment % kv_heads
    at, to = head * HEAD * HEAD, segment * HEAD
    if tl.program_id(1) == 0:
        _mapped(key_mean + to, key_matrix + at, key_wide + to, key_offset + to, HEAD, BLOCK_D, BLOCK)
    else:
        at, to = head * VALUE * VALUE, segment * VALUE
        _mapped(value_mean + to, value_matrix + at, value_wide + to, value_offset + to, VALUE, BLOCK_V, BLOCK)


@on_its_device
def launch_mapped_means(means: tuple[Tensor, Tensor], matrices: tuple[Tensor, Tensor]) -> list[Tensor]:
    """`reference.mapped_means`."""
    means, matrices = (
        (means[0].contiguous(), means[1].contiguous()),
        (matrices[0].contiguous(), matrices[1].contiguous()),
    )
    (batch, heads, size), value_size = means[0].shape, means[1].shape[-1]
    made = [torch.empty(mean.shape, dtype=torch.float32, device=mean.device) for mean in (*means, *means)]
    _mapped_means_kernel[(batch * heads, 2, blocks_of(max(size, value_size), MAPPED))](
        *means, *matrices, *made, heads, HEAD=size, VALUE=value_size, BLOCK_D=power_of_2(size),
        BLOCK_V=power_of_2(value_size), BLOCK=MAPPED,
    )  # fmt: skip
    return made


@on_its_device
def launch_centres(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`core.quantisation.centre_of` of keys and of values ``[B, H_kv, n, D]`` without padding."""
    keys, values = elements_first(keys), elements_first(values)
    (batch, heads, length, size), value_size = keys.shape, values.shape[-1]
    first = SINKS if length > SINKS else 0
    chunks = blocks_of(length - first, CHUNK)
    sums = torch.empty(batch * heads, chunks, size + value_size, dtype=torch.float32, device=keys.device)
    means = keys.new_empty(batch, heads, size), values.new_empty(batch, heads, value_size)
    sizes = {"HEAD": size, "VALUE": value_size}
    _sums_of_entries_kernel[(chunks, batch * heads, 2)](
        keys, values, sums, length, first, heads, *keys.stride()[:3], *values.stride()[:3], **sizes,
        BLOCK_D=power_of_2(size), BLOCK_V=power_of_2(value_size), CHUNK=CHUNK, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    _means_of_entries_kernel[(batch * heads,)](
        sums, *means, chunks, length - first, **sizes, BLOCK_D=power_of_2(size + value_size), BLOCK=CHUNKS,
    )  # fmt: skip
    return means
