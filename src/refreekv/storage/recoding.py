"""Coded entries that stay when a policy decides again: moved to the rungs that they go to, in few launches.

How many launches, and what the host waits for, does not depend on how many entries there are, or on how many went from
which rung to which.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.packed_lines import PackedFormat
from refreekv.storage.arena import KVArena, growth_for, tell, together
from refreekv.storage.coding import room_for
from refreekv.storage.members import Lengths, Members, counted
from refreekv.storage.runs import flat, runs, starts_of

if TYPE_CHECKING:
    from refreekv.storage.coded_lines import CodedLines


def recoded(lines: "CodedLines", stay: Tensor, asked: Tensor | None, counts: Lengths) -> tuple[list[KVArena], Members]:
    """The arenas and members of the entries of the numbers ``stay`` among all, ``counts`` of each segment.

    ``asked`` are the rungs that they are to have, uint8 ``[entries]``; None: all stay where they are.
    """
    arenas, forms, device = lines.rungs, lines.coding.forms, stay.device
    old = lines.rung_of_each()
    # Where each coded entry's line is among those of its rung's arena, room between segments counted.
    places = runs(
        [start for arena in arenas for start in starts_of(flat(arena.capacities))],
        [n for arena in arenas for n in flat(arena.lengths)],
        device,
    )
    line = torch.empty_like(places).index_copy_(0, old.argsort(stable=True), places)
    came, line = old[stay], line[stay]
    rungs = came if asked is None else torch.minimum(came, asked)
    by_rung = counted(rungs, counts, len(arenas))
    order = rungs.argsort(stable=True)
    came, line = came[order], line[order]
    firsts, at, made = [], 0, []
    for rung, own in enumerate(by_rung):
        firsts.append([at + start for start in starts_of(flat(own))])
        at += sum(map(sum, own))
        growth = max(growth_for(own), room_for(counts) if rung == lines.coding.generated else 0)
        made.append(_alike(arenas[rung], forms[rung], own, growth))
    tell(made)
    sources, starts = together(
        [[(arena.keys.data_ptr(), arena.values.data_ptr(), len(arena.keys), form.line_bytes)
          for arena, form in zip(arenas, forms, strict=True)], firsts], device,
    )  # fmt: skip
    for rung, (arena, own) in enumerate(zip(made, by_rung, strict=True)):
        if longest := max(map(max, own)):
            with ExitStack() as stack:
                # Lines are read by address: what another stream still writes is waited for.
                for other in arenas:
                    stack.enter_context(other.table_in_turn())
                table = stack.enter_context(arena.table_in_turn())
                kernels.recode_lines(
                    kernels.Moved(table, sources, came, line, starts[rung], forms, rung, lines.coding.maps, longest)
                )
    return made, Members.of(rungs, counts)


def _alike(arena: KVArena, form: PackedFormat, lengths: Sequence[tuple[int, ...]], growth: int) -> KVArena:
    """An arena on the device for so many lines, with room for others; they are still to be written, as is its table."""
    like = torch.empty(0, form.line_bytes, dtype=torch.uint8, device=arena.device)
    values = arena.values.new_empty(0, 2, device=arena.device)
    return KVArena.like(like, values, lengths, growth, arena.freed, told=False)
