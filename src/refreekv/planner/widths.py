"""In which of several number formats entries are stored: shares of each, measured, with the source of each number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refreekv.core.footprint import Mix
from refreekv.core.quantisation import KVDtype
from refreekv.planner import measurements


@dataclass(frozen=True)
class Measured:
    """Where a policy stored what it kept on one model, all prompts together."""

    policy: str  # the policy's shortest specification
    ladder: str  # the number formats
    model: str  # the model's name
    n: int  # prompts measured
    tokens: tuple[int, int]  # of the shortest and the longest of them
    shares: tuple[float, ...]  # of coded entries, by rung
    source: dict[str, Any]  # command, date, machine


@dataclass(frozen=True)
class Stored:
    """How entries are expected to be stored, and at worst.

    Attributes
    ----------
    name : str
        As it is written: ``"auto"`` or the number formats.
    expected, worst : KVDtype, Mix or None
        What is expected, and all in the widest format; None: the model's precision.
    source : str
        Where the shares are from, in words; empty where there is one format.
    """

    name: str
    expected: KVDtype | Mix | None
    worst: KVDtype | Mix | None
    source: str = ""


def stored(policy: Any, kv: str, model: str, known: Sequence[Measured] | None = None) -> Stored:
    """What ``--kv`` means for a policy.

    Parameters
    ----------
    policy : Policy
        The policy.
    kv : str
        ``"auto"``, ``"bf16"``, a number format, or several with ``+`` between them.
    model : str
        Name of the model; its own measurements are taken alone if there are any.
    known : sequence of Measured, optional
        Measurements; by default those that come with refreekv.

    Raises
    ------
    ValueError
        Unknown formats.
    """
    from refreekv.evaluation.sweeps import specification
    from refreekv.policies.base import ladder_for

    ladder = ladder_for(policy, None if kv == "bf16" else kv)
    if ladder is None:
        return Stored(kv, None, None)
    if len(ladder.rungs) == 1:
        return Stored(kv, ladder.rungs[0], ladder.rungs[0])
    count = len(ladder.rungs)
    widest = Mix(ladder, (0.0,) * (count - 1) + (1.0,))
    every = load() if known is None else known
    found = [one for one in every if one.ladder == str(ladder)]
    own_policy = [one for one in found if one.policy == specification(policy)]
    chosen = measurements.of_model(own_policy or found, model)
    if not chosen:
        # Nobody has measured where a policy that chooses puts them: the widest format holds for all.
        return Stored(
            kv, widest, widest, f"nobody measured shares of {ladder}: all entries count as {ladder.rungs[-1]}"
        )
    # Of several models the mean, each alike.
    shares = [sum(one.shares[rung] for one in chosen) / len(chosen) for rung in range(count)]
    told = ", ".join(f"{rung.kind} {share:.0%}" for rung, share in zip(ladder.rungs, shares, strict=True))
    return Stored(kv, Mix(ladder, tuple(shares)), widest, f"{told}: measured on {'; '.join(map(_cite, chosen))}")


def _cite(one: Measured) -> str:
    short, long = one.tokens
    about = one.source
    return f"{one.model} (n={one.n}, {short:,} to {long:,} tokens, {about.get('machine')}, {about.get('date')})"


def load() -> list[Measured]:
    """The measurements that come with refreekv."""
    return measurements.shipped("widths", measured)


def measured(one: dict[str, Any]) -> Measured:
    """A measurement from its JSON form."""
    return Measured(**{**one, "tokens": tuple(one["tokens"]), "shares": tuple(one["shares"])})
