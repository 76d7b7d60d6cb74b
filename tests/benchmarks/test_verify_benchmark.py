"""`benchmarks/verify.py`: what would have been chosen, played through on stored numbers, and a run on a tiny model."""

import json
import sys

import pytest
import torch

import checkpoints
import verify
from helpers.models import build, characters
from refreekv import policies
from refreekv.engines.transformers.verifying import steps_of

RUNGS = [one.spec for one in verify.at_factors(policies.create("adaptive"), verify.FACTORS)]


EARLY = verify.TOKENS[verify.ANSWER]


def line(name, damage, again):
    shares = [10 * (1 + at) for at in range(len(RUNGS))]
    return {
        "sample": name, "tokens": 100, "bytes_full": 100, "rungs": RUNGS, "bytes": shares, "apart": False,
        "answer": [[one / 2] * EARLY + [one] * 8 for one in damage], "again": [[one] * 4 for one in again],
    }  # fmt: skip


DAMAGE = [0.9, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01]
HURT = line("hurt", DAMAGE, DAMAGE)
FINE = line("fine", [0.01] * 9, [0.001] * 9)


def test_a_step_is_the_step_of_the_library():
    base = policies.parse(RUNGS[0])
    assert [one.spec for one in steps_of(base)[:-1]] == RUNGS[: 2 * verify.STEP + 1 : verify.STEP]
    assert len(steps_of(base)) == 4


def test_rungs_that_would_have_been_chosen():
    by_prompt, by_answer = verify.PROMPT, verify.ANSWER
    assert verify.verified([HURT, FINE], 0, 0.5, by_prompt) == [2, 0]
    assert verify.verified([HURT, FINE], 0, 0.25, by_answer) == [2, 0], "whose beginning is half as damaged here"
    assert verify.verified([HURT, FINE], 0, 0.3, by_prompt) == [4, 0]
    assert verify.verified([HURT, FINE], 0, 0.2, by_prompt) == [9, 0], "three rungs are tried, then everything is kept"
    assert verify.verified([HURT], 2, 0.1, by_prompt) == [6]


def test_equal_bytes():
    lines = [HURT, FINE]
    share, mean, worst = verify.outcome(lines, [2, 0])
    assert (share, mean, worst) == pytest.approx((0.2, 0.255, 0.5))
    assert verify.alike(lines, 0.2) == pytest.approx(((0.8 + 0.01) / 2, 0.8))
    assert verify.alike(lines, 0.25)[1] == pytest.approx(0.65)
    assert verify.outcome(lines, [9, 9]) == (1.0, 0.0, 0.0)
    assert verify.alike(lines, 1.0) == (0.0, 0.0)
    rows = verify.table(lines, [0.5])
    assert rows[1][2:5] == ["20.0%", "0.2550", "0.5000"]


def test_what_a_reading_sees():
    blind = {**HURT, "again": [[0.0] * 4] * 9}
    rows = verify.seen([HURT, FINE, blind], 0.25)
    assert rows[0][4] == "2 of 3"
    assert rows[0][6:8] == ["1 of 2", "0 of 1"]
    assert rows[0][9:] == ["2 of 2", "0 of 1"]


def test_a_run(tmp_path, monkeypatch, capsys):
    model = build("llama", attention="sdpa")
    monkeypatch.setattr(checkpoints, "load", lambda *args: (model, characters(), "tiny"))
    monkeypatch.setattr(verify.own, "KINDS", {"document": verify.own.KINDS["document"]})
    policy = "adaptive:min_length=8,window=4,constant=0.01,copying=2"
    out, apart = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    asked = ["verify.py", "x", "--sizes", "60", "--each", "2", "--policy", policy, "--continuation", "20"]
    monkeypatch.setattr(sys, "argv", [*asked, "--out", str(out)])
    verify.main()
    verify.main()  # nothing is left to do
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert len(lines) == 2
    assert [len(one["again"]) for one in lines] == [9, 9]
    assert lines[0]["bytes"] == sorted(lines[0]["bytes"])
    assert [len(one) for one in lines[0]["answer"]] == [20] * 9
    assert sum(lines[0]["again"][0]) > sum(lines[0]["again"][-1])
    monkeypatch.setattr(sys, "argv", [*asked, "--out", str(apart), "--compare", "snapkv:ratio=0.2", "adaptive"])
    verify.main()
    found = json.loads(apart.read_text().splitlines()[0])
    assert found["rungs"] == ["snapkv:ratio=0.2", "adaptive"]
    assert sum(found["again"][0]) > 0
    assert sum(found["again"][1]) == 0
    monkeypatch.setattr(sys, "argv", ["verify.py", "--table", str(out), str(apart)])
    capsys.readouterr()
    verify.main()
    shown = capsys.readouterr().out
    plan = tmp_path / "plan.toml"
    plan.write_text('continuation = 20\n\n[families]\n"niah:tokens=60" = 1\n')
    monkeypatch.setattr(sys, "argv", [*asked, "--plan", str(plan), "--out", str(tmp_path / "c.jsonl")])
    verify.main()
    assert json.loads((tmp_path / "c.jsonl").read_text())["sample"].startswith("niah")
    assert "one constant, same bytes" in shown
    assert "false alarms" in shown
    assert torch.is_grad_enabled()
