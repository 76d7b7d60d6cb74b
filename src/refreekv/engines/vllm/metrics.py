"""Counters: from the scheduler's side to vLLM's log and to /metrics."""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from refreekv.engines.vllm.messages import PruningOutcome

COUNTS = {
    "pruned_requests": "Requests of which a part of the prompt was evicted.",
    "prompt_tokens": "Prompt tokens that a policy has looked at.",
    "blocks_returned": "KV cache blocks given back to the pool since prompts ended, those of coded answers among them.",
}

REASONS = ("policy", "rounding", "ended")
"""Why nothing of a request was evicted: the policy kept its whole prompt; what the policy gave up fills no
block; the request ended before its blocks could go back (after one token, or aborted)."""

_KEPT = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_METRIC = (1e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)


def _empty() -> dict[str, Any]:
    return {**dict.fromkeys(COUNTS, 0), **dict.fromkeys(map(_refusal, REASONS), 0), "kept_share": [], "metric": []}


def _refusal(reason: str) -> str:
    return f"refusals_{reason}"


@dataclass
class PruningStats(KVConnectorStats):
    """Counts and observations of an interval; ``data`` is plain, since it crosses processes."""

    data: dict[str, Any] = field(default_factory=_empty)

    def count_outcome(self, outcome: PruningOutcome, *, first: bool) -> None:
        """A prompt has ended; ``first``: not a repetition after a preemption."""
        if not first:
            return
        if any(group.freed for group in outcome.groups):
            self.data["pruned_requests"] += 1
        else:
            self.count_refusal("policy" if set(outcome.selected) == {outcome.prompt} else "rounding")
        self.data["prompt_tokens"] += outcome.prompt
        self.data["kept_share"].append(sum(outcome.kept) / (len(outcome.kept) * outcome.prompt))
        metrics = [metric for metric in outcome.metrics if metric is not None]
        if metrics:
            self.data["metric"].append(max(metrics))

    def count_refusal(self, reason: str) -> None:
        """Nothing of a request was evicted, for one of `REASONS`."""
        self.data[_refusal(reason)] += 1

    def count_blocks(self, blocks: int) -> None:
        """Blocks came back."""
        self.data["blocks_returned"] += blocks

    def reset(self) -> None:
        """Start over."""
        self.data = _empty()

    def aggregate(self, other: KVConnectorStats) -> "PruningStats":
        """Add another interval."""
        for name, value in other.data.items():
            self.data[name] = self.data[name] + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """One number each, for the log."""
        kept = self.data["kept_share"]
        numbers: dict[str, int | float] = {name: self.data[name] for name in COUNTS}
        numbers["refusals"] = sum(self.data[_refusal(reason)] for reason in REASONS)
        if kept:
            numbers["mean_kept_share"] = round(sum(kept) / len(kept), 4)
        return numbers

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.values())


class PruningMetrics(KVConnectorPromMetrics):
    """The Prometheus series ``vllm:refreekv_*``, one child an engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        made: dict[str, Any] = {
            name: self._counter_cls(name=f"vllm:refreekv_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTS.items()
        }
        made["kept_share"] = self._histogram_cls(
            name="vllm:refreekv_kept_share",
            documentation="Share of a request's prompt tokens that its blocks still hold, over all layers.",
            labelnames=labelnames,
            buckets=_KEPT,
        )
        made["metric"] = self._histogram_cls(
            name="vllm:refreekv_metric",
            documentation="The policy's criterion at what a request keeps (Uni-Metric loss), largest over layers.",
            labelnames=labelnames,
            buckets=_METRIC,
        )
        refusals = self._counter_cls(
            name="vllm:refreekv_refusals",
            documentation=(
                "Requests of which nothing was evicted: the policy kept all (policy), no block came free (rounding), "
                "or the request ended first (ended)."
            ),
            labelnames=[*labelnames, "reason"],
        )
        self._series = {
            engine: {
                **{name: metric.labels(*values) for name, metric in made.items()},
                **{_refusal(reason): refusals.labels(*values, reason) for reason in REASONS},
            }
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's counts."""
        series = self._series[engine_idx]
        for name in (*COUNTS, *map(_refusal, REASONS)):
            series[name].inc(transfer_stats_data[name])
        for name in ("kept_share", "metric"):
            for value in transfer_stats_data[name]:
                series[name].observe(value)
