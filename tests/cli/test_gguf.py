""".gguf files on the command line: packed where they can be, and said what became of the weights."""

import io
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from helpers.command_line import assert_refused, runner  # noqa: E402
from helpers.gguf_files import write_model  # noqa: E402
from refreekv.cli import loading, weights  # noqa: E402
from refreekv.engines.transformers import gguf as told  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def run(capsys):
    return runner(capsys)


def said(outcome):
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("tiny.gguf: ")]
    return line


def test_what_became_of_the_weights_is_said(run, file):
    asked = ("generate", "--model", str(file), "--prompt", "hello there", "--max-new-tokens", "3", "--device", "cpu")
    size = f"{file.stat().st_size / 1024:.1f} KiB in the file"
    line = said(run(*asked))
    assert "weights are unpacked to float32 (" in line
    assert f"{size}): on a CPU that is quicker" in line
    line = said(run(*asked, "--weights", "packed"))
    assert "weights stay packed in 16 modules (" in line  # seven matrices a layer, the embedding and the output layer
    assert size in line
    assert "as --weights says" in said(run(*asked, "--weights", "unpacked"))


def test_answers_are_the_same_packed_and_unpacked(run, file):
    asked = ("generate", "--model", str(file), "--prompt", "hello there", "--max-new-tokens", "12", "--device", "cpu")
    assert run(*asked).out == run(*asked, "--weights", "packed").out != ""


@pytest.mark.parametrize("command", ["chat", "inspect"])
def test_other_commands_take_the_file(run, file, command, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    own = {"chat": [], "inspect": ["--prompt", "hello there", "--out", str(tmp_path / "page.html")]}[command]
    done = run(command, "--model", str(file), "--max-new-tokens", "3", "--weights", "packed", *own)
    assert "weights stay packed" in said(done)


def test_packed_is_refused_where_it_cannot_be(run, tmp_path):
    file = write_model(tmp_path / "tiny.gguf", leave_out="blk.1.ffn_up")
    asked = ("generate", "--model", str(file), "--prompt", "hello", "--weights", "packed")
    assert_refused(run(*asked), "--weights packed cannot be", "the file has no blk.1.ffn_up.weight")


def test_the_file_is_parsed_once(file, monkeypatch):
    parsed = []
    real = gguf.GGUFReader

    class Counted(real):
        def __init__(self, path, *rest):
            parsed.append(Path(path).name)
            super().__init__(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    for kind in ("packed", "unpacked"):
        parsed.clear()
        loading.load(str(file), weights=kind, device="cpu")
        assert set(parsed) == {"tiny.gguf"}
        assert len(parsed) == 1


def test_who_loads_it(file, monkeypatch):
    def loads(said, device):
        made = weights.packed_model(file, said, device, torch.float32)
        return made if isinstance(made, str) else None

    monkeypatch.setattr("refreekv.engines.transformers.packed_weights.load", lambda *a, **k: object())
    assert "as --weights says" in loads("unpacked", CUDA)
    assert "on a CPU that is quicker" in loads("auto", CPU)
    assert loads("packed", CPU) is None
    assert "on trial on GPUs" in loads("auto", CUDA)
    assert loads("packed", CUDA) is None


def test_the_first_release_that_is_supported_knows_no_choice(file, monkeypatch):
    """And unpacks all; later ones do that for Llama, too, where nothing is said."""
    monkeypatch.setattr(told, "_gguf_config_class", lambda: None)
    assert told.gguf_config("auto") is None
    assert loading.load(str(file), device="cpu").model.dtype == torch.float32
