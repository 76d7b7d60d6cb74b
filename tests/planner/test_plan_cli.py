"""``refreekv plan`` on the command line: its table, its JSON, its picture, and how it fails."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from helpers.command_line import Outcome, runner
from helpers.planning import GEMMA_12B, LATENT, LLAMA, measured_on


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    return runner(capsys)


@pytest.fixture
def llama_file(tmp_path: Path) -> str:
    (tmp_path / "Llama-3-8B").mkdir()
    file = tmp_path / "Llama-3-8B" / "config.json"
    file.write_text(json.dumps(LLAMA))
    return str(file)


@pytest.fixture
def own_budgets(tmp_path: Path) -> str:
    file = tmp_path / "budgets.json"
    measured = asdict(measured_on("one", 0.5, "refreekv:threshold=0.02"))
    file.write_text(json.dumps({"schema": 1, "measured": [measured]}))
    return str(file)


def test_table_and_json_say_the_same(run, llama_file, own_budgets):
    arguments = ["plan", llama_file, "--vram", "24GB", "--context", "8k", "--output", "4k", "--concurrency", "4"]
    arguments += ["--policy", "refreekv:threshold=0.02", "--budgets", own_budgets]
    result = json.loads(run(*arguments, "--json").out)
    assert result["model"] == "Llama-3-8B"
    assert result["kv"]["bytes_per_token"] == 131072
    assert result["load"] == {"context": 8192, "output": 4096, "requests": 4, "prompt": 4096}
    full, worst, expected = result["scenarios"]
    assert full["kv_bytes"] == worst["kv_bytes"] == 4 * 2**30
    assert expected["kv_bytes"] == 3 * 2**30
    assert expected["budget"] == 0.5
    assert expected["requests"] > full["requests"]
    assert "n=14" in result["expected_from"]
    shown = run(*arguments).out
    for part in ("Llama-3-8B (llama, 8.03 billion parameters)", "128 KiB in bf16", "22.35 GiB", "n=14", "worst case"):
        assert part in shown
    assert "does not fit" not in shown
    for row in result["scenarios"]:
        assert f"{row['requests']:,}" in shown


def test_heads_that_cannot_be_coded_stay_as_they_are(run, tmp_path):
    """As `compress` does unless codes were asked for by name; it was refused, with the advice to do what was done."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**LLAMA, "num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 4000}))
    arguments = ["plan", str(file), "--vram", "48GiB", "--json"]
    result = json.loads(run(*arguments).out)
    assert result["kv"]["dtype"] == "bf16"
    assert "multiple of 16" in result["kv"]["shares_from"]
    assert {row["stored"] for row in result["scenarios"]} == {row["read"] for row in result["scenarios"]} == {"bf16"}
    assert "multiple of 16" in run(*arguments[:-1]).out
    named = run(*arguments, "--kv", "int4")
    assert named.code == 2
    assert "multiple of 16" in named.err


def test_how_a_prompt_is_held_until_its_end(run, llama_file):
    arguments = ["plan", llama_file, "--vram", "24GiB", "--kv", "int4", "--json"]
    held = {}
    for options in ((), ("--prompt-kv", "int8"), ("--prompt-kv", "int4"), ("--prompt-kv", "bf16")):
        result = json.loads(run(*arguments, *options).out)
        held[options[-1] if options else None] = result["scenarios"][-1]["peak_bytes"]
    assert held[None] == held["int8"]
    assert held["int4"] < held["int8"] < held["bf16"]
    for number in ("int8", "int4"):
        shown = run(*arguments[:-1], "--prompt-kv", number).out.splitlines()
        heading = next(line for line in shown if "K/V a token" in line)
        columns = heading.split("  ")
        at = [name.strip() for name in columns if name.strip()].index("prompt held in") + 1
        rows = [line for line in shown if line.startswith(("full cache", "worst case"))]
        assert [[cell for cell in row.split("   ") if cell.strip()][at].strip() for row in rows] == ["bf16", number]
    assert "prompt held in" not in run(*arguments[:-1], "--prompt-kv", "bf16").out


def test_quantised_and_too_large(run, llama_file):
    result = json.loads(run("plan", llama_file, "--vram", "12GiB", "--kv", "int4", "--json").out)
    assert result["kv"]["stored_bytes_per_token"] == 32 * 8 * 2 * 66
    assert not result["scenarios"][-1]["fits"]
    assert any("--weights int8" in line for line in result["advice"])
    assert "It does not fit. One of these makes it fit:" in run("plan", llama_file, "--vram", "12GiB").out


def test_no_expected_row_without_a_measurement(run, llama_file):
    result = json.loads(run("plan", llama_file, "--vram", "24GB", "--policy", "refreekv:threshold=0.3", "--json").out)
    assert [row["scenario"] for row in result["scenarios"]] == ["full cache", "worst case"]
    assert any("Nothing is known" in note for note in result["notes"])


def test_latent_caches_and_windows_are_named(run, tmp_path):
    for name, config, words in (
        ("deepseek", LATENT, "pruning does not apply"),
        ("gemma", GEMMA_12B, "only full-attention layers are pruned"),
    ):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(config))
        assert words in run("plan", str(file), "--vram", "80GB").out


def test_plot(run, llama_file, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("plan.png", "plan.svg"):
        shown = run(
            "plan", llama_file, "--vram", "24GB", "--policy", "snapkv:ratio=0.5", "--plot", str(tmp_path / name)
        )
        assert shown.code == 0
        assert name in "".join(shown.out.split())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "plan.svg").read_text()
    assert "expected with snapkv" in drawn or "<path" in drawn


def test_simulated_load(run, llama_file, tmp_path):
    trace = tmp_path / "load.jsonl"
    lines = [{"arrival": 0.2 * i, "prompt_tokens": 4000 + 50 * (i % 9), "output_tokens": 100} for i in range(60)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["plan", llama_file, "--vram", "20GiB", "--policy", "snapkv:ratio=0.25", "--trace", str(trace)]
    arguments += ["--gpus", "2", "--price", "2.5", "--bandwidth", "0.8TB", "--tflops", "100"]
    result = json.loads(run(*arguments, "--json").out)["load_simulation"]
    full, pruned = result["scenarios"]
    assert (full["scenario"], pruned["scenario"]) == ("full cache", "expected")
    assert full["completed"] == pruned["completed"] == 60
    assert pruned["mean_running"] >= full["mean_running"]
    assert pruned["latency"]["p90"] <= full["latency"]["p90"]
    assert full["cost_per_million"] > 0
    assert full["gpus_needed"] >= pruned["gpus_needed"] >= 1
    assert "prefix caching" in result["left_out"]
    shown = run(*arguments).out
    assert "GPUs for p90 first token ≤ 5 s" in shown
    assert "The simulation leaves out" in shown


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--vram", "24"], ["--vram '24' has no unit", "24GB", "24GiB"]),
        (["--vram", "lots"], ["--vram 'lots' is not a size such as 24GB"]),
        (["--vram", "0GB"], ["more than 0 bytes"]),
        (["--context", "32kb"], ["--context '32kb' is not a number of tokens"]),
        (["--context", "32k"], ["32,768 tokens is more than the 8,192"]),
        (["--context", "512", "--output", "512"], ["leaves no prompt"]),
        (["--concurrency", "0"], ["--concurrency must be at least 1"]),
        (["--weights", "int3"], ["--weights must be bf16, int8 or int4"]),
        (["--kv", "int9"], ["kv_dtype must be int8, int6, int4 or int2"]),
        (["--policy", "refrekv"], ["no policy is named 'refrekv'"]),
        (["--prefill-chunk", "some"], ["--prefill-chunk 'some'"]),
        (["--prompt-kv", "int7"], ["prompt_dtype must be int8, int6, int4 or int2"]),
        (["--reserve", "1"], ["--reserve '1' has no unit"]),
        (["--plot", "plan.txt"], ["--plot writes .png, .svg or .pdf, not '.txt'"]),
        (["--plot", "/nowhere/plan.png"], ["cannot write /nowhere/plan.png"]),
        (["--gpus", "2"], ["give one with --trace"]),
        (["--trace", "nowhere.jsonl"], ["cannot read --trace nowhere.jsonl"]),
        (["--price", "-1"], ["--price must be more than 0"]),
        (["--bandwidth", "fast"], ["--bandwidth 'fast' is not a size"]),
        (["--budgets", "nowhere.json"], ["cannot read --budgets"]),
        (["--vram", "2GB", "--trace", "TRACE"], ["no memory for a K/V pool"]),
    ],
)
def test_bad_input(run, llama_file, tmp_path, arguments, fragments):
    (tmp_path / "trace.jsonl").write_text('{"arrival": 1, "prompt_tokens": 3, "output_tokens": 1}')
    arguments = [str(tmp_path / "trace.jsonl") if one == "TRACE" else one for one in arguments]
    given = arguments if "--vram" in arguments else ["--vram", "24GB", *arguments]
    refused(run("plan", llama_file, *given), *fragments)


def refused(outcome: Outcome, *fragments: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("refreekv: error: ")
    for fragment in fragments:
        assert fragment in outcome.err


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ({"model_type": "mamba"}, "no usable num_attention_heads"),
        ({"model_type": "made-up"}, "does not know"),
        ({"hidden_size": 8}, "names no model_type"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({**LLAMA, "num_hidden_layers": 0}, "no usable num_hidden_layers"),
    ],
)
def test_models_that_cannot_be_planned_for(run, tmp_path, config, fragment):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    refused(run("plan", str(file), "--vram", "24GB"), fragment)


def test_unknown_models(run):
    refused(run("plan", "./nowhere", "--vram", "24GB"), "no such file or folder")
    refused(run("plan", "nobody-at-all/nothing-at-all", "--vram", "24GB"), "give its folder or config.json instead")
