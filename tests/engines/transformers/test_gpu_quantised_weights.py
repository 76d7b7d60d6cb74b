"""Weights in few bits on CUDA by the libraries that transformers integrates: captured, or eager for one reason."""

import importlib.util
import logging
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import refreekv
from helpers.equivalence import same_steps
from helpers.models import prompts
from refreekv.engines.transformers import fingerprint, fusion, graph, model_constants
from refreekv.engines.transformers.naming import NAME

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

LENGTH, NEW = 700, 24


def needs(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def nf4():
    needs("bitsandbytes", "accelerate")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def llm_int8():
    needs("bitsandbytes", "accelerate")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int4():
    needs("torchao", "accelerate")
    from torchao.quantization import Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    try:  # the format that PyTorch's own kernel reads
        return TorchAoConfig(Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    except TypeError:
        return TorchAoConfig(Int4WeightOnlyConfig(group_size=128))


def torchao_int8():
    needs("torchao", "accelerate")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


KINDS = {"plain": lambda: None, "nf4": nf4, "llm.int8": llm_int8, "torchao-int4": torchao_int4,
         "torchao-int8": torchao_int8}  # fmt: skip
BITS = {"plain": 16, "nf4": 4.2, "llm.int8": 8.1, "torchao-int4": 4.4, "torchao-int8": 8.1}
CAPTURED = {"plain", "nf4", "torchao-int4", "torchao-int8"}
"""LLM.int8() asks the device for outliers at each product: no graph can."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=4096, initializer_range=0.06, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    return place


def load(folder, kind):
    config = KINDS[kind]()
    options = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda", **options).eval()


def answer(model, decode, policy="adaptive"):
    ids, mask = (part.cuda() for part in prompts((LENGTH,), seed=3))
    cache = refreekv.ReFreeKVCache(model, policy, decode=decode)
    begin = time.perf_counter()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **{NAME: cache},
    )  # fmt: skip
    torch.cuda.synchronize()
    return out, time.perf_counter() - begin


@pytest.mark.parametrize("kind", KINDS)
def test_each_runs_captured_or_eagerly_for_one_logged_reason(folder, kind, monkeypatch, caplog):
    made = []
    original = graph.Step.__init__
    monkeypatch.setattr(graph.Step, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    model = load(folder, kind)
    weights = sum(
        part.untyped_storage().nbytes()
        for name, tensor in model.named_parameters()
        if "layers" in name
        for part in fingerprint.parts(tensor)
    )
    plain = 4 * (1024 * (1024 * 2 + 256 * 2) + 3 * 1024 * 2048)
    assert weights <= plain * BITS[kind] / 8 * 1.05 + 2**16
    with caplog.at_level(logging.WARNING, "refreekv"):
        eager, slow = answer(model, "eager")
        assert not made
        answer(model, "graph")  # compiles and captures
        captured, quick = answer(model, "graph")
    reasons = [record.message for record in caplog.records if "without a CUDA graph" in record.message]
    print(f"{kind}: eager {slow:.3f} s, asked for a graph {quick:.3f} s; {reasons or 'captured'}")
    graphs = [step for step in made if getattr(step, "_graph", None) is not None]
    if kind in CAPTURED:
        assert reasons == []
        assert len(graphs) == 1
    else:
        assert len(reasons) == 1 or (len(graphs) == 1 and not reasons)
    same_steps(eager, captured, LENGTH, 5e-2)


@pytest.mark.parametrize("rows", [1, 4])
def test_products_of_nf4_are_ours_for_a_few_rows(folder, rows):
    model = load(folder, "nf4")
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    ids = prompts((1,) * rows, seed=4)[0].cuda()
    with torch.no_grad():
        before = model(ids).logits
        with fusion.fused(model, rows):
            assert len(layers) == 4 * 7
            assert all("forward" in vars(layer) for layer in layers)
            after = model(ids).logits
    assert (after - before).norm() <= 2e-2 * before.norm()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_changed_scales_are_noticed(folder, kind):
    model = load(folder, kind)
    ids = prompts((4,))[0].cuda()
    with torch.no_grad():
        model(ids)
        before = fingerprint.of_contents(model), model_constants.key_of(model)
        model(ids)
        assert (fingerprint.of_contents(model), model_constants.key_of(model)) == before
        layer = model.model.layers[2].mlp.up_proj
        if kind == "nf4":
            layer.weight.quant_state.state2.absmax.mul_(2)
        elif kind == "llm.int8":
            fingerprint.scales(vars(layer))[0].mul_(2)
        else:
            small = min(fingerprint.parts(layer.weight), key=lambda part: part.numel())
            small.mul_(2)
    assert fingerprint.of_contents(model) != before[0]
    assert model_constants.key_of(model) not in (before[1], None)


def test_digesting_packed_weights_takes_little_memory(folder):
    model = load(folder, "nf4")
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert model_constants.key_of(model) is not None
    assert torch.cuda.max_memory_allocated() - held < 16 * 2**20


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0", "Q4_1"])
def test_blocks_of_gguf_files(kind, tmp_path, monkeypatch, caplog):
    needs("gguf", "accelerate")
    from helpers.gguf_files import write_model
    from refreekv.cli import weights

    made = []
    original = graph.Step.__init__
    monkeypatch.setattr(graph.Step, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    path = write_model(
        tmp_path / "a.gguf", kind, hidden=1024, inner=2048, heads=16, kv_heads=4, layers=4, vocabulary=128
    )
    model = weights.packed_model(path, "packed", torch.device("cuda"), torch.bfloat16)
    assert not isinstance(model, str), model  # why not
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    assert weights.weight_bytes(model) <= 1.125 * path.stat().st_size
    with caplog.at_level(logging.WARNING, "refreekv"):
        eager, slow = answer(model, "eager")
        answer(model, "graph")
        captured, quick = answer(model, "graph")
    print(f"{kind}: eager {slow:.3f} s, captured {quick:.3f} s")
    assert [record.message for record in caplog.records] == []
    assert len([step for step in made if getattr(step, "_graph", None) is not None]) == 1
    same_steps(eager, captured, LENGTH, 5e-2)
    # And as on the CPU, where weights are unpacked by plain code.
    judge = weights.packed_model(path, "packed", torch.device("cpu"), torch.float32)
    ids, _ = prompts((40,), seed=3)
    with torch.no_grad():
        want, got = judge(ids).logits, model(ids.cuda()).logits.cpu().float()
        one = torch.stack([model(ids[:, :1].cuda()).logits.cpu().float(), judge(ids[:, :1]).logits])
    assert (got - want).norm() <= 5e-2 * want.norm()
    assert (one[0] - one[1]).norm() <= 5e-2 * one[1].norm()


def test_compressed_tensors_are_unpacked_by_their_library_and_then_captured(folder, tmp_path, monkeypatch, caplog):
    """It unpacks a model in 4 bits at its first forward; what follows is a plain model."""
    needs("accelerate")
    # It may be there without what it needs itself.
    pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    bits = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    scheme = QuantizationConfig(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=bits)}, ignore=["lm_head"],
        format="pack-quantized", quantization_status="frozen",
    )  # fmt: skip
    apply_quantization_config(model, scheme)
    for layer in [layer for layer in model.modules() if hasattr(layer, "weight_scale")]:
        groups = layer.weight.detach().float().unflatten(1, (-1, 128))
        layer.weight_scale.data = (groups.abs().amax(-1) / 7.5).to(layer.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))

    made = []
    original = graph.Step.__init__
    monkeypatch.setattr(graph.Step, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cuda").eval()
    packed = torch.cuda.memory_allocated()
    with caplog.at_level(logging.WARNING, "refreekv"):
        captured, _ = answer(loaded, "graph")
        eager, _ = answer(loaded, "eager")
    print(f"{packed:,} bytes after loading, {torch.cuda.memory_allocated():,} after the first answer")
    assert [record.message for record in caplog.records if "without a CUDA graph" in record.message] == []
    assert len(made) == 1
    assert (eager.logits[0] - captured.logits[0]).norm() <= 5e-2 * eager.logits[0].norm()
