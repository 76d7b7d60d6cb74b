"""``benchmarks/task_scores.py``: turns, a run that was cut short, and its page."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra [eval])")

from helpers.models import save_with_characters
from refreekv.evaluation.records import TaskRecord
from refreekv.evaluation.results import read

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "task_scores.py"
spec = importlib.util.spec_from_file_location("benchmark_task_scores", SCRIPT)
driver = sys.modules["benchmark_task_scores"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)

PLAN = """
samples = 5
turn = 2
max_new_tokens = 3
policies = ["streaming-llm:ratio=0.5", "adaptive:constant=0"]
tasks = ["niah:tokens=60,depths=2", "long-code:tokens=60", "gpqa"]
"""
POLICIES = ("full", "chance", "streaming-llm:ratio=0.5", "adaptive:constant=0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_with_characters(folder)
    (folder.parent / "plan.toml").write_text(PLAN)
    return folder


def run(monkeypatch, model, out, *more):
    arguments = [model, "--plan", model.parent / "plan.toml", "--data-dir", model, "--out", out, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["task_scores", *map(str, arguments), "--dtype", "float32", *more])
    driver.main()
    return read(out, TaskRecord)


def test_tasks_take_turns_and_a_cut_run_goes_on(model, tmp_path, monkeypatch, capsys):
    whole = run(monkeypatch, model, tmp_path / "whole.jsonl")
    assert "not run: gpqa" in capsys.readouterr().out
    needle, code = (f"{name}:" for name in ("niah", "long-code"))
    # Five samples: two, and three, for nobody is left alone.
    order = [record.family.partition(":")[0] + ":" for record in whole.records]
    assert order == [needle] * 8 + [code] * 8 + [needle] * 12 + [code] * 12
    assert {policy: sum(one.policy == policy for one in whole.records) for policy in POLICIES} == dict.fromkeys(
        POLICIES, 10
    )
    texts = {one.key: one.text for one in whole.records}
    assert all(one.text == texts[(*one.key[:2], "full")] for one in whole.records if one.policy == POLICIES[3])

    # Cut in the second turn, where one policy has not answered yet.
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[: 2 + 16 + 9]))
    held = read(cut, TaskRecord).records
    counted = driver.read(cut).results.records
    assert len(counted) == 16 < len(held) == 25
    assert [one for one in held if one.sample in {other.sample for other in counted}] == counted
    run(monkeypatch, model, cut, "--time-limit", "0")
    assert read(cut, TaskRecord).records == held
    assert run(monkeypatch, model, cut).records == whole.records


def test_page(model, tmp_path, monkeypatch):
    made = run(monkeypatch, model, tmp_path / "run.jsonl")

    def write(score, **more):
        path = tmp_path / "scored.jsonl"
        setup = {**made.setup, "environment": {**made.setup["environment"], **more}}
        path.unlink(missing_ok=True)
        records = [
            TaskRecord.from_dict({**one.to_dict(), "scores": {"score": score(one, index)}})
            for index, one in enumerate(made.records)
        ]
        with driver.RecordFile(path, setup, made.policies, TaskRecord) as file:
            file.append(records)
        page = tmp_path / "page.md"
        monkeypatch.setattr(sys, "argv", ["task_scores", str(path), "--page", str(page)])
        driver.main()
        return page.read_text()

    def kept_half(one, index):
        if one.policy == POLICIES[2]:
            return 0.5 if one.family.startswith("niah") else 0.75
        return float(one.policy != "chance")

    text = write(kept_half)
    assert "Over the 2 tasks above chance" in text
    row = next(line for line in text.splitlines() if line.startswith("| `streaming-llm:ratio=0.5` "))
    assert "| -37.5 | 62.5% [62.5%, 62.5%] | niah:depths=2,tokens=60: 50.0%, -50.0 [-50.0, -50.0] |" in row
    assert "| 10, 0 of 10 | 2 |" in row
    floor = next(line for line in text.splitlines() if line.startswith("| `adaptive:constant=0` "))
    assert "| 100% | 0, 0 of 10 | 0 |" in floor
    assert "| +0.0 | 100.0% [100.0%, 100.0%] |" in floor
    assert "missing: gpqa" in text
    assert "Not reached" not in text
    assert "| niah:depths=2,tokens=60 | `full` | 100 | 100 |" in text

    text = write(lambda one, index: 0.0, asked=["niah:depths=2,tokens=60", "gsm8k"])
    assert "Not reached by the run: gsm8k." in text
    assert "above chance, each" not in text
    assert "not above chance with the full cache: niah:depths=2,tokens=60 (0.0, chance 0.0, n = 5)" in text
