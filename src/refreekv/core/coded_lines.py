"""int8 entries as lines of bytes: the codes, behind them each group's scale and lowest value, all in one place.

This is what kernels decode in place: each group of an entry's elements on a grid of 256 steps from its
lowest value to its highest, neither centred nor rotated as `refreekv.core.quantisation` has it elsewhere.

What moves entries moves lines and knows nothing else of them. A line is ``D`` bytes of codes, then for each
group two numbers of 16 bits, and ends at a multiple of 8 bytes, which is what is copied at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv.core.quantisation import KVDtype

MOST_GROUPS = 8
"""Of an entry: kernels hold a partial result for each."""
LEVELS = 255
"""Steps of a code."""


def line_bytes(size: int, group: int) -> int:
    """Bytes of a line of ``size`` elements, ``group`` of which share a scale."""
    return -(-(size + 4 * (size // group)) // 8) * 8


def fits(number: KVDtype | None, size: int) -> bool:
    """Whether entries of ``size`` elements in a number format can be such lines, coded as they are written."""
    if number is None or number.kind != "int8" or number.recent:
        return False
    return size % 8 == 0 and size // number.group_size(size) <= MOST_GROUPS


def to_lines(entries: Tensor, group: int, half: torch.dtype | None = None) -> Tensor:
    """Entries ``[n, D]``, encoded with numbers in ``half`` (None: `half_of` theirs): ``[n, line_bytes]``, uint8."""
    count, size = entries.shape
    half = half_of(entries.dtype) if half is None else half
    groups = entries.float().view(count, size // group, group)
    low = groups.amin(-1, keepdim=True).to(half)
    # The scales are rounded first, none of them to zero, and the codes computed for the rounded ones.
    scale = (groups.amax(-1, keepdim=True) - low.float()) / LEVELS
    scale = scale.to(half).clamp_min(torch.finfo(half).tiny)
    steps = ((groups - low.float()) / scale.float()).round_().clamp_(0, LEVELS)
    numbers = torch.cat([scale, low], dim=-1).flatten(1).view(torch.uint8)
    lines: Tensor = numbers.new_zeros(count, line_bytes(size, group))
    lines[:, :size] = steps.view(count, size)
    lines[:, size : size + numbers.shape[1]] = numbers
    return lines


def from_lines(lines: Tensor, size: int, group: int, half: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Entries ``[..., D]`` in ``dtype``, of lines ``[..., line_bytes]`` whose numbers are in ``half``."""
    flat = lines.reshape(-1, lines.shape[-1])
    numbers = flat[:, size : size + 4 * (size // group)].contiguous().view(half).unflatten(1, (-1, 2))
    groups = flat[:, :size].reshape(len(flat), size // group, group).to(torch.float32)
    entries: Tensor = groups * numbers[..., :1] + numbers[..., 1:]
    return entries.to(dtype).view(*lines.shape[:-1], size)


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The type of the scales of entries in ``dtype``."""
    return dtype if dtype.itemsize == 2 else torch.float16


@dataclass(frozen=True)
class Coding:
    """What the lines of a layer's keys and values stand for.

    Attributes
    ----------
    sizes : (int, int)
        Elements of a key and of a value.
    groups : (int, int)
        How many of them share a scale.
    halves : (torch.dtype, torch.dtype)
        Types of the scales.
    types : (torch.dtype, torch.dtype)
        Of the keys and the values that come back.
    """

    sizes: tuple[int, int]
    groups: tuple[int, int]
    halves: tuple[torch.dtype, torch.dtype]
    types: tuple[torch.dtype, torch.dtype]

    @classmethod
    def of(cls, number: KVDtype, keys: Tensor, values: Tensor) -> "Coding":
        """How a number format codes keys and values like these."""
        sizes, types = (keys.shape[-1], values.shape[-1]), (keys.dtype, values.dtype)
        groups = number.group_size(sizes[0]), number.group_size(sizes[1])
        return cls(sizes, groups, (half_of(types[0]), half_of(types[1])), types)

    def no_lines(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Storages of keys and of values without lines."""
        key, value = (line_bytes(*pair) for pair in zip(self.sizes, self.groups, strict=True))
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        return empty.view(0, key), empty.view(0, value)

    def keys(self, lines: Tensor) -> Tensor:
        """The keys ``[..., D]`` that lines stand for: a copy."""
        return from_lines(lines, self.sizes[0], self.groups[0], self.halves[0], self.types[0])

    def values(self, lines: Tensor) -> Tensor:
        """The values ``[..., Dv]`` that lines stand for: a copy."""
        return from_lines(lines, self.sizes[1], self.groups[1], self.halves[1], self.types[1])
