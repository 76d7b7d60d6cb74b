"""The table that tells kernels where an arena's segments are.

``[segments, 4]`` int64, a line for each (row, KV head), row by row: address of the first key,
address of the first value, entries written so far, entries it can hold. Addresses, not
offsets: a CUDA graph that reads the table serves any storage, also after that has moved.

Entry ``i`` is in line ``i``. What a segment has no capacity for it does not take.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KEY, VALUE, LENGTH, CAPACITY = range(4)


class Format(NamedTuple):
    """What entries behind a table are, which its addresses do not say. Keys and values have a type each.

    Attributes
    ----------
    sizes : (int, int)
        Elements of a key and of a value.
    key_type, value_type : torch.dtype
        Types of keys and of values as they are stored.
    """

    sizes: tuple[int, int]
    key_type: torch.dtype
    value_type: torch.dtype

    @property
    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Types of keys and of values."""
        return self.key_type, self.value_type

    def __str__(self) -> str:
        parts = (f"{kind} of {size}" for kind, size in zip(map(_short, self.types), self.sizes, strict=True))
        return " and ".join(parts)


def check_table(table: Tensor, like: Tensor | None = None) -> None:
    """Raise ValueError unless this is a table, on the device of ``like``.

    What kernels do with addresses nobody can check any more.
    """
    if table.dim() != 2 or table.shape[1] != 4 or table.dtype != torch.int64 or not table.is_contiguous():
        raise ValueError(
            f"a table of segments is contiguous int64 [segments, 4], got {_short(table.dtype)} {list(table.shape)}"
        )
    if like is not None and table.device != like.device:
        raise ValueError(f"the table is on {table.device} and what goes with it on {like.device}")


def check_entries(keys: Tensor, values: Tensor, table: Tensor, form: Format) -> None:
    """Check entries ``[B, H_kv, q, D]`` that are to be written where a table says.

    Raises
    ------
    ValueError
        Shapes or devices that do not go with each other, the table or its format.
    TypeError
        A type that the segments' own does not hold exactly.
    """
    check_table(table, keys)
    shape = keys.shape
    if len(shape) != 4 or values.dim() != 4 or values.shape[:3] != shape[:3] or values.device != keys.device:
        raise ValueError(
            f"keys {list(shape)} on {keys.device} and values {list(values.shape)} on {values.device} do not go "
            "together: expected [B, H_kv, q, D] and [B, H_kv, q, Dv] on one device"
        )
    if shape[0] * shape[1] != table.shape[0]:
        raise ValueError(f"{shape[0]} rows of {shape[1]} KV heads for a table of {table.shape[0]} segments")
    if (shape[3], values.shape[3]) != tuple(form.sizes):
        raise ValueError(f"keys of {shape[3]} and values of {values.shape[3]} elements; the segments hold {form}")
    _check_format(form)
    for part, stored in zip((keys, values), form.types, strict=True):
        if not part.is_floating_point() or torch.promote_types(part.dtype, stored) != stored:
            raise TypeError(
                f"{_short(keys.dtype)} keys and {_short(values.dtype)} values cannot be written to segments that "
                f"hold {form}: the storage has to be widened first"
            )


def check_query(query: Tensor, table: Tensor, form: Format, sinks: Tensor | None) -> None:
    """Check queries ``[B, H, 1, D]`` that are to attend to where a table says; ValueError or TypeError."""
    check_table(table, query)
    shape = query.shape
    if len(shape) != 4 or shape[2] != 1 or shape[3] != form.sizes[0]:
        raise ValueError(f"expected queries [B, H, 1, {form.sizes[0]}] for segments of {form}, got {list(shape)}")
    segments = table.shape[0]
    if not shape[0] or not segments or segments % shape[0] or shape[1] % (segments // shape[0]):
        raise ValueError(f"{shape[0]} rows of {shape[1]} query heads cannot share {segments} segments evenly")
    if not query.is_floating_point():
        raise TypeError(f"expected queries of a floating-point type, got {_short(query.dtype)}")
    if sinks is not None and (sinks.shape != shape[1:2] or sinks.device != query.device):
        raise ValueError(f"expected a sink logit for each of {shape[1]} query heads, got {list(sinks.shape)}")
    _check_format(form)


def check_spans(spans: Tensor, table: Tensor, end: int, entries: int) -> None:
    """Check ``spans`` and ``end`` of `kernels.gather` for dense keys of ``entries``; ValueError."""
    if spans.shape != (table.shape[0], 3) or spans.dtype != torch.int64 or not spans.is_contiguous():
        raise ValueError(f"spans are contiguous int64 [{table.shape[0]}, 3], got {spans.dtype} {list(spans.shape)}")
    if spans.device != table.device:
        raise ValueError(f"spans on {spans.device} for a table on {table.device}")
    if not 0 <= end <= entries:
        raise ValueError(f"the prompt's end {end} is not among {entries} entries")


def check_move(source: Tensor, target: Tensor, key_bytes: int, value_bytes: int) -> None:
    """Check what `kernels.move` is given; ValueError."""
    check_table(source)
    check_table(target, source)
    if source.shape != target.shape:
        raise ValueError(f"{source.shape[0]} segments cannot be moved to {target.shape[0]}")
    _check_bytes(key_bytes, value_bytes)


def check_take_out(table: Tensor, told: Tensor, key_bytes: int, value_bytes: int) -> None:
    """Check what `kernels.take_out` is given; ValueError."""
    check_table(table, told)
    if told.shape != (2, table.shape[0]) or told.dtype != torch.int64 or not told.is_contiguous():
        raise ValueError(
            f"what is taken out is told in contiguous int64 [2, {table.shape[0]}], got {told.dtype} {list(told.shape)}"
        )
    _check_bytes(key_bytes, value_bytes)


def _check_bytes(key_bytes: int, value_bytes: int) -> None:
    if key_bytes % 4 or value_bytes % 4:
        raise ValueError(
            f"entries are moved 4 or 8 bytes at a time; got keys of {key_bytes} and values of {value_bytes}"
        )


def _check_format(form: Format) -> None:
    for size, kind in zip(form.sizes, form.types, strict=True):
        if not kind.is_floating_point or size < 1:
            raise TypeError(f"segments hold floating-point keys and values, got {form}")


def _short(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def entries(table: Tensor, segment: int, sizes: Sequence[int], types: Sequence[torch.dtype]) -> tuple[Tensor, Tensor]:
    """Keys ``[capacity, D]`` and values ``[capacity, Dv]`` of one segment in host memory, as views."""
    line: list[int] = table[segment].tolist()
    return (
        _view(line[KEY], line[CAPACITY], sizes[0], types[0]),
        _view(line[VALUE], line[CAPACITY], sizes[1], types[1]),
    )


def _view(address: int, lines: int, size: int, dtype: torch.dtype) -> Tensor:
    if lines == 0:
        return torch.empty(0, size, dtype=dtype)
    buffer = (ctypes.c_byte * (lines * size * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(lines, size)
