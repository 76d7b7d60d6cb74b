"""Top-p: each head keeps as many tokens as hold a share of its attention."""

from dataclasses import dataclass
from typing import Literal

from refreekv.core.budget import newest, smallest_mass
from refreekv.core.scores import attention_received
from refreekv.core.selection import Selection
from refreekv.policies.base import LayerView, Policy, ProbePlan, check_count, check_frozen_layers
from refreekv.policies.registry import register


@register("top-p")
@dataclass(frozen=True)
class TopP(Policy):
    """The fewest tokens that hold a share of the last window's attention, per KV head.

    Twilight's criterion (arXiv 2502.02770), used for eviction: with ``a`` the mean attention row of the
    last ``window`` queries and of the query heads that share a KV head, keep the smallest set ``S`` with
    ``sum_S a_j >= p sum_j a_j``, and the newest ``window`` tokens. Heads keep as many as they need.

    Differs on purpose: Twilight evicts nothing, it chooses anew for each query what to read.

    Parameters
    ----------
    p : float
        Share of the attention to keep, in (0, 1]. 1 evicts nothing.
    window : int
        Last queries that are looked through, and newest tokens that are always kept; these count as
        part of the set where they belong to it.
    frozen_layers : int or "all"
        Leading full-attention layers that are never pruned.
    """

    p: float = 0.95
    window: int = 32
    frozen_layers: int | Literal["all"] = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.p <= 1.0:
            raise ValueError(f"p is the share of attention to keep and must lie in (0, 1], got {self.p!r}")
        check_count("window", self.window, minimum=1)
        check_frozen_layers(self.frozen_layers)

    def probe_plan(self, n: int) -> ProbePlan:
        return ProbePlan(rows=0 if self.p == 1 else self.window)

    def select(self, view: LayerView) -> Selection | None:
        if self.p == 1:
            return None
        real = view.real_heads
        weights = attention_received(view.probe, view.keys.shape[1])
        keep = smallest_mass(weights, self.p, real) | newest(real, self.window)
        kept = weights.masked_fill(~keep, 0.0).sum(-1) / weights.sum(-1)
        return Selection(keep, metric=1.0 - kept.nan_to_num(1.0).mean(1))
