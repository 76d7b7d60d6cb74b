"""The planner: public numbers, real allocations of tiny models, and what fits."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache

from helpers.driving import prefill, storage_bytes
from helpers.models import ARCHITECTURES, build
from helpers.planning import DEEPSEEK_V3, GEMMA_12B, LATENT, LLAMA, measured_on
from refreekv import KVDtype, ReFreeKVCache, policies
from refreekv.core.footprint import activation_elements
from refreekv.core.units import format_size, parse_bytes, parse_tokens
from refreekv.engines import DEFAULT_POLICY
from refreekv.planner import budgets, geometry, measurements, memory, weights
from refreekv.planner import plan as plans
from refreekv.planner.memory import Load, Machine, Scenario
from refreekv.planner.source import Model, ModelError, find

KIB, GIB = 2**10, 2**30

LLAMA_70B = {
    **LLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
MISTRAL_7B = {
    **LLAMA,
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "max_position_embeddings": 32768,
    "vocab_size": 32768,
    "sliding_window": None,
}
QWEN_7B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QWEN_05B = {
    **QWEN_7B,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
MIXTRAL = {
    **MISTRAL_7B,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
FALCON_7B = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "new_decoder_architecture": False,
    "vocab_size": 65024,
}


def model_of(config: dict, name: str = "model", size: int | None = None) -> Model:
    return Model(
        name, CONFIG_MAPPING[config["model_type"]].from_dict(config), size, "an index" if size else None, config
    )


# -- public numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "per_token", "billions"),
    [
        pytest.param(LLAMA, 128 * KIB, 8.030, id="Llama-3-8B"),
        pytest.param(LLAMA_70B, 320 * KIB, 70.554, id="Llama-3-70B"),
        pytest.param(MISTRAL_7B, 128 * KIB, 7.248, id="Mistral-7B-v0.3"),
        pytest.param(QWEN_7B, 56 * KIB, 7.616, id="Qwen2.5-7B"),
        pytest.param(QWEN_05B, 12 * KIB, 0.494, id="Qwen2.5-0.5B, tied embeddings"),
        # 8 of 48 layers see everything: 8 · 2 · 8 · 256 · 2 bytes.
        pytest.param(GEMMA_12B, 64 * KIB, 12.187, id="Gemma-3-12B, with its image part"),
        pytest.param(MIXTRAL, 128 * KIB, 46.703, id="Mixtral-8x7B, all experts"),
        pytest.param(DEEPSEEK_V3, 61 * 576 * 2, 671.026, id="DeepSeek-V3, latent"),
        pytest.param(FALCON_7B, 8 * KIB, 6.922, id="Falcon-7B, one KV head"),
    ],
)
def test_published_models(config, per_token, billions):
    model = model_of(config)
    assert geometry.measure(model).bytes_per_token == per_token
    assert weights.count(model).total / 1e9 == pytest.approx(billions, abs=0.0006)


def test_gemma_s_windows_are_bounded():
    measured = geometry.measure(model_of(GEMMA_12B))
    assert [layer.kind for layer in measured.layers].count("window") == 40
    assert measured.bounded_bytes == 40 * 1024 * 2 * 8 * 256 * 2
    assert measured.full_bytes(32768) == measured.bounded_bytes + 32768 * measured.bytes_per_token
    assert measured.full_bytes(512) == 512 * 48 * 2 * 8 * 256 * 2


def test_latent_caches_are_not_pruned():
    made = plans.make(model_of(LATENT), memory=1500 * GIB, load=Load(8192, 512))
    assert [row.scenario for row in made.rows] == ["full cache"]
    assert any("pruning does not apply" in note for note in made.notes)
    assert "latent cache (MLA) of 576 elements" in made.geometry.describe()


def test_weights_in_every_form():
    model = model_of(LLAMA)
    counts = weights.count(model)
    assert counts.others == pytest.approx(2 * 128256 * 4096, rel=1e-3)
    plain, eight, four = (weights.weigh(model, form, counts).bytes for form in ("bf16", "int8", "int4"))
    assert plain == 2 * counts.total
    assert eight == pytest.approx(counts.matrices + 2 * counts.others, rel=0.02)
    assert four == pytest.approx(counts.matrices * 4.5 / 8 + 2 * counts.others)
    stored = weights.weigh(model_of(LLAMA, size=16_060_522_496), None, counts)
    assert (stored.bytes, stored.form) == (16_060_522_496, "checkpoint")
    with pytest.raises(ValueError, match="weights must be one of bf16, int8, int4"):
        weights.weigh(model, "int3", counts)


def test_experts_are_all_resident_and_few_are_used():
    model = model_of(MIXTRAL)
    counts = weights.count(model)
    assert counts.active(model.text) / 1e9 == pytest.approx(12.88 - 0.13, abs=0.02)  # the input embedding is a look-up
    assert weights.weigh(model, "bf16", counts).bytes == 2 * counts.total


# -- against real allocations -------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_caches_take_what_is_planned(name):
    built = build(name).to(torch.bfloat16)
    planned = geometry.measure(Model(name, built.config))
    for tokens in (10, 60):
        cache = DynamicCache(config=built.config)
        prefill(built, cache, (tokens,))
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        # A window holds what its next query sees beside itself: one token less.
        windows = [layer for layer in planned.layers if layer.kind == "window" and tokens > layer.window]
        assert planned.full_bytes(tokens) - sum(layer.elements * 2 for layer in windows) == held
    assert weights.count(Model(name, built.config)).total == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("number", [None, KVDtype("int4", recent=8), KVDtype("int8", recent=8)])
def test_pruned_caches_take_what_is_planned(llama, number):
    built = build("llama", attention="sdpa", head_dim=64).to(torch.bfloat16)
    planned = geometry.measure(Model("llama", built.config))
    cache = ReFreeKVCache(built, "streaming-llm", ratio=0.5, kv_dtype=number)
    prefill(built, cache, (60,))
    storages = [t for layer in cache.pruned_layers for t in (layer.keys, layer.values)]
    if number is None:
        assert storage_bytes(storages) == cache.report.bytes_after
    # Number formats come with room for generated entries, in full precision.
    rooms = [layer.ragged.tables[0].left * layer.kv_heads for layer in cache.pruned_layers if number is not None]
    assert planned.kept_bytes(60, 0, 0.5, number) + sum(rooms) * 256 == cache.report.bytes_after


def test_models_that_do_not_run_without_data_are_read_from_their_fields(monkeypatch):
    def fail(_):
        raise RuntimeError("needs data")

    for config in (LLAMA, GEMMA_12B, LATENT):
        measured = geometry.measure(model_of(config))
        with monkeypatch.context() as patch:
            patch.setattr(geometry, "_run", fail)
            read = geometry.measure(model_of(config))
        assert read.bytes_per_token == measured.bytes_per_token
        assert read.bounded_bytes == measured.bounded_bytes


def test_a_model_is_built_once_for_all_that_say_the_same(monkeypatch):
    built, skeleton = [], geometry.skeleton
    for module in (geometry, weights):
        monkeypatch.setattr(module, "skeleton", lambda config: built.append(config) or skeleton(config))
    # Of a size that no other test has.
    sizes = [{**LLAMA, "hidden_size": size, "num_hidden_layers": 3} for size in (1408, 1408, 1536)]
    models = [model_of(size) for size in sizes]
    one, same, wider = [(geometry.measure(model), weights.count(model)) for model in models]
    assert one == same
    assert len(built) == 4
    assert wider[1].total > one[1].total
    # The caller's own configuration may change, and is asked anew.
    models[1].config.num_hidden_layers = 5
    assert geometry.measure(models[1]).bytes_per_token * 3 == one[0].bytes_per_token * 5


# -- what fits ----------------------------------------------------------------------------------


def machine(gib: float, chunk: int | None = 2048) -> Machine:
    return Machine(int(gib * GIB), 0, 0, activation_bytes=0, logit_bytes=0, chunk=chunk)


def test_requests_and_contexts_that_fit_are_the_largest():
    measured = geometry.measure(model_of(LLAMA))
    full = Scenario("full", lambda _: 1.0, compacts=False)
    half = Scenario("half", lambda _: 0.5)
    load = Load(8192, 0)
    # 1 GiB a request; pruned, half of it for each but the last, which is read in full.
    assert memory.most_requests(measured, machine(4), full, load) == 4
    assert memory.most_requests(measured, machine(4), half, load) == 7
    assert memory.longest_context(measured, machine(4), full, load) == 32768
    assert memory.longest_context(measured, machine(4), full, load, limit=8192) == 8192
    assert memory.longest_context(measured, machine(4), half, replace(load, requests=2)) == 32768 * 2 // 3
    # Read in one call, layers are compacted on the way: half, and two full layers of 32.
    one_call = memory.longest_context(measured, machine(4, chunk=None), half, load)
    assert one_call == int(32768 / (0.5 + 2 / 32))
    for scenario in (full, half):
        for gib in (1.3, 3.7):
            count = memory.most_requests(measured, machine(gib), scenario, load)
            assert memory.fits(measured, machine(gib), scenario, replace(load, requests=count))
            assert not memory.fits(measured, machine(gib), scenario, replace(load, requests=count + 1))
            longest = memory.longest_context(measured, machine(gib), scenario, load)
            assert memory.fits(measured, machine(gib), scenario, load.at(longest))
            assert not memory.fits(measured, machine(gib), scenario, load.at(longest + 1))
    assert memory.most_requests(measured, machine(0.5), full, load) == 0
    assert memory.longest_context(measured, Machine(1, 2, 0, 0, 0), full, load) == 0


def test_activations_and_reserve_count():
    measured = geometry.measure(model_of(LLAMA))
    load, full = Load(8192, 0), Scenario("full", lambda _: 1.0, compacts=False)
    bare = Machine(3 * GIB, GIB, GIB // 2, activation_bytes=1000, logit_bytes=7, chunk=2048)
    assert memory.use(measured, bare, full, load).peak == GIB + 2048 * 1000 + 7
    assert memory.use(measured, replace(bare, chunk=None), full, load).peak == GIB + 8192 * 1000 + 7
    assert bare.available == 3 * GIB - GIB - GIB // 2
    # K/V in a number format is decoded in place: no copy counts.
    for number in (KVDtype("int4", recent=0), KVDtype("int8")):
        stored = Scenario(str(number), lambda _: 1.0, number)
        taken = memory.use(measured, replace(bare, activation_bytes=0, logit_bytes=0), stored, load)
        # Sinks and newest entries are exact, and each head has its means, in single precision, as they are and rotated.
        exact, means = 4 + number.recent, 4 * measured.bytes_per_token
        wanted = (8192 - exact) * measured.stored_per_token(number) + exact * measured.bytes_per_token + means
        assert taken.kv == wanted
        assert taken.peak == max(GIB, taken.kv)


def test_activations_are_those_that_were_measured():
    """What a prefill adds beside its K/V, Llama-3-8B shape on an H100 (benchmarks/overhead.py, lab/performance.md)."""
    elements = activation_elements(model_of(LLAMA).text)
    for tokens, peak_mib in ((2048, 489), (8192, 1956), (32768, 7824)):
        beside = peak_mib * 2**20 - tokens * 128 * KIB
        assert 2 * elements * tokens == pytest.approx(beside, rel=0.01)


def test_advice_makes_it_fit():
    model = model_of(LLAMA)
    expected = budgets.expected(policies.create("snapkv", ratio=0.5), "model")
    made = plans.make(model, memory=16 * GIB, load=Load(8192, 512, 4), expected=expected)
    assert not made.rows[-1].fits
    said = "\n".join(made.advice)
    assert "--weights int8" in said
    assert "--vram" in said
    changed = plans.make(model, memory=16 * GIB, load=Load(8192, 512, 4), expected=expected, weights="int8")
    assert changed.rows[-1].fits
    assert not changed.advice
    needed = int(said.rpartition("--vram ")[2].removesuffix("GiB"))
    assert plans.make(model, memory=needed * GIB, load=Load(8192, 512, 4), expected=expected).rows[-1].fits


def test_advice_combines_what_does_not_help_alone():
    model = model_of({**QWEN_7B, "max_position_embeddings": 131072})
    load = Load(32768, 512, 8)
    made = plans.make(model, memory=16 * GIB, load=load)
    (line,) = [line for line in made.advice if "--weights" in line]
    assert "--weights int8" in line
    assert ", and store K/V in int4" in line
    assert plans.make(model, memory=16 * GIB, load=load, weights="int8", number=KVDtype("int4")).rows[-1].fits
    assert not plans.make(model, memory=16 * GIB, load=load, weights="int8").rows[-1].fits


def test_context_beyond_the_model_s():
    with pytest.raises(ValueError, match="more than the 8,192"):
        plans.make(model_of(LLAMA), memory=80 * GIB, load=Load(8193, 512))
    with pytest.raises(ValueError, match="leaves no prompt"):
        plans.make(model_of(LLAMA), memory=80 * GIB, load=Load(512, 512))


# -- budgets ------------------------------------------------------------------------------------


def test_expected_budgets_come_from_measurements():
    policy = policies.create("refreekv")
    both = [measured_on("one", 0.5), measured_on("other", 0.6), measured_on("one", 0.1, "tova")]
    expected = budgets.expected(policy, "third", both)
    # Where several were measured, the mean over their prompts; where none was, who keeps most nearby.
    assert (expected.budget(100), expected.budget(3000), expected.budget(9000)) == (1.0, pytest.approx(0.55), 0.6)
    assert expected.is_extrapolated(9000)
    assert not expected.is_extrapolated(3000)
    assert "n=14" in expected.source
    assert "2026-01-01" in expected.source
    assert budgets.expected(policy, "maker/One", both).budget(3000) == 0.5  # its own speak alone
    assert budgets.expected(policies.create("refreekv", threshold=0.5), "one", both) is None
    assert budgets.expected(policies.create("full"), "one", both).budget(3000) == 1.0
    assert budgets.expected(policies.create("streaming-llm", size=300), "one", both).budget(3000) == 0.1


RUNS = Path(__file__).parents[2] / "benchmarks" / "runs"
spec = importlib.util.spec_from_file_location("budgets_script", RUNS.parent / "budgets.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_shipped_budgets_are_those_of_the_committed_runs():
    assert script.collect(sorted(RUNS.glob("*.jsonl.gz"))) == budgets.load()


def test_shipped_budgets_can_be_read_and_name_their_source():
    shipped = budgets.load()
    assert shipped
    for one in shipped:
        assert {"command", "date", "machine", "families"} <= set(one.source)
        assert all(0 < bucket.low <= bucket.mean <= bucket.high <= bucket.most <= 1 for bucket in one.buckets)
        assert all(bucket.n >= script.LEAST for bucket in one.buckets)
    assert budgets.read(json.loads(measurements.dump(shipped))) == shipped
    assert budgets.expected(policies.create(DEFAULT_POLICY), "any").budget(3000) < 1
    with pytest.raises(ValueError, match="budgets of schema 2"):
        budgets.read({"schema": 2})


# -- units and sources --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("1.5 TiB", 3 * 2**39), ("80gb", 80 * 10**9), ("512 MiB", 2**29)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "24 G", "-1GB", "24Gb s", "0GB", "1e3GB", "24,5GB", "", "24GBit"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="--vram"):
        parse_bytes(text, "--vram")


@pytest.mark.parametrize(("text", "count"), [("8192", 8192), ("32k", 32768), ("1M", 2**20), ("0.5k", 512)])
def test_token_counts(text, count):
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["0", "-1", "32kb", "1.3", "many", "", "0.3k", "²"])
def test_token_counts_that_are_none(text):
    with pytest.raises(ValueError, match="not a number of tokens"):
        parse_tokens(text)


def test_sizes_for_people():
    assert [format_size(n) for n in (17, 128 * KIB, 57_344, 1.5 * GIB)] == ["17 B", "128 KiB", "56 KiB", "1.50 GiB"]


def test_checkpoints_say_what_they_weigh(tmp_path):
    built = build("llama")
    built.save_pretrained(tmp_path / "one")
    built.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    held = sum(p.numel() * 4 for p in built.parameters())
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    for folder in ("one", "many"):
        model = find(str(tmp_path / folder))
        assert model.checkpoint_bytes == held
        assert find(str(tmp_path / folder / "config.json")).checkpoint_bytes == held
        assert model.name == folder


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_models_that_are_none(tmp_path):
    def refused(text: str, fragment: str) -> None:
        with pytest.raises(ModelError, match=fragment):
            geometry.measure(find(text))

    refused(str(tmp_path), "has no config.json")
    refused("./nowhere", "no such file or folder")
    refused("nowhere.json", "no such file or folder")
    refused("nobody-at-all/nothing-at-all", "give its folder or config.json instead")
    refused(write(tmp_path / "weights.bin", "x"), "is not a configuration")
    refused(write(tmp_path / "a.json", "{"), "is not a JSON configuration")
    refused(write(tmp_path / "b.json", "[]"), "names no model_type")
    refused(write(tmp_path / "c.json", '{"model_type": "made-up", "auto_map": {}}'), "'made-up', which the installed")
    refused(write(tmp_path / "d.json", json.dumps({"model_type": "t5"})), "encoder-decoder")
    refused(write(tmp_path / "e.json", json.dumps({"model_type": "mamba"})), "no usable num_attention_heads")
    refused(
        write(tmp_path / "f.json", json.dumps({**LLAMA, "num_attention_heads": 0})), "transformers cannot|no usable"
    )
    refused(write(tmp_path / "g.json", json.dumps({**LLAMA, "hidden_size": "wide"})), "transformers|configuration")
