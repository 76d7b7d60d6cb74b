"""What every storage of one layer's keys and values can do: the contract of all that lies in this folder."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self, TypeAlias

import torch
from torch import Tensor

from refreekv.storage.runs import numbers, sent

if TYPE_CHECKING:
    from refreekv.storage.arena import KVArena
    from refreekv.storage.coding import Coding
    from refreekv.storage.columns import Columns, Levels
    from refreekv.storage.ragged import RaggedKV

Piece: TypeAlias = Tensor | Sequence[Tensor]
"""A part of a row: ``[kv_heads, l, D]``, or one ``[l_h, D]`` for each KV head."""


class KVStorage(ABC):
    """Keys and values of one layer, one segment per (row, KV head).

    `append`, `code_older`, `drop`, `reserve` and `free_rows` may change a storage in place; `append` says what to
    go on with. All else leaves it as it is.

    Attributes
    ----------
    keys, values : Tensor
        A tensor of each that the storage holds: they say on what device it is.
    lengths : list of tuple of int
        Entries of each row's KV heads.
    """

    keys: Tensor
    values: Tensor
    lengths: list[tuple[int, ...]]

    # -- what it holds ----------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def kv_heads(self) -> int:
        """KV heads of each row."""
        return len(self.lengths[0])

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int]:
        """Head sizes of keys and values."""

    @property
    @abstractmethod
    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Types of the keys and of the values that come out. Those of wider entries that come in are taken over."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the storages really hold on to, room to grow included."""

    @abstractmethod
    def row_nbytes(self, row: int) -> int:
        """Bytes of one row's entries, and of their room."""

    @property
    def freed(self) -> list[bool]:
        """Which rows were freed."""
        return [False] * len(self.lengths)

    @property
    def tables(self) -> "tuple[KVArena, ...]":
        """The arenas whose tables decode attention reads, first the one that takes new entries; none: it reads none."""
        return ()

    @property
    def coding(self) -> "Coding | None":
        """How entries behind all tables but the first are coded; None: there is one table at most, of exact entries."""
        return None

    @property
    def in_host_memory(self) -> bool:
        """Whether entries behind all tables but the first are in host memory, where kernels of the device read them."""
        return False

    @property
    def host_nbytes(self) -> int:
        """Bytes of `nbytes` that are in host memory beside the device that reads them."""
        return 0

    # -- all entries in full precision --------------------------------------------------------

    @abstractmethod
    def full(self) -> "RaggedKV":
        """All entries in full precision, one beside the other: a copy where they are stored otherwise."""

    @property
    def uniform(self) -> bool:
        """Whether all segments have one length, so that `stacked` can be asked for."""
        return len({length for row in self.lengths for length in row}) <= 1

    def even(self, row: int) -> bool:
        """Whether all KV heads of a row hold equally many entries."""
        return len(set(self.lengths[row])) == 1

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All rows as ``[B, kv_heads, L, D]``; only where `uniform`."""
        return self.full().stacked()

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Each row as ``[kv_heads, L, D]``, padded on the left where heads are uneven."""
        return self.full().rows()

    def segments(self, row: int) -> tuple[Piece, Piece]:
        """One row's keys and values as parts, without padding."""
        return self.full().segments(row)

    def visible(self, row: int) -> Tensor | None:
        """Boolean ``[kv_heads, L]``, False where `rows` padded a head of this row; None if it padded none."""
        origins = self.origins(row)
        if origins is None:
            return None
        return numbers(0, max(self.lengths[row]), self.keys.device) >= origins[:, None]

    def origins(self, row: int) -> Tensor | None:
        """How many places `rows` padded of each of this row's heads: int32 ``[kv_heads]``; None if it padded none."""
        if self.even(row):
            return None
        longest = max(self.lengths[row])
        return sent([longest - length for length in self.lengths[row]], self.keys.device, torch.int32)

    def attend(self, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attention of one query a row ``[B, H, 1, D]`` over all entries: ``[B, 1, H, Dv]``; where there are tables."""
        raise NotImplementedError(f"a {type(self).__name__} has no table to attend to")

    def attend_each(self, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attention of the newest tokens of one row ``[1, H, q, D]``, each over all before it: ``[1, q, H, Dv]``.

        Only where there are tables, and these tokens were the last ones to be appended. Each is attended to as a row
        whose entries end with it.
        """
        raise NotImplementedError(f"a {type(self).__name__} has no table to attend to")

    # -- changes ----------------------------------------------------------------------------

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> "KVStorage":
        """A storage with ``[B, kv_heads, q, D]`` new entries at the segments' ends, of types that hold all."""

    @abstractmethod
    def select_rows(self, indices: Sequence[int]) -> Self:
        """A new storage of the rows ``indices``, in that order; rows may repeat."""

    @abstractmethod
    def truncate(self, lengths: Sequence[Sequence[int]]) -> Self:
        """A new storage that keeps the first ``lengths[b][h]`` entries of each segment."""

    @abstractmethod
    def keep(self, kept: "Sequence[Columns]", after: int, levels: "Sequence[Levels] | None" = None) -> Self:
        """A new storage of what a policy keeps of each row, and the last ``after`` entries.

        Columns count the entries of `rows`, where shorter heads are padded on the left. ``levels`` say which rung
        each goes to, where entries are coded.
        """

    def code_older(self, after: int = 0, *, all_due: bool = False) -> bool:
        """Code entries that are no longer among the newest, in place, where entries are coded; whether any were.

        They are coded in blocks, or ``all_due``, as at the end of a prompt, which ``after`` entries follow.
        """
        return False

    def drop(self, tokens: int) -> bool:
        """Take the last entries of all segments back, in place; False where a new storage has to be made."""
        return False

    def reserve(self, tokens: int) -> bool:
        """Make sure that ``tokens`` more entries have room in the table; whether the storage moved for it."""
        raise NotImplementedError(f"a {type(self).__name__} has no table to write to")

    def note_appended(self, tokens: int) -> None:
        """Count entries that somebody wrote through the table."""
        raise NotImplementedError(f"a {type(self).__name__} has no table to write to")

    def move_to_host(self) -> None:
        """Move what is coded to host memory; the device reads it from there."""
        raise NotImplementedError(f"a {type(self).__name__} has no codes to move")

    def move_to_device(self) -> None:
        """Move what is coded back from host memory, if it is there."""
        raise NotImplementedError(f"a {type(self).__name__} has no codes to move")

    def free_rows(self, rows: Sequence[int]) -> None:
        """Give the memory of finished rows back; only where there are `tables`. They stay in the batch, empty."""
        raise NotImplementedError(f"rows of a {type(self).__name__} cannot be freed")


class FlatKV(KVStorage):
    """Entries that are lines of two flat tensors: ``keys`` and ``values``, ``[lines, D]`` and ``[lines, Dv]``."""

    @property
    def sizes(self) -> tuple[int, int]:
        """Head sizes of keys and values."""
        return self.keys.shape[-1], self.values.shape[-1]

    @property
    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Types of the keys and of the values."""
        return self.keys.dtype, self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the storages really hold on to."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    @property
    def line_bytes(self) -> tuple[int, int]:
        """Bytes of a line of keys, and of one of values."""
        key, value = (flat.shape[-1] * flat.element_size() for flat in (self.keys, self.values))
        return key, value
