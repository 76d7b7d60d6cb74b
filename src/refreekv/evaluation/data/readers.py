"""From a dataset's row to a task: one reader for each dataset.

A reader accepts the field names of local files and of the hub. Prompts are worded by us
in each benchmark's usual form.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One row as a task."""

    text: str  # the prompt, or what a question is asked about
    question: str = ""  # the question about ``text``, to be appended or to come later
    turn: str = ""  # A second turn of the conversation
    answers: tuple[str, ...] = ()  # gold answers
    key: str = ""  # what the row calls itself; empty: its number
    chat: bool = True  # as in `Sample`
    extra: dict[str, Any] = field(default_factory=dict)  # as in `Sample`


Reader = Callable[..., Iterable[Item]]
"""From the rows of each of a dataset's files, and its parameters, to items."""


def _first(row: Row, *names: str) -> Any:
    """The field that a row has, of several spellings."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(names[0])


# -- short prompts ------------------------------------------------------------------------


def gsm8k(rows: Sequence[Row]) -> Iterable[Item]:
    """A solution step by step, the number after ``####``."""
    for row in rows:
        solution = re.sub(r"<<.*?>>", "", row["answer"])
        prompt = (
            f"{row['question']}\n\nSolve the problem step by step. "
            'End with a line that has only "#### " and the resulting number.'
        )
        yield Item(prompt, answers=(solution,))


def theoremqa(rows: Sequence[Row]) -> Iterable[Item]:
    """Rows that need no picture."""
    for row in rows:
        if row.get("Picture") not in (None, "", "NONE"):
            continue
        kind = row["Answer_type"]
        asked = {"bool": "True or False", "option": "the letter of the option"}.get(
            kind, "a number or a list of numbers"
        )
        prompt = f'{row["Question"]}\n\nReason step by step, then finish with "The answer is" and {asked}.'
        yield Item(prompt, answers=(str(row["Answer"]),), key=str(row.get("id", "")), extra={"answer_type": kind})


def truthfulqa(rows: Sequence[Row]) -> Iterable[Item]:
    """A short answer; ``answers`` are all true ones, the best first."""
    for row in rows:
        right = _several(_first(row, "Correct Answers", "correct_answers"))
        best = str(_first(row, "Best Answer", "best_answer")).strip()
        wrong = _several(_first(row, "Incorrect Answers", "incorrect_answers"))
        prompt = f"Answer in one short sentence.\n\nQuestion: {_first(row, 'Question', 'question')}\nAnswer:"
        yield Item(prompt, answers=tuple(dict.fromkeys([best, *right])), extra={"incorrect": wrong})


def _several(answers: Any) -> list[str]:
    parts = answers.split(";") if isinstance(answers, str) else answers
    return [part.strip() for part in parts if part.strip()]


def humaneval(rows: Sequence[Row]) -> Iterable[Item]:
    """The function to complete, as plain text."""
    for row in rows:
        extra = {
            "entry_point": row["entry_point"],
            "test": row["test"],
            "stop": ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("],
        }
        answers = (row["canonical_solution"],)
        yield Item(row["prompt"], answers=answers, key=row["task_id"], chat=False, extra=extra)


def mt_bench(rows: Sequence[Row]) -> Iterable[Item]:
    """The first turn, and the second one as ``turn``."""
    for row in rows:
        turns = [*_first(row, "turns", "prompt"), ""]
        yield Item(
            turns[0],
            turn=turns[1],
            key=str(_first(row, "question_id", "prompt_id")),
            extra={"category": row["category"]},
        )


# -- questions about a long text ----------------------------------------------------------


def long(instruction: str, label: str, asking: str = "Question") -> Reader:
    """LongBench's rows: a context, a question about it, answers."""

    def read(rows: Sequence[Row]) -> Iterable[Item]:
        for row in rows:
            question = row.get("input") or row.get("question") or ""
            yield Item(
                f"{instruction}\n\n{label}:\n{row['context']}",
                f"{instruction}\n\n{asking}: {question}\nAnswer:" if question else f"{instruction}\n\n{asking}:",
                answers=tuple(row["answers"]),
                key=_id(row),
            )

    return read


PASSAGES = "Answer the question from the passages. Give only the answer, without any other words."
ARTICLE = (
    "Answer the question about the scientific article as briefly as you can, in one phrase or sentence. "
    'If the article does not answer it, write "unanswerable"; to a yes/no question, write "yes", "no" or '
    '"unanswerable". Explain nothing.'
)
MEETING = "Answer the query about the meeting in one or more sentences."
STORY = "Answer the question about the story as briefly as you can, in one phrase. Explain nothing."
NEWS = "Write a one-page summary of all the news."


def code_context(rows: Sequence[Row]) -> Iterable[Item]:
    """Code to go on with, as plain text."""
    for row in rows:
        text = row["context"] + (row.get("input") or row.get("question") or "")
        yield Item(text, answers=tuple(row["answers"]), key=_id(row), chat=False)


def few_shot(rows: Sequence[Row]) -> Iterable[Item]:
    """TriviaQA: solved examples, then a passage with a question."""
    intro = "Answer the question from the passage. Give only the answer. Examples come first."
    for row in rows:
        question = row.get("input") or row["question"]
        yield Item(
            f"{intro}\n\n{row['context']}", question, answers=tuple(row["answers"]), key=str(row.get("_id") or "")
        )


def musique(rows: Sequence[Row]) -> Iterable[Item]:
    """Questions over passages, of the corpora as published; unanswerable ones left out."""
    return long(PASSAGES, "Passages")([in_longbench_fields(row) for row in rows if row.get("answerable", True)])


def _id(row: Row) -> str:
    return str(row.get("id") or row.get("_id") or "")


def in_longbench_fields(row: Row) -> Row:
    """A row of MuSiQue or HotpotQA as published, in LongBench's fields; rows in those already stay."""
    if "answers" in row:
        return row
    if "paragraphs" in row:
        passages = [(part["title"], part["paragraph_text"]) for part in row["paragraphs"]]
    else:
        parts = row["context"]
        passages = [(title, "".join(lines)) for title, lines in zip(parts["title"], parts["sentences"], strict=True)]
    text = "\n".join(f"Passage {index}:\n{title}\n{body}" for index, (title, body) in enumerate(passages, start=1))
    answers = [row["answer"], *row.get("answer_aliases", [])]
    return {"id": row["id"], "input": row["question"], "context": text, "answers": answers}


def qmsum_meetings(meetings: Sequence[Row], queries: Sequence[Row]) -> Iterable[Item]:
    """Each query with the transcript of its meeting."""
    known = joined_meetings(meetings, queries)
    for row, item in zip(known, long(MEETING, "Transcript", "Query")(known), strict=True):
        yield Item(item.text, item.question, answers=item.answers, extra={"kind": row.get("kind", "")})


def joined_meetings(meetings: Sequence[Row], queries: Sequence[Row]) -> list[Row]:
    """Queries with their meetings, in LongBench's fields."""
    transcripts = {row["meeting_id"]: row["transcript"] for row in meetings}
    return [{**row, "context": transcripts[row["meeting_id"]]} for row in queries if row["meeting_id"] in transcripts]


# -- rows as lm-eval's tasks expect them --------------------------------------------------


def truthfulqa_rows(rows: Sequence[Row]) -> Iterable[Row]:
    """Fields of the hub's dataset."""
    for row, item in zip(rows, truthfulqa(rows), strict=True):
        yield {
            "question": row.get("Question", row.get("question")),
            "best_answer": item.answers[0],
            "correct_answers": list(item.answers),
            "incorrect_answers": item.extra["incorrect"],
        }


def longbench_rows(rows: Sequence[Row]) -> Iterable[Row]:
    """LongBench's fields, also of corpora as published."""
    for row in map(in_longbench_fields, rows):
        yield {
            "context": row["context"],
            "question": row.get("input") or row.get("question") or "",
            "answers": list(row["answers"]),
            "id": _id(row),
        }


def meeting_rows(meetings: Sequence[Row], queries: Sequence[Row]) -> Iterable[Row]:
    """Queries with their meetings, in LongBench's fields."""
    return longbench_rows(joined_meetings(meetings, queries))


def ruler_rows(rows: Sequence[Row]) -> Iterable[Row]:
    """What lm-eval's generators make."""
    for row in rows:
        prefix = str(row.get("answer_prefix") or row.get("gen_prefix") or "").strip()
        yield {"input": row["input"], "outputs": list(row["outputs"]), "gen_prefix": prefix, "max_length": 4096}


# -- synthetic ----------------------------------------------------------------------------


def ruler(rows: Sequence[Row]) -> Iterable[Item]:
    """The last line is the question; what the answer begins with is in ``extra``."""
    for row in rows:
        text, _, question = row["input"].rpartition("\n")
        extra = {"answer_prefix": row.get("answer_prefix", "").strip()}
        yield Item(text, question, answers=tuple(row["outputs"]), key=str(row.get("index", "")), extra=extra)


def kv_retrieval(rows: Sequence[Row]) -> Iterable[Item]:
    """One of many pairs of a JSON object."""
    for row in rows:
        pairs = ",\n ".join(f'"{key}": "{value}"' for key, value in row["ordered_kv_records"])
        text = f"Extract the value that belongs to the given key from this JSON object.\n\n{{{pairs}}}"
        question = f'Key: "{row["key"]}"\nCorresponding value:'
        yield Item(text, question, answers=(row["value"],), key=row["key"])


# -- plain text ---------------------------------------------------------------------------


def books(rows: Sequence[Row], *, chars: int, following: int) -> Iterable[Item]:
    """Pieces of ``chars`` characters, side by side; what follows each is its answer."""
    for row in rows:
        text, name = row["text"].strip(), str(row.get("id") or _first(row, "short_book_title", "title"))
        for start in range(0, len(text) - chars - following, chars):
            begin, end = _word_start(text, start), _word_start(text, start + chars)
            yield Item(
                text[begin:end].rstrip(),
                answers=(text[end : end + following].strip(),),
                key=f"{name}-{start}",
                chat=False,
            )


def articles(rows: Sequence[Row], *, chars: int, following: int) -> Iterable[Item]:
    """The start of each article that is long enough: at most ``chars`` characters of it."""
    for number, row in enumerate(rows):
        text = _first(row, "text", "page").strip()
        end = _word_start(text, min(chars, len(text) - following))
        if end > following:
            key = str(row.get("id") or number)
            yield Item(text[:end].rstrip(), answers=(text[end : end + following].strip(),), key=key, chat=False)


def _word_start(text: str, at: int) -> int:
    """The first start of a word from ``at`` on."""
    while 0 < at < len(text) and not text[at - 1].isspace():
        at += 1
    return at
