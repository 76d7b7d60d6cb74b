"""One policy at stricter and looser constants, for whoever has to find the right one."""

import contextlib
from collections.abc import Sequence
from dataclasses import fields, replace

from refreekv.policies.base import Policy

DIALS = ("constant", "threshold")
"""Parameters by which a policy is made stricter: the smaller, the more is kept, and 0 keeps everything."""


def dial(policy: Policy) -> str | None:
    """The parameter out of `DIALS` that a policy has; None if it has none."""
    names = {field.name for field in fields(policy)}  # type: ignore[arg-type]
    return next((name for name in DIALS if name in names), None)


def scaled(policy: Policy, factor: float) -> Policy:
    """The same policy with its dial times ``factor``: under 1 stricter, over 1 looser.

    Raises
    ------
    ValueError
        A policy without a dial, or a factor that takes the dial out of its range.
    """
    name = dial(policy)
    if name is None:
        raise ValueError(
            f"policy {policy.name!r} has no {' or '.join(DIALS)} to make it stricter or looser by; use one that has, "
            "such as 'adaptive'"
        )
    # Seven digits: 3 * 2e-4 is to read 0.0006 wherever it is written.
    return replace(policy, **{name: float(f"{getattr(policy, name) * factor:.7g}")})  # type: ignore[type-var]


def at_factors(policy: Policy, factors: Sequence[float]) -> list[Policy]:
    """The policy at several constants, in the order of ``factors``; without those that its dial's range does not hold.

    Raises
    ------
    ValueError
        A policy without a dial.
    """
    scaled(policy, 1.0)  # whether it has one
    steps = []
    for factor in factors:
        with contextlib.suppress(ValueError):
            steps.append(scaled(policy, factor))
    return steps
