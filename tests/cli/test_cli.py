"""``refreekv policies`` and ``generate`` on a tiny model in a folder: results and JSON."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import refreekv
from helpers.command_line import CHAT_TEMPLATE, PROMPT, SHAPE, Outcome, full_cache, runner, save_llama
from refreekv.cli.commands import app
from refreekv.engines import DEFAULT_POLICY


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    return runner(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "chat", CHAT_TEMPLATE)


def test_version(run):
    assert run("--version").out == f"refreekv {refreekv.__version__}\n"


@pytest.mark.parametrize(
    ("given", "arguments", "wanted"),
    [
        ({}, ("policies",), "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, ("policies",), "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ("policies",), None),
        ({}, ("serve", "nothing-there", "--engine", "transformers"), "expandable_segments:True"),
        ({}, ("serve", "nothing-there", "--dry-run"), None),  # vLLM has settings of its own
    ],
)
def test_the_allocator_of_a_gpu_grows_its_segments_unless_told_otherwise(run, monkeypatch, given, arguments, wanted):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run(*arguments)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == wanted


def test_the_command_line_comes_to_its_commands_without_torch():
    """PyTorch may read its allocator's settings as early as it is imported."""
    program = "import sys, refreekv.cli.commands; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_help_names_every_command(run):
    outcome = run("--help")
    assert outcome.code == 0
    for command in ("demo", "generate", "policies"):
        assert command in outcome.out


def test_policies_are_listed_with_their_real_defaults(run):
    listing = {entry["name"]: entry for entry in json.loads(run("policies", "--json").out)}
    assert {name: entry["description"] for name, entry in listing.items()} == refreekv.policies.available()
    for name in ("refreekv", "refreekv-heavy-hitter"):
        made = refreekv.policies.create(name)
        for parameter in listing[name]["parameters"]:
            assert not parameter["required"]
            assert parameter["default"] == getattr(made, parameter["name"])
    types = {parameter["name"]: parameter["type"] for parameter in listing["refreekv"]["parameters"]}
    assert types["frozen_layers"] == "int | 'all'"
    assert types["threshold"] == "float"


def test_policies_in_words(run):
    out = run("policies").out
    for name, description in refreekv.policies.available().items():
        assert name in out
        assert description in out
    assert "threshold            = 0.01  (float)" in out


# -- generate ---------------------------------------------------------------------------


def test_generate_gives_what_the_library_gives(run, folder):
    outcome = run("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "12", "--json")
    result = json.loads(outcome.out)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with refreekv.compress(model) as kv:
        output = model.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert result["prompt_tokens"] == 60
    assert result["tokens"] == output.sequences[0, 60:].tolist()
    assert result["text"] == tokenizer.decode(result["tokens"])
    assert result["report"] == json.loads(json.dumps(kv.report.to_dict()))
    assert result["policy"] == DEFAULT_POLICY
    assert result["prefill_seconds"] > 0
    assert result["decode_seconds"] > 0
    assert 0 < result["token_seconds"] < result["decode_seconds"]


def test_generate_prints_text_to_stdout_and_summary_to_stderr(run, folder):
    arguments = ("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "5")
    words = json.loads(run(*arguments, "--json").out)["text"]
    outcome = run(*arguments)
    assert outcome.code == 0
    assert outcome.out == words + "\n"
    assert "60 prompt tokens, 5 new" in outcome.err
    assert "kept" in outcome.err


def test_generate_streams_to_a_terminal(folder, monkeypatch, capsys):
    class Terminal(io.StringIO):
        writes = 0

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.writes += bool(text.strip())
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        app(["generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "9"])
    model_words = AutoTokenizer.from_pretrained(folder).decode(full_cache(folder, PROMPT, 1))
    assert terminal.getvalue().split()[0] == model_words
    assert len(terminal.getvalue().split()) == 9
    assert terminal.writes > 3  # came in pieces
    assert "60 prompt tokens, 9 new" in capsys.readouterr().err


def test_generate_follows_the_policy_and_its_parameters(run, folder):
    outcome = run(
        "generate", "--model", str(folder), "--prompt", PROMPT, "--policy", "streaming-llm:size=9", "--json"
    )  # fmt: skip
    assert outcome.code == 2  # 60 + 128 tokens do not fit in 128
    outcome = run(
        *("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "3"),
        *("--policy", "streaming-llm:size=9", "--json"),
    )
    layers = json.loads(outcome.out)["report"]["layers"]
    assert [row["kept"] for layer in layers for row in layer["rows"]] == [9] * 4


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_kept_entries_can_be_stored_quantised(run, folder, tmp_path, command):
    (tmp_path / "prompt").write_text(PROMPT)
    common = (command, "--model", str(folder), "--prompt-file", str(tmp_path / "prompt"), "--max-new-tokens", "4")
    plain, stored = (
        json.loads(run(*common, "--json", *more).out)
        for more in (("--kv-dtype", "16"), ("--kv-dtype", "int8:recent=8"))
    )
    assert (plain["kv_dtype"], stored["kv_dtype"]) == (None, "int8:recent=8")
    assert stored["report"]["bytes_before"] == plain["report"]["bytes_before"]
    assert stored["report"]["bytes_after"] < plain["report"]["bytes_after"]
    assert stored["report"]["budget"] == plain["report"]["budget"]
    shown = run(*common, "--kv-dtype", "int8:recent=8")
    assert "int8:recent=8" in shown.out + shown.err


def test_prompt_from_file_and_from_stdin(run, folder, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    common = ("generate", "--model", str(folder), "--max-new-tokens", "4", "--json")
    expected = json.loads(run(*common, "--prompt", PROMPT).out)["tokens"]
    assert json.loads(run(*common, "--prompt-file", str(file)).out)["tokens"] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert json.loads(run(*common, "--prompt-file", "-").out)["tokens"] == expected


def test_chat_template_is_used_where_there_is_one(run, chat_folder):
    common = ("generate", "--model", str(chat_folder), "--prompt", PROMPT, "--max-new-tokens", "2", "--json")
    assert json.loads(run(*common).out)["prompt_tokens"] == 63
    assert json.loads(run(*common, "--chat").out)["prompt_tokens"] == 63
    assert json.loads(run(*common, "--no-chat").out)["prompt_tokens"] == 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_decides_what_an_entry_weighs(run, folder, dtype):
    common = ("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "2", "--json")
    report = json.loads(run(*common, "--dtype", dtype).out)["report"]
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    # Layers, K and V, KV heads, head size, tokens.
    assert report["bytes_before"] == 4 * 2 * 2 * SHAPE["head_dim"] * 61 * size


def test_trust_remote_code_is_handed_on_only_when_asked_for(run, folder, monkeypatch):
    seen = []
    real = AutoModelForCausalLM.from_pretrained

    def spy(*args, **kwargs):
        seen.append(kwargs["trust_remote_code"])
        return real(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    common = ("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "1", "--json")
    run(*common)
    run(*common, "--trust-remote-code")
    assert seen == [False, True]
