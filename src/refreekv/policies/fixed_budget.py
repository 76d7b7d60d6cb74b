"""What the policies share that keep a given number of entries: a score, a budget, the best."""

from abc import abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from refreekv.core.budget import budgets, keep_best, newest
from refreekv.core.selection import Selection
from refreekv.policies.base import LayerView, Policy, check_budget


@dataclass(frozen=True)
class FixedBudget(Policy):
    """Base of the policies that score entries and keep the best ones, so many or such a share.

    A subclass has `scores`; it may say what ranks `first` and what a ratio never goes under.
    Budgets count the real entries that a KV head holds: on a second turn what the first one
    left and the new tokens.

    Parameters
    ----------
    size : int, optional
        Entries to keep of each layer, row and KV head, exactly. Exactly one of ``size`` and
        ``ratio`` is given.
    ratio : float, optional
        Share to KEEP, in (0, 1], rounded down, but never under what the policy always keeps.
    """

    size: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        check_budget(self.name, self.size, self.ratio)

    @abstractmethod
    def scores(self, view: LayerView) -> Tensor:
        """Importance ``[B, G, n]``, larger is better; ``G`` is 1 or the number of KV heads."""

    def at_least(self) -> int:
        """Entries that a ratio does not go under."""
        return 1

    def budget(self, view: LayerView, real: Tensor) -> Tensor:
        """Entries to keep, integer ``[B, G]``; ``real`` is ``[B, G, n]``."""
        return budgets(real, self.size, self.ratio, self.at_least())

    def first(self, real: Tensor, budget: Tensor) -> Tensor:
        """Entries that rank before all others, boolean ``[B, G, n]``: the last one, if nothing else."""
        return newest(real, 1)

    def scored(self, view: LayerView) -> Tensor:
        """`scores`, which policies that differ in nothing but their budget share."""
        return view.once(replace(self, size=1, ratio=None), lambda: self.scores(view))

    def select(self, view: LayerView) -> Selection:
        scores = self.scored(view)
        real = real_groups(view, scores)
        budget = self.budget(view, real)
        return Selection(keep_best(scores.expand_as(real), budget, real, self.first(real, budget)))


def real_groups(view: LayerView, scores: Tensor) -> Tensor:
    """Where the entries that ``scores`` rank are real: ``[B, 1, n]`` if all KV heads can share one answer."""
    uneven = view.valid is not None and view.valid.dim() == 3
    return view.real_heads if uneven or scores.shape[1] > 1 else view.real[:, None]


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless ``0 <= value <= 1``."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
