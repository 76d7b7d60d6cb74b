"""The table that tells kernels where an arena's segments are.

``[segments, 4]`` int64, a line for each (row, KV head), row by row: address of the first key,
address of the first value, entries written so far, entries there is room for. Addresses, not
offsets: a CUDA graph that reads the table serves any storage, also after that has moved.

A segment that was written more entries than it has room for is a ring, as sliding-window layers
need: entry ``i`` is in line ``i % capacity``, and the last ``capacity`` entries are there. One
without room takes nothing.
"""

import ctypes

import torch
from torch import Tensor

KEY, VALUE, LENGTH, CAPACITY = range(4)


def entries(table: Tensor, segment: int, sizes: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys ``[capacity, D]`` and values ``[capacity, Dv]`` of one segment in host memory, as views."""
    line: list[int] = table[segment].tolist()
    return (
        _view(line[KEY], line[CAPACITY], sizes[0], dtype),
        _view(line[VALUE], line[CAPACITY], sizes[1], dtype),
    )


def _view(address: int, lines: int, size: int, dtype: torch.dtype) -> Tensor:
    if lines == 0:
        return torch.empty(0, size, dtype=dtype)
    buffer = (ctypes.c_byte * (lines * size * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(lines, size)
