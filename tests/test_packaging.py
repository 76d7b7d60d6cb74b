"""What importing refreekv brings along, and what the package carries."""

import importlib.metadata
import json
import os
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import refreekv
from helpers.command_line import save_tokenizer


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    changed = {**os.environ, **environment}
    kept = {name: value for name, value in changed.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept, capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_brings_nothing_but_torch_and_transformers():
    # First what the base classes of transformers bring by themselves, then what refreekv adds to that.
    code = """
import json, sys
import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
before = {name.partition(".")[0] for name in sys.modules}
models = {name for name in sys.modules if name.startswith("transformers.models.")}
for name in ("typer", "rich", "gguf", "accelerate"):
    sys.modules[name] = None  # importing it from here on fails, also where transformers did it before
import refreekv
after = {name.partition(".")[0] for name, module in sys.modules.items() if module} - set(sys.stdlib_module_names)
print(json.dumps({
    "added": sorted(after - before),
    "models": sorted({name for name in sys.modules if name.startswith("transformers.models.")} - models),
    "cli": sorted(name for name in sys.modules if name.startswith("refreekv.cli")),
}))
"""
    process = run_python(code)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found["added"] == ["refreekv"]
    assert found["models"] == []
    assert found["cli"] == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["eval", "--help"]], ids=" ".join)
def test_help_does_not_wait_for_torch(arguments):
    code = f"""
import runpy, sys
sys.argv = ["refreekv", *{arguments!r}]
try:
    runpy.run_module("refreekv", run_name="__main__")
except SystemExit as ended:
    print(ended.code, [name for name in ("torch", "transformers", "numpy", "matplotlib") if name in sys.modules])
"""
    process = run_python(code)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "0 []"


def test_names_that_there_are_not():
    with pytest.raises(AttributeError, match="module 'refreekv' has no attribute 'compres'"):
        refreekv.compres  # noqa: B018
    assert set(refreekv.__all__) <= set(dir(refreekv))


def test_public_names_exist():
    promised = {"CompressionReport", "LayerReport", "RowReport", "ReFreeKVCache", "__version__", "compress", "policies"}
    assert promised <= set(refreekv.__all__)
    for name in refreekv.__all__:
        assert getattr(refreekv, name) is not None
    for name in ("available", "create", "parse", "register", "resolve", "Policy"):
        assert callable(getattr(refreekv.policies, name))


def test_version_is_the_distribution_s():
    try:
        installed = importlib.metadata.version("refreekv")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("refreekv runs from its source tree here")
    assert installed == refreekv.__version__


def test_the_command_is_installed():
    try:
        scripts = importlib.metadata.distribution("refreekv").entry_points.select(group="console_scripts")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("refreekv runs from its source tree here")
    assert {script.name: script.value for script in scripts} == {"refreekv": "refreekv.cli:main"}


def test_types_are_shipped():
    assert files("refreekv").joinpath("py.typed").is_file()


def test_it_runs_as_a_module_and_a_local_model_needs_no_network(tmp_path):
    config = LlamaConfig(
        vocab_size=save_tokenizer(tmp_path), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    code = f"""
import runpy, socket, sys
asked = []
def refuse(*args, **kwargs):
    asked.append(args)
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
def refreekv(*more):
    sys.argv = ["refreekv", "generate", "--model", {str(tmp_path)!r}, "--prompt", "w1 w2 w3 w4 w5 w6", *more]
    try:
        runpy.run_module("refreekv", run_name="__main__")
    except SystemExit as ended:
        print(ended.code, asked)
refreekv("--max-new-tokens", "3")
refreekv("--policy", "refrekv")
"""
    # Not told to stay offline: it must not even try.
    process = run_python(code, HF_HUB_OFFLINE=None, TRANSFORMERS_OFFLINE=None)
    assert process.returncode == 0, process.stderr
    text, first, second = process.stdout.splitlines()
    assert len(text.split()) == 3
    assert (first, second) == ("0 []", "2 []")
    assert process.stderr.splitlines()[-1].startswith("refreekv: error: no policy is named 'refrekv'")
