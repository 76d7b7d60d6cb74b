"""Prompts of a user's own: JSON Lines or plain text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refreekv.evaluation.data.samples import Sample

SEPARATOR = "---"
"""A line of a text file that stands between two prompts."""

FAMILY = "own"
"""The family of prompts that name none."""


Prompts = Path | Sequence[str | Sample]
"""What may be given for prompts in Python: a file as `read_prompts` reads it, texts, or samples."""


def as_samples(prompts: Prompts) -> list[Sample]:
    """Texts as samples with ids of their own; what is one stays one, and a file is read.

    Raises
    ------
    TypeError
        One text in place of several.
    OSError, ValueError
        As `read_prompts`.
    """
    if isinstance(prompts, Path):
        return read_prompts(prompts)
    if isinstance(prompts, str):
        raise TypeError("prompts are a list of texts, or a Path to a file; got one text")
    return [
        Sample(id=f"prompt-{number}", family=FAMILY, prompt=one) if isinstance(one, str) else one
        for number, one in enumerate(prompts, 1)
    ]


def read_prompts(path: Path) -> list[Sample]:
    r"""Prompts of a file, in its order.

    JSON Lines, where the first line is JSON: a string, or an object with ``prompt`` (and, if it likes, ``system``,
    ``question``: asked only after the prompt was compressed, ``family``, ``id`` and ``"chat": false``: no chat
    template) or with ``messages``, of roles and contents as chat logs have them; an answer at their end is left out.

    Anything else is text: one prompt, or several with a line of three dashes between them.

    Raises
    ------
    OSError
        No such file.
    ValueError
        No text, no prompt, or a line that is none of the above; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    samples = _of_lines(path, text) if _is_json(text.lstrip().partition("\n")[0]) else _of_text(text)
    if not samples:
        raise ValueError(f"{path} holds no prompt")
    known: set[tuple[str, str]] = set()
    for sample in samples:
        if (sample.family, sample.id) in known:
            raise ValueError(f"{path} has two prompts of family {sample.family!r} with the id {sample.id!r}")
        known.add((sample.family, sample.id))
    return samples


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | str)
    except ValueError:
        return False


def _of_text(text: str) -> list[Sample]:
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(line)
    prompts = [prompt for prompt in ("\n".join(part).strip() for part in parts) if prompt]
    return [Sample(id=f"prompt-{number}", family=FAMILY, prompt=prompt) for number, prompt in enumerate(prompts, 1)]


def _of_lines(path: Path, text: str) -> list[Sample]:
    samples = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                samples.append(_sample(json.loads(line), f"line-{number}"))
            except ValueError as error:
                raise ValueError(f"line {number} of {path}: {error}") from error
    return samples


def _sample(item: Any, name: str) -> Sample:
    if isinstance(item, str):
        item = {"prompt": item}
    if not isinstance(item, dict) or ("prompt" in item) == ("messages" in item):
        raise ValueError("expected a string, or an object with either prompt or messages")
    for key in ("prompt", "system", "question", "family", "id"):
        if not isinstance(item.get(key, ""), str):
            raise ValueError(f"{key} is to be text, got {item[key]!r:.60}")
    if not isinstance(item.get("chat", True), bool):
        raise ValueError(f"chat is to be true or false, got {item['chat']!r:.60}")
    system, earlier, prompt = item.get("system", ""), (), item.get("prompt", "")
    if "messages" in item:
        system, earlier, prompt = _conversation(item["messages"])
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return Sample(
        id=item.get("id", name),
        family=item.get("family", FAMILY),
        prompt=prompt,
        system=system,
        earlier=earlier,
        question=item.get("question", ""),
        chat=item.get("chat", True),
    )


def _conversation(messages: Any) -> tuple[str, Any, str]:
    """System prompt, earlier turns and the last message of a user."""
    if not isinstance(messages, list) or not all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    ):
        raise ValueError("messages are to be a list of objects, each with a role and a content of text")
    turns = [(one["role"], one["content"]) for one in messages]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    while turns and turns[-1][0] != "user":
        turns.pop()
    if not turns:
        raise ValueError("messages have none of a user")
    return system, tuple(turns[:-1]), turns[-1][1]
