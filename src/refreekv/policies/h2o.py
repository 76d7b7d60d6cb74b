"""H2O: the tokens that received most attention so far, and the newest."""

from dataclasses import dataclass

from torch import Tensor

from refreekv.core.budget import newest
from refreekv.core.scores import attention_received
from refreekv.policies.base import LayerView, ProbePlan, check_count
from refreekv.policies.fixed_budget import FixedBudget, check_share
from refreekv.policies.registry import register


@register("h2o")
@dataclass(frozen=True)
class H2O(FixedBudget):
    """Heavy hitters by attention received over the prompt, and the newest tokens, in equal parts.

    arXiv 2306.14048: ``score_j = sum_i a_ij``, the attention that key ``j`` gets from all queries
    ``i``; half of the budget goes to the newest tokens, half to the largest scores among the
    others. The sum is not divided by the number of queries that see a key, as in the paper,
    so old tokens have an advantage.

    Approximation: the sum runs over at most ``queries`` queries, spread evenly over the prompt
    (`ProbePlan.spread`), since all of them would need n x n numbers. Up to ``queries`` tokens it
    is exact. The paper adds up and evicts while decoding, too; here the prompt is pruned once.
    On a later turn the queries are that turn's. Query heads that share a KV head are added up.

    Parameters
    ----------
    size, ratio
        As in `FixedBudget`.
    recent_share : float
        Share of the budget that goes to the newest tokens, in [0, 1]; at least one token.
    queries : int
        Most queries that are added up.
    """

    recent_share: float = 0.5
    queries: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("recent_share", self.recent_share)
        check_count("queries", self.queries, minimum=1)

    def probe_plan(self, n: int) -> ProbePlan:
        return ProbePlan(spread=self.queries)

    def scores(self, view: LayerView) -> Tensor:
        return attention_received(view.probe, view.keys.shape[1])

    def first(self, real: Tensor, budget: Tensor) -> Tensor:
        return newest(real, (budget.double() * self.recent_share + 1e-6).floor().long().clamp_min(1))
