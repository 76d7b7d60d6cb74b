"""Packed lines of coded entries: one arena for each rung of a ladder of number formats.

The lines of a rung are in the order of the tokens, and two bits an entry say which rung it is in; not so of entries
behind the last one that somebody gave a rung, which are in the rung of what is generated.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache, partial, reduce
from operator import add
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.packed_lines import FACTOR_BYTES, PackedFormat
from refreekv.kernels.table import LENGTH
from refreekv.storage.arena import KVArena, Span, as_lists, tell, together
from refreekv.storage.coding import ROOM, Coding, room_for
from refreekv.storage.hosted import HostArena
from refreekv.storage.members import Array, Counts, Lengths, Members, counted
from refreekv.storage.ragged import RaggedKV
from refreekv.storage.recoding import recoded
from refreekv.storage.runs import each, flat, runs, starts_of

if TYPE_CHECKING:
    from refreekv.storage.unfinished import UnfinishedKV


class Packing(NamedTuple):
    """What goes to a rung: of each segment so many columns of a list int32 ``[.]``, from a place on."""

    rung: int
    lists: Sequence[Tensor]
    starts: Sequence[int]
    counts: Lengths
    end: int

    @property
    def spans(self) -> list[Span]:
        """How `kernels.gather` is told about them, and all columns from the end."""
        where = zip(self.lists, self.starts, flat(self.counts), strict=True)
        return [
            (own.data_ptr() + start * own.element_size(), n, 0) if n else (0, 0, self.end) for own, start, n in where
        ]

    @property
    def columns(self) -> Tensor:
        """All of them, one segment after the other."""
        where = zip(self.lists, self.starts, flat(self.counts), strict=True)
        return torch.cat([own[start : start + n] for own, start, n in where])


class CodedLines:
    """The coded entries of a layer, one segment per (row, KV head); `extend` and `free_rows` change them in place.

    Attributes
    ----------
    rungs : tuple of KVArena
        Of each rung, lines (``keys``, uint8 ``[lines, line_bytes]``) and factors (``values``, float16 ``[lines, 2]``).
    members : Members
        The rungs of each segment's first entries; none with one rung.
    coding : Coding
        How entries are coded.
    """

    def __init__(self, rungs: Sequence[KVArena], members: Members, coding: Coding):
        self.rungs, self.members, self.coding = tuple(rungs), members, coding

    @classmethod
    def to_pack(
        cls,
        listed: Sequence[Tensor],
        counts: Lengths,
        coding: Coding,
        end: int,
        by_rung: Sequence[Lengths] | None = None,
        members: Members | None = None,
    ) -> "tuple[Self, list[Packing]]":
        """Storage for entries of dense ``[B, H_kv, n, D]``, and what `pack` is to write there.

        Its arenas have no tables until `storage.arena.tell`.

        Parameters
        ----------
        listed : sequence of Tensor
            Columns of each segment, int32, the first ``counts``: those of the first rung first, ascending in each.
        counts : list of tuple of int
            Entries of each row's KV heads.
        coding : Coding
            How to code them.
        end : int
            Columns that may be listed.
        by_rung, members : optional
            Counts of each rung alone, and the rungs of all. None: all have that of what is generated.
        """
        device = listed[0].device
        if members is None or by_rung is None:
            members, by_rung = Members.none(counts, device), _all_in(coding.generated, len(coding.forms), counts)
        arenas, work, starts = [], [], [0] * len(listed)
        for rung, (form, own) in enumerate(zip(coding.forms, by_rung, strict=True)):
            arenas.append(_lines(form, own, device, room_for(counts) if rung == coding.generated else 0))
            if any(map(any, own)):
                work.append(Packing(rung, listed, starts, own, end))
            starts = list(map(add, starts, flat(own)))
        return cls(arenas, members, coding), work

    def pack(
        self,
        keys: Tensor,
        values: Tensor,
        work: "Sequence[Packing]",
        told: Sequence[Tensor],
        end: int,
        read: "UnfinishedKV | None" = None,
    ) -> None:
        """Code entries of dense ``[B, H_kv, n, D]`` of one type, as `to_pack` says it.

        ``told`` are the spans of the ``work`` on the device; ``read`` is the prompt as it was coded while it was read:
        entries that go to a rung of its format keep their lines.
        """
        by_rung = {job.rung: (where, job.counts) for job, where in zip(work, told, strict=True)}
        if not by_rung:
            return
        # Nothing goes to other rungs: spans of theirs are not read.
        nothing = told[0], [(0,)]
        with ExitStack() as stack:
            given = []
            for rung, (form, arena) in enumerate(zip(self.coding.forms, self.rungs, strict=True)):
                where, counts = by_rung.get(rung, nothing)
                table, longest = stack.enter_context(arena.table_in_turn()), max(map(max, counts))
                given.append(
                    kernels.Transfer(keys, values, None, table, form, self.coding.maps, where, end, longest, None)
                )
            kernels.pack_rungs(given)
        for job in work:
            if read is not None and read.form == self.coding.forms[job.rung]:
                read.move_lines(job.columns, job.counts, self.rungs[job.rung])

    # -- what they are ------------------------------------------------------------------------

    @property
    def lengths(self) -> list[tuple[int, ...]]:
        """Entries of each row's KV heads, in whatever rung."""
        return as_lists(self.counts)

    @property
    def counts(self) -> Array:
        """The same, int64 ``[B, H_kv]``, not to be changed."""
        return reduce(np.add, [arena.counts for arena in self.rungs])

    @property
    def nbytes(self) -> int:
        """Bytes that they really hold on to: lines, room, rungs of entries, and the rows' means."""
        arenas = sum(arena.nbytes for arena in self.rungs)
        return arenas + self.members.nbytes + sum(part.nbytes for part in self.coding.means)

    def row_nbytes(self, row: int) -> int:
        """Bytes of one row's."""
        arenas = sum(arena.row_nbytes(row) for arena in self.rungs)
        return arenas + self.members.row_nbytes(row) + sum(part[row].nbytes for part in self.coding.means)

    @property
    def held(self) -> list[tuple[PackedFormat, KVArena]]:
        """The rungs that anything is in."""
        pairs = zip(self.coding.forms, self.rungs, strict=True)
        return [(form, arena) for form, arena in pairs if any(map(any, arena.lengths))]

    def rung_of_each(self) -> Tensor:
        """The rung of each entry in the order of the tokens: uint8 ``[entries]``, one segment after another."""
        coded, known = flat(self.lengths), flat(self.members.counts)
        if coded == known:
            return self.members.rungs()
        device = self.rungs[0].device
        found = torch.full((sum(coded),), self.coding.generated, dtype=torch.uint8, device=device)
        found[runs(starts_of(coded), known, device)] = self.members.rungs()
        return found

    def decode_into(self, target: RaggedKV, places: Tensor) -> None:
        """Write all entries, in full precision, to flat storage: to ``places`` of their own segments, int32."""
        if len(self.rungs) > 1:
            places = places[self.rung_of_each().argsort(stable=True)]
        into = KVArena(target.keys, target.values, target.lengths, [0] * len(target.lengths), told=False)
        told, work, at = list[Sequence[Span]](), [], 0
        for form, arena in zip(self.coding.forms, self.rungs, strict=True):
            counts = flat(arena.lengths)
            if count := sum(counts):
                told.append(spans(places[at : at + count], counts, 0))
                work.append((form, arena, max(counts)))
            at += count
        for (form, arena, longest), where in zip(work, tell([into], told), strict=True):
            with arena.table_in_turn() as lines:
                kernels.unpack_lines(
                    target.keys, target.values, lines, form, self.coding.maps, where, end=0, longest=longest,
                    target=into.table,
                )  # fmt: skip

    # -- others made of them --------------------------------------------------------------------

    def of_rows(self, indices: Sequence[int]) -> Self:
        """Those of the rows ``indices``, in that order; rows may repeat."""
        rungs = [arena.select_rows(indices) for arena in self.rungs]
        return type(self)(rungs, self.members.of_rows(indices), self.coding.of_rows(indices))

    def truncated(self, counts: Lengths) -> Self:
        """The first so many of each segment."""
        by_rung, members, held = [arena.lengths for arena in self.rungs], self.members, self.lengths
        if len(by_rung) == 1:
            by_rung = [counts]
        elif counts != held:
            left = self.rung_of_each()[runs(starts_of(flat(held)), flat(counts), self.rungs[0].device)]
            by_rung, members = counted(left, counts, len(by_rung)), Members.of(left, counts)
        rungs = [arena.truncate(own) for arena, own in zip(self.rungs, by_rung, strict=True)]
        return type(self)(rungs, members, self.coding)

    def kept(self, stay: Tensor, asked: Tensor | None, counts: Lengths) -> Self:
        """Those of the numbers ``stay`` among all entries, ``counts`` of each segment.

        ``asked`` are the rungs that they are to have, uint8 ``[entries]``: those that are in a wider one are coded
        anew from what their code stands for. None: all stay where they are.
        """
        if len(self.rungs) == 1:
            return type(self)(
                [self.rungs[0].taken(stay, counts)], Members.none(counts, self.rungs[0].device), self.coding
            )
        hosted = self.in_host_memory
        made = type(self)(*recoded(self, stay, asked, counts), self.coding)
        if hosted:
            made.move_to_host()
        return made

    # -- in place -------------------------------------------------------------------------------

    def oldest(self, source: KVArena, firsts: Array, counts: Array) -> kernels.Oldest:
        """What `kernels.code_oldest` is told to code so many of each segment's exact entries, from the first ones on.

        They are coded as generated ones, for which there is room then.
        """
        self.coding = coding = self.coding.of_type(source.types[0])
        arena, form = self.rungs[coding.generated], coding.forms[coding.generated]
        arena.make_room(counts, ROOM)
        told = torch.from_numpy(np.stack([firsts, counts, arena.counts]).reshape(3, -1))
        return kernels.Oldest(source.keys, source.values, source.table, arena.table, form, coding.maps, told)

    def extend(self, source: KVArena, firsts: Counts, counts: Lengths, asked: Tensor) -> None:
        """Code so many of each segment's exact entries, from the first ones on, behind the lines that are here.

        ``asked`` are their rungs, uint8 ``[entries]``.
        """
        device = source.keys.device
        self.coding = coding = self.coding.of_type(source.types[0])
        numbers = runs(flat(firsts), flat(counts), device).int()[asked.argsort(stable=True)]
        self.members = self.members.extended(self.rung_of_each(), self.lengths, asked, counts)
        at, told, work = 0, list[Sequence[Sequence[int]]](), []
        for rung, own in enumerate(counted(asked, counts, len(self.rungs))):
            if count := sum(map(sum, own)):
                starts = flat(self.rungs[rung].lengths)
                told += [spans(numbers[at : at + count], flat(own), 0), [starts, flat(own)]]
                self.rungs[rung].make_room(np.array(own))
                work.append((rung, own))
                at += count
        # What is told before anything is launched stays alive until all is.
        sent = iter(together(told, device))
        with ExitStack() as stack:
            exact, given = stack.enter_context(source.table_in_turn()), []
            for rung, own in work:
                arena, where, (starts, more) = self.rungs[rung], next(sent), next(sent)
                table, longest = stack.enter_context(arena.table_in_turn()), max(map(max, own))
                table[:, LENGTH].add_(more)  # one launch, where ``+=`` writes the column back once more
                arena.note_changed(np.array(own))
                given.append(
                    kernels.Transfer(
                        source.keys, source.values, exact, table, coding.forms[rung], coding.maps, where, 0, longest,
                        starts,
                    )
                )  # fmt: skip
            kernels.pack_rungs(given)

    @property
    def in_host_memory(self) -> bool:
        """Whether lines are in host memory, from where kernels of the device read them."""
        return isinstance(self.rungs[0], HostArena)

    def move_to_host(self) -> None:
        """Move all lines to host memory.

        Raises
        ------
        NoRoomError
            The system gives no more memory; all are where they were.
        """
        if not self.in_host_memory:
            self.rungs = tuple(HostArena.moved(arena) for arena in self.rungs)

    def move_to_device(self) -> None:
        """Move all lines from host memory to the device."""
        if self.in_host_memory:
            self.rungs = tuple(arena.back() if isinstance(arena, HostArena) else arena for arena in self.rungs)

    def free_rows(self, rows: Sequence[int]) -> None:
        """Give the memory of finished rows back."""
        for arena in self.rungs:
            arena.free_rows(rows)
        freed = self.rungs[0].freed
        left = [(0,) * len(own) if gone else own for own, gone in zip(self.members.counts, freed, strict=True)]
        self.members = self.members.truncated(left)


def spans(index: Tensor, counts: Sequence[int], end: int) -> list[Span]:
    """How `kernels.gather` is told about the entries that an int32 list names of each segment, and all from ``end``."""
    address, size = index.data_ptr(), index.element_size()
    # Nothing listed is a gap from the start: an empty part has no address to look at.
    return [
        (address + start * size, n, 0) if n else (0, 0, end) for start, n in zip(starts_of(counts), counts, strict=True)
    ]


def sums(parts: Sequence[Sequence[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """Counts of several storages, added up."""
    return list(reduce(partial(each, add), parts))


def _lines(form: PackedFormat, lengths: Lengths, device: torch.device, room: int) -> KVArena:
    """An arena for so many packed lines, which are still to be written, as is its table."""
    return KVArena.like(*_like(form.line_bytes, device), lengths, growth=room, told=False)


@lru_cache(maxsize=32)
def _like(line_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """No line and no factors."""
    with torch.inference_mode(False):
        lines = torch.empty(0, line_bytes, dtype=torch.uint8, device=device)
        return lines, torch.empty(0, FACTOR_BYTES // 2, dtype=torch.float16, device=device)


def _all_in(rung: int, rungs: int, counts: Lengths) -> list[Lengths]:
    """Counts of each rung where all entries are in one."""
    nothing = [(0,) * len(row) for row in counts]
    return [counts if number == rung else nothing for number in range(rungs)]
