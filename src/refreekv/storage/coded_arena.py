"""Ragged K/V with room to grow whose entries are int8: written, moved and decoded as lines of bytes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.coded_lines import Coding
from refreekv.storage.arena import KVArena
from refreekv.storage.ragged import Piece, RaggedKV


class CodedArena(KVArena):
    """An arena that encodes each entry as it is written. Whoever moves entries moves lines: nothing is encoded twice.

    Decode attention reads the lines. Whatever else reads entries, such as a further turn's prompt, gets copies
    in full precision.

    Attributes
    ----------
    keys, values : Tensor
        Lines of `core.coded_lines`, uint8: ``[lines, bytes]``, allocated room included.
    coding : Coding
        What they stand for.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, lengths: Sequence[tuple[int, ...]], room: Sequence[int], coding: Coding
    ):
        super().__init__(keys, values, lengths, room)
        self.coding = coding

    @classmethod
    def for_entries(
        cls, keys: Tensor, values: Tensor, lengths: Sequence[tuple[int, ...]], room: int, **kind: Any
    ) -> Self:
        """An arena that takes entries like ``keys`` and ``values`` ``[..., D]``; ``number`` says in which format."""
        coding = Coding.of(kind["number"], keys, values)
        return cls.like(*coding.no_lines(keys.device), lengths, room, coding=coding)

    @property
    def sizes(self) -> tuple[int, int]:
        """Head sizes of keys and values."""
        return self.coding.sizes

    @property
    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Types of the keys and of the values that come out."""
        return self.coding.types

    @property
    def form(self) -> kernels.Format:
        """What kernels are told of lines behind the table."""
        return kernels.Format(self.coding.sizes, *self.coding.halves, self.coding.groups)

    def _widen(self, *brought: torch.dtype) -> None:
        """Give back entries in types that hold those ``brought``, too. Lines stay as they are and take any."""
        wider = [torch.promote_types(*pair) for pair in zip(self.types, brought, strict=True)]
        self.coding = replace(self.coding, types=(wider[0], wider[1]))

    # -- entries, decoded -----------------------------------------------------------------------

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All rows as ``[B, kv_heads, L, D]``, a copy; only where `uniform`."""
        keys, values = super().stacked()
        return self.coding.keys(keys), self.coding.values(values)

    def segments(self, row: int) -> tuple[Piece, Piece]:
        """One row's keys and values as parts, a copy."""
        keys, values = super().segments(row)
        return _each(self.coding.keys, keys), _each(self.coding.values, values)

    # -- entries, as they are stored ------------------------------------------------------------

    @property
    def lines(self) -> KVArena:
        """The same storage, whose entries are the lines."""
        return KVArena(self.keys, self.values, self.lengths, self._room)

    def of_lines(self, lines: RaggedKV) -> Self:
        """An arena that holds a copy of lines of this one."""
        return self._alike(lines.lengths, [False] * len(lines.lengths))._copied(lines)

    def _alike(self, lengths: Sequence[tuple[int, ...]], freed: Sequence[bool]) -> Self:
        return self.like(self.keys, self.values, lengths, freed=freed, coding=self.coding)


def _each(decode: Any, part: Piece) -> Piece:
    return decode(part) if isinstance(part, Tensor) else [decode(head) for head in part]
