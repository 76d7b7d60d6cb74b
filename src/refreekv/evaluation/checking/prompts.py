"""The prompts that come with the package: six kinds in five sizes, the same on every machine.

All text is our own: a page of prose, and what seeded generators make of word lists (`evaluation.data.stress_text`,
`stress_code`). Each kind asks a cache for something else: one fact of a document, a value under a random key,
the text of a program, what was said turns ago, the sense of a story, and an answer to a question that comes only
after the document was compressed.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files

from refreekv.evaluation.data import stress, stress_text
from refreekv.evaluation.data.samples import Sample

SIZES = (600, 1000, 2000, 4000, 7500)
"""Tokens of the prompts, roughly."""

SEED = 2026
"""Of all generators here. Another one makes other prompts, and numbers that cannot be compared."""

Maker = Callable[[random.Random, int], Sample]


def rounds(sizes: Sequence[int] = SIZES) -> list[list[Sample]]:
    """A list of prompts for each size, one of each of `KINDS`."""
    return [[prompt(kind, size) for kind in KINDS] for size in sizes]


def prompt(kind: str, tokens: int, index: int = 0) -> Sample:
    """One prompt: of a kind out of `KINDS`, about ``tokens`` long; another one for each ``index``."""
    made = KINDS[kind](random.Random(f"check/{kind}/{tokens}/{index}/{SEED}"), tokens)
    more = f"-{index}" if index else ""
    return replace(made, id=f"{kind}-{tokens}{more}", family=kind, answers=(), metric="", extra={})


def _of_stress(family: str, tokens: str = "tokens") -> Maker:
    """A kind that is one of the stress families."""

    def make(rng: random.Random, size: int) -> Sample:
        return stress.FAMILIES[family](rng, 1, **{tokens: size})

    return make


def _keyed_list(rng: random.Random, tokens: int) -> Sample:
    """A JSON object of random keys, and the value of one of them."""
    # A pair takes some 62 tokens, in the tokenizers that are in use: digits and letters mixed.
    count = max(4, round((tokens - 40) / 62))
    pairs = {_identifier(rng): _identifier(rng) for _ in range(count)}
    key = rng.choice(list(pairs))
    text = json.dumps(pairs, indent=1)
    question = f'What is the value under "{key}"? Answer with the value only.'
    return _plain(f"This is a JSON object.\n\n{text}\n\n{question}")


def _identifier(rng: random.Random) -> str:
    return "-".join(f"{rng.getrandbits(16):04x}" for _ in range(6))


_OPENINGS = (
    "Tell me about {a}.",
    "And what has {a} to do with {b}?",
    "I was at {place} last week. Is there anything about {a} that I should have seen?",
    "Could you say that about {a} in fewer words?",
    "My neighbour {person} disagrees about {a}. Who is right?",
    "Please make a note: {person} brings the {thing} to {place} on {day}.",
)
_CLOSING = (
    "Let us stop here. In one paragraph: what did I tell you to make a note of, who brings what, where and when, and "
    "what was it that I asked you about first?"
)


def _dialogue(rng: random.Random, tokens: int) -> Sample:
    """A conversation of many turns, with notes to keep, and a question about all of it."""
    earlier: list[tuple[str, str]] = []
    length, turn = 0.0, 0
    while length < tokens - 60 or turn < 3:
        a, b = rng.sample(stress_text.SUBJECTS, 2)
        shape = _OPENINGS[0] if turn == 0 else _OPENINGS[-1] if turn % 4 == 2 else rng.choice(_OPENINGS[1:-1])
        said = shape.format(
            a=a,
            b=b,
            place=rng.choice(stress_text.PLACES),
            person=rng.choice(stress_text.PEOPLE),
            thing=rng.choice(stress_text.THINGS),
            day=rng.choice(stress_text.WEEKDAYS),
        )
        answer = "Noted. " if turn % 4 == 2 else ""
        answer += " ".join(stress_text.sentence(rng) for _ in range(rng.randint(2, 6)))
        earlier += [("user", said), ("assistant", answer)]
        length += (len(said) + len(answer)) / stress_text.CHARS_PER_TOKEN + 8
        turn += 1
    return replace(_plain(_CLOSING), earlier=tuple(earlier))


def _prose(rng: random.Random, tokens: int) -> Sample:
    """A story that breaks off and is to be read on; longer ones come after pages of other text."""
    story = files("refreekv.evaluation.checking").joinpath("prose.txt").read_text(encoding="utf-8").strip()
    paragraphs = story.split("\n\n")
    # The end of the story where all of it is too long.
    while len(paragraphs) > 3 and _tokens(paragraphs) > tokens * 1.1:
        paragraphs = paragraphs[1:]
    more = tokens - _tokens(paragraphs)
    before = [stress_text.paragraphs(rng, stress_text.sentences(rng, more)), "* * *"] if more > 100 else []
    return replace(_plain("\n\n".join([*before, *paragraphs])), chat=False)


def _tokens(paragraphs: Sequence[str]) -> float:
    return sum(map(len, paragraphs)) / stress_text.CHARS_PER_TOKEN


def _plain(text: str) -> Sample:
    return Sample(id="", family="", prompt=text)


KINDS: dict[str, Maker] = {
    "document": _of_stress("multi-key-retrieval"),
    "keyed-list": _keyed_list,
    "code": _of_stress("long-code"),
    "dialogue": _dialogue,
    "prose": _prose,
    "question-after": _of_stress("question-after"),
}
"""Names to makers of one prompt of about so many tokens."""
