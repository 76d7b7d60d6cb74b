"""``refreekv eval`` and ``benchmarks/fidelity.py`` from the outside: a small model in a folder, generated samples."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.models import save_with_characters
from refreekv.cli.commands import app
from refreekv.evaluation.data import families
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.results import read

POLICIES = ("--policy", "refreekv:threshold=0.1,0.3,frozen_layers=1", "--policy", "streaming-llm:ratio=0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights whose tokens are characters."""
    folder = tmp_path_factory.mktemp("model")
    save_with_characters(folder)
    return folder


def made(family, *, data_dir=None, limit=None, seed=0):
    if family == "absent":
        raise families.DataMissing("absent.jsonl is not there")
    rng = random.Random(f"{family}/{seed}")
    texts = ["".join(rng.choices("abcdefgh ", k=40 + 7 * index)) for index in range(limit)]
    question = "which?" if family == "late" else ""
    return [
        Sample(f"{family}-{index}", family, text, question=question, answers=(text[:3],))
        for index, text in enumerate(texts)
    ]


@pytest.fixture(autouse=True)
def _families(monkeypatch):
    monkeypatch.setattr(families, "load", made)
    monkeypatch.setattr(families, "names", lambda: {"early": "one", "late": "two", "absent": "three"})
    monkeypatch.setattr(families, "parse", lambda name: (name, {}, False))


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_eval_end_to_end(folder, tmp_path):
    out, page = tmp_path / "deep" / "out.jsonl", tmp_path / "table.md"
    common = ("--model", folder, "--out", out, *POLICIES, "--limit", 2, "--continuation", 6, "--dtype", "float32")
    result = invoke(*common, "--markdown", page)
    assert result.exit_code == 0, result.output
    assert "Overall: mean of 2 families' means" in result.stdout
    assert "Not run: absent: absent.jsonl is not there" in result.stderr
    results = read(out)
    specs = ["full", "refreekv:threshold=0.1,frozen_layers=1", "refreekv:threshold=0.3,frozen_layers=1"]
    assert {record.policy for record in results.records} == {*specs, "streaming-llm:ratio=0.5"}
    assert len(results.records) == 2 * 2 * 4
    assert results.setup["continuation"] == 6
    assert all(record.answer_nll_change is not None for record in results.records)
    text = page.read_text()
    assert "## early" in text
    assert "| full (noise floor) | 4 |" in text

    before = out.read_bytes()
    again = invoke(*common, "--json")
    assert again.exit_code == 0, again.output
    assert out.read_bytes() == before
    assert "16 results are in the file already" in again.stderr
    table = json.loads(again.stdout)
    assert table["not_run"] == {"absent": "absent.jsonl is not there"}
    assert table["overall"][0]["policy"] == "full"
    assert table["overall"][0]["kl"] < 1e-5 < table["overall"][3]["kl"]

    refused = invoke(*common, "--seed", 1)
    assert refused.exit_code == 2
    assert "results of other settings (seed = 0; now seed = 1)" in " ".join(refused.stderr.split())
    assert out.read_bytes() == before


def test_too_long_prompts_are_said(folder, tmp_path):
    result = invoke(
        "--model", folder, "--out", tmp_path / "o.jsonl", "--families", "early", "--limit", 3, "--max-tokens", 70
    )
    assert result.exit_code == 0, result.output
    assert "Left out of early: 1 samples, as 71 tokens are more than the 70 asked for" in result.stderr
    assert "Overall" not in result.stdout  # one family is its own mean
    none = invoke("--model", folder, "--out", tmp_path / "n.jsonl", "--families", "early", "--max-tokens", 7)
    assert none.exit_code == 2
    assert "no sample could be measured" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policy", "refrekv"), "did you mean 'refreekv'"),
        (("--policy", "refreekv:threshold=2"), "threshold must lie in [0, 1)"),
        (("--suite", "paper"), "no suite is named 'paper'"),
        (("--limit", "0"), "--limit must be at least 1"),
        (("--continuation", "0"), "--continuation must be at least 1"),
        (("--data-dir", "nowhere"), "nowhere is not a folder"),
        (("--rows", "0"), "rows must be at least 1"),
    ],
)
def test_mistakes_are_said_in_a_line(folder, tmp_path, arguments, words):
    result = invoke("--model", folder, "--out", tmp_path / "o.jsonl", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_fidelity_needs_no_terminal_packages(tmp_path):
    script, out = str(Path(__file__).parents[2] / "benchmarks" / "fidelity.py"), str(tmp_path / "o")
    program = (
        "import sys\n"
        "sys.modules['typer'] = sys.modules['rich'] = None\n"
        "sys.argv = ['fidelity', '--random', 'tiny', '--text-tokens', '40', '--limit', '2', '--continuation', '3',\n"
        "    '--device', 'cpu', '--dtype', 'float32', '--policy', 'streaming-llm:ratio=0.5',\n"
        f"    '--out', {out!r}]\n"
        f"sys.path.insert(0, {str(Path(script).parent)!r})\n"  # as for any script that Python is given
        "import runpy\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 samples, 1 policies and the full cache" in done.stdout
    assert len(read(tmp_path / "o").records) == 4
