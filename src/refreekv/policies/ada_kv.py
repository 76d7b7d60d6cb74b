"""Ada-KV: heads that need more get more, around any scorer."""

import contextlib
from dataclasses import dataclass, replace

from torch import Tensor

from refreekv.core.budget import keep_best_of_layer
from refreekv.core.selection import Selection
from refreekv.policies.base import LayerView, ProbePlan
from refreekv.policies.fixed_budget import FixedBudget, check_share
from refreekv.policies.registry import create, register


@register("ada-kv")
@dataclass(frozen=True)
class AdaKV(FixedBudget):
    """A layer's budget shared out among its KV heads by the scores, each head sure of a part.

    arXiv 2407.11550: the heads' budgets are added up, and the largest scores of all heads together are
    kept, so heads with spread-out attention keep more than those with a few peaks. Each head keeps a
    ``safeguard`` share of its own budget in any case, and what the scorer always keeps.

    Parameters
    ----------
    size : int, optional
        Entries to keep, on average over the KV heads. Exactly one of ``size`` and ``ratio`` is given.
    ratio : float, optional
        Share to keep, in (0, 1], on average over the KV heads.
    scorer : str or FixedBudget
        Where the scores come from: the name of another fixed-budget policy, or one with settings of
        its own, whose budget is not used. Scores of different heads are compared, so they should be of
        one scale, as attention is. Of `pyramidkv` the scores are used, not the budgets.
    safeguard : float
        Share of its budget that each head is sure of, in [0, 1].
    """

    scorer: str | FixedBudget = "snapkv"
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("safeguard", self.safeguard)
        self.around()

    def around(self) -> FixedBudget:
        """The scorer, under the budget of this policy."""
        scorer: object = self.scorer
        if isinstance(scorer, str) and scorer != self.name:
            given = {"ratio": self.ratio} if self.size is None else {"size": self.size}
            # A policy without a budget refuses one: none of those is a scorer.
            with contextlib.suppress(TypeError):
                scorer = create(scorer, **given)
        if not isinstance(scorer, FixedBudget) or isinstance(scorer, AdaKV):
            raise ValueError(f"scorer must be another policy with a fixed budget, or its name, got {self.scorer!r}")
        return replace(scorer, size=self.size, ratio=self.ratio)

    def probe_plan(self, n: int) -> ProbePlan:
        return self.around().probe_plan(n)

    def scores(self, view: LayerView) -> Tensor:
        return self.around().scored(view)

    def at_least(self) -> int:
        return self.around().at_least()

    def first(self, real: Tensor, budget: Tensor) -> Tensor:
        return self.around().first(real, budget)

    def select(self, view: LayerView) -> Selection:
        scores, real = self.scores(view), view.real_heads
        budget = self.budget(view, real)
        first = self.first(real, budget)
        return Selection(keep_best_of_layer(scores.expand_as(real), budget, real, first, self.safeguard))
