"""KeyDiff: keys unlike the others."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from refreekv.core.budget import newest
from refreekv.policies.base import LayerView, check_count
from refreekv.policies.fixed_budget import FixedBudget
from refreekv.policies.registry import register


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(FixedBudget):
    """Tokens whose keys point away from the mean direction of all keys.

    arXiv 2504.15364: ``score_j = -cos(k_j, mean_i k_i / ||k_i||)``, per KV head; needs no queries. The
    paper evicts block by block while the prompt comes in; here it is pruned once at its end.

    Parameters
    ----------
    size, ratio
        As in `FixedBudget`.
    recent : int
        Newest tokens that are always kept, within the budget. The paper's rule has none: 0.
    """

    recent: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("recent", self.recent)

    def scores(self, view: LayerView) -> Tensor:
        directions = functional.normalize(view.keys.float(), dim=-1)
        real = view.real_heads[..., None]
        # A sum points where the mean does.
        anchor = directions.masked_fill(~real, 0.0).sum(2, keepdim=True)
        return -(directions * functional.normalize(anchor, dim=-1)).sum(-1)

    def first(self, real: Tensor, budget: Tensor) -> Tensor:
        return newest(real, self.recent)
