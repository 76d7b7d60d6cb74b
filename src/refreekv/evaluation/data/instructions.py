"""Instructions whose obedience a program can check: how they are worded, and the check.

Each kind is one function from an answer and the instruction's parameters to True or
False. The parameters are plain types, so that a sample can be written to JSON.
"""

import json
import random
import re
from collections.abc import Callable
from typing import Any

from refreekv.core.spelling import suggestion
from refreekv.evaluation.data import stress_text

Check = Callable[..., bool]


def _contains(text: str, word: str, times: int = 1) -> bool:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)) >= times


def _json(text: str, key: str) -> bool:
    try:
        value = json.loads(re.sub(r"^```(?:json)?\s*|\s*```$", "", text))
    except ValueError:
        return False
    return isinstance(value, dict) and key in value


_CHECKS: dict[str, Check] = {
    "starts-with": lambda text, phrase: text.lower().startswith(phrase.lower()),
    "ends-with": lambda text, phrase: text.rstrip(" .!\"'*").lower().endswith(phrase.rstrip(" .!").lower()),
    "contains": _contains,
    "avoids": lambda text, word: not _contains(text, word),
    "no-character": lambda text, character: character not in text,
    "lower-case": lambda text: text == text.lower(),
    "upper-case": lambda text: text == text.upper() and any(letter.isalpha() for letter in text),
    "bullets": lambda text, count: len(re.findall(r"^\s*[-*•] +\S", text, re.MULTILINE)) == count,
    "sentences-at-most": lambda text, count: len(re.findall(r"[.!?]+(?=\s|$)", text)) <= count,
    "words-at-most": lambda text, count: len(text.split()) <= count,
    "words-at-least": lambda text, count: len(text.split()) >= count,
    "quoted": lambda text: len(text) > 2 and text[0] in '"“' and text[-1] in '"”',
    "json": _json,
}


def follows(instruction: dict[str, Any], text: str) -> bool:
    """Whether ``text`` obeys one instruction.

    Parameters
    ----------
    instruction : dict
        ``kind`` (one of `kinds`) and what that kind needs beside; ``text`` is ignored.
    text : str
        The answer. An empty one follows nothing, not even a prohibition.

    Raises
    ------
    ValueError
        Unknown kind.
    """
    kind = instruction["kind"]
    if kind not in _CHECKS:
        raise ValueError(f"no instruction is of kind {kind!r}{suggestion(str(kind), _CHECKS)}")
    parameters = {key: value for key, value in instruction.items() if key not in ("kind", "text")}
    return bool(text.strip()) and _CHECKS[kind](text.strip(), **parameters)


def kinds() -> list[str]:
    """All kinds of instructions."""
    return sorted(_CHECKS)


def draw(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """``count`` instructions that do not contradict each other, each with its wording as ``text``."""
    word, banned, closing = stress_text.distinct(lambda: stress_text.word(rng, 3), 3)
    opening = f"Regarding {rng.choice(stress_text.SUBJECTS)}:"
    subject = rng.choice(stress_text.PEOPLE)
    tag = f"end of note {rng.randint(10, 99)}"
    bullets, limit = rng.randint(2, 5), rng.choice((60, 80, 100))
    least = rng.choice((15, 20, 25))
    # One of each group at most: within a group, instructions exclude each other.
    groups: list[list[dict[str, Any]]] = [
        [
            _said(f'Begin your answer with exactly these words: "{opening}"', "starts-with", phrase=opening),
            _said(f'The first word of your answer must be "{closing}".', "starts-with", phrase=closing),
        ],
        [_said(f'Finish with the words "{tag}" and write nothing after them.', "ends-with", phrase=tag)],
        [
            _said(f'Use the word "{word}" somewhere in your answer.', "contains", word=word),
            _said(f'The word "{word}" must occur at least twice.', "contains", word=word, times=2),
        ],
        [
            _said(f'Never mention "{subject}".', "avoids", word=subject),
            _said(f'Do not write the word "{banned}", even though it may seem to fit.', "avoids", word=banned),
            _said('Do not use the word "and".', "avoids", word="and"),
        ],
        [
            _said("Do not use any comma.", "no-character", character=","),
            _said("Do not write any question mark.", "no-character", character="?"),
        ],
        [
            _said("Write everything in lower-case letters.", "lower-case"),
            _said("Write everything in CAPITAL letters.", "upper-case"),
        ],
        [_said(f"Give exactly {bullets} bullet points, each starting with a hyphen.", "bullets", count=bullets)],
        [_said(f"Stay under {limit} words.", "words-at-most", count=limit - 1)],
        [_said(f"Write at least {least} words.", "words-at-least", count=least)],
    ]
    if not 1 <= count <= len(groups):
        raise ValueError(f"the number of instructions must be 1 to {len(groups)}, got {count}")
    return [rng.choice(group) for group in rng.sample(groups, count)]


def _said(text: str, kind: str, **parameters: Any) -> dict[str, Any]:
    return {"kind": kind, "text": text, **parameters}
