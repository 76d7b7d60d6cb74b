"""What calls and outputs of a model name the cache: ``past_key_values``, or ``cache`` from transformers 5.24 on.

There transformers still takes the old name, with a warning; code that came with a checkpoint may
know no other.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

_OLD = "past_key_values"

NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else _OLD
"""The name in `generate`, in outputs and in the models of the transformers that is installed."""

NAMES = frozenset({NAME, _OLD})
"""All names that a caller may use."""


def name_among(parameters: Collection[str]) -> str:
    """The name that a forward with these parameters takes."""
    return _OLD if _OLD in parameters else NAME


def cache_argument(forward: Callable[..., Any], cache: object) -> dict[str, Any]:
    """The keyword argument that hands ``cache`` to a model's forward."""
    return {name_among(inspect.signature(forward).parameters): cache}


def logits_argument(forward: Callable[..., Any], keep: int) -> dict[str, int]:
    """The keyword argument that asks a model's forward for the last ``keep`` logits alone; none if it has none."""
    return {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(forward).parameters else {}


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call by name; None if there is none."""
    cache = arguments.get(NAME)
    return arguments.get(_OLD) if cache is None else cache


def arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, with those of ``**kwargs`` beside the named ones."""
    if not args:
        return kwargs
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    rest = next((name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), None)
    return {**given, **given.pop(rest, {})} if rest is not None else given


def with_argument(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: object
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with one argument more; as it is, if the function takes none of that name."""
    place = list(signature.parameters).index(name) if name in signature.parameters else len(args)
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    takes = name in signature.parameters or any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
    return args, {**kwargs, name: value} if takes else kwargs
