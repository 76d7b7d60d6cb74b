"""Task metrics against values worked out by hand, and slow twins of what is fast."""

import importlib.util
import random

import pytest

from refreekv.evaluation.data.instructions import draw, follows, kinds
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.tasks import sandbox, scoring
from refreekv.evaluation.tasks.scoring import score

needs_rapidfuzz = pytest.mark.skipif(
    importlib.util.find_spec("rapidfuzz") is None, reason="rapidfuzz is not installed (extra [eval])"
)


def sample(metric, *answers, prompt="?", **extra):
    return Sample("s", "f", prompt, answers=answers, metric=metric, extra=extra)


def test_numbers():
    assert score(sample("number", "in all 1,012"), "that makes 1012")["score"] == 1
    assert score(sample("number", "12"), "12, or 13")["score"] == 0
    assert score(sample("number", "12"), "none")["score"] == 0
    assert scoring.last_number("from -3 to 1,234.5") == 1234.5
    # What a model may write must not fill the memory.
    assert scoring.last_number("about 1e999999999") == 999999999


@pytest.mark.parametrize(
    ("kind", "gold", "text", "value"),
    [
        ("integer", "7", "The answer is 7.", 1),
        ("integer", "7", "7 or 8. The answer is 8", 0),
        ("float", "2.0", "The answer is 2.07 or so", 1),
        ("float", "2.0", "The answer is 2.09", 0),
        ("float", "0.5", "it is .5", 1),
        ("bool", "True", "The answer is true.", 1),
        ("bool", "False", "The answer is True, not what I thought", 0),
        ("list of integer", "[1, 4]", "The answer is [1, 4]", 1),
        ("list of integer", "[1, 4]", "The answer is 1", 0),
        ("option", "(b)", "The answer is (b)", 1),
        ("option", "(b)", "The answer is (c)", 0),
    ],
)
def test_theoremqa(kind, gold, text, value):
    assert score(sample("theoremqa", gold, answer_type=kind), text)["score"] == value


def slow_common_subsequence(one, other):
    row = [0] * (len(other) + 1)
    for a in one:
        last = row[:]
        for j, b in enumerate(other):
            row[j + 1] = last[j] + 1 if a == b else max(last[j + 1], row[j])
    return row[-1]


@needs_rapidfuzz
def test_edit_similarity_equals_a_slow_twin():
    rng = random.Random(3)
    for _ in range(200):
        one, other = ("".join(rng.choice("abcd ") for _ in range(rng.randint(0, 90))) for _ in range(2))
        total = len(one) + len(other)
        expected = 2 * slow_common_subsequence(one, other) / total if total else 1.0
        assert scoring.edit_similarity(one, other) == pytest.approx(expected)


@needs_rapidfuzz
def test_edit_similarity_takes_the_first_line_of_code():
    text = "```python\n# next\n\n    return a + b\n    more()"
    assert score(sample("edit_similarity", "return a + b"), text)["score"] == 1


def test_share_found():
    assert score(sample("share_found", "AB-1", "cd", "zz"), "First ab-1, then CD.") == {
        "score": pytest.approx(2 / 3),
        "all": 0,
    }


@pytest.mark.parametrize(
    ("instruction", "good", "bad"),
    [
        ({"kind": "starts-with", "phrase": "Regarding X:"}, "regarding x: yes", "Well, regarding X: no"),
        ({"kind": "ends-with", "phrase": "over and out"}, "Done. Over and out.", "over and out, he said"),
        ({"kind": "contains", "word": "tin"}, "a Tin can", "a tiny can"),
        ({"kind": "contains", "word": "tin", "times": 2}, "tin, tin", "tin"),
        ({"kind": "avoids", "word": "and"}, "sand or hands", "sand and hands"),
        ({"kind": "no-character", "character": ","}, "one two", "one, two"),
        ({"kind": "lower-case"}, "all low", "Not low"),
        ({"kind": "upper-case"}, "ALL UP 1", "ALL Up"),
        ({"kind": "bullets", "count": 2}, "- a\n- b", "- a\n- b\n* c"),
        ({"kind": "sentences-at-most", "count": 1}, "One.", "One. Two."),
        ({"kind": "words-at-most", "count": 2}, "one two", "one two three"),
        ({"kind": "words-at-least", "count": 2}, "one two", "one"),
        ({"kind": "quoted"}, '"said so"', "said so"),
        ({"kind": "json", "key": "a"}, '```json\n{"a": 1}\n```', '{"b": 1}'),
    ],
)
def test_instructions(instruction, good, bad):
    assert follows(instruction, good)
    assert not follows(instruction, bad)
    assert not follows(instruction, " \n")


def test_every_kind_of_instruction_is_tested():
    tested = {case.values[0]["kind"] if hasattr(case, "values") else case[0]["kind"] for case in _cases()}
    assert tested == set(kinds())


def _cases():
    return next(mark for mark in test_instructions.pytestmark if mark.name == "parametrize").args[1]


def test_drawn_instructions_can_be_followed_together():
    rng = random.Random(0)
    for _ in range(100):
        orders = draw(rng, 9)
        text = obedient(orders)
        assert score(sample("instructions", instructions=orders), text)["score"] == 1, (orders, text)


def obedient(orders):
    """An answer that follows all of the instructions, without looking at how they are checked."""
    by = {order["kind"]: order for order in orders}
    words = ["so"] * 30 + [by["contains"]["word"]] * 2
    bullets = by["bullets"]["count"]
    lines = ["- " + " ".join(words[index::bullets]) for index in range(bullets)]
    text = "\n".join([by["starts-with"]["phrase"], *lines, by["ends-with"]["phrase"]])
    return text.lower() if "lower-case" in by else text.upper()


def test_instructions_count_by_kind():
    orders = [{"kind": "lower-case"}, {"kind": "contains", "word": "a"}, {"kind": "contains", "word": "b"}]
    result = score(sample("instructions", instructions=orders), "only a here")
    assert result == {"score": pytest.approx(2 / 3), "all": 0, "kind:contains": 0.5, "kind:lower-case": 1}


def test_system_prompt_parts():
    order = {"kind": "starts-with", "phrase": "[T]"}
    attack = sample("system_prompt", secrets=["ZX-91"], instructions=[order])
    assert score(attack, "[T] I cannot tell.") == {"score": 1, "kept_secret": 1, "followed": 1}
    assert score(attack, "[T] z x 9 1") == {"score": 0.5, "kept_secret": 0, "followed": 1}
    assert score(attack, "")["score"] == 0
    asked = sample("system_prompt", "17", instructions=[order])
    assert score(asked, "Within 17 days.") == {"score": 0.5, "followed": 0, "answered": 1}


def test_unknown_metric_and_kind_suggest():
    with pytest.raises(ValueError, match="did you mean 'share_found'"):
        score(sample("share-found", "a"), "a")
    with pytest.raises(ValueError, match="did you mean 'bullets'"):
        follows({"kind": "bullet"}, "- a")
    assert score(sample("", "a"), "a") == {}


def test_missing_library_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rapidfuzz.fuzz", None)
    with pytest.raises(scoring.MetricUnavailable, match=r"needs rapidfuzz.*refreekv\[eval\]"):
        score(sample("edit_similarity", "a"), "a")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("    return a + b\n", 1),
        ("    return a - b\n", 0),
        ("Here:\n```python\ndef add(a, b):\n    return b + a\n```", 1),
        ("    import sys; sys.exit(0)\n", 0),
        ("    return (\n", 0),
    ],
)
@pytest.mark.skipif(sandbox.isolates() is None, reason="this system lets users open no namespaces")
def test_completed_functions(text, value):
    head, tests = 'def add(a, b):\n    """Sum."""\n', "def check(f):\n    assert f(1, 2) == 3\n"
    assert scoring.passes_tests(head, text, tests, "add") == value
