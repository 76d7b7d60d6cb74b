"""What is measured on: one prompt with what is known about it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One prompt of one task family."""

    id: str  # unique within the family and stable between runs
    family: str  # the task family, such as ``"qasper"`` or ``"multi-key-retrieval"``
    prompt: str  # what is compressed: the user's message, before any chat template
    system: str = ""  # system prompt, if the sample has one
    earlier: tuple[tuple[str, str], ...] = ()  # turns of the conversation before ``prompt``, each a role and a text
    question: str = ""  # asked after ``prompt`` was compressed, as a second turn. Empty: the prompt holds all.
    answers: tuple[str, ...] = ()  # accepted answers, the first one for log-likelihoods. Empty where none is known.
    metric: str = ""  # name of the task metric that ``answers`` go with; empty where none does
    # whether to use the tokenizer's chat template; plain continuation (language modelling, base models) if False
    chat: bool = True
    extra: dict[str, Any] = field(default_factory=dict)  # whatever the family's metric needs beside
