"""The paper's method: position ranking, stopped by the Uni-Metric."""

from dataclasses import dataclass
from typing import Literal

from refreekv import kernels
from refreekv.core.selection import CutSelection, check_threshold, uni_metric_cut_of_worst
from refreekv.policies.base import LayerView, Policy, ProbePlan, check_count, check_flag, check_frozen_layers
from refreekv.policies.registry import register


@register("refreekv")
@dataclass(frozen=True)
class ReFreeKV(Policy):
    """Sinks and the newest tokens, as far back as the last prompt token still looks.

    arXiv 2502.16886: positions rank sinks first, then newest to oldest; each layer keeps
    the shortest prefix of that ranking whose Uni-Metric loss is within the threshold. What
    is dropped is one range after the sinks, the same for all heads of a layer.

    Parameters
    ----------
    threshold : float
        Share of the attention norm that may be lost, in [0, 1). 0 evicts nothing.
    sinks : int
        Leading tokens that are always kept.
    probe_rows : int
        Last prompt queries that are looked through (the paper's k).
    probe_reduce : "mean" or "max"
        ``"mean"`` measures the loss on the average of these rows, as the paper does. ``"max"``
        measures it on each row and lets none of them lose more than the threshold.
    frozen_layers : int or "all"
        Leading full-attention layers that are never pruned.
    norm_includes_sinks : bool
        True follows the paper's formula; False its released code, which leaves the
        sinks out of the norm and so keeps far more.
    """

    threshold: float = 0.01
    sinks: int = 4
    probe_rows: int = 1
    probe_reduce: Literal["mean", "max"] = "mean"
    frozen_layers: int | Literal["all"] = 2
    norm_includes_sinks: bool = False

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        check_count("sinks", self.sinks)
        check_count("probe_rows", self.probe_rows, minimum=1)
        if self.probe_reduce not in ("mean", "max"):
            raise ValueError(f"probe_reduce must be 'mean' or 'max', got {self.probe_reduce!r}")
        check_frozen_layers(self.frozen_layers)
        check_flag("norm_includes_sinks", self.norm_includes_sinks)

    def probe_plan(self, n: int) -> ProbePlan:
        return ProbePlan(rows=0 if self.threshold == 0 else self.probe_rows)

    def select(self, view: LayerView) -> CutSelection | None:
        if self.threshold == 0:
            return None
        measure = kernels.uni_metric_cut if self.probe_reduce == "mean" else uni_metric_cut_of_worst
        cut, loss = measure(
            view.mean_row if self.probe_reduce == "mean" else view.probe,
            sinks=self.sinks,
            threshold=self.threshold,
            includes_sinks=self.norm_includes_sinks,
            valid=view.valid,
        )
        return CutSelection(cut, self.sinks, metric=loss)
