"""Keys and values in codes, read where they are: sinks and newest entries exact, those between packed in few bits.

Each segment is its sinks, its coded entries and its newest ones, in that order. What is coded lies in an arena of
packed lines; all that is appended is exact, and coded once it is no longer among the newest. Attention of one token
a row reads both as they are stored. Whatever else reads entries gets a copy in full precision, as long as a call takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.autocast import without_autocast
from refreekv.core.packed_lines import FACTOR_BYTES, PackedFormat, PackedMaps
from refreekv.core.quantisation import FLUSH, SINKS, KVDtype
from refreekv.storage.arena import LEAST_GROWTH, KVArena, Span, on_device
from refreekv.storage.base import KVStorage, Piece
from refreekv.storage.columns import Columns
from refreekv.storage.ragged import RaggedKV

Pair = tuple[Tensor, Tensor]
"""Of keys and of values."""

Counts = Sequence[Sequence[int]]
"""A number for each row's KV heads."""


@dataclass(frozen=True)
class Coding:
    """How the entries of a layer are coded.

    Attributes
    ----------
    form : PackedFormat
        Of the lines.
    maps : PackedMaps
        What takes keys, values and queries to code space; the means are the rows' own, fixed for good.
    recent : int
        Newest entries of each KV head that stay exact.
    """

    form: PackedFormat
    maps: PackedMaps
    recent: int

    @classmethod
    def of(cls, number: KVDtype, centres: Pair, dtype: torch.dtype) -> "Coding":
        """That of a number format for entries in ``dtype``; ``centres`` are the means ``[B, H_kv, D]`` to take out."""
        sizes = centres[0].shape[-1], centres[1].shape[-1]
        with torch.inference_mode(False):
            maps = PackedMaps.rotated(centres[0].clone(), centres[1].clone(), dtype)
            return cls(number.form(sizes), maps, number.recent)

    def of_rows(self, rows: Sequence[int]) -> "Coding":
        """The same for some rows, in that order."""
        return Coding(self.form, self.maps.of_rows(rows), self.recent)


class LeveledKV(KVStorage):
    """Keys and values of one layer, coded but for sinks and newest entries.

    Nothing is coded twice: an entry keeps its code until it is evicted. When entries are coded, and into what,
    depends on their segment alone.

    Invariant: in each segment with coded entries, exact ones are its first ``sinks`` and those after the coded ones.

    Attributes
    ----------
    exact : KVArena
        Sinks and newest entries, keys and values of one type.
    coded : KVArena
        Lines (``keys``, uint8 ``[lines, line_bytes]``) and factors (``values``, float16 ``[lines, 2]``).
    sinks : list of tuple of int
        How many exact entries lie before the coded ones of each row's KV heads; 0 where nothing is coded.
    coding : Coding
        How entries are coded.
    """

    def __init__(
        self,
        exact: KVArena,
        coded: KVArena,
        sinks: Sequence[tuple[int, ...]],
        coding: Coding,
        types: tuple[torch.dtype, torch.dtype] | None = None,
    ):
        self._types = exact.types if types is None else types
        exact.widen(*exact.types[::-1])
        self.exact, self.coded, self._coding = exact, coded, coding
        self.sinks = [
            tuple(first if n else 0 for first, n in zip(*rows, strict=True))
            for rows in zip(sinks, coded.lengths, strict=True)
        ]
        self._wait = 0
        """Entries that may be appended before it is worth looking whether some are due to be coded."""
        self._wait = self._until_due()

    # -- making one -------------------------------------------------------------------------

    @classmethod
    def gathered(
        cls, keys: Tensor, values: Tensor, columns: Sequence[Columns], after: int, number: KVDtype, centres: Pair
    ) -> Self:
        """Chosen entries of dense ``[B, H_kv, n, D]``, coded on their way, and the last ``after`` ones exact.

        ``centres`` are the mean key and the mean value of the rows' KV heads, ``[B, H_kv, D]``.
        """
        types, heads, device = (keys.dtype, values.dtype), keys.shape[1], keys.device
        # Exact entries have one type for both, as attention reads them beside codes.
        keys, values = (part.to(torch.promote_types(*types)) for part in (keys, values))
        coding = Coding.of(number, centres, keys.dtype)
        end = keys.shape[2] - after
        counts = [row.for_heads(heads) for row in columns]
        coded = [tuple(number.coded(n) for n in row) for row in counts]
        sinks = [tuple(SINKS if n else 0 for n in row) for row in coded]
        parts, spans = [], []
        for row, own in enumerate(columns):
            index = own.tensors(device)
            for head in range(heads):
                # int32 [n]: what stays of the segment, of which the first and the last are exact
                listed = index[head % len(index)]
                first, stop = sinks[row][head], sinks[row][head] + coded[row][head]
                parts += [listed[:first], listed[stop:]]
                spans.append(_span(listed[first:stop], end))
        flat, at, where = torch.cat(parts), 0, []
        for opening, rest in zip(parts[::2], parts[1::2], strict=True):
            where.append(_span(flat[at : at + len(opening) + len(rest)], end))
            at += len(opening) + len(rest)
        lengths = [tuple(n - c + after for n, c in zip(*rows, strict=True)) for rows in zip(counts, coded, strict=True)]
        longest = max(map(max, coded))
        # Room until entries are coded together; less where coding saves little, as a prompt must not grow by it.
        growth = min(FLUSH + LEAST_GROWTH, max(LEAST_GROWTH, longest // 2)) if longest else None
        exact = KVArena.gathered(keys, values, lengths, where, end, growth=growth)
        lines = _lines(coding.form, coded, device)
        if longest:
            table = on_device([list(span) for span in spans], device)
            with lines.table_in_turn() as own_table:
                kernels.pack_lines(keys, values, own_table, coding.form, coding.maps, table, end=end, longest=longest)
        return cls(exact, lines, sinks, coding, types)

    # -- what every storage has -----------------------------------------------------------------

    @property
    def keys(self) -> Tensor:  # type: ignore[override]  # nobody sets them
        """Keys of exact entries."""
        return self.exact.keys

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Values of exact entries."""
        return self.exact.values

    @property
    def lengths(self) -> list[tuple[int, ...]]:  # type: ignore[override]
        """Entries of each row's KV heads."""
        return _sums(self.exact.lengths, self.coded.lengths)

    @property
    def kv_heads(self) -> int:
        """KV heads of each row."""
        return self.exact.kv_heads

    @property
    def coding(self) -> Coding:
        """How entries are coded."""
        return self._coding

    @property
    def sizes(self) -> tuple[int, int]:
        """Head sizes of keys and values."""
        return self.exact.sizes

    @property
    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Types of the keys and of the values that come out: those that came, where exact ones have one for both."""
        return self._types

    @property
    def freed(self) -> list[bool]:
        """Which rows were freed."""
        return self.exact.freed

    @property
    def nbytes(self) -> int:
        """Bytes that the storages really hold on to, room and the rows' means included."""
        maps = self.coding.maps
        means = maps.key_mean, maps.value_mean, maps.key_offset, maps.value_offset
        return self.exact.nbytes + self.coded.nbytes + sum(part.nbytes for part in means)

    def row_nbytes(self, row: int) -> int:
        """Bytes of one row's entries, room and means included."""
        maps = self.coding.maps
        means = maps.key_mean, maps.value_mean, maps.key_offset, maps.value_offset
        return self.exact.row_nbytes(row) + self.coded.row_nbytes(row) + sum(part[row].nbytes for part in means)

    @property
    def tables(self) -> tuple[KVArena, ...]:
        """The exact entries' arena, which takes new ones, and that of the lines."""
        return self.exact, self.coded

    def full(self) -> RaggedKV:
        """All entries in full precision: a copy."""
        rows = [self._decoded(row) for row in range(len(self.sinks))]
        return RaggedKV.from_pieces([[keys] for keys, _ in rows], [[values] for _, values in rows])

    def segments(self, row: int) -> tuple[Piece, Piece]:
        """One row's keys and values as parts: a copy."""
        return self._decoded(row)

    def _decoded(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """One row's keys and values, a tensor ``[n, D]`` for each KV head."""
        form, maps = self.coding.form, self.coding.maps
        exact, stored = self.exact.segments(row), self.coded.segments(row)
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for head, first in enumerate(self.sinks[row]):
            coded = form.unpack(stored[0][head], stored[1][head], torch.float32)
            with without_autocast(exact[0][head].device):
                back = maps.entries(*coded, row, head)
            for into, own, between, kind in zip(found, exact, back, self._types, strict=True):
                parts = own[head][:first], between, own[head][first:]
                into.append(torch.cat([part.to(kind) for part in parts]))
        return found

    def attend(self, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attention of one query a row ``[B, H, 1, D]`` over all entries: ``[B, 1, H, Dv]``."""
        self.exact.widen(query.dtype, query.dtype)
        with self.exact.table_in_turn() as exact, self.coded.table_in_turn() as coded:
            return kernels.packed_attention(
                query.to(self.exact.types[0]), exact, [coded], [self.coding.form], self.coding.maps,
                scaling=scaling, softcap=softcap, sinks=sinks,
            ).to(query.dtype)  # fmt: skip

    def append(self, keys: Tensor, values: Tensor) -> Self:
        """Write ``[B, H_kv, q, D]`` new entries behind the segments' last ones, in place.

        They are exact until the next call, so that a prompt's own attention, and the policy that looks at it, see
        what the model computed.
        """
        self.code_older()
        key_type, value_type = map(torch.promote_types, self._types, (keys.dtype, values.dtype))
        self._types = key_type, value_type
        self.exact.append(keys, values)
        self.exact.widen(*self.exact.types[::-1])
        self._wait -= keys.shape[2]
        return self

    def select_rows(self, indices: Sequence[int]) -> Self:
        """A new storage of the rows ``indices``, in that order; rows may repeat."""
        parts = self.exact.select_rows(indices), self.coded.select_rows(indices)
        sinks = [self.sinks[row] for row in indices]
        return type(self)(*parts, sinks, self.coding.of_rows(indices), self._types)

    def truncate(self, lengths: Counts) -> Self:
        """A new storage that keeps the first ``lengths[b][h]`` entries of each segment."""
        coded = [
            tuple(max(0, min(n - first, held)) for n, first, held in zip(*rows, strict=True))
            for rows in zip(lengths, self.sinks, self.coded.lengths, strict=True)
        ]
        exact = [tuple(n - c for n, c in zip(*rows, strict=True)) for rows in zip(lengths, coded, strict=True)]
        return type(self)(self.exact.truncate(exact), self.coded.truncate(coded), self.sinks, self.coding, self._types)

    def keep(self, kept: Sequence[Columns], after: int) -> Self:
        """A new storage of what a policy keeps of each row, and the last ``after`` entries; codes stay as they are."""
        device = self.exact.keys.device
        exact, coded, sinks = [], [], []
        for row, (columns, lengths) in enumerate(zip(kept, self.lengths, strict=True)):
            index, longest = columns.tensors(device), max(lengths)
            own_exact, own_coded, own_sinks = [], [], []
            for head, length in enumerate(lengths):
                first, held = self.sinks[row][head], self.coded.lengths[row][head]
                tail = torch.arange(longest - after, longest, device=device)
                # [n]: what stays of the segment, counted within it
                chosen = torch.cat([index[head % len(index)].long(), tail]) - (longest - length)
                early, late = chosen[chosen < first], chosen[chosen >= first + held]
                own_coded.append(chosen[(chosen >= first) & (chosen < first + held)] - first)
                own_exact.append(torch.cat([early, late - held]))
                own_sinks.append(len(early))
            exact.append(own_exact)
            coded.append(own_coded)
            sinks.append(tuple(own_sinks))
        return type(self)(self.exact.taken(exact), self.coded.taken(coded), sinks, self.coding, self._types)

    # -- growing and freeing, in place ---------------------------------------------------------

    def code_older(self, after: int = 0, *, all_due: bool = False) -> bool:
        """Code entries that are no longer among the newest, in place; whether any were.

        In whole blocks of `FLUSH`, so that it does not matter how many entries a call brought; or ``all_due``, as
        at the end of a prompt, which ``after`` entries follow.
        """
        if self._wait > 0 and not all_due:
            return False
        counts = [self._due(row, after, 1 if all_due else FLUSH) for row in range(len(self.sinks))]
        if longest := max(map(max, counts)):
            old = self.coded.lengths
            firsts = [
                tuple(first if held else min(SINKS, n) for first, held, n in zip(*rows, strict=True))
                for rows in zip(self.sinks, old, self.exact.lengths, strict=True)
            ]
            self.coded.lengthen(counts)
            device, coding = self.exact.keys.device, self.coding
            spans = on_device([[0, 0, first] for row in firsts for first in row], device)
            starts = on_device([[n for row in old for n in row]], device)[0]
            with self.exact.table_in_turn() as source, self.coded.table_in_turn() as table:
                kernels.pack_lines(
                    self.exact.keys, self.exact.values, table, coding.form, self._maps(), spans, end=0,
                    longest=longest, starts=starts, source=source,
                )  # fmt: skip
            self.exact.cut(firsts, counts, growth=FLUSH + LEAST_GROWTH)
            self.sinks = [
                tuple(first if n else 0 for first, n in zip(*rows, strict=True))
                for rows in zip(firsts, self.coded.lengths, strict=True)
            ]
        self._wait = self._until_due()
        return longest > 0

    def _maps(self) -> PackedMaps:
        """The maps for entries of the type that exact ones have by now."""
        if self.coding.maps.key_sum.dtype != self.exact.types[0]:
            self._coding = replace(self.coding, maps=self.coding.maps.of_type(self.exact.types[0]))
        return self.coding.maps

    def _due(self, row: int, after: int, block: int) -> tuple[int, ...]:
        """How many entries of each of a row's KV heads are to be coded now."""
        found = []
        for first, held, n in zip(self.sinks[row], self.coded.lengths[row], self.exact.lengths[row], strict=True):
            surplus = n - after - (first if held else SINKS) - self.coding.recent
            found.append(max(0, surplus) // block * block)
        return tuple(found)

    def _until_due(self) -> int:
        """Entries that can be appended before any segment has a block of them to code."""
        surplus = [
            n - (first if held else SINKS) - self.coding.recent
            for rows in zip(self.sinks, self.coded.lengths, self.exact.lengths, self.freed, strict=True)
            if not rows[3]
            for first, held, n in zip(*rows[:3], strict=True)
        ]
        return FLUSH - max(surplus, default=0)

    def reserve(self, tokens: int) -> bool:
        """Make sure that ``tokens`` more entries can be appended; whether the storage moved for it."""
        return self.exact.reserve(tokens)

    def note_appended(self, tokens: int) -> None:
        """Count entries that somebody wrote through the table."""
        self.exact.note_appended(tokens)
        self._wait -= tokens

    def drop(self, tokens: int) -> bool:
        """Take the last entries of all segments back, in place; False where a new storage has to be made."""
        newest = [
            n - first
            for rows in zip(self.exact.lengths, self.sinks, self.freed, strict=True)
            if not rows[2]
            for n, first in zip(*rows[:2], strict=True)
        ]
        if min(newest, default=0) < tokens or not self.exact.drop(tokens, FLUSH + LEAST_GROWTH):
            return False
        self._wait += tokens
        return True

    def free_rows(self, rows: Sequence[int]) -> None:
        """Give the memory of finished rows back. They stay in the batch, hold nothing and take nothing."""
        self.exact.free_rows(rows)
        self.coded.free_rows(rows)
        self.sinks = [(0,) * self.kv_heads if freed else own for own, freed in zip(self.sinks, self.freed, strict=True)]


def _lines(form: PackedFormat, lengths: Sequence[tuple[int, ...]], device: torch.device) -> KVArena:
    """An arena for so many packed lines, which are still to be written."""
    lines = torch.empty(0, form.line_bytes, dtype=torch.uint8, device=device)
    factors = torch.empty(0, FACTOR_BYTES // 2, dtype=torch.float16, device=device)
    return KVArena.like(lines, factors, lengths, growth=0)


def _span(index: Tensor, end: int) -> Span:
    """How `kernels.gather` is told about the entries that an int32 list names, and then all from ``end`` on."""
    # An empty tensor has no address to look at: nothing listed is a gap from the start.
    return (index.data_ptr(), len(index), 0) if len(index) else (0, 0, end)


def _sums(first: Sequence[tuple[int, ...]], second: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [tuple(map(sum, zip(*rows, strict=True))) for rows in zip(first, second, strict=True)]
