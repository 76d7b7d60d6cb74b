"""A load on several engines: what runs, what waits, how many engines it takes, what a token costs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refreekv.planner.engine import Engine, Job, Replica
from refreekv.planner.geometry import Geometry
from refreekv.planner.memory import Machine, Scenario, last
from refreekv.planner.trace import Request

PERCENTILES = (50, 90, 99)
MOST_GPUS = 1024


@dataclass(frozen=True)
class Speed:
    """How long a step takes: whichever is longer of moving bytes and computing, and a fixed part."""

    bandwidth: float  # bytes a second that the memory gives in practice
    flops: float  # operations a second that matrix products reach in practice
    overhead: float  # seconds of each step that neither explains: scheduling, launches, sampling

    def seconds(self, tokens: int, *, weight_bytes: float, kv_bytes: float, parameters: float) -> float:
        """Seconds of a step that computes ``tokens`` with all weights and reads ``kv_bytes``."""
        moving = (weight_bytes + kv_bytes) / self.bandwidth
        computing = 2 * parameters * tokens / self.flops
        return max(moving, computing) + self.overhead


@dataclass(frozen=True)
class Result:
    """What a simulation gave."""

    scenario: str  # how K/V was kept
    gpus: int  # engines, each with a copy of the model
    # requests with all their tokens; those that no engine can ever hold
    completed: int
    refused: int
    seconds: float  # from the first arrival to the last token
    # requests of one engine, over the time it works
    mean_running: float
    most_running: int
    mean_waiting: float
    pool_used: float  # mean share of the K/V pool, over the time an engine works
    preemptions: int  # times a request had to give its blocks back
    # seconds by percentile: to the first token, to the last, and a token in between
    first_token: dict[str, float]
    latency: dict[str, float]
    between_tokens: dict[str, float]
    output_tokens_per_second: float  # of all engines
    cost_per_million: float | None = None  # price of a million tokens, prompt and output, at the price given

    def to_dict(self) -> dict[str, Any]:
        """As plain types."""
        return asdict(self)


def engine(
    geometry: Geometry,
    machine: Machine,
    scenario: Scenario,
    speed: Speed,
    parameters: float,
    block_size: int = 16,
    running: int = 256,
) -> Engine:
    """An engine whose pool is what the machine has left.

    Raises
    ------
    ValueError
        No memory for a single block, or a model whose cache does not grow.
    """
    per_token = geometry.stored_per_token(scenario.number)
    if not per_token:
        raise ValueError("this model's cache does not grow with length, so there is no K/V pool to simulate")
    tokens = machine.chunk or 2048
    block = block_size * per_token
    pool = machine.available - tokens * machine.activation_bytes - running * machine.logit_bytes
    if pool < block:
        raise ValueError("the weights leave no memory for a K/V pool on this machine; see the table for what to change")

    def blocks_for(prompt: int, output: int, complete: bool) -> int:
        if not complete:
            held = geometry.kept_bytes(prompt, 0, 1.0, scenario.number if not scenario.compacts else None)
        else:
            held = geometry.kept_bytes(prompt, output, scenario.budget(prompt), scenario.number)
        return -(-held // block)

    def step_seconds(tokens: int, blocks: int) -> float:
        return speed.seconds(tokens, weight_bytes=machine.weights, kv_bytes=blocks * block, parameters=parameters)

    return Engine(int(pool // block), blocks_for, step_seconds, step_tokens=tokens, running=running)


def simulate(requests: Sequence[Request], one: Engine, gpus: int, *, name: str, price: float | None = None) -> Result:
    """Run a load on ``gpus`` equal engines; each request goes to the one with the fewest tokens to do."""
    replicas = [Replica(one) for _ in range(gpus)]
    for request in requests:
        for replica in replicas:
            replica.advance(request.arrival)
        min(replicas, key=lambda replica: replica.outstanding).add(request)
    for replica in replicas:
        replica.advance(math.inf)
    return _result(replicas, requests[0].arrival, name=name, price=price)


def gpus_needed(requests: Sequence[Request], one: Engine, *, target: float, percentile: int = 90) -> int | None:
    """The fewest engines with which that share of requests has its first token in ``target`` seconds."""

    def enough(count: int) -> bool:
        result = simulate(requests, one, count, name="")
        return not result.refused and result.first_token[f"p{percentile}"] <= target

    high = 1
    while not enough(high):
        high *= 2
        if high > min(MOST_GPUS, 2 * len(requests)):
            return None
    return last(high // 2, high, lambda count: not enough(count)) + 1


def _result(replicas: Sequence[Replica], start: float, *, name: str, price: float | None) -> Result:
    done = [job for replica in replicas for job in replica.finished]
    totals = [replica.totals for replica in replicas]
    busy = sum(total.busy for total in totals) or 1.0
    seconds = max((job.done or 0.0 for job in done), default=start) - start
    tokens = sum(job.request.prompt + job.request.output for job in done)
    output = sum(job.request.output for job in done)
    cost = None
    if price is not None and tokens:
        cost = price * len(replicas) * seconds / 3600 / tokens * 1e6
    return Result(
        name,
        len(replicas),
        len(done),
        sum(len(replica.refused) for replica in replicas),
        seconds,
        sum(total.running_seconds for total in totals) / busy,
        max(total.most_running for total in totals),
        sum(total.waiting_seconds for total in totals) / busy,
        sum(total.block_seconds for total in totals) / busy / replicas[0].engine.blocks,
        sum(total.preemptions for total in totals),
        _percentiles([_first(job) - job.request.arrival for job in done]),
        _percentiles([_last(job) - job.request.arrival for job in done]),
        _percentiles([(_last(job) - _first(job)) / (job.request.output - 1) for job in done if job.request.output > 1]),
        output / seconds if seconds else 0.0,
        cost,
    )


def _first(job: Job) -> float:
    assert job.first is not None
    return job.first


def _last(job: Job) -> float:
    assert job.done is not None
    return job.done


def _percentiles(values: list[float]) -> dict[str, float]:
    """Nearest-rank percentiles; nothing where there are no values."""
    ordered = sorted(values)
    return {
        f"p{percent}": ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.nan
        for percent in PERCENTILES
    }
