""".gguf files on the command line: packed where transformers can, and said what became of the weights."""

import io
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from helpers.command_line import assert_refused, runner
from refreekv.cli import loading, weights

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 64, 128, 4, 2, 96


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny Llama in Q8_0 with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    tokens = [chr(33 + index) for index in range(VOCABULARY - 4)] + ['!"', "#$", "Ġ", "<end>"]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (VOCABULARY - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(['! "', "# $"])
    writer.add_bos_token_id(VOCABULARY - 1)
    writer.add_eos_token_id(VOCABULARY - 1)

    def add(name, *shape, packed=True):
        values = draw.normal(0, 0.2, shape).astype(np.float32)
        if packed:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ones(shape, np.float32))

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output.weight", VOCABULARY, HIDDEN)
    add("output_norm.weight", HIDDEN, packed=False)
    kv = KV_HEADS * HIDDEN // HEADS
    for layer in range(2):
        for name, rows, columns in (("attn_q", HIDDEN, HIDDEN), ("attn_k", kv, HIDDEN), ("attn_v", kv, HIDDEN),
                                    ("attn_output", HIDDEN, HIDDEN), ("ffn_gate", INNER, HIDDEN),
                                    ("ffn_up", INNER, HIDDEN), ("ffn_down", HIDDEN, INNER)):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", rows, columns)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN, packed=False)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN, packed=False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def run(capsys):
    return runner(capsys)


def test_what_became_of_the_weights_is_said(run, file):
    done = run("generate", "--model", str(file), "--prompt", "hello there", "--max-new-tokens", "3")
    assert done.code == 0, done.err
    (said,) = [line for line in done.err.splitlines() if line.startswith("tiny.gguf: ")]
    assert "weights are unpacked to float32 (" in said
    assert f"{file.stat().st_size / 1024:.1f} KiB in the file" in said
    assert f"transformers {transformers.__version__} " in said


@pytest.mark.parametrize("command", ["chat", "inspect"])
def test_other_commands_take_the_file(run, file, command, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    own = {"chat": [], "inspect": ["--prompt", "hello there", "--out", str(tmp_path / "page.html")]}[command]
    done = run(command, "--model", str(file), "--max-new-tokens", "3", *own)
    assert done.code == 0, done.err
    assert "tiny.gguf: weights are unpacked" in done.err


def test_packed_is_refused_where_it_cannot_be(run, file):
    asked = ("generate", "--model", str(file), "--prompt", "hello", "--weights", "packed")
    outcome = run(*asked)
    if outcome.code == 0:
        pytest.skip("this transformers keeps Llama packed")
    assert_refused(outcome, "--weights packed cannot be: tiny.gguf: weights are unpacked to float32", "transformers")


def test_unpacked_is_the_users_wish(run, file):
    done = run("generate", "--model", str(file), "--prompt", "hello", "--weights", "unpacked", "--max-new-tokens", "2")
    assert "as --weights says" in done.err


def test_the_file_is_parsed_once(file, monkeypatch):
    parsed = []
    real = gguf.GGUFReader

    class Counted(real):
        def __init__(self, path, *rest):
            parsed.append(Path(path).name)
            super().__init__(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    loading.load(str(file))
    assert parsed == ["tiny.gguf"]


class Blocks(torch.nn.Module):
    """As transformers' modules that hold blocks."""

    ggml_type = 8

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 34, dtype=torch.uint8), requires_grad=False)


def model_of(*modules, kind="llama", supported=True):
    model = torch.nn.Sequential(*modules)
    text = types.SimpleNamespace(model_type=kind)
    model.config = types.SimpleNamespace(get_text_config=lambda decoder: text)
    model.hf_quantizer = types.SimpleNamespace(supported=supported)
    model.dtype, model.device = torch.bfloat16, torch.device("cpu")
    return model


def test_packed_modules_are_counted(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(100))
    said = weights.packing(model_of(Blocks(), Blocks(), torch.nn.Linear(2, 2)), path, "auto")
    assert said == f"a.gguf: weights stay packed in 2 modules ({2 * 4 * 34 + 24} B in memory, 100 B in the file)"


@pytest.mark.parametrize(
    ("kernels", "supported", "fragment"),
    [
        (True, False, "keeps none of llama packed"),
        (False, True, "pip install 'kernels"),
        (True, True, "no kernels for"),
    ],
)
def test_the_reason_is_the_true_one(tmp_path, monkeypatch, kernels, supported, fragment):
    from transformers.utils import import_utils

    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(100))
    monkeypatch.setattr(weights, "_gguf_config_class", lambda: object)
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: kernels, raising=False)
    assert fragment in weights.packing(model_of(torch.nn.Linear(2, 2), supported=supported), path, "auto")


def test_the_first_release_that_is_supported_knows_no_choice(file, tmp_path, monkeypatch):
    """And unpacks all; later ones do that for Llama, too, where nothing is said."""
    monkeypatch.setattr(weights, "_gguf_config_class", lambda: None)
    assert weights.gguf_config("auto") is None
    assert loading.load(str(file)).model.dtype == torch.float32
    assert "knows no packed ones" in weights.packing(model_of(torch.nn.Linear(2, 2)), file, "auto")
