"""What the server tells Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from refreekv.serving.worker import Worker


class ServerMetrics(Collector):
    """Numbers of a worker, read when they are asked for."""

    def __init__(self, worker: Worker, weight_bytes: int):
        self._worker, self._weights = worker, weight_bytes

    def collect(self) -> Iterator[Metric]:
        """Give all metrics as they are now."""
        worker, counts, held = self._worker, self._worker.counts, self._worker.conversations
        latest = counts.latest
        yield _gauge("weight_bytes", "Bytes of the model's weights.", self._weights)
        places = {"memory": held.memory_bytes, "disk": held.disk_bytes}
        yield _by("cache_bytes", "Bytes of caches between requests.", "place", places)
        if held.keep_evicted is not None:
            kept = dict(zip(("memory", "disk"), held.keep_evicted.nbytes, strict=True))
            yield _by("evicted_bytes", "Bytes of what conversations read, kept on the host.", "place", kept)
        numbers = {"memory": held.count(in_memory=True), "disk": held.count(in_memory=False)}
        yield _by("conversations", "Conversations whose cache is kept.", "place", numbers)
        states = {"running": worker.running, "waiting": worker.waiting}
        yield _by("requests", "Requests on their way.", "state", states)
        if latest is not None:
            yield _gauge("latest_kept_share", "Kept share of the latest answer's prompt.", latest.budget)
            yield _gauge("latest_cache_bytes", "Bytes of the latest answer's cache.", latest.bytes_after)
            yield _gauge("latest_full_cache_bytes", "Bytes that a full cache would have had.", latest.bytes_before)
            if latest.verified is not None:
                yield _gauge(
                    "latest_step", "Step of the latest answer's verification, from 0 on.", latest.verified.step
                )
            if latest.remembered is not None and latest.remembered.restored is not None:
                yield _gauge(
                    "latest_restored", "Whether the latest turn was read over everything.", latest.remembered.restored
                )
            yield _gauge("latest_tokens_per_second", "Speed of the latest answer.", counts.tokens_per_second)
        yield _counter("prompt_tokens", "Tokens of prompts.", counts.prompt_tokens)
        yield _counter("reused_tokens", "Tokens of prompts that were in a cache already.", counts.reused_tokens)
        yield _counter("answer_tokens", "Tokens generated.", counts.answer_tokens)
        outcomes = CounterMetricFamily("refreekv_outcomes", "Requests by how they ended.", labels=["outcome"])
        for outcome, number in list(counts.outcomes.items()):
            outcomes.add_metric([outcome], number)
        yield outcomes


def text(metrics: ServerMetrics) -> bytes:
    """All metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    return generate_latest(registry)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"refreekv_{name}", about, value=value)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"refreekv_{name}", about, value=value)


def _by(name: str, about: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(f"refreekv_{name}", about, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
