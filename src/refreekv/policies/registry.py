"""Names to policies: the one list that the API, the command line and the tests share."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from refreekv.core import spelling
from refreekv.core.spelling import suggestion
from refreekv.policies.base import Policy

P = TypeVar("P", bound=type[Policy])

_POLICIES: dict[str, type[Policy]] = {}


def register(name: str) -> Callable[[P], P]:
    """Class decorator: make a policy available under ``name``.

    The first line of the class docstring becomes its description in listings.
    """

    def add(cls: P) -> P:
        if name in _POLICIES:
            raise ValueError(f"a policy named {name!r} is registered already: {_POLICIES[name].__qualname__}")
        cls.name = name
        cls.summary = (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")
        _POLICIES[name] = cls
        return cls

    return add


def available() -> dict[str, str]:
    """Names of all policies, each with a one-line description."""
    return {name: _POLICIES[name].summary for name in sorted(_POLICIES)}


def get(name: str) -> type[Policy]:
    """The policy class registered under ``name``; ValueError, with the nearest name, if there is none."""
    if name not in _POLICIES:
        raise ValueError(f"no policy is named {name!r}{suggestion(name, _POLICIES)}; `refreekv policies` lists them")
    return _POLICIES[name]


def create(name: str, **parameters: Any) -> Policy:
    """Make a policy by name.

    Parameters
    ----------
    name : str
        One of `available`.
    **parameters
        The policy's parameters; what is left out keeps its default.

    Raises
    ------
    ValueError
        Unknown name (the nearest one is suggested), or a parameter out of range.
    TypeError
        A parameter that the policy does not have (the nearest one is suggested).

    Examples
    --------
    >>> create("refreekv", threshold=0.05).threshold
    0.05
    """
    cls = get(name)
    known = inspect.signature(cls).parameters
    for parameter in parameters:
        if parameter not in known:
            raise TypeError(
                f"policy {name!r} has no parameter {parameter!r}{suggestion(parameter, known)}; "
                f"it has: {', '.join(known) or 'none'}"
            )
    return cls(**parameters)


def parse(spec: str, **parameters: Any) -> Policy:
    """Make a policy from ``name`` or ``name:parameter=value,parameter=value``.

    The form that the command line takes. Values are read as integer, float, true/false
    or, failing that, text. Parameters given by name come before those in ``spec``.

    Examples
    --------
    >>> parse("refreekv:threshold=0.05,sinks=8").sinks
    8
    """
    name, items = spelling.parts(spec)
    written: dict[str, Any] = {}
    for key, value in items:
        if value is None:
            raise ValueError(f"policy parameter {key!r} in {spec!r} is not of the form name=value")
        written[key] = _literal(value)
    return create(name, **(written | parameters))


def resolve(policy: "str | Policy", **parameters: Any) -> Policy:
    """Accept a policy, its name or what `parse` takes; parameters do not go with a ready policy."""
    if isinstance(policy, Policy):
        if parameters:
            raise TypeError(
                f"parameters ({', '.join(parameters)}) go with a policy's name, not with a ready policy; "
                f"set them when creating {policy.name!r}"
            )
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a name or a Policy, got {type(policy).__name__}")
    return parse(policy, **parameters)


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
