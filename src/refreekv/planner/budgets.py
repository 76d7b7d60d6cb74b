"""What share of a prompt policies keep: measured, by prompt length, with the source of each number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refreekv.planner import measurements


@dataclass(frozen=True)
class Bucket:
    """Kept shares of prompts whose length lies in ``[start, stop)``."""

    # prompt tokens
    start: int
    stop: int
    n: int  # prompts measured
    # mean share, and its 95% bootstrap interval
    mean: float
    low: float
    high: float
    most: float  # the largest share of any prompt


@dataclass(frozen=True)
class Measured:
    """What a policy kept on one model."""

    policy: str  # the policy's shortest specification
    model: str  # the model's name
    source: dict[str, Any]  # command, date, machine, versions, number of task families
    buckets: tuple[Bucket, ...]  # by prompt length

    def bucket(self, prompt: int) -> Bucket:
        """The bucket for a prompt; the nearest one where none of its length was measured."""
        return min(self.buckets, key=lambda one: max(one.start - prompt, prompt - (one.stop - 1), 0))

    def covers(self, prompt: int) -> bool:
        """Whether prompts of this length were measured."""
        return any(one.start <= prompt < one.stop for one in self.buckets)


@dataclass(frozen=True)
class Expected:
    """What a policy is expected to keep."""

    source: str  # where it is from, in words
    measured: tuple[Measured, ...] = ()  # measurements it is from; empty for policies whose parameters say it
    # A budget that a parameter fixes
    ratio: float | None = None
    size: int | None = None

    def budget(self, prompt: int) -> float:
        """Share of a prompt that is kept: the mean over the measured prompts of its length, whatever the model."""
        if prompt < 1:
            return 1.0
        if self.ratio is not None:
            return self.ratio
        if self.size is not None:
            return min(1.0, self.size / prompt)
        buckets = [one.bucket(prompt) for one in self.measured if one.covers(prompt)]
        if not buckets:
            # Of each model the nearest length, and then the one that keeps most.
            return max(one.bucket(prompt).mean for one in self.measured)
        return sum(bucket.n * bucket.mean for bucket in buckets) / sum(bucket.n for bucket in buckets)

    def is_extrapolated(self, prompt: int) -> bool:
        """Whether no prompt of this length was measured."""
        return bool(self.measured) and not any(one.covers(prompt) for one in self.measured)


def expected(policy: Any, model: str, known: Sequence[Measured] | None = None) -> Expected | None:
    """What a policy is expected to keep; None if nobody knows.

    Parameters
    ----------
    policy : Policy
        The policy.
    model : str
        Name of the model; its own measurements are taken alone if there are any.
    known : sequence of Measured, optional
        Measurements; by default those that come with refreekv.
    """
    from refreekv.evaluation.sweeps import specification

    spec = specification(policy)
    if spec == "full":
        return Expected("keeps everything", ratio=1.0)
    for name in ("ratio", "size"):
        if (value := getattr(policy, name, None)) is not None:
            return Expected(f"{name}={value} is fixed", **{name: value})
    found = [one for one in (load() if known is None else known) if one.policy == spec]
    chosen = tuple(measurements.of_model(found, model))
    if not chosen:
        return None
    return Expected("; ".join(map(_cite, chosen)), chosen)


def _cite(one: Measured) -> str:
    count = sum(bucket.n for bucket in one.buckets)
    about = one.source
    return f"measured on {one.model}, n={count}, {about.get('machine')}, {about.get('date')} ({about.get('command')})"


def load() -> list[Measured]:
    """The measurements that come with refreekv."""
    return measurements.shipped("budgets", _measured)


def read(data: Mapping[str, Any]) -> list[Measured]:
    """Measurements from their JSON form; ValueError if that is of another schema."""
    return measurements.read("budgets", data, _measured)


def _measured(one: dict[str, Any]) -> Measured:
    return Measured(**{**one, "buckets": tuple(Bucket(**bucket) for bucket in one["buckets"])})
