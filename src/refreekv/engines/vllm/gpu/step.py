"""One engine step on CUDA: whose queries are read by which kernel, and which of them a policy wants to see."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refreekv.engines.vllm.gpu.tracked import Tracked
from refreekv.kernels.paged import Rows

Ints = np.ndarray[Any, np.dtype[np.int32]]

EVERYTHING = np.iinfo(np.int32).max
"""A number of tokens that no row has."""


@dataclass(frozen=True)
class PromptPart:
    """Prompt tokens of one request that are computed for the first time in this step.

    Attributes
    ----------
    tracked : Tracked
        The request.
    row : int
        Row of the batch.
    index : Tensor
        int64, on the device: where the queries that the policy probes are among the step's tokens.
    spans : list of slice
        If the prompt ends with these and its queries are too many to wait for the step's end: which layers are decided
        about together, as soon as the last of them has run.
    seen : set of int
        Layers that have run.
    """

    tracked: Tracked
    row: int
    index: Tensor
    spans: list[slice] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)


@dataclass
class Step:
    """The plan of a step.

    Attributes
    ----------
    prompts : list of PromptPart
        What layers have to look at.
    ended : list of (str, Tracked)
        Requests whose prompts end in this step, or end again after a preemption.
    limits : Tensor or None
        int32 ``[R]``, on the device: the most tokens that vLLM's kernel may read of each row, for it writes what the
        kernel over kept entries then overwrites.
    stock : bool
        Whether vLLM's kernel has rows to read: tokens of prompts.
    parts : Tensor or None
        int32 ``[3, P]``, on the device: of parts of rows that the kernel over kept entries reads, the row, how many of
        its queries come before the part's, and how many the part has at most; None: all rows, whole.
    slots, numbered : Tensor
        int32 ``[most rows]``: each row's slot, and ``0, 1, …``.
    longest : int
        Most queries of a part.
    span : tuple of (int, int) or None
        Which of the step's queries the parts' are among.
    waiting : int
        Bytes of the queries of prompts that end in this step.
    """

    slots: Tensor
    numbered: Tensor
    longest: int
    limits: Tensor | None = None
    stock: bool = False
    parts: Tensor | None = None
    span: tuple[int, int] | None = None
    prompts: list[PromptPart] = field(default_factory=list)
    ended: list[tuple[str, Tracked]] = field(default_factory=list)
    waiting: int = 0

    def rows(self, common: Any) -> Rows | None:
        """The rows of the kernel over kept entries, given vLLM's common metadata; None if there are none."""
        starts, lengths = common.query_start_loc, common.seq_lens
        if self.parts is None:
            return whole_rows(starts, lengths, self.slots, self.numbered, self.longest)
        if not self.parts.shape[1]:
            return None
        row, skipped, most = self.parts
        at = row.long()
        begins = starts[at] + skipped
        stop = starts[at + 1]
        ends = torch.minimum(begins + most, stop)
        lengths = lengths[at] - (stop - ends)
        return Rows(begins, ends, lengths, row.contiguous(), self.slots[at], self.longest, span=self.span)


def whole_rows(starts: Tensor, lengths: Tensor, slots: Tensor, numbered: Tensor, longest: int) -> Rows:
    """Rows of a batch of which each is one part: views of what is at the same addresses in every step.

    Parameters
    ----------
    starts, lengths : Tensor
        int32 ``[R + 1]`` and ``[R]``: vLLM's, of queries and of sequences.
    slots, numbered : Tensor
        int32, ``R`` or more: each row's slot, and ``0, 1, …``.
    longest : int
        Most queries of a row.
    """
    count = len(lengths)
    return Rows(starts[:count], starts[1 : count + 1], lengths, numbered[:count], slots[:count], longest, whole=True)


def split_rows(starts: Ints, counts: Ints, prompts: Ints, most: int) -> tuple[Ints, Ints]:
    """Which queries of a batch's rows come after their prompts, in parts of at most ``most``.

    Parameters
    ----------
    starts, counts, prompts : ndarray
        ``[R]``: position of a row's first query, its queries, and its prompt's length.

    Returns
    -------
    parts, limits : ndarray
        As `Step` has them.
    """
    skipped = np.clip(prompts - starts, 0, counts)
    after = counts - skipped
    limits = np.where(skipped > 0, EVERYTHING, counts).astype(np.int32)
    parts = [
        (row, skipped[row] + at, min(most, after[row] - at))
        for row in np.flatnonzero(after)
        for at in range(0, after[row], most)
    ]
    return np.array(parts, dtype=np.int32).reshape(-1, 3).T.copy(), limits
