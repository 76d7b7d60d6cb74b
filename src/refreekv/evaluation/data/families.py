"""Task families by name: public datasets and generated stress tests under one roof.

A family is asked for as ``name``, with parameters as ``name:parameter=value,…``, and with
``after`` among them (``qasper:after``) where the question is to come only after the text
was compressed.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from refreekv.core import spelling
from refreekv.core.spelling import suggestion
from refreekv.evaluation.data import catalogue, stress
from refreekv.evaluation.data.datasets import DataMissing, Dataset
from refreekv.evaluation.data.readers import Item
from refreekv.evaluation.data.samples import Sample

AFTER = "after"

__all__ = ["DataMissing", "load", "names", "parse", "split"]

DATASETS = {name: dataset for name, dataset in catalogue.DATASETS.items() if dataset.read is not None}


def names() -> dict[str, str]:
    """All families, each with a one-line description."""
    described = {name: dataset.summary for name, dataset in DATASETS.items()}
    described |= {name: f"generated: {stress.summary(name)}" for name in stress.FAMILIES}
    return {name: described[name] for name in sorted(described)}


def task_names() -> dict[str, str]:
    """All tasks, by lm-eval's metrics or by our own, each with a one-line description."""
    described = {name: one.summary for name, one in catalogue.DATASETS.items() if one.task or one.metric}
    described |= {name: summary for name, summary in names().items() if name in stress.FAMILIES}
    return {name: described[name] for name in sorted(described)}


def load(family: str, *, data_dir: Path | None = None, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Samples of a family.

    Parameters
    ----------
    family : str
        As described above; ``-`` and ``_`` in names are the same.
    data_dir : Path, optional
        Folder with the datasets as JSONL. Without it they come from the Hugging Face hub.
    limit : int, optional
        Samples at most, chosen at random but in the dataset's order; all by default, or 20
        of a generated family.
    seed : int
        Decides which ones, and what is generated.

    Raises
    ------
    ValueError
        Unknown family or parameter (the nearest is suggested), or a file with other data.
    DataMissing
        The data is not there; the message says what is missing.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    name, parameters, after = parse(family)
    if name in stress.FAMILIES:
        count = stress.DEFAULT_SAMPLES if limit is None else limit
        made = stress.generate(name, samples=count, seed=seed, **parameters)
        return [replace(sample, family=_canonical(name, parameters, after)) for sample in made]
    dataset = DATASETS[name]
    items = list(enumerate(dataset.items(data_dir, **parameters)))
    if limit is not None and limit < len(items):
        chosen = random.Random(f"{name}/{seed}").sample(range(len(items)), limit)
        items = [items[index] for index in sorted(chosen)]
    return [_sample(_canonical(name, parameters, after), index, item, dataset, after) for index, item in items]


def parse(family: str) -> tuple[str, dict[str, int | float], bool]:
    """Name, parameters and whether the question comes after; ValueError for what there is not."""
    name, items = spelling.parts(family)
    name = name.lower().replace("_", "-")
    if name not in DATASETS and name not in stress.FAMILIES:
        raise ValueError(
            f"no task family is named {name!r}{suggestion(name, names())}; there are: {', '.join(names())}"
        )
    known = DATASETS[name].parameters if name in DATASETS else stress.parameters(name)
    parameters: dict[str, int | float] = {}
    after = False
    for key, value in items:
        if (key, value) == (AFTER, None):
            if name not in DATASETS or not DATASETS[name].splits:
                raise ValueError(f"{name} has no question apart from its text, so it cannot come {AFTER}")
            after = True
            continue
        if value is None or key not in known:
            raise ValueError(
                f"family {name!r} has no parameter {key!r}{suggestion(key, known)}; "
                f"it has: {', '.join(known) or 'none'}" + (f", and {AFTER}" if name in DATASETS else "")
            )
        parameters[key] = _number(name, key, value, known[key])
    return name, parameters, after


def split(listing: Iterable[str]) -> list[str]:
    """Families from comma-separated lists, where parameters may follow with commas too."""
    return spelling.listed(listing, [AFTER])


def _number(family: str, key: str, value: str, default: int | float) -> int | float:
    kind = type(default)
    try:
        number = kind(value)
    except ValueError:
        raise ValueError(f"{key} of family {family!r} must be of type {kind.__name__}, got {value!r}") from None
    if number <= 0:
        raise ValueError(f"{key} of family {family!r} must be positive, got {value!r}")
    return number


def _canonical(name: str, parameters: dict[str, int | float], after: bool) -> str:
    """The family's name in results: with what changes its samples."""
    return spelling.spell(name, dict(sorted(parameters.items())), [AFTER] if after else [])


def _sample(family: str, index: int, item: Item, dataset: Dataset, after: bool) -> Sample:
    prompt, question = item.text, item.turn
    if item.question:
        prompt, question = (item.text, item.question) if after else (f"{item.text}\n\n{item.question}", "")
    # The row's number makes it unique, its own name makes it findable.
    key = re.sub(r"[^\w.-]+", "-", item.key)
    return Sample(
        id=f"{family}-{index}" + (f"-{key}" if key and key != str(index) else ""),
        family=family,
        prompt=prompt,
        question=question,
        answers=item.answers,
        metric=dataset.metric if item.answers else "",
        chat=item.chat,
        extra={"max_new_tokens": dataset.max_new_tokens, **item.extra},
    )
