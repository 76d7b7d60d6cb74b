"""The examples run as they are on the small model; only what they read is cut, to save time."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import refreekv

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "small_model")
NEEDS = {"in_langchain": ("langchain_core", "langchain_huggingface")}

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not part of this installation"),
]


@pytest.fixture
def run(smollm2, monkeypatch, capsys):
    """Runs an example in this process, with the model that the tests have loaded."""

    def call(name, *options):
        for package in NEEDS.get(name, ()):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs {package}: pip install 'refreekv[examples]'")
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.delitem(sys.modules, "small_model", raising=False)
        import small_model

        whole = small_model.document
        monkeypatch.setattr(small_model, "load", lambda name: smollm2)
        monkeypatch.setattr(small_model, "document", lambda characters=6_000, skip=0: whole(characters // 4, skip))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--max-new-tokens", "5", *options])
        monkeypatch.setattr(smollm2[1], "padding_side", "right")  # put back, whatever the example makes of it
        capsys.readouterr()
        found = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        return found, capsys.readouterr().out

    return call


def test_all_examples_are_in_the_list():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert SCRIPTS
    for name in SCRIPTS:
        assert f"[{name}.py]({name}.py)" in listed


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs_and_says_what_it_kept(run, name):
    policy = "streaming-llm:ratio=0.5"
    found, out = run(name, "--policy", policy)
    assert refreekv.ReFreeKVCache(found["model"]).policy, "the model can still be used"
    if name == "compare_policies":
        rows = {line[:32].strip(): line[32:].split() for line in out.splitlines()[1:]}
        assert set(rows) == {policy, "refreekv", "snapkv:ratio=0.5"}
        assert rows[policy][0] == "50.0%"
        return
    report = (found["kv"] if "kv" in found else found["cache"]).report
    assert str(report).splitlines()[0] in out
    if name == "chat_on_a_document":
        assert 0 < report.budget < 0.5, "each turn halves what there is"
    else:
        assert report.budget == pytest.approx(0.5, abs=0.01)
    assert report.bytes_after < report.bytes_before


def test_turns_on_a_document_read_only_what_is_new(run):
    found, out = run("chat_on_a_document", "--policy", "full")
    read = [line.split(" tokens read")[0].split(" of ") for line in out.splitlines() if " tokens read" in line]
    assert read[0][0].strip() == read[0][1]
    assert all(int(part) < 40 for part, _ in read[1:])
    # With nothing evicted: what one prompt of the same tokens is continued with.
    import torch

    prompt = found["prompt"]
    again = found["model"].generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert again[0].tolist() == found["output"][0].tolist()


def test_rows_of_a_batch_have_budgets_of_their_own(run):
    _, out = run("batch_summaries", "--policy", "refreekv")
    lengths = [int(line.split(" tokens")[0].replace(",", "")) for line in out.splitlines() if "% kept:" in line]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 3


def test_as_a_reader_starts_it():
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / "long_document.py"), "--help"], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert "--question" in process.stdout
