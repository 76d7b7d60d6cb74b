"""TOVA: what the last query looks at."""

from dataclasses import dataclass

from torch import Tensor

from refreekv.policies.base import LayerView, ProbePlan
from refreekv.policies.fixed_budget import FixedBudget
from refreekv.policies.registry import register


@register("tova")
@dataclass(frozen=True)
class TOVA(FixedBudget):
    """The tokens that the last query attends to most, the same for all heads.

    arXiv 2401.06104: ``score_j = mean_h a_h,nj``, the last query's attention averaged over the query
    heads of a layer. The last token stays. The paper evicts one token at each step; here the
    prompt is pruned once, by its last query.

    Parameters
    ----------
    size, ratio
        As in `FixedBudget`.
    """

    def probe_plan(self, n: int) -> ProbePlan:
        return ProbePlan(rows=1)

    def scores(self, view: LayerView) -> Tensor:
        return view.probe[:, :, -1].mean(1, keepdim=True)
