"""The released README's variant: rank by attention received, stop by the Uni-Metric."""

from dataclasses import dataclass
from typing import Literal

from refreekv.core.scores import attention_received
from refreekv.core.selection import Selection, check_threshold, uni_metric_keep
from refreekv.policies.base import LayerView, Policy, ProbePlan, check_count, check_flag, check_frozen_layers
from refreekv.policies.registry import register


@register("refreekv-heavy-hitter")
@dataclass(frozen=True)
class ReFreeKVHeavyHitter(Policy):
    """Tokens that the last 8 queries attend to most, stopped by the last row's norm.

    The sample command in the README of the code released with arXiv 2502.16886: sinks and
    the last positions stay, the others rank by attention received from the last queries
    (as in H2O, arXiv 2306.14048), and the Uni-Metric of the last query's row says how many
    are kept. Each KV head keeps positions of its own, all heads equally many.

    Parameters
    ----------
    threshold : float
        Share of the last row's norm that may be lost, in [0, 1). 0 evicts nothing.
    sinks : int
        Leading tokens that are always kept.
    recent : int
        Trailing tokens that are always kept.
    probe_rows : int
        Last prompt queries whose attention is added up for the ranking.
    frozen_layers : int or "all"
        Leading full-attention layers that are never pruned.
    norm_includes_sinks : bool
        Whether the norm covers the sinks, as in `ReFreeKV`.
    """

    threshold: float = 0.05
    sinks: int = 4
    recent: int = 8
    probe_rows: int = 8
    frozen_layers: int | Literal["all"] = 2
    norm_includes_sinks: bool = False

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        check_count("sinks", self.sinks)
        check_count("recent", self.recent)
        check_count("probe_rows", self.probe_rows, minimum=1)
        check_frozen_layers(self.frozen_layers)
        check_flag("norm_includes_sinks", self.norm_includes_sinks)

    def probe_plan(self, n: int) -> ProbePlan:
        return ProbePlan(rows=0 if self.threshold == 0 else self.probe_rows)

    def select(self, view: LayerView) -> Selection | None:
        if self.threshold == 0:
            return None
        rows = view.probe
        keep, loss = uni_metric_keep(
            rows[:, :, -1],
            attention_received(rows, kv_heads=view.keys.shape[1]),
            sinks=self.sinks,
            recent=self.recent,
            threshold=self.threshold,
            includes_sinks=self.norm_includes_sinks,
            valid=view.real,
        )
        return Selection(keep, metric=loss)
