"""Files of measurements, a line of JSON each: those that come with refreekv, and a user's own."""

import importlib.resources
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

SCHEMA = 1

M = TypeVar("M")


def shipped(name: str, parse: Callable[[dict[str, Any]], M]) -> list[M]:
    """The measurements of a name that come with refreekv."""
    text = importlib.resources.files("refreekv.planner").joinpath(f"{name}.json").read_text(encoding="utf-8")
    return read(name, json.loads(text), parse)


def read(name: str, data: Mapping[str, Any], parse: Callable[[dict[str, Any]], M]) -> list[M]:
    """Measurements from their JSON form; ValueError if that is of another schema."""
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{name} of schema {data.get('schema')!r}; this version reads {SCHEMA}")
    return [parse(one) for one in data["measured"]]


def dump(measured: Iterable[Any]) -> str:
    """The text of a file of measurements."""
    lines = ",\n".join(json.dumps(asdict(one)) for one in measured)
    return f'{{"schema": {SCHEMA}, "measured": [\n{lines}\n]}}\n'


def of_model(found: Sequence[M], model: str) -> Sequence[M]:
    """Those of a model, whoever offers it; all where there are none of it."""
    wanted = model.split("/")[-1].lower()
    return [one for one in found if one.model.split("/")[-1].lower() == wanted] or found  # type: ignore[attr-defined]
