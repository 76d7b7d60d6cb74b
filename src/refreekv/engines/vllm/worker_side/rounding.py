"""From what a policy keeps to what whole blocks can express. Pure functions, torch only.

A request's block table has one entry for every ``block`` tokens. Entries up to the prompt's
last, partly filled one (the tail, if the prompt does not end with a block) may be given up.
Rounding always keeps more than the policy asked for, never less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv.core.selection import CutSelection, Selection


@dataclass(frozen=True)
class GroupCut:
    """Entries ``start … stop - 1`` go; every other block stays as it is.

    Attributes
    ----------
    start, stop : int
        Table entries; equal if nothing goes.
    """

    start: int
    stop: int

    copies = 0

    @property
    def freed(self) -> int:
        """Table entries that go."""
        return self.stop - self.start

    def positions(self, prompt: int, block: int) -> Tensor:
        """The prompt positions that stay, ascending."""
        return torch.cat([torch.arange(self.start * block), torch.arange(self.stop * block, prompt)])


@dataclass(frozen=True)
class GroupSet:
    """Scattered positions stay: copied into full blocks in front, the tail as it is.

    Attributes
    ----------
    kept : Tensor
        Integer, ascending: the positions before the tail that stay, a multiple of the block size.
    tail : int
        Table entry of the tail.
    """

    kept: Tensor
    tail: int
    block: int

    @property
    def copies(self) -> int:
        """Blocks that hold the kept positions."""
        return len(self.kept) // self.block

    @property
    def start(self) -> int:
        """First table entry that goes."""
        return self.copies

    @property
    def stop(self) -> int:
        """First table entry behind those that go."""
        return self.tail

    @property
    def freed(self) -> int:
        """Table entries that go."""
        return self.tail - self.copies

    def positions(self, prompt: int, block: int) -> Tensor:
        """The prompt positions that stay, ascending."""
        return torch.cat([self.kept, torch.arange(self.tail * block, prompt)])


GroupDecision = GroupCut | GroupSet


def decide_group(selections: Sequence[Selection | CutSelection | None], prompt: int, block: int) -> GroupDecision:
    """What a group of layers gives up, given what each of them keeps.

    Parameters
    ----------
    selections : sequence
        One for each layer; None keeps everything. Batch size 1; KV heads are joined, since a
        block holds all heads of a token.
    prompt : int
        Prompt tokens, ``n``.
    block : int
        Tokens in a block.

    Returns
    -------
    GroupCut or GroupSet
        A cut where all layers have one: their common range, shrunk to whole blocks.
        Otherwise the union of what the layers keep, filled up with the newest other
        positions until it fills whole blocks; a cut of nothing if that saves no block.
    """
    nothing = GroupCut(0, 0)
    if any(selection is None for selection in selections):
        return nothing
    cuts = [selection for selection in selections if isinstance(selection, CutSelection)]
    if len(cuts) == len(selections):
        start = max(-(-cut.sinks // block) for cut in cuts)
        stop = min(int(cut.cut.item()) for cut in cuts) // block
        return GroupCut(start, stop) if stop > start else nothing
    keep = torch.zeros(prompt, dtype=torch.bool)
    for selection in selections:
        assert selection is not None
        keep |= keep_mask(selection, prompt)
    return _fill(keep, prompt // block, block) or nothing


def keep_mask(selection: Selection | CutSelection, prompt: int) -> Tensor:
    """The positions that any KV head keeps; boolean ``[n]`` on the CPU."""
    if isinstance(selection, CutSelection):
        return selection.mask(torch.ones(1, prompt, dtype=torch.bool, device=selection.cut.device))[0, 0].cpu()
    return selection.keep[0].any(0).cpu()


def _fill(keep: Tensor, tail: int, block: int) -> GroupSet | None:
    before = keep[: tail * block].clone()
    missing = -int(before.sum()) % block
    if missing:
        newest = (~before).nonzero()[:, 0].flip(0)[:missing]
        before[newest] = True
    kept = before.nonzero()[:, 0]
    return GroupSet(kept, tail, block) if len(kept) < tail * block else None
