"""What is measured on: one prompt with what is known about it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One prompt of one task family.

    Attributes
    ----------
    id : str
        Unique within the family and stable between runs.
    family : str
        The task family, such as ``"qasper"`` or ``"multi-key-retrieval"``.
    prompt : str
        What is compressed: the user's message, before any chat template.
    system : str
        System prompt, if the sample has one.
    question : str
        Asked after ``prompt`` was compressed, as a second turn. Empty: the prompt holds all.
    answers : tuple of str
        Accepted answers, the first one for log-likelihoods. Empty where none is known.
    metric : str
        Name of the task metric that ``answers`` go with; empty where none does.
    chat : bool
        Whether to use the tokenizer's chat template; plain continuation (language modelling,
        base models) if False.
    extra : dict
        Whatever the family's metric needs beside.
    """

    id: str
    family: str
    prompt: str
    system: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    metric: str = ""
    chat: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
