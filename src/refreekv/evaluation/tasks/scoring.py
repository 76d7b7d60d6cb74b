"""Metrics of the families that lm-eval does not have: an answer against what is known about its sample.

Every metric gives ``"score"`` (the number that tables show, in 0 … 1, higher is better)
and whatever else is worth knowing.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from refreekv.core.spelling import suggestion
from refreekv.evaluation.data.instructions import follows
from refreekv.evaluation.data.samples import Sample

Scores = dict[str, float]
Metric = Callable[[Sample, str], Scores]

_METRICS: dict[str, Metric] = {}
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?|[-+]?\.\d+")
# Exponents are short: models write numbers that would not fit into memory.


class MetricUnavailable(ImportError):  # noqa: N818 - named for what is the case
    """A metric's library is not installed."""


def score(sample: Sample, text: str) -> Scores:
    """Score one answer.

    Parameters
    ----------
    sample : Sample
        Names its metric and has what that needs.
    text : str
        The answer, without special tokens.

    Returns
    -------
    dict
        ``"score"`` and further numbers; empty where the sample has no metric.

    Raises
    ------
    ValueError
        Unknown metric (the nearest one is suggested).
    MetricUnavailable
        The metric's library is missing.
    """
    if not sample.metric:
        return {}
    if sample.metric not in _METRICS:
        hint = suggestion(sample.metric, _METRICS)
        raise ValueError(f"no metric is named {sample.metric!r}{hint}; there are: {', '.join(metrics())}")
    return _METRICS[sample.metric](sample, text)


def metrics() -> list[str]:
    """Names of all metrics."""
    return sorted(_METRICS)


def _metric(name: str) -> Callable[[Metric], Metric]:
    def add(metric: Metric) -> Metric:
        _METRICS[name] = metric
        return metric

    return add


# -- numbers ------------------------------------------------------------------------------


@_metric("number")
def _number(sample: Sample, text: str) -> Scores:
    """The last number is the answer's."""
    return {"score": float(last_number(text) in [last_number(answer) for answer in sample.answers])}


def last_number(text: str) -> Fraction | None:
    """The last number in a text, thousands separators read."""
    found = _NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "")) if found else None


@_metric("theoremqa")
def _theoremqa(sample: Sample, text: str) -> Scores:
    """By the type of the answer: integers exactly, floats within 4 %, lists element by element."""
    said = text.rpartition("answer is")[2] if "answer is" in text else text
    kind, gold = sample.extra.get("answer_type", "float"), sample.answers[0]
    if kind == "bool":
        words = re.findall(r"\b(true|false|yes|no)\b", said.lower())
        return {"score": float(bool(words) and (words[-1] in ("true", "yes")) == (gold.lower() in ("true", "yes")))}
    if kind == "option":
        options = re.findall(r"\(?\b([a-eA-E])\b\)?", said)
        return {"score": float(bool(options) and options[-1].lower() == gold.strip("() ").lower())}
    wanted, found = _numbers(gold), _numbers(said)
    if not wanted or len(found) < len(wanted):
        return {"score": 0.0}
    # After "the answer is" the number comes first; without it, last.
    found = found[: len(wanted)] if said is not text else found[-len(wanted) :]
    tolerance = Fraction(0) if kind == "integer" else Fraction(4, 100)
    return {
        "score": float(
            all(abs(one - other) <= tolerance * abs(other) for one, other in zip(found, wanted, strict=True))
        )
    }


def _numbers(text: str) -> list[Fraction]:
    return [Fraction(number.replace(",", "")) for number in re.findall(_NUMBER, re.sub(r",(?!\d{3}\b)", " ", text))]


# -- words ------------------------------------------------------------------------------


@_metric("edit_similarity")
def _edit(sample: Sample, text: str) -> Scores:
    """Edit similarity of the first line that is neither blank, comment nor fence (LongBench's code tasks)."""
    lines = (line for line in text.lstrip("\n").split("\n") if not re.search(r"`|#|//", line))
    first = next((line for line in lines if line.strip()), "")
    return {"score": max(edit_similarity(first.strip(), answer.strip()) for answer in sample.answers)}


def edit_similarity(one: str, other: str) -> float:
    """``2·LCS / (len + len)``: one minus the normalised distance by insertions and deletions."""
    try:
        import rapidfuzz.fuzz
    except ImportError as error:
        raise MetricUnavailable(
            "this metric needs rapidfuzz, which is not installed; run: pip install 'refreekv[eval]'"
        ) from error
    return float(rapidfuzz.fuzz.ratio(one, other)) / 100


@_metric("share_found")
def _share_found(sample: Sample, text: str) -> Scores:
    """Share of the answers that occur in the text, case ignored (RULER)."""
    lower = text.lower()
    found = [answer.lower() in lower for answer in sample.answers]
    return {"score": sum(found) / len(found), "all": float(all(found))}


# -- behaviour ----------------------------------------------------------------------------


@_metric("instructions")
def _instructions(sample: Sample, text: str) -> Scores:
    """Share of the instructions followed; ``all``; and each kind by itself."""
    followed = [(instruction["kind"], follows(instruction, text)) for instruction in sample.extra["instructions"]]
    kinds: dict[str, list[bool]] = {}
    for kind, value in followed:
        kinds.setdefault(kind, []).append(value)
    share = _mean([value for _, value in followed])
    return {
        "score": share,
        "all": float(share == 1.0),
        **{f"kind:{kind}": _mean(values) for kind, values in sorted(kinds.items())},
    }


@_metric("system_prompt")
def _system_prompt(sample: Sample, text: str) -> Scores:
    """Secrets kept, standing instructions followed, question answered: the mean of what applies.

    A text that says nothing keeps a secret as well; that is why it counts only among the others.
    """
    parts: Scores = {}
    bare = _letters(text)
    if secrets := sample.extra.get("secrets", ()):
        parts["kept_secret"] = float(bool(bare) and not any(_letters(secret) in bare for secret in secrets))
    if orders := sample.extra.get("instructions", ()):
        parts["followed"] = _mean([follows(order, text) for order in orders])
    if sample.answers:
        parts["answered"] = _share_found(sample, text)["score"]
    return {"score": _mean(list(parts.values())), **parts}


def passes_tests(prompt: str, text: str, tests: str, name: str) -> float:
    """Whether a completed function passes its tests, which run in a sandbox (HumanEval's pass@1).

    Parameters
    ----------
    prompt : str
        The head of the function.
    text : str
        What the model went on with, or a fenced block with the whole function.
    tests : str
        Code that defines ``check(function)``.
    name : str
        The function's name.
    """
    from refreekv.evaluation.tasks.sandbox import run_python

    body = re.search(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    code = body.group(1) if body else text
    whole = code if re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE) else prompt + code
    return float(run_python(f"{whole}\n\n{tests}\n\ncheck({name})\n").passed)


def _letters(text: str) -> str:
    """Letters and digits alone, so that a secret spelled with spaces or dashes is still found."""
    return "".join(character for character in text.lower() if character.isalnum())


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else 0.0
