"""``benchmarks/fidelity.py`` as a process: killed for real and run again, plans, time limits."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

from helpers.models import save_with_characters
from refreekv.evaluation.results import read

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fidelity.py"
RANDOM = ("--random", "tiny", "--text-tokens", "60", "--limit", "5", "--device", "cpu", "--dtype", "float32")
COMMON = ("--continuation", "4", "--policy", "streaming-llm:ratio=0.5", "--policy", "snapkv:ratio=0.3,window=4")


def run(capsys, monkeypatch, *arguments):
    """Run the script in this process; what it printed."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out


def test_a_killed_run_goes_on_and_gives_the_same_table(tmp_path, capsys, monkeypatch):
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    command = [sys.executable, SCRIPT, *RANDOM, *COMMON, "--out", killed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("2/5"):
                break
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = killed.read_bytes()
    with killed.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"sample": "4", "fam')
    held = {(record.sample, record.policy) for record in read(killed).records}
    assert 2 * 3 <= len(held) < 5 * 3
    output = run(capsys, monkeypatch, *RANDOM, *COMMON, "--out", killed, "--json", tmp_path / "killed.json")
    assert f"{5 - len(held) // 3} samples" in output
    run(capsys, monkeypatch, *RANDOM, *COMMON, "--out", whole, "--json", tmp_path / "whole.json")
    assert killed.read_bytes().startswith(before)
    assert len(read(killed).records) == len(read(whole).records) == 15
    tables = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("killed", "whole")]
    assert tables[0] == tables[1]


def test_a_plan_with_a_time_limit_takes_families_in_turn(tmp_path, capsys, monkeypatch):
    model = tmp_path / "model"
    save_with_characters(model)
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'max_tokens = 3000\ncontinuation = 2\npolicies = ["streaming-llm:ratio=0.5"]\n'
        '[families]\n"niah:tokens=200" = 2\n"variable-tracking:tokens=200" = 3\n'
    )
    out = tmp_path / "o.jsonl"
    arguments = (model, "--plan", plan, "--out", out, "--device", "cpu", "--dtype", "float32")
    assert "out of time" in run(capsys, monkeypatch, *arguments, "--time-limit", "1e-6")
    assert len(read(out).records) == 2
    assert "out of time" in run(capsys, monkeypatch, *arguments, "--time-limit", "1e-6")
    assert [record.family.partition(":")[0] for record in read(out).records[::2]] == ["niah", "variable-tracking"]
    run(capsys, monkeypatch, *arguments)
    assert len(read(out).records) == 2 * 5
