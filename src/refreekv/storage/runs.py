"""Index tensors of many runs, made without a loop on the host and without waiting for the device."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor


def spread(numbers: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """Each number so many times: int64 ``[sum of counts]``."""
    both, pinned = [list(numbers), list(counts)], device.type == "cuda"
    pair = torch.tensor(both, dtype=torch.int64, device="cpu", pin_memory=pinned)
    number, count = pair.to(device, non_blocking=True).unbind()
    return torch.repeat_interleave(number, count, output_size=sum(counts))


def runs(starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """The numbers ``starts[i] .. starts[i] + counts[i] - 1``, one run after the other: int64 ``[sum of counts]``."""
    shifts = [start - before for start, before in zip(starts, starts_of(counts), strict=True)]
    return spread(shifts, counts, device) + torch.arange(sum(counts), device=device)


def starts_of(counts: Sequence[int]) -> list[int]:
    """Where each of several parts begins that lie one after the other."""
    return [0, *accumulate(counts)][:-1] if counts else []


def flat(rows: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of all rows, one row after the other."""
    return [number for row in rows for number in row]


def each(function: Callable[..., int], *counts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """A function of the numbers that several lists have for each row's KV heads."""
    return [tuple(map(function, *rows)) for rows in zip(*counts, strict=True)]
