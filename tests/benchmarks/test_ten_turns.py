"""``benchmarks/ten_turns.py`` and ``benchmarks/restore_price.py`` in small."""

import itertools
import json

import pytest
import torch

import refreekv
import restore_price
import ten_turns
from helpers.command_line import save_chat_model, words
from helpers.models import build
from refreekv.cli import loading


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_chat_model(tmp_path_factory.mktemp("models") / "chatty")
    return loading.load(loading.find(str(folder)))


def test_each_turn_is_compared_with_the_full_conversation(loaded):
    model, tokenizer = loaded.model, loaded.tokenizer
    questions = [words(6, number) for number in range(4)]
    turns = ten_turns.converse(model, tokenizer, words(200, 9), questions, 120, 5)
    assert [len(turn.answer) for turn in turns] == [len(turn.logits) for turn in turns]
    assert 120 < len(turns[0].ids) < 140
    assert all(turn.ids[0] == before.answer[-1] for before, turn in itertools.pairwise(turns))
    # The full cache, and all of it kept as it is: nothing is off.
    for variant in ("full", "full+host"):
        assert all(turn["kl_most"] < 1e-6 for turn in ten_turns.follow(model, variant, turns))
    found = {}
    for variant in ("streaming-llm:ratio=0.3", "streaming-llm:ratio=0.3+host16"):
        found[variant] = ten_turns.follow(model, variant, turns)
    without, kept = found.values()
    assert [turn["restored"] for turn in kept] == [None, True, True, True]
    assert kept[0]["kl_first"] == without[0]["kl_first"] < 1e-6
    assert all(turn["kl_first"] < without[number]["kl_first"] for number, turn in enumerate(kept) if number)
    assert kept[-1]["bytes_host"] > 0 == without[-1]["bytes_host"]
    lines = [{"model": "tiny", "variant": name, "turns": turns} for name, turns in found.items()]
    assert len(ten_turns.table(lines)) == len(ten_turns.by_turn(lines)) == 4


def test_a_meeting_with_enough_questions(tmp_path):
    meetings = [{"meeting_id": str(number), "transcript": f"text {number}"} for number in range(3)]
    queries = [{"meeting_id": str(number), "input": f"q{n}"} for number in range(3) for n in range(2 * number)]
    for name, rows in (("meetings", meetings), ("queries", queries)):
        (tmp_path / f"qmsum_{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert ten_turns.read_meeting(tmp_path, 3, None) == ("text 2\n\ntext 0\n\ntext 1", ["q0", "q1", "q2"], "2")
    assert ten_turns.read_meeting(tmp_path, 2, "1") == ("text 1\n\ntext 0\n\ntext 2", ["q0", "q1"], "1")
    with pytest.raises(ValueError, match="has 9 questions"):
        ten_turns.read_meeting(tmp_path, 9, None)


@pytest.mark.parametrize("limit", [None, 0])
def test_what_it_costs_is_measured(limit):
    """Part by part; without time, up to the way back."""
    model = build("llama", attention="sdpa", head_dim=16)
    clock = restore_price.Clock(limit)
    parts = restore_price.measure(model, 300, "streaming-llm:ratio=0.5", refreekv.HostStore(), clock, repeats=1)
    found = {part["part"]: part for part in parts}
    assert [*found] == ["ready", "first", "restore", *([] if limit == 0 else ["prompt", "turn"])]
    assert found["restore"]["host"] > 0
    for part in found.values():
        assert part["part"] in restore_price.line(part)
    if limit is None:
        assert found["turn"]["decoding"][0] < found["turn"]["decoding"][1] * 1.5
        assert "over everything" in restore_price.line(found["turn"])
        prompt = found["prompt"]
        assert prompt["pruning"] == pytest.approx(prompt["plain"] / prompt["full"] - 1)
    assert torch.is_grad_enabled()


def test_a_model_without_a_template_is_asked_in_plain_text(loaded):
    template, loaded.tokenizer.chat_template = loaded.tokenizer.chat_template, None
    try:
        turns = ten_turns.converse(loaded.model, loaded.tokenizer, words(60, 9), [words(6, 1), words(6, 2)], 50, 3)
    finally:
        loaded.tokenizer.chat_template = template
    assert len(turns) == 2
    assert turns[1].ids[0] == turns[0].answer[-1]
