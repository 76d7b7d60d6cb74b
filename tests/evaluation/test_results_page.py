"""The results page: marked parts are made anew, what is written by hand stays, figures are drawn."""

import gzip
import importlib.util
import sys
from pathlib import Path

import pytest

from helpers.fidelity import NumberTokenizer
from helpers.models import build
from refreekv.evaluation import sweeps
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity import runner
from refreekv.evaluation.fidelity.bench import Bench

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "results.py"
spec = importlib.util.spec_from_file_location("benchmark_results", SCRIPT)
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A results file of a small model, gzipped."""
    folder = tmp_path_factory.mktemp("run")
    bench = Bench(build("llama", attention="sdpa"), NumberTokenizer(), "tiny model", continuation=3)
    samples = [
        Sample(f"{family}{index}", family, " ".join(str(2 + (7 * at + index) % 90) for at in range(length)))
        for family, length in (("short", 30), ("long", 600))
        for index in range(2)
    ]
    chosen = sweeps.choose(["refreekv:threshold=0.01,0.1", "snapkv:ratio=0.5,window=4", "refreekv:frozen_layers=0"])
    path = folder / "model.jsonl"
    runner.run(bench, samples, chosen, path)
    packed = folder / "model.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def test_marked_parts_are_made_anew_and_the_rest_stays(run, tmp_path, monkeypatch):
    page, figures = tmp_path / "page.md", tmp_path / "figures"
    parts = "\n".join(f"<!-- begin model:{name} -->\nstale part\n<!-- end -->" for name in results.TABLES)
    shown = "figures/model-frontier.svg figures/model-length.svg"
    page.write_text(f"# By hand\n\nbefore\n{parts}\n{shown}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["results", str(run), "--page", str(page), "--figures", str(figures)])
    for _ in range(2):  # and again from its own output
        results.main()
        text = page.read_text()
        assert text.startswith("# By hand\n\nbefore\n<!-- begin model:setup -->\n\n- Model: tiny model, float32")
        assert text.endswith(f"<!-- end -->\n{shown}\nafter\n")
        assert "stale part" not in text
    assert "4 of 2 families, prompts of 30 to 600 tokens" in text
    lines = text.splitlines()
    (row,) = [line for line in lines if line.startswith("| refreekv |") and line.count("|") == 4]
    assert " n=2 | " in next(line for line in lines if line.startswith("| policy: budget / mean KL"))
    measured = results.Run(run)
    for tokens, cell in zip((30, 600), (row.split("|")[2], row.split("|")[3]), strict=True):
        some = [record for record in measured.of("refreekv") if record.prompt_tokens == tokens]
        assert cell.strip().startswith(f"{sum(record.budget for record in some) / 2:.0%} / ")
    for name in ("model-frontier.svg", "model-length.svg"):
        drawn = (figures / name).read_text()
        assert "<svg" in drawn
        assert drawn.count("<path") > 20


def test_a_page_that_asks_for_what_is_not_there(run):
    for mark in ("other:peers", "model:nothing"):
        with pytest.raises(SystemExit, match=f"the page asks for {mark}"):
            results.fill(f"<!-- begin {mark} -->\n<!-- end -->", [results.Run(run)])


def test_paths_are_compared_with_the_noise_floor_sample_by_sample(run):
    measured = results.Run(run)
    floor = {(one.family, one.sample): one.same_path for one in measured.of("full")}
    for line in results.paths(measured).splitlines()[2:]:
        name = line.split("|")[1].strip().strip("`")
        if name == "full cache, run twice":
            assert "| – | – |" in line
            continue
        changes = {"short": [], "long": []}
        for one in measured.of(name):
            changes[one.family].append(100 * (one.same_path - floor[one.family, one.sample]))
        mean = sum(sum(some) / len(some) for some in changes.values()) / 2
        assert line.split("|")[6].strip().startswith(f"{mean:+.1f} [")
        worst = min(changes, key=lambda family: sum(changes[family]))
        assert line.split("|")[7].strip() == f"{sum(changes[worst]) / 2:+.0f} {worst}"
