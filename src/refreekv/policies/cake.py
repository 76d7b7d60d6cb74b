"""CAKE: SnapKV-like scores under budgets that the layers' attention patterns ask for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv.core.budget import fill_evenly, keep_best, newest, pool
from refreekv.core.scores import moments_of_rows
from refreekv.core.selection import Selection
from refreekv.policies.base import LayerView, ProbePlan, check_budget, check_count
from refreekv.policies.joint import JointPolicy, LayerScores
from refreekv.policies.registry import register
from refreekv.policies.snapkv import check_pooling


@register("cake")
@dataclass(frozen=True)
class CAKE(JointPolicy):
    """A budget shared out among layers by how spread out and how changing their attention is.

    arXiv 2503.12491. With ``a_hij`` the attention of the last ``window`` queries ``i`` to the keys ``j``
    before the window, a layer's preference is ``P = H^(1/tau1) V^(1/tau2)``: ``H = -sum_hij a log a`` says how
    spread out, ``V = sum_hj var_i(a_hij)`` how changing over time its attention is. Of all layers'
    budgets together, less their windows, layer ``l`` gets the share ``P_l / sum P``. It keeps the
    largest ``pool_j(mean_i a_ij + gamma var_i a_ij)``, averaged over the query heads that share a KV head,
    and the window.

    A layer whose share is more than it holds keeps everything, and what is over goes to the
    others in equal parts, as in the authors' code. The paper evicts in a cascade: whenever a
    layer was read, the earlier ones shrink to what their share then is. Shares only fall and
    each keeps the best of the same scores, so that what remains at the end is what is kept
    here, where everything is decided once, after the last layer; the cascade's lower peak
    during the prompt is not had.

    Parameters
    ----------
    size : int, optional
        Entries to keep a layer, on average over the layers, the window included. Exactly one of ``size``
        and ``ratio`` is given.
    ratio : float, optional
        Share to keep, in (0, 1], on average over the layers, never under the window.
    window : int
        Last queries that are looked through, and newest tokens that are kept.
    kernel, pooling
        As in `SnapKV`.
    tau1, tau2 : float
        The larger, the less the spread, and the change over time, count in a layer's share.
        The paper sets them for each model.
    gamma : float
        Weight of the variance in an entry's score.
    """

    size: int | None = None
    ratio: float | None = None
    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    tau1: float = 1.0
    tau2: float = 1.0
    gamma: float = 200.0

    def __post_init__(self) -> None:
        check_budget(self.name, self.size, self.ratio)
        check_count("window", self.window, minimum=1)
        check_pooling(self.kernel, self.pooling)
        for name in ("tau1", "tau2"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not self.gamma >= 0:
            raise ValueError(f"gamma must not be negative, got {self.gamma!r}")

    def probe_plan(self, n: int) -> ProbePlan:
        return ProbePlan(rows=self.window)

    def examine(self, view: LayerView) -> LayerScores:
        rows, real = view.probe, view.real_heads
        batch, heads, _, length = rows.shape
        kv_heads = real.shape[1]
        group = heads // kv_heads
        every = real.repeat_interleave(group, 1)
        before = every & ~newest(real, self.window).repeat_interleave(group, 1)
        mean, variance = (part.masked_fill(~before, 0.0) for part in moments_of_rows(rows, view.visible))
        # In double: sums over very many small terms.
        spread = -torch.xlogy(rows, rows).sum(2).masked_fill(~before, 0.0).double().sum((1, 2))
        change = variance.double().sum((1, 2))
        pooled = pool(mean + self.gamma * variance, every, self.kernel, self.pooling)
        scores = pooled.view(batch, kv_heads, group, length).mean(2)
        preference = spread.clamp_min(0.0) ** (1 / self.tau1) * change ** (1 / self.tau2)
        return LayerScores(scores, newest(real, self.window), real, preference)

    def allot(self, layers: Sequence[LayerScores]) -> list[Selection]:
        # Layers may be on several devices; budgets are counted on the first one's.
        where = layers[0].real.device
        held = torch.stack([layer.real.sum(-1).amax().to(where) for layer in layers])
        window = held.clamp_max(self.window)
        if self.size is not None:
            mean = held.clamp_max(self.size).double()
        else:
            assert self.ratio is not None
            mean = torch.maximum(held.double() * self.ratio, window.double())
        # A size under the window keeps the newest entries, as many as it says.
        total = ((mean - window).clamp_min(0.0).sum() + 1e-6).floor().long()
        preference = torch.stack([layer.preference[0].to(where) for layer in layers])
        share = (preference / preference.sum()).nan_to_num(1.0 / len(layers))
        wanted = (share * total + 1e-6).floor().long()
        budgets = fill_evenly(wanted, held - window, total) + torch.minimum(window, mean.long())
        return [_kept(layer, budget) for layer, budget in zip(layers, budgets, strict=True)]


def _kept(layer: LayerScores, budget: Tensor) -> Selection:
    every_head = budget.to(layer.scores.device).expand(layer.real.shape[:2])
    return Selection(keep_best(layer.scores, every_head, layer.real, layer.first))
