"""int8 entries as lines of bytes: the codes, behind them each group's scale and lowest value, all in one place.

What moves entries moves lines and knows nothing else of them. A line is ``D`` bytes of codes, then for each
group two numbers of 16 bits, and ends at a multiple of 8 bytes, which is what is copied at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv.core.quantisation import Codes, KVDtype

MOST_GROUPS = 8
"""Of an entry: kernels hold a partial result for each."""


def line_bytes(size: int, group: int) -> int:
    """Bytes of a line of ``size`` elements, ``group`` of which share a scale."""
    return -(-(size + 4 * (size // group)) // 8) * 8


def fits(number: KVDtype | None, size: int) -> bool:
    """Whether entries of ``size`` elements in a number format can be such lines, coded as they are written."""
    if number is None or number.kind != "int8" or number.recent:
        return False
    return size % 8 == 0 and size // number.group_size(size) <= MOST_GROUPS


def to_lines(entries: Tensor, group: int) -> Tensor:
    """Entries ``[n, D]``, encoded: ``[n, line_bytes]``, uint8."""
    codes = KVDtype("int8", group=group).encode(entries)
    assert codes.low is not None
    numbers = torch.stack([codes.scale, codes.low], dim=-1).flatten(1).view(torch.uint8)
    spare = line_bytes(entries.shape[1], group) - codes.payload.shape[1] - numbers.shape[1]
    return torch.nn.functional.pad(torch.cat([codes.payload, numbers], dim=1), (0, spare))


def from_lines(lines: Tensor, size: int, group: int, half: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Entries ``[..., D]`` in ``dtype``, of lines ``[..., line_bytes]`` whose numbers are in ``half``."""
    flat = lines.reshape(-1, lines.shape[-1])
    numbers = flat[:, size : size + 4 * (size // group)].contiguous().view(half).unflatten(1, (-1, 2))
    codes = Codes(flat[:, :size], numbers[..., 0], numbers[..., 1], size, dtype)
    return codes.decode().view(*lines.shape[:-1], size)


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The type of the scales of entries in ``dtype``, as `KVDtype.encode` has it."""
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
    dtype : torch.dtype
        Of the entries before and after.
    """

    sizes: tuple[int, int]
    groups: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, number: KVDtype, keys: Tensor, values: Tensor) -> "Coding":
        """How a number format codes keys and values like these."""
        sizes = keys.shape[-1], values.shape[-1]
        return cls(sizes, (number.group_size(sizes[0]), number.group_size(sizes[1])), keys.dtype)

    def no_lines(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Storages of keys and of values without lines."""
        key, value = (line_bytes(*pair) for pair in zip(self.sizes, self.groups, strict=True))
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        return empty.view(0, key), empty.view(0, value)

    def keys(self, lines: Tensor) -> Tensor:
        """The keys ``[..., D]`` that lines stand for: a copy."""
        return from_lines(lines, self.sizes[0], self.groups[0], half_of(self.dtype), self.dtype)

    def values(self, lines: Tensor) -> Tensor:
        """The values ``[..., Dv]`` that lines stand for: a copy."""
        return from_lines(lines, self.sizes[1], self.groups[1], half_of(self.dtype), self.dtype)
