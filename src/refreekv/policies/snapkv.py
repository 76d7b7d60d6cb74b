"""SnapKV: what the last queries look at, smoothed."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from refreekv.core.budget import newest, pool
from refreekv.policies.base import LayerView, ProbePlan, check_count
from refreekv.policies.fixed_budget import FixedBudget
from refreekv.policies.registry import register


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(FixedBudget):
    """Pooled attention of the last window of queries; the window itself stays.

    arXiv 2404.14469: ``score_j = pool_j(mean_i a_ij)`` over the last ``window`` queries ``i``, for the
    keys ``j`` before the window; pooling keeps the neighbours of what is looked at. Pooled per
    query head, then averaged over the query heads that share a KV head.

    Parameters
    ----------
    size : int, optional
        Entries to keep, the window included. Exactly one of ``size`` and ``ratio`` is given. A
        size under the window keeps the newest ``size`` tokens.
    ratio : float, optional
        Share to keep, in (0, 1], never under the window.
    window : int
        Last queries that are looked through, and newest tokens that are kept.
    kernel : int
        Tokens of the pooled neighbourhood; odd. 1 pools nothing.
    pooling : "avg" or "max"
        Mean or largest of the neighbourhood.
    """

    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, minimum=1)
        check_pooling(self.kernel, self.pooling)

    def probe_plan(self, n: int) -> ProbePlan:
        return ProbePlan(rows=self.window)

    def scores(self, view: LayerView) -> Tensor:
        received = view.probe.mean(2)
        batch, heads, length = received.shape
        kv_heads = view.keys.shape[1]
        real = view.real_heads
        before = (real & ~newest(real, self.window)).repeat_interleave(heads // kv_heads, 1)
        # The window's columns are zeros to the pooling, as what is beyond the end.
        pooled = pool(
            received.masked_fill(~before, 0.0),
            real.repeat_interleave(heads // kv_heads, 1),
            self.kernel,
            self.pooling,
        )
        return pooled.view(batch, kv_heads, heads // kv_heads, length).mean(2)

    def at_least(self) -> int:
        return self.window

    def first(self, real: Tensor, budget: Tensor) -> Tensor:
        return newest(real, self.window)


def check_pooling(kernel: object, pooling: object) -> None:
    """Raise ValueError unless ``kernel`` is odd and ``pooling`` is ``"avg"`` or ``"max"``."""
    check_count("kernel", kernel, minimum=1)
    assert isinstance(kernel, int)
    if kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, to have a token in its middle, got {kernel!r}")
    if pooling not in ("avg", "max"):
        raise ValueError(f"pooling must be 'avg' or 'max', got {pooling!r}")
