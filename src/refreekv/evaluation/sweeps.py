"""Which policies to measure: lists of parameter values, and named suites."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

from refreekv import policies
from refreekv.core import spelling
from refreekv.evaluation.fidelity.formats import MARK, StoredPolicy, parse
from refreekv.evaluation.fidelity.peer_formats import PeerStored
from refreekv.policies import Policy

FULL = "full"
"""The full cache, run a second time: the noise floor of every table."""

RATIOS = (0.2, 0.5, 0.75, 0.9)
"""Budgets that policies with one are compared at."""

GRIDS = {
    "adaptive": "constant=1e-4,2e-4,4e-4,8e-4,1.6e-3,3.2e-3",
    "gvote": "p=0.9,0.95,0.99",
    "refreekv": "threshold=0.001,0.01,0.05,0.1",
    "refreekv-heavy-hitter": "threshold=0.01,0.05,0.1",
    "top-p": "p=0.9,0.95,0.99",
}
"""What moves the budget of policies without one; others of that kind are compared as they are."""


def expand(spec: str) -> list[str]:
    """All combinations of a specification whose parameters may be lists of values.

    A number format behind it, as in ``snapkv:ratio=0.5@int4``, goes with each of them.

    Examples
    --------
    >>> expand("refreekv:threshold=0.01,0.05,sinks=4,8")
    ['refreekv:threshold=0.01,sinks=4', 'refreekv:threshold=0.01,sinks=8', \
'refreekv:threshold=0.05,sinks=4', 'refreekv:threshold=0.05,sinks=8']

    Raises
    ------
    ValueError
        A value before the first parameter's name, or a parameter named twice.
    """
    spec, mark, kind = spec.partition(MARK)
    name, items = spelling.parts(spec)
    parameters: dict[str, list[str]] = {}
    for key, value in items:
        if value is None and not parameters:
            raise ValueError(f"policy parameter {key!r} in {spec!r} is not of the form name=value")
        if value is None:
            list(parameters.values())[-1].append(key)
        elif key in parameters:
            raise ValueError(f"policy parameter {key!r} stands twice in {spec!r}; write {key}=1,2,3 for a list")
        else:
            parameters[key] = [value]
    combinations = (zip(parameters, values, strict=True) for values in itertools.product(*parameters.values()))
    return [f"{spelling.spell(name, dict(chosen))}{mark}{kind}" for chosen in combinations]


def specification(policy: Policy) -> str:
    """The shortest specification that makes this policy: its name and what differs from the defaults.

    Two ways to write one policy have the same specification, so it serves as a key.
    """
    if isinstance(policy, StoredPolicy) and policy.optional:
        return specification(policy.policy)
    if isinstance(policy, StoredPolicy):
        return f"{specification(policy.policy)}{MARK}{policy.ladder}"
    if isinstance(policy, PeerStored):
        return policy.spec
    changed = {
        field.name: value
        for field in dataclasses.fields(policy)  # type: ignore[arg-type]
        if (value := getattr(policy, field.name)) != field.default
    }
    return spelling.spell(policy.name, changed)


def choose(specs: Iterable[str] = (), suites: Iterable[str] = ()) -> dict[str, Policy]:
    """Specifications and suites as policies by their `specification`, each once, in the order given.

    ``"full"`` is left out: it is measured always.

    Raises
    ------
    ValueError
        Unknown policy or suite, or a parameter out of range.
    TypeError
        Unknown parameter.
    """
    wanted = [one for spec in specs for one in expand(spec)]
    wanted += [one for name in suites for one in suite(name)]
    chosen = (parse(spec) for spec in wanted if spec != FULL)
    return {specification(policy): policy for policy in chosen}


def suite(name: str) -> list[str]:
    """Specifications of a named suite.

    Raises
    ------
    ValueError
        No such suite.
    """
    if name not in SUITES:
        raise ValueError(f"no suite is named {name!r}; there are: {', '.join(SUITES)}")
    return SUITES[name]()


def _paper_ablations() -> list[str]:
    """What arXiv 2502.16886 varies (k, T, ranking, frozen layers), and both norms, around its defaults."""
    varied = [
        "refreekv",
        "refreekv:threshold=0.001,0.005,0.01,0.02,0.05,0.1",
        "refreekv:threshold=0.001,0.01,0.05,norm_includes_sinks=true",
        # k = 1 is the default.
        "refreekv:probe_rows=2,4,8,16,32",
        "refreekv:probe_rows=8,threshold=0.001,0.05",
        "refreekv:frozen_layers=0,1,2,3,4",
        # Ranking by attention with the same stop, last positions always kept or not.
        "refreekv-heavy-hitter:threshold=0.01,0.05",
        "refreekv-heavy-hitter:threshold=0.01,0.05,recent=0,probe_rows=1",
    ]
    return [one for spec in varied for one in expand(spec)]


def _peers() -> list[str]:
    """Every registered policy over a grid of budgets: `RATIOS`, or what `GRIDS` says."""
    found: list[str] = []
    for name in policies.available():
        if _takes_ratio(name):
            found += [f"{name}:ratio={ratio}" for ratio in RATIOS]
        elif name != FULL:
            found += expand(f"{name}:{GRIDS.get(name, '')}")
    return found


def _takes_ratio(name: str) -> bool:
    try:
        policies.create(name, ratio=RATIOS[0])
    except (TypeError, ValueError):
        return False
    return True


SUITES: dict[str, Callable[[], list[str]]] = {"paper-ablations": _paper_ablations, "peers": _peers}
"""Names of suites to what makes their specifications."""
