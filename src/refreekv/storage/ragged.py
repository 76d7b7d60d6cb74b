"""Ragged K/V storage: segments of different length side by side in one flat tensor.

A padded tensor costs every row, and every KV head, the length of the longest one. Here
each (row, KV head) costs what it keeps: its entries are consecutive lines of the flat
tensors, row by row, and in a row KV head by KV head.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from refreekv.storage.base import FlatKV, Piece
from refreekv.storage.columns import Columns, Levels


class RaggedKV(FlatKV):
    """Keys and values of one layer, one segment per (row, KV head). Never changed in place.

    Invariant: the flat tensors have as many lines as ``lengths`` adds up to, and own
    exactly that much storage.

    Attributes
    ----------
    keys, values : Tensor
        ``[entries, D]``; head sizes of keys and values may differ.
    lengths : list of tuple of int
        Entries of each row's KV heads.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: Sequence[tuple[int, ...]]):
        self.keys = keys
        self.values = values
        self.lengths = list(lengths)

    @classmethod
    def from_pieces(cls, keys: Sequence[Sequence[Piece]], values: Sequence[Sequence[Piece]]) -> "RaggedKV":
        """Copy rows, each given as parts in order, into new storage."""
        lengths = [_lengths(row) for row in keys]
        return cls(_flat(keys, lengths), _flat(values, lengths), lengths)

    def row_nbytes(self, row: int) -> int:
        return sum(self.lengths[row]) * sum(self.line_bytes)

    def full(self) -> "RaggedKV":
        return self

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All rows as ``[B, kv_heads, L, D]`` views; only where `uniform`."""
        shape = (len(self.lengths), self.kv_heads, self.lengths[0][0])
        return self.keys.view(*shape, self.keys.shape[-1]), self.values.view(*shape, self.values.shape[-1])

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Each row as ``[kv_heads, L, D]``: views where heads are even, else copies padded on the left."""
        sizes = [sum(row) for row in self.lengths]
        return [
            (_rectangular(key, lengths), _rectangular(value, lengths))
            for key, value, lengths in zip(self.keys.split(sizes), self.values.split(sizes), self.lengths, strict=True)
        ]

    def append(self, keys: Tensor, values: Tensor) -> "RaggedKV":
        """A new storage with ``[B, kv_heads, q, D]`` new entries at the segments' ends, of a type that holds all."""
        if self.uniform:
            old_keys, old_values = self.stacked()
            flat_keys = torch.cat([old_keys, keys], dim=2).flatten(0, 2)
            flat_values = torch.cat([old_values, values], dim=2).flatten(0, 2)
            lengths = [tuple(length + keys.shape[2] for length in row) for row in self.lengths]
            return RaggedKV(flat_keys, flat_values, lengths)
        held = [self.segments(row) for row in range(len(self.lengths))]
        return RaggedKV.from_pieces(
            [(old, new) for (old, _), new in zip(held, keys, strict=True)],
            [(old, new) for (_, old), new in zip(held, values, strict=True)],
        )

    def segments(self, row: int) -> tuple[Piece, Piece]:
        """One row's keys and values as parts, without copying or padding."""
        start = sum(sum(lengths) for lengths in self.lengths[:row])
        stop = start + sum(self.lengths[row])
        keys, values = self.keys[start:stop], self.values[start:stop]
        if self.even(row):
            return _rectangular(keys, self.lengths[row]), _rectangular(values, self.lengths[row])
        return keys.split(self.lengths[row]), values.split(self.lengths[row])

    def select_rows(self, indices: Sequence[int]) -> "RaggedKV":
        held = [self.segments(row) for row in indices]
        return RaggedKV.from_pieces([[keys] for keys, _ in held], [[values] for _, values in held])

    def truncate(self, lengths: Sequence[Sequence[int]]) -> "RaggedKV":
        keys: list[list[Piece]] = []
        values: list[list[Piece]] = []
        for row, wanted in enumerate(lengths):
            key, value = self.segments(row)
            keys.append([[head[:n] for head, n in zip(key, wanted, strict=True)]])
            values.append([[head[:n] for head, n in zip(value, wanted, strict=True)]])
        return RaggedKV.from_pieces(keys, values)

    def keep(self, kept: Sequence[Columns], after: int, levels: Sequence[Levels] | None = None) -> "RaggedKV":
        return kept_of_rows(self.rows(), kept, after)


def kept_of_rows(rows: Sequence[tuple[Tensor, Tensor]], kept: Sequence[Columns], after: int) -> RaggedKV:
    """What a policy keeps of rows ``[kv_heads, n, D]``, and the last ``after`` entries, copied once."""
    keys: list[list[Piece]] = []
    values: list[list[Piece]] = []
    for columns, (key, value) in zip(kept, rows, strict=True):
        stored = key.shape[1] - after
        keys.append([*_pieces(key, columns), key[:, stored:]])
        values.append([*_pieces(value, columns), value[:, stored:]])
    return RaggedKV.from_pieces(keys, values)


def _pieces(entries: Tensor, kept: Columns) -> list[Piece]:
    """The kept entries of one row ``[kv_heads, n, D]``, as parts in order.

    Ranges are views and cost nothing before they are copied to where they go.
    """
    if kept.ranges is not None:
        return [entries[:, start:stop] for start, stop in kept.ranges]
    heads = kept.tensors(entries.device)
    if len(heads) == 1:
        return [entries.index_select(1, heads[0])]
    return [[head.index_select(0, index) for head, index in zip(entries, heads, strict=True)]]


def _lengths(row: Sequence[Piece]) -> tuple[int, ...]:
    return tuple(sum(piece[head].shape[0] for piece in row) for head in range(len(row[0])))


def _flat(rows: Sequence[Sequence[Piece]], lengths: Sequence[tuple[int, ...]]) -> Tensor:
    """Parts of rows, copied once, to where they belong in a flat tensor ``[entries, D]``."""
    sizes = [sum(row) for row in lengths]
    sample = rows[0][0][0]
    types = {piece.dtype if isinstance(piece, Tensor) else piece[0].dtype for row in rows for piece in row}
    flat = sample.new_empty(sum(sizes), sample.shape[-1], dtype=functools.reduce(torch.promote_types, types))
    for target, row, heads in zip(flat.split(sizes), rows, lengths, strict=True):
        whole = [piece for piece in row if isinstance(piece, Tensor)]
        if len(whole) == len(row):
            torch.cat(whole, dim=1, out=target.view(len(heads), heads[0], -1) if target.numel() else target[None])
        else:
            torch.cat([piece[head] for head in range(len(heads)) for piece in row], out=target)
    return flat


def _rectangular(flat: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One row's lines as ``[kv_heads, L, D]``: a view if all heads have one length, else padded on the left."""
    longest = max(lengths)
    if min(lengths) == longest:
        return flat.view(len(lengths), longest, flat.shape[-1])
    heads = flat.split(lengths)
    return torch.stack([torch.nn.functional.pad(head, (0, 0, longest - len(head), 0)) for head in heads])
