"""Tables of task scores: per family, with intervals, and the worst family beside the mean."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from refreekv.evaluation.records import CHANCE, TaskRecord
from refreekv.evaluation.sweeps import FULL

DRAWS = 2_000
"""Resamples of a bootstrap."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class FamilyResult:
    """One policy on one family.

    Attributes
    ----------
    family, policy : str
        Which.
    n : int
        Samples.
    score : Estimate or None
        Mean score; None for families without a metric.
    change : Estimate or None
        Mean difference to the full cache on the same samples.
    same : float
        Share of answers equal to the full cache's.
    budget : float
        Mean budget.
    bytes_full, bytes_kept : int
        Sums.
    """

    family: str
    policy: str
    n: int
    score: Estimate | None
    change: Estimate | None
    same: float
    budget: float
    bytes_full: int
    bytes_kept: int


@dataclass(frozen=True)
class PolicyResult:
    """One policy over all families, each family counting the same.

    Attributes
    ----------
    policy : str
        Which.
    score, change : float or None
        Means over the families that have a score.
    worst : FamilyResult or None
        The family with the largest loss.
    budget : float
        Mean over families.
    """

    policy: str
    score: float | None
    change: float | None
    worst: FamilyResult | None
    budget: float


def summarise(records: Iterable[TaskRecord]) -> tuple[list[FamilyResult], list[PolicyResult]]:
    """The table of one model's records, in the order in which families and policies occur."""
    groups: dict[tuple[str, str], dict[str, TaskRecord]] = {}
    for record in records:
        groups.setdefault((record.family, record.policy), {})[record.sample] = record
    results = []
    for (family, policy), group in groups.items():
        full = groups.get((family, FULL), {})
        scores = {name: record.scores["score"] for name, record in group.items() if "score" in record.scores}
        pairs = [
            (value, full[name].scores["score"])
            for name, value in scores.items()
            if name in full and "score" in full[name].scores
        ]
        members = list(group.values())
        results.append(
            FamilyResult(
                family,
                policy,
                n=len(members),
                score=bootstrap(list(scores.values())) if scores else None,
                change=bootstrap([one - other for one, other in pairs]) if pairs else None,
                same=_mean([record.same_as_full is not False for record in members]),
                budget=_mean([record.budget for record in members]),
                bytes_full=sum(record.bytes_full for record in members),
                bytes_kept=sum(record.bytes_kept for record in members),
            )
        )
    policies = dict.fromkeys(one.policy for one in results if one.policy != CHANCE)
    return results, [_over_families(policy, results) for policy in policies]


def by_place(records: Iterable[TaskRecord]) -> dict[tuple[str, str], dict[tuple[float, float], float]]:
    """Needles: for each family and policy the mean score by (length, depth), shortest and earliest first."""
    found: dict[tuple[str, str], dict[tuple[float, float], list[float]]] = {}
    for record in records:
        if record.place and "score" in record.scores:
            length, depth = record.place
            cells = found.setdefault((record.family, record.policy), {})
            cells.setdefault((length, depth), []).append(record.scores["score"])
    return {key: {place: _mean(cells[place]) for place in sorted(cells)} for key, cells in found.items()}


def _over_families(policy: str, results: Iterable[FamilyResult]) -> PolicyResult:
    own = [one for one in results if one.policy == policy]
    scores = [one.score.mean for one in own if one.score]
    changes = [(one.change.mean, one) for one in own if one.change]
    return PolicyResult(
        policy,
        score=_mean(scores) if scores else None,
        change=_mean([change for change, _ in changes]) if changes else None,
        worst=min(changes, key=lambda pair: pair[0])[1] if changes and policy != FULL else None,
        budget=_mean([one.budget for one in own]),
    )


def bootstrap(values: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean with its 95 % percentile-bootstrap interval over the values."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(data), (draws, len(data)), generator=generator)
    low, high = data[chosen].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(data.mean().item(), low, high)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
