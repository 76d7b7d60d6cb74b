"""Expected Attention: what queries like the last ones would look at, weighed by the values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv.core.budget import newest
from refreekv.core.scores import expected_attention
from refreekv.core.selection import sink_mask
from refreekv.policies.base import LayerView, ProbePlan, check_count
from refreekv.policies.fixed_budget import FixedBudget
from refreekv.policies.registry import register


@register("expected-attention")
@dataclass(frozen=True)
class ExpectedAttention(FixedBudget):
    """Attention expected from normally distributed queries, times the norm of the values.

    arXiv 2510.00636: with queries ``~ N(mu, S)`` the expected unnormalised attention has the closed form
    ``z_j = exp(mu k_j / sqrt(D) + k_j S k_j / 2D)``, and ``score_j = z_j / sum_i z_i * ||v_j||``, averaged over
    the query heads that share a KV head.

    Differs on purpose in where the distribution comes from: the paper takes mean and
    covariance of all of the prompt's queries before rotation and rotates them to the next 512
    positions. Which rotation a model applies is nothing a policy can know, so mean and covariance
    here are those of the last ``window`` queries, rotated as they are: the queries to come are
    next to them. A softcap on logits (Gemma 2) is not followed.

    Parameters
    ----------
    size, ratio
        As in `FixedBudget`.
    window : int
        Last queries that mean and covariance are taken of.
    sinks : int
        Leading tokens that are always kept, within the budget. The last token has precedence.
    epsilon : float
        Added to the expected attention before it is multiplied with the norm of the values.
    """

    window: int = 128
    sinks: int = 4
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, minimum=1)
        check_count("sinks", self.sinks)
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon!r}")

    def probe_plan(self, n: int) -> ProbePlan:
        return ProbePlan(rows=self.window, queries=True)

    def scores(self, view: LayerView) -> Tensor:
        if view.queries is None:
            raise ValueError("expected-attention asks for queries in its probe_plan, and the view has none")
        asked = None
        if view.visible is not None:
            # A query that sees nothing stands for padding.
            asked = view.visible.any(-1)
        expected = expected_attention(view.queries, view.keys, real=view.real_heads, asked=asked)
        norms: Tensor = torch.linalg.vector_norm(view.values.float(), dim=-1)
        return (expected + self.epsilon) * norms

    def at_least(self) -> int:
        return self.sinks + 1

    def first(self, real: Tensor, budget: Tensor) -> Tensor:
        sinks = sink_mask(real, self.sinks)
        return newest(real, 1) | (sinks & (budget > self.sinks)[..., None])
