"""Forecasts with several number formats and with host memory, against what caches hold and by their own arithmetic."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from helpers.command_line import runner
from helpers.copies import Early
from helpers.driving import Uneven, prefill
from helpers.models import build
from helpers.planning import LLAMA
from planner.test_chunked_memory import CHUNK, LAYERS, PROMPT, held
from planner.test_plan import GIB, LLAMA_70B, model_of
from refreekv import KVDtype, ReFreeKVCache, policies
from refreekv.core.footprint import LayerKV, Mix, Reader, least_hosted, reading_bytes
from refreekv.core.quantisation import Ladder
from refreekv.engines.transformers.host_tier import HostTier
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.planner import geometry, measurements, memory, widths
from refreekv.planner import plan as plans
from refreekv.planner.memory import Load, Machine, Scenario
from refreekv.planner.plan import Speeds

LADDER = Ladder.of("k4v2", "k6v4", "int8")
MEASURED = widths.Measured("adaptive", str(LADDER), "one", 5, (900, 2000), (0.5, 0.3, 0.2), {"machine": "a GPU"})


def test_shares_of_formats_are_what_is_held():
    model = build("llama", attention="sdpa", head_dim=64, num_key_value_heads=2, num_attention_heads=2)
    cache = ReFreeKVCache(model, Uneven(), kv_dtype=LADDER)
    cache.state.arena = True
    prefill(model, cache, (1200,))
    report = cache.report
    coded = sum(report.formats[rung.kind] for rung in LADDER.rungs)
    mix = Mix(LADDER, tuple(report.formats[rung.kind] / coded for rung in LADDER.rungs))
    assert len({round(share, 2) for share in mix.shares}) > 1
    layer, own = LayerKV("full", 2, 64, 64, itemsize=4), cache.first.ragged
    entries = sum(sum(map(sum, one.ragged.lengths)) for one in cache.pruned_layers) / 2 / len(cache.pruned_layers)
    room = 2 * (own.exact.capacities[0][0] - own.exact.lengths[0][0]) * 512
    forecast = len(cache.pruned_layers) * (layer.stored_bytes(entries, mix) + room)
    assert report.bytes_after == pytest.approx(forecast, rel=0.01)
    with pytest.raises(ValueError, match="a share for each of k4v2"):
        Mix(LADDER, (0.5, 0.5))
    with pytest.raises(ValueError, match="1 in all"):
        Mix(LADDER, (0.5, 0.2, 0.1))


def test_what_kv_means():
    adaptive, snapkv = policies.parse("adaptive"), policies.parse("snapkv:ratio=0.5")
    found = widths.stored(adaptive, str(LADDER), "other", [MEASURED])
    assert found.expected == Mix(LADDER, (0.5, 0.3, 0.2))
    assert found.worst == Mix(LADDER, (0, 0, 1))
    narrow = found.expected.at_most(LADDER.rungs[1])
    assert narrow == Mix(LADDER, (0.5, 0.5, 0))
    assert found.expected.at_most(None) is found.expected
    assert found.source == "k4v2 50%, k6v4 30%, int8 20%: measured on one (n=5, 900 to 2,000 tokens, a GPU, None)"
    other = widths.Measured(**{**asdict(MEASURED), "model": "two", "shares": (0.7, 0.1, 0.2)})
    both = widths.stored(adaptive, str(LADDER), "x", [MEASURED, other]).expected
    assert both.shares == pytest.approx((0.6, 0.2, 0.2))
    assert widths.stored(adaptive, str(LADDER), "org/Two", [MEASURED, other]).expected.shares == (0.7, 0.1, 0.2)
    own = adaptive.default_ladder
    assert widths.stored(adaptive, "auto", "x", []).worst == Mix(own, (0,) * (len(own.rungs) - 1) + (1,))
    unknown = widths.stored(adaptive, "k4v2+int8", "x", [MEASURED])
    assert unknown.expected == unknown.worst == Mix(Ladder.of("k4v2", "int8"), (0, 1))
    assert "nobody measured" in unknown.source
    assert widths.stored(snapkv, "auto", "x", []).expected is None
    assert widths.stored(snapkv, "int4", "x", []).expected == KVDtype("int4")
    assert widths.stored(snapkv, "bf16", "x", []).expected is None
    with pytest.raises(ValueError, match="k4v3"):
        widths.stored(snapkv, "k4v3", "x", [])
    assert measurements.read("widths", json.loads(measurements.dump([MEASURED])), widths.measured) == [MEASURED]
    with pytest.raises(ValueError, match="schema 7"):
        measurements.read("widths", {"schema": 7}, widths.measured)
    # What comes along says where it is from.
    for one in widths.load():
        assert one.n >= 3
        assert one.source["command"]
        assert sum(one.shares) == pytest.approx(1, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("hosted", [1, 4, LAYERS])
def test_a_forecast_with_host_memory_is_what_the_device_holds(hosted):
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    model = build("llama", attention="sdpa", num_hidden_layers=LAYERS, initializer_range=0.02, **shape).bfloat16()
    cache = ReFreeKVCache(model, "streaming-llm", ratio=0.3, kv_dtype="int4", prompt_dtype="int8")
    cache.state.arena = True
    layer, number = LayerKV("full", 2, 64, 64), KVDtype("int8")
    lines = int(layer.unfinished_lines(PROMPT, number))
    cache.state.host = HostTier(hosted * lines, Reader(1), copies=Early())
    most, attended = 0, ReFreeKVLayer.after_attention

    def here():
        return held(cache.pruned_layers) - cache.report.host_bytes

    def watched(self, call):
        nonlocal most
        most = max(most, here())
        attended(self, call)

    with pytest.MonkeyPatch.context() as patch, cache.prompt_until(PROMPT):
        patch.setattr(ReFreeKVLayer, "after_attention", watched)
        pieces = torch.randint(2, 90, (1, PROMPT)).split(CHUNK, 1)
        for piece in pieces:
            model(piece, past_key_values=cache)
            if piece is pieces[-2]:
                assert sum(one.reading.prompt.host_nbytes > 0 for one in cache.pruned_layers) == hosted
    forecast = reading_bytes([layer] * LAYERS, PROMPT, number, 0, hosted=hosted)
    # On a GPU lines of the layer that is compacted come once more.
    assert most == pytest.approx(forecast - lines, rel=0.05)


def test_the_fewest_layers_go():
    for most in range(1, 12):
        for wanted in range(most + 2):
            asked = []

            def fits(count, wanted=wanted, asked=asked):
                asked.append(count)
                return count >= wanted

            assert least_hosted(fits, most) == min(wanted, most)
            assert len(asked) <= 6
    assert least_hosted(lambda count: False, 0) == 0


def test_host_memory_makes_longer_prompts_fit():
    model = model_of({**LLAMA_70B, "max_position_embeddings": 2**20})
    measured, reader, load = geometry.measure(model), Reader.of(model.text), Load(131072 + 512, 512)
    machine = Machine(48 * GIB, 38 * GIB, GIB, 2 * reader.activation, 4, 2048, reader)
    mix = Mix(LADDER, (0.5, 0.3, 0.2))
    scenario = Scenario("", lambda _: 0.5, mix, prompt_number=KVDtype("int8"))
    without = memory.use(measured, machine, scenario, load)
    assert without.peak > machine.available
    assert without.layers == without.reading_layers == without.most_host == 0
    found = {}
    for host in (GIB, 4 * GIB, 64 * GIB):
        found[host] = taken = memory.use(measured, replace(machine, host=host), scenario, load)
        assert taken.most_host <= host
        assert taken.kv == without.kv
    assert found[GIB].peak > found[4 * GIB].peak > machine.available
    enough = found[64 * GIB]
    assert enough.peak <= machine.available
    lines = measured.layers[0].unfinished_lines(131072, KVDtype("int8"))
    assert enough.most_host == int(enough.reading_layers * lines)
    assert machine.available - enough.peak >= memory.SPARE
    # One layer less would not do.
    less = memory.use(measured, replace(machine, host=enough.most_host - 1), scenario, load)
    assert less.reading_layers == enough.reading_layers - 1
    assert less.peak > machine.available - memory.SPARE
    longest = [
        memory.longest_context(measured, replace(machine, host=host), scenario, load) for host in (0, 8 * GIB, 2**50)
    ]
    assert 0 < longest[0] < longest[1] < longest[2]


def test_what_a_step_takes():
    model = model_of({**LLAMA_70B, "max_position_embeddings": 2**20})
    given = {"memory": 44 * GIB, "load": Load(131072, 512), "weights": "int4", "number": KVDtype("int4")}
    rows = {host: plans.make(model, **given, host=host, speeds=Speeds(2.7e12, 50e9)).rows[-1] for host in (0, 2**50)}
    assert not rows[0].fits
    assert rows[2**50].fits
    assert rows[0].host_layers == 0
    assert rows[2**50].host_layers > 0
    there = rows[2**50].host_layers * 131072 * 8 * 2 * 66
    assert rows[2**50].step_seconds == pytest.approx(there / 50e9, rel=0.01)
    assert rows[0].step_seconds == pytest.approx((rows[0].kv_bytes + 37 * GIB) / 2.7e12, rel=0.1)
    advice = plans.make(model, **given).advice
    assert any("--host-memory auto" in line for line in advice)
    with pytest.raises(ValueError, match="choose --kv auto or int4"):
        plans.make(model, **{**given, "number": None}, host=2**30)


def test_the_command_line(capsys, tmp_path):
    run = runner(capsys)
    (tmp_path / "Llama-3-8B").mkdir()
    file = tmp_path / "Llama-3-8B" / "config.json"
    file.write_text(json.dumps({**LLAMA, "max_position_embeddings": 131072}))
    arguments = ["plan", str(file), "--vram", "8GiB", "--weights", "int4", "--context", "48k"]
    result = json.loads(run(*arguments, "--json").out)
    assert result["kv"]["dtype"] == str(policies.parse("adaptive").default_ladder)
    assert sum(result["kv"]["shares"]) == pytest.approx(1, abs=1e-3)
    assert "measured" in result["kv"]["shares_from"]
    assert not result["scenarios"][-1]["fits"]
    hosted = json.loads(run(*arguments, "--host-memory", "auto", "--bus", "25GB", "--json").out)["scenarios"]
    assert hosted[-1]["fits"]
    assert hosted[-1]["host_bytes"] > 0 == hosted[0]["host_bytes"]
    shown = run(*arguments, "--host-memory", "64GiB").out
    assert "of 32 layers while a prompt is read" in shown
    assert "a step takes at least" in shown
    assert "Widths" in shown
    refused = run("plan", str(file), "--vram", "8GiB", "--kv", "bf16", "--host-memory", "auto")
    assert refused.code == 2
    assert "choose --kv auto or int4" in refused.err
