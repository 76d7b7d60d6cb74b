"""Index tensors of many runs, made without a loop on the host and without waiting for the device."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from refreekv.kernels.device_guard import stream_of

SHARED = 2**17
"""Numbers up to which they are kept for the next one who asks."""


def spread(numbers: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """Each number so many times: int64 ``[sum of counts]``."""
    both, pinned = [list(numbers), list(counts)], device.type == "cuda"
    pair = torch.tensor(both, dtype=torch.int64, device="cpu", pin_memory=pinned)
    number, count = pair.to(device, non_blocking=True).unbind()
    return torch.repeat_interleave(number, count, output_size=sum(counts))


def sent(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers on a device; the host does not wait for it, as they are in pinned memory."""
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=device.type == "cuda").to(
        device, non_blocking=True
    )


def runs(starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """The numbers ``starts[i] .. starts[i] + counts[i] - 1``, one run after the other: int64 ``[sum of counts]``."""
    shifts = [start - before for start, before in zip(starts, starts_of(counts), strict=True)]
    return spread(shifts, counts, device) + numbers(0, sum(counts), device)


def numbers(start: int, stop: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers from ``start`` to ``stop - 1``, not to be written to: they are shared, and need no launch."""
    if stop > SHARED or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.arange(start, stop, dtype=dtype, device=device)
    return _first_numbers(max(1024, 1 << (stop - 1).bit_length()), device, dtype, stream_of(device))[start:stop]


@lru_cache(maxsize=16)
def _first_numbers(count: int, device: torch.device, dtype: torch.dtype, stream: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count, device=device).to(dtype)


def starts_of(counts: Sequence[int]) -> list[int]:
    """Where each of several parts begins that lie one after the other."""
    return [0, *accumulate(counts)][:-1] if counts else []


def flat(rows: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of all rows, one row after the other."""
    return [number for row in rows for number in row]


def each(function: Callable[..., int], *counts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """A function of the numbers that several lists have for each row's KV heads."""
    return [tuple(map(function, *rows)) for rows in zip(*counts, strict=True)]
