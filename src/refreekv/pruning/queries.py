"""The queries that a layer holds between calls, until its next pruning asks through them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refreekv.policies import ProbePlan
from refreekv.pruning.calls import AttentionCall, Queries
from refreekv.pruning.masks import visible_columns


@dataclass(frozen=True)
class HeldQueries:
    """Of the prompt so far, if more of it is to come, and of tokens generated since it ended.

    Attributes
    ----------
    prompt : Queries or None
        Those of the prompt's chunks that the policy's plan asks for.
    generated : tuple of Tensor
        ``[B, H, q, D]`` of each call since, where generated tokens are pruned, too.
    """

    prompt: Queries | None = None
    generated: tuple[Tensor, ...] = ()

    def with_chunk(self, call: AttentionCall, before: int, length: int, plan: ProbePlan) -> "HeldQueries":
        """These and what ``plan`` asks for of a prompt's chunk from logical length ``before`` to ``length``."""
        if not plan.count:
            return self
        # The last query in any case: it says how many there were.
        plan = replace(plan, rows=max(plan.rows, 1))
        valid = visible_columns(call.mask, call.query.shape[2] - 1, call.query.shape[0], length)
        known = Queries.of_call(call.query, before, valid, self.prompt).planned(plan)
        known = known.after(self.prompt).planned(plan)
        # A copy: a view would keep the whole chunk's queries alive.
        return replace(self, prompt=replace(known, states=known.states.clone()))

    def with_generated(self, query: Tensor) -> "HeldQueries":
        """These and those of the tokens just generated."""
        return replace(self, generated=(*self.generated, query))

    @property
    def generated_tokens(self) -> int:
        """How many generated tokens there are queries of."""
        return sum(query.shape[2] for query in self.generated)

    def cropped(self, tokens: int) -> "HeldQueries":
        """Without those of the last tokens, and of a prompt, which is not to go on."""
        if not self.generated:
            return HeldQueries()
        queries = torch.cat(self.generated, dim=2)
        return HeldQueries(generated=(queries[:, :, : max(queries.shape[2] - tokens, 0)],))

    def of_rows(self, indices: Sequence[int]) -> "HeldQueries":
        """Those of the rows ``indices`` of the batch."""
        prompt = None if self.prompt is None else self.prompt.of_rows(indices)
        return replace(self, prompt=prompt, generated=tuple(query[list(indices)] for query in self.generated))
