"""Keys and values in codes, read where they are: sinks and newest entries exact, those between packed in few bits.

Each segment is its sinks, its coded entries (`CodedLines`) and its newest ones, in that order. All that is appended is
exact, and coded once it is no longer among the newest. Attention of one token a row reads everything as it is stored.
Whatever else reads entries gets a copy in full precision, as long as a call takes.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from operator import sub
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import FLUSH, SINKS, Ladder
from refreekv.storage.arena import LEAST_GROWTH, KVArena, as_lists, growth_within, on_device, tell, together
from refreekv.storage.base import KVStorage, Piece
from refreekv.storage.coded_lines import CodedLines, spans, sums
from refreekv.storage.coding import Coding, Pair
from refreekv.storage.columns import Columns, Levels, listed_by_rung, rungs_asked
from refreekv.storage.members import Array, Counts, Lengths, counted
from refreekv.storage.ragged import RaggedKV
from refreekv.storage.runs import each, flat, numbers, runs, spread, starts_of
from refreekv.storage.token_rows import in_rows, in_turn

if TYPE_CHECKING:
    from refreekv.storage.unfinished import UnfinishedKV


class LeveledKV(KVStorage):
    """Keys and values of one layer, coded but for sinks and newest entries.

    An entry keeps its code until it is evicted or moves to a narrower rung. When entries are coded, and into what,
    depends on their segment alone.

    In each segment with coded entries, exact ones are its first ``sinks`` and those after the coded ones.

    Attributes
    ----------
    exact : KVArena
        Sinks and newest entries, keys and values of one type.
    lines : CodedLines
        The coded entries.
    """

    def __init__(
        self, exact: KVArena, lines: CodedLines, sinks: Counts, types: tuple[torch.dtype, torch.dtype] | None = None
    ):
        self._types = exact.types if types is None else types
        exact.widen(*exact.types[::-1])
        self.exact, self.lines = exact, lines
        self._sinks = np.array(sinks) * (lines.counts > 0)
        self._wait = self._until_due()
        """Entries that may be appended before it is worth looking whether some are due to be coded."""

    # -- making one -------------------------------------------------------------------------

    @classmethod
    def gathered(
        cls,
        keys: Tensor,
        values: Tensor,
        columns: Sequence[Columns],
        after: int,
        ladder: Ladder,
        centres: Pair | PackedMaps,
        levels: Sequence[Levels] | None = None,
        codes: KeyCodes | None = None,
        read: "UnfinishedKV | None" = None,
    ) -> Self:
        """Chosen entries of dense ``[B, H_kv, n, D]``, coded on their way, and the last ``after`` ones exact.

        ``centres`` are the mean key and the mean value of the rows' KV heads, ``[B, H_kv, D]``, or the maps that take
        them out. ``levels`` say of each row's columns which rung they go to; None: all to that of what is generated.
        ``codes`` are the model's own. ``read`` is the prompt as it was coded while it was read, in the format of a
        rung: entries that go to that rung keep their lines, and its means are taken out of all.
        """
        types, heads, device = (keys.dtype, values.dtype), keys.shape[1], keys.device
        # Exact entries have one type for both, as attention reads them beside codes.
        keys, values = (part.to(torch.promote_types(*types)) for part in (keys, values))
        if read is not None:
            coding = Coding.by(ladder, read.maps.of_type(keys.dtype), codes)
        elif isinstance(centres, PackedMaps):
            coding = Coding.by(ladder, centres.of_type(keys.dtype), codes)
        else:
            coding = Coding.of(ladder, centres, keys.dtype, codes)
        end = keys.shape[2] - after
        counts = [row.for_heads(heads) for row in columns]
        coded = each(ladder.coded, counts)
        sinks = each(lambda n: SINKS if n else 0, coded)
        opening, between = [], []
        for row, chosen in enumerate(columns):
            index = chosen.tensors(device)
            for head in range(heads):
                # int32 [n]: what stays of the segment, of which the first and the last are exact
                listed = index[head % len(index)]
                first, stop = sinks[row][head], sinks[row][head] + coded[row][head]
                opening += [listed[:first], listed[stop:]]
                between.append(listed[first:stop])
        around = [n - c for n, c in zip(flat(counts), flat(coded), strict=True)]
        # They stay alive until the kernels that are told their addresses were launched.
        exactly = torch.cat(opening)
        lengths = each(lambda n, c: n - c + after, counts, coded)
        # Room until entries are coded together; less where coding saves little, as a prompt must not grow by it.
        longest = max(map(max, coded))
        growth = min(FLUSH, max(LEAST_GROWTH, longest // 2)) if longest else None
        growth = growth_within(keys, lengths) if growth is None else growth
        exact = KVArena.like(keys, values, lengths, growth, told=False)
        by_rung = members = None
        if levels is not None and len(coding.forms) > 1:
            between, members = listed_by_rung(levels, between, sinks, coded)
            by_rung = [[row.for_heads(heads, rung) for row in levels] for rung in range(len(coding.forms))]
        lines, work = CodedLines.to_pack(between, coded, coding, end, by_rung, members)
        tell([exact, *lines.rungs])
        # Spans are of no use once kernels have read them: they are not kept with the tables.
        where, *places = together([spans(exactly, around, end), *(job.spans for job in work)], device)
        exact.fill(keys, values, where, end)
        lines.pack(keys, values, work, places, end, read)
        return cls(exact, lines, sinks, types)

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
        return sums([self.exact.lengths, self.lines.lengths])

    @property
    def batch(self) -> int:
        return self.exact.batch

    @property
    def kv_heads(self) -> int:
        return self.exact.kv_heads

    @property
    def coding(self) -> Coding:
        return self.lines.coding

    @property
    def sinks(self) -> Lengths:
        """How many exact entries lie before the coded ones of each row's KV heads; 0 where nothing is coded."""
        return as_lists(self._sinks)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.exact.sizes

    @property
    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Types of the keys and of the values that come out: those that came, where exact ones have one for both."""
        return self._types

    @property
    def freed(self) -> list[bool]:
        return self.exact.freed

    @property
    def nbytes(self) -> int:
        return self.exact.nbytes + self.lines.nbytes

    def row_nbytes(self, row: int) -> int:
        return self.exact.row_nbytes(row) + self.lines.row_nbytes(row)

    @property
    def in_host_memory(self) -> bool:
        return self.lines.in_host_memory

    @property
    def host_nbytes(self) -> int:
        return sum(arena.nbytes for arena in self.lines.rungs) if self.in_host_memory else 0

    @property
    def tables(self) -> tuple[KVArena, ...]:
        """The exact entries' arena, which takes new ones, and those of the lines of each rung."""
        return self.exact, *self.lines.rungs

    def full(self) -> RaggedKV:
        return self._decoded(self.lengths)

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        return self._decoded([(max(row),) * len(row) for row in self.lengths]).rows()

    def _decoded(self, room: Counts) -> RaggedKV:
        """All entries in full precision at the ends of segments of so many lines; zeros are before them."""
        device, exact, total = self.keys.device, self.exact.full(), sum(flat(room))
        (exact_starts, exact_counts), (coded_starts, coded) = self._where(room)
        # Exact ones among all lines; coded ones, which are told by segment, among those of theirs.
        relative = list(map(sub, coded_starts, starts_of(flat(room))))
        both = runs([*exact_starts, *relative], [*exact_counts, *coded], device)
        exact_at, coded_at = both.split([len(exact.keys), sum(coded)])
        made = torch.empty if total == sum(flat(self.lengths)) else torch.zeros
        keys, values = (
            made(total, size, dtype=kind, device=device) for size, kind in zip(self.sizes, self._types, strict=True)
        )
        for side, own in ((keys, exact.keys), (values, exact.values)):
            side[exact_at] = own.to(side.dtype)
        found = RaggedKV(keys, values, [tuple(row) for row in room])
        self.lines.decode_into(found, coded_at.int())
        return found

    def segments(self, row: int) -> tuple[Piece, Piece]:
        return self.select_rows([row]).full().segments(0)

    def _where(self, room: Counts) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
        """Where runs of exact and of coded entries begin among the lines of `_decoded`, and how long they are."""
        lengths, sinks, coded = (flat(rows) for rows in (self.lengths, self.sinks, self.lines.lengths))
        starts = [start + n - own for start, n, own in zip(starts_of(flat(room)), flat(room), lengths, strict=True)]
        firsts = [start + n for start, n in zip(starts, sinks, strict=True)]
        ends = [first + n for first, n in zip(firsts, coded, strict=True)]
        rest = [start + n - end for start, n, end in zip(starts, lengths, ends, strict=True)]
        around = [[*chain.from_iterable(zip(*pair, strict=True))] for pair in ((starts, ends), (sinks, rest))]
        return (around[0], around[1]), (firsts, coded)

    def attend(self, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
        self.exact.widen(query.dtype, query.dtype)
        held = self.lines.held
        with ExitStack() as stack:
            arenas = self.exact, *(arena for _, arena in held)
            exact, *lines = (stack.enter_context(arena.table_in_turn()) for arena in arenas)
            return kernels.packed_attention(
                query.to(self.exact.types[0]), exact, lines, [form for form, _ in held], self.lines.coding.maps,
                scaling=scaling, softcap=softcap, sinks=sinks,
            ).to(query.dtype)  # fmt: skip

    def attend_each(self, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
        self.exact.widen(query.dtype, query.dtype)
        coding = self.lines.coding
        with ExitStack() as stack:
            # All rungs, also those that hold nothing: there is one kernel for all layers.
            tables = [stack.enter_context(arena.table_in_turn()) for arena in self.tables]
            found = [
                kernels.packed_attention(
                    rows, exact, lines, coding.forms, coding.maps, scaling=scaling, softcap=softcap, sinks=sinks
                )[:count]
                for count, rows, (exact, *lines) in in_rows(query.to(self.exact.types[0]), tables)
            ]
        return in_turn(found).to(query.dtype)

    # -- changes ------------------------------------------------------------------------------

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
        sinks = [self.sinks[row] for row in indices]
        return type(self)(self.exact.select_rows(indices), self.lines.of_rows(indices), sinks, self._types)

    def truncate(self, lengths: Counts) -> Self:
        coded = each(lambda n, first, most: max(0, min(n - first, most)), lengths, self.sinks, self.lines.lengths)
        exact = each(sub, lengths, coded)
        return type(self)(self.exact.truncate(exact), self.lines.truncated(coded), self.sinks, self._types)

    def keep(self, kept: Sequence[Columns], after: int, levels: Sequence[Levels] | None = None) -> Self:
        """A new storage of what a policy keeps of each row, and the last ``after`` entries.

        What is coded moves to the rung that ``levels`` say of it if that is narrower than its own, and is coded anew
        from what its code stands for. What is due is coded: there, or without ``levels`` as generated entries are.
        """
        chosen, counts, begins = self._chosen(kept, after)
        device, flat_counts = chosen.device, flat(counts)
        sinks, coded = flat(self.sinks), flat(self.lines.lengths)
        segment = spread(range(len(flat_counts)), flat_counts, device)
        # Each chosen entry's number among those of its segment, and where it is if it is coded and if it is not.
        by_segment = begins, sinks, coded, starts_of(coded), starts_of(flat(self.exact.capacities))
        before, firsts, held, coded_starts, exact_starts = on_device(by_segment, device)[:, segment]
        number = chosen - before
        early = number < firsts
        is_coded = (number >= firsts) & (number < firsts + held)
        coded_at = number - firsts + coded_starts
        exact_at = torch.where(early, number, number - held) + exact_starts
        rungs = len(self.lines.rungs)
        asked = None if levels is None or rungs == 1 else rungs_asked(levels, counts, after, rungs - 1)
        sides = counted(early + 2 * is_coded, counts, 3, segment)
        left = sides[2]
        # Exact ones, then coded ones: without asking the device once more how many they are.
        order = is_coded.to(torch.uint8).argsort(stable=True)
        exactly, stay = order.split([len(order) - (count := sum(map(sum, left))), count])
        made = type(self)(
            self.exact.picked(exact_at[exactly], each(sub, counts, left)),
            self.lines.kept(coded_at[stay], None if asked is None else asked[stay], left),
            sides[1],
            self._types,
        )
        due = made._due(after, 1)
        if asked is not None:
            ends = zip(starts_of(flat_counts), flat(made._firsts().tolist()), flat(left), strict=True)
            asked = asked[runs([start + first + n for start, first, n in ends], due.ravel().tolist(), device)]
        if asked is not None and due.any():
            before = made._firsts()
            made.lines.extend(made.exact, as_lists(before), as_lists(due), asked)
            made.exact.take_out(before, due)
            made._note_coded(before, due)
            made._wait = made._until_due()
        elif asked is None:
            made.code_older(after, all_due=True)
        return made

    def _note_coded(self, firsts: Array, counts: Array) -> None:
        """Note that so many exact entries of each segment, from the first ones on, are coded now and gone."""
        self.exact.note_changed(-counts)
        self.exact.trim(FLUSH)
        self._sinks = firsts * (self.lines.counts > 0)

    def _chosen(self, kept: Sequence[Columns], after: int) -> tuple[Tensor, list[tuple[int, ...]], list[int]]:
        """Entries that stay, by their places in `rows`; how many they are of each segment, and where that begins."""
        device, parts, counts, begins = self.keys.device, [], [], []
        for columns, lengths in zip(kept, self.lengths, strict=True):
            longest, index = max(lengths), columns.tensors(device)
            tail = numbers(longest - after, longest, device, torch.int32)
            for head, length in enumerate(lengths):
                parts += [index[head % len(index)], tail]
                begins.append(longest - length)
            counts.append(tuple(n + after for n in columns.for_heads(len(lengths))))
        return torch.cat(parts), counts, begins

    # -- growing, moving and freeing, in place ---------------------------------------------------

    def move_to_host(self) -> None:
        self.lines.move_to_host()

    def move_to_device(self) -> None:
        self.lines.move_to_device()

    def code_older(self, after: int = 0, *, all_due: bool = False) -> bool:
        """Code entries that are no longer among the newest, in place, as generated ones; whether any were.

        In whole blocks of `FLUSH`, so that it does not matter how many entries a call brought; or ``all_due``, as
        at the end of a prompt, which ``after`` entries follow.
        """
        return code_older([self], after, all_due=all_due)

    def _firsts(self) -> Array:
        """How many exact entries lie, or would lie, before the coded ones of each row's KV heads."""
        return np.where(self.lines.counts, self._sinks, np.minimum(self.exact.counts, SINKS))

    def _newest(self) -> Array:
        """How many exact entries of each row's KV heads lie behind coded ones, or would; below 0 where sinks lack."""
        return self.exact.counts - np.where(self.lines.counts, self._sinks, SINKS)

    def _due(self, after: int, block: int) -> Array:
        """How many entries of each row's KV heads are to be coded now."""
        return np.maximum(self._newest() - self.lines.coding.recent - after, 0) // block * block

    def _until_due(self) -> int:
        """Entries that can be appended before any segment has a block of them to code."""
        return FLUSH + self.lines.coding.recent - int(self._newest().max())

    def reserve(self, tokens: int) -> bool:
        return self.exact.reserve(tokens)

    def note_appended(self, tokens: int) -> None:
        self.exact.note_appended(tokens)
        self._wait -= tokens

    def drop(self, tokens: int) -> bool:
        newest = (self.exact.counts - self._sinks)[[not freed for freed in self.freed]]
        if newest.min(initial=tokens) < tokens or not self.exact.drop(tokens, FLUSH):
            return False
        self._wait += tokens
        return True

    def free_rows(self, rows: Sequence[int]) -> None:
        self.exact.free_rows(rows)
        self.lines.free_rows(rows)
        self._sinks = self._sinks * (self.lines.counts > 0)


def code_older(storages: Sequence[KVStorage], after: int = 0, *, all_due: bool = False) -> bool:
    """Do `LeveledKV.code_older` for several layers together, where entries are coded; whether any were.

    On CUDA it is one copy to the device and one launch for all of them, and nothing waits for it.
    """
    block = 1 if all_due else FLUSH
    asked = [own for own in storages if isinstance(own, LeveledKV) and (own._wait <= 0 or all_due)]
    work = [(own, counts) for own in asked if (counts := own._due(after, block)).any()]
    if work:
        firsts = [own._firsts() for own, _ in work]
        with ExitStack() as stack:
            for own, _ in work:
                for arena in (own.exact, own.lines.rungs[own.coding.generated]):
                    stack.enter_context(arena.table_in_turn())
            kernels.code_oldest(
                [own.lines.oldest(own.exact, first, counts) for (own, counts), first in zip(work, firsts, strict=True)]
            )
            for (own, counts), first in zip(work, firsts, strict=True):
                own.lines.rungs[own.coding.generated].note_changed(counts)
                own._note_coded(first, counts)
    for own in asked:
        own._wait = own._until_due()
    return bool(work)
