"""KNorm: keys with a small norm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv.core.budget import newest
from refreekv.policies.base import LayerView, check_count
from refreekv.policies.fixed_budget import FixedBudget
from refreekv.policies.registry import register


@register("knorm")
@dataclass(frozen=True)
class KNorm(FixedBudget):
    """Tokens whose keys have the smallest L2 norm: these tend to receive most attention.

    arXiv 2406.11430: ``score_j = -||k_j||``, per KV head; needs no queries.

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
        norms: Tensor = torch.linalg.vector_norm(view.keys.float(), dim=-1)
        return -norms

    def first(self, real: Tensor, budget: Tensor) -> Tensor:
        return newest(real, self.recent)
