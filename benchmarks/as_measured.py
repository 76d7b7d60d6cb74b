"""A policy that costs what `adaptive` does and keeps what it kept of real text: for models with random weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

import refreekv
from refreekv.core.selection import Selection
from refreekv.planner.budgets import Expected
from refreekv.planner.widths import load
from refreekv.policies import LayerView, Policy
from refreekv.policies.adaptive import LADDER, Adaptive

NAME = "adaptive-as-measured"


@dataclass(frozen=True)
class AsMeasured(Adaptive):
    """`adaptive` looks at the prompt as ever; what stays is a fixed share, in fixed shares of the number formats.

    Random weights attend to everything alike, so that what `adaptive` would keep of them says nothing.

    Attributes
    ----------
    ratio : float
        Share of the prompt's entries that stays.
    shares : tuple of float
        Of these in each of `adaptive`'s number formats.
    """

    name = NAME
    ratio: float = 0.8
    shares: tuple[float, ...] = ()

    def select(self, view: LayerView) -> Selection | None:
        """Look as `adaptive` does, and keep what is to stay."""
        super().select(view)
        real = view.real_heads
        count = real.shape[-1]
        number = torch.arange(count, device=real.device)
        keep = _share(number, self.ratio) | (number < self.sinks) | (number >= count - self.window)
        edges = torch.tensor(self.shares, device=real.device).cumsum(0)[:-1]
        # Neighbours are in different formats: a golden ratio's multiples are spread evenly.
        levels = torch.bucketize((number * 0.6180339887) % 1.0, edges.to(torch.float64), right=True)
        return Selection(real & keep, levels=levels.to(torch.uint8).expand_as(real))


def _share(number: Tensor, share: float) -> Tensor:
    """So many of all numbers from 0 on, evenly."""
    return ((number + 1) * share).floor() > (number * share).floor()


def parse(spec: str) -> Policy:
    """A policy by its specification, or this one: ``adaptive-as-measured`` or ``adaptive-as-measured:ratio=0.6``."""
    name, _, given = spec.partition(":")
    if name != NAME:
        return refreekv.policies.parse(spec)
    measured = [one.shares for one in load() if one.policy == "adaptive" and one.ladder == str(LADDER)]
    if not measured:
        raise ValueError("nobody has measured in which formats adaptive stores: see width_shares.py")
    shares = tuple(sum(part) / len(measured) for part in zip(*measured, strict=True))
    ratio = given.removeprefix("ratio=") if given else "0.8"
    return AsMeasured(ratio=float(ratio), shares=tuple(share / sum(shares) for share in shares))


def expected(policy: Policy, shape: str) -> Expected | None:
    """What a policy is expected to keep; see `planner.budgets.expected`."""
    from refreekv.planner.budgets import expected as known

    if isinstance(policy, AsMeasured):
        return Expected(f"ratio={policy.ratio} is fixed", ratio=policy.ratio)
    return known(policy, shape)
