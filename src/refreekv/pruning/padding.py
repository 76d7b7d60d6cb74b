"""Which stored columns are padding: of a prompt's beginning, what none of its queries saw."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refreekv.pruning.calls import AttentionCall
from refreekv.pruning.masks import leading_run, seen_columns


@dataclass(frozen=True)
class Padding:
    """Padding of the prompts that were read, and what is known of one whose chunks go on.

    Attributes
    ----------
    stored : Tensor or None
        Boolean ``[B, columns]``: padding that is still stored; None: there is none.
    start : int or None
        Logical length at which the prompt began that goes on; None: none does.
    seen : Tensor or None
        Boolean ``[B, columns]``: what queries of that prompt saw; None: everything.
    """

    stored: Tensor | None = None
    start: int | None = None
    seen: Tensor | None = None

    def with_chunk(self, call: AttentionCall, before: int, end: int) -> "Padding":
        """What is known after a prompt's chunk from logical length ``before`` to ``end``."""
        start = before if self.start is None else self.start
        if call.mask is None and self.seen is None:
            return replace(self, start=start)
        batch = call.query.shape[0]
        seen = seen_columns(call.mask, end - before, batch, end)
        if seen is None:
            seen = torch.ones(batch, end, dtype=torch.bool, device=call.query.device)
        earlier = self.seen
        if earlier is None:  # chunks without a mask saw everything
            earlier = torch.ones_like(seen[:, : before if before > start else 0])
        known = earlier.shape[1]
        return replace(self, start=start, seen=torch.cat([seen[:, :known] | earlier, seen[:, known:]], 1))

    def at_end(self) -> "Padding":
        """What is known once the prompt has ended."""
        if self.seen is None or self.start is None:
            return Padding(self.stored)
        return Padding(torch.cat([self.until(self.start, self.seen[:, : self.start]), self._hidden_run()], 1))

    def until(self, end: int, like: Tensor) -> Tensor:
        """Boolean ``[B, end]`` like another: the padding that is still stored."""
        if self.stored is None:
            return torch.zeros_like(like)
        return torch.nn.functional.pad(self.stored, (0, end - self.stored.shape[1]))

    def real_since(self, start: int) -> Tensor | None:
        """Boolean ``[B, columns]`` from ``start`` on, False at padding; None: there is none.

        Of the prompt that goes on, or of earlier ones, too.
        """
        if self.seen is None or self.start is None:
            return None
        run = self._hidden_run()
        if start < self.start:
            run = torch.cat([self.until(self.start, self.seen[:, : self.start])[:, start:], run], 1)
        return ~run[:, max(start - self.start, 0) :]

    def _hidden_run(self) -> Tensor:
        """Boolean ``[B, columns since start]``: the run at the prompt's beginning that nobody saw."""
        assert self.seen is not None
        assert self.start is not None
        return leading_run(~self.seen[:, self.start :], turn=self.start > 0)

    def cropped(self, length: int) -> "Padding":
        """Padding of the first columns; a prompt that is cropped is not to go on."""
        return Padding(None if self.stored is None else self.stored[:, :length].clone())

    def of_rows(self, indices: Sequence[int]) -> "Padding":
        """Padding of the rows ``indices`` of the batch."""
        stored, seen = (None if part is None else part[list(indices)] for part in (self.stored, self.seen))
        return replace(self, stored=stored, seen=seen)
