"""The simulated engine: by hand, and its invariants on random loads."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refreekv.core.footprint import LayerKV
from refreekv.planner.engine import Engine, Replica
from refreekv.planner.fleet import Speed, engine, gpus_needed, simulate
from refreekv.planner.geometry import Geometry
from refreekv.planner.memory import Machine, Scenario
from refreekv.planner.trace import Request, read

BLOCK = 16


def blocks_at(share: float):
    def blocks_for(prompt: int, output: int, complete: bool) -> int:
        held = math.ceil(share * prompt) + output if complete else prompt
        return -(-held // BLOCK)

    return blocks_for


def one_second(tokens: int, blocks: int) -> float:
    del tokens, blocks
    return 1.0


def small(blocks: int, share: float = 1.0, **options) -> Engine:
    return Engine(blocks, blocks_at(share), one_second, **{"step_tokens": 64, **options})


def run(one: Engine, requests: list[Request]) -> Replica:
    replica = Replica(one)
    for request in requests:
        replica.advance(request.arrival)
        replica.add(request)
    replica.advance(math.inf)
    return replica


def test_one_request_by_hand():
    """100 tokens in chunks of 64: the second step ends the prompt and gives the first token."""
    replica = run(small(blocks=20), [Request(5.0, 100, 4)])
    (job,) = replica.finished
    assert (job.first, job.done) == (7.0, 10.0)
    assert replica.totals.steps == 5
    assert replica.totals.running_steps == 5


def test_decoding_goes_before_reading():
    """A long prompt comes while another request generates: 63 tokens of it are read beside each new token."""
    replica = run(small(blocks=40), [Request(0.0, 10, 20), Request(0.5, 126, 1)])
    first, second = sorted(replica.finished, key=lambda job: job.request.arrival)
    assert (first.first, first.done) == (1.0, 20.0)
    assert second.first == second.done == 3.0


def test_the_pool_decides_who_runs_and_pruning_lets_more_in():
    requests = [Request(0.0, 64, 32) for _ in range(6)]
    full = run(small(blocks=12), requests).totals
    half = run(small(blocks=12, share=0.5), requests).totals
    # Full: 4 blocks each and 2 to come, so a third never finds 4. Half: 2 and 2 to come.
    assert full.most_running == 2
    assert half.most_running == 3  # while two hold 2 blocks and more, a fourth never finds the 4 to read its prompt
    assert half.steps < 0.75 * full.steps


def test_who_gives_back_reads_its_answer_again():
    replica = run(small(blocks=5, step_tokens=1000), [Request(0.0, 32, 20), Request(0.0, 32, 20)])
    one, other = replica.finished
    # Both read 2 blocks in step 1. In step 2 each needs a third; one is left: the second gives back.
    assert replica.totals.preemptions == 1
    assert (one.first, one.done) == (1.0, 20.0)
    # It reads 32 + 1 tokens again when the first is done, and goes on where it was.
    assert (other.first, other.done) == (1.0, 20.0 + 19)


def test_requests_that_no_pool_holds_are_refused():
    replica = run(small(blocks=4), [Request(0.0, 60, 10), Request(0.0, 60, 4)])
    assert [job.request.output for job in replica.refused] == [10]
    assert len(replica.finished) == 1


requests_strategy = st.lists(
    st.builds(Request, st.floats(0, 60), st.integers(1, 150), st.integers(1, 60)), min_size=1, max_size=25
).map(lambda found: sorted(found, key=lambda request: request.arrival))


@settings(max_examples=80, deadline=None)
@given(
    requests=requests_strategy,
    blocks=st.integers(14, 60),
    share=st.floats(0.1, 1.0),
    budget=st.integers(1, 200),
    running=st.integers(1, 12),
)
def test_invariants(requests, blocks, share, budget, running):
    one = small(blocks, share, step_tokens=budget, running=running)
    replica = run(one, requests)
    assert replica._free == blocks
    assert not replica.active
    assert not replica.waiting
    assert replica.outstanding == 0
    assert len(replica.finished) + len(replica.refused) == len(requests)
    for job in replica.finished:
        assert job.generated == job.request.output
        assert job.request.arrival < job.first <= job.done
    assert replica.totals.most_running <= running
    again = run(one, requests)
    assert [(j.first, j.done) for j in again.finished] == [(j.first, j.done) for j in replica.finished]
    assert replica.totals == again.totals


@settings(max_examples=40, deadline=None)
@given(requests=requests_strategy, share=st.floats(0.1, 1.0))
def test_with_blocks_for_all_nobody_waits_for_memory(requests, share):
    """With a pool for everything, pruned and full run alike, as memory is all that differs."""
    full, pruned = (run(small(5000, one), requests) for one in (1.0, share))
    assert full.totals.preemptions == pruned.totals.preemptions == 0
    assert [(j.first, j.done) for j in full.finished] == [(j.first, j.done) for j in pruned.finished]


MEASURED = sorted((Path(__file__).parents[1] / "fixtures").glob("simulation_check_*.json"))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_it_runs_as_many_requests_as_vllm_did(path):
    """vLLM's own engine on the same load, measured by benchmarks/simulation_check.py."""
    measured = json.loads(path.read_text())
    load = measured["load"]
    requests = [Request(**request) for request in load["requests"]]
    names = {result["policy"] for result in measured["results"]}
    assert names == {"full cache", "streaming-llm:ratio=0.5", "refreekv:threshold=0.05,frozen_layers=1"}
    for result in measured["results"]:
        kept = {request.prompt: share for request, share in zip(requests, result["kept"], strict=True)}

        def blocks_for(prompt: int, output: int, complete: bool, kept=kept) -> int:
            held = round(kept[prompt] * prompt) + output if complete else prompt
            return -(-held // load["block"])

        blocks = result["pool_tokens"] // load["block"]
        totals = run(Engine(blocks, blocks_for, one_second, load["step_tokens"], load["running"]), requests).totals
        real = result["vllm"]
        assert totals.running_steps / totals.steps == pytest.approx(real["mean_running"], rel=0.02)
        assert totals.steps == pytest.approx(real["steps"], rel=0.02)
        if result["policy"] != "refreekv:threshold=0.05,frozen_layers=1":
            # Where all layers keep equally much, step by step the same.
            assert (totals.most_running, totals.steps) == (real["most_running"], real["steps"])
            assert totals.preemptions == real["preemptions"]


ADMISSION = json.loads((Path(__file__).parents[1] / "fixtures" / "vllm_admission.json").read_text())


@pytest.mark.parametrize("measured", ADMISSION["runs"], ids=lambda one: f"{one['policy']}-{one['kv_mib']}")
def test_the_admission_benchmark(measured):
    """What benchmarks/vllm_admission.py measured: a real model, 40 requests at once, 48 new tokens each."""
    entry = 30 * 2 * 3 * 64 * 4  # layers, keys and values, KV heads, head size, bytes of float32
    blocks = (measured["kv_mib"] << 20) // entry // 32 - 1

    def blocks_for(prompt: int, output: int, complete: bool) -> int:
        held = round(measured["kept_share"] * prompt) + output if complete else prompt
        return -(-held // 32)

    (output,) = measured["output_tokens"]
    lengths = [300 + 700 * (index * 17 % 40) // 40 for index in range(measured["requests"])]
    requests = [Request(0.0, length, output) for length in lengths]
    totals = run(Engine(blocks, blocks_for, one_second, 2048, 64), requests).totals
    # Asked: 15%. Of a pruned run the mean share is known, not each request's.
    tolerance = 0.01 if measured["kept_share"] == 1 else 0.05
    assert totals.running_steps / totals.steps == pytest.approx(measured["mean_running"], rel=tolerance)
    assert totals.steps == pytest.approx(measured["steps"], rel=tolerance)


def test_runs_of_vllm_are_there():
    assert len(MEASURED) == 2


def test_steps_take_what_moving_or_computing_takes():
    speed = Speed(bandwidth=1e12, flops=1e14, overhead=0.002)
    few = speed.seconds(1, weight_bytes=2e10, kv_bytes=1e10, parameters=1e10)
    many = speed.seconds(4096, weight_bytes=2e10, kv_bytes=1e10, parameters=1e10)
    assert few == pytest.approx(0.03 + 0.002)
    assert many == pytest.approx(2 * 1e10 * 4096 / 1e14 + 0.002)


GEOMETRY = Geometry((LayerKV("full", 2, 64, 64),) * 4)  # 2 KiB a token


def fleet_engine(share: float) -> Engine:
    machine = Machine(40 * 2**20, 8 * 2**20, 2**20, activation_bytes=64, logit_bytes=16, chunk=512)
    speed = Speed(bandwidth=1e9, flops=1e12, overhead=0.001)
    scenario = Scenario("x", lambda _: share, compacts=share < 1)
    return engine(GEOMETRY, machine, scenario, speed, parameters=4e6, running=64)


def test_pools_are_what_the_machine_has_left():
    one = fleet_engine(1.0)
    room = (40 - 8 - 1) * 2**20 - 512 * 64 - 64 * 16
    assert one.blocks == room // (16 * 2048)
    assert one.blocks_for(160, 0, False) == one.blocks_for(160, 0, True) == 10
    half = fleet_engine(0.5)
    assert (half.blocks_for(160, 0, False), half.blocks_for(160, 0, True), half.blocks_for(160, 16, True)) == (10, 5, 6)
    assert one.step_seconds(1, 10) == pytest.approx((8 * 2**20 + 10 * 16 * 2048) / 1e9 + 0.001)
    windows = Geometry((*GEOMETRY.layers, LayerKV("window", 2, 64, 64, window=32)))
    machine = Machine(2**30, 0, 0, 0, 0)
    mixed = engine(windows, machine, Scenario("x", lambda _: 0.5), Speed(1e9, 1e12, 0), parameters=1)
    assert mixed.blocks_for(160, 0, True) == math.ceil((80 * 2048 + 32 * 512) / (16 * 2048))


def test_fleets():
    requests = [Request(0.02 * index, 700 + 37 * (index % 11), 60) for index in range(150)]
    full, half = (simulate(requests, fleet_engine(share), 2, name="x", price=2.0) for share in (1.0, 0.5))
    assert full.completed == half.completed == 150
    assert half.mean_running > full.mean_running
    assert half.latency["p90"] < full.latency["p90"]
    tokens = sum(request.prompt + request.output for request in requests)
    assert full.cost_per_million == pytest.approx(2.0 * 2 * full.seconds / 3600 / tokens * 1e6)
    assert full.output_tokens_per_second == pytest.approx(150 * 60 / full.seconds)
    assert full.first_token["p50"] <= full.first_token["p90"] <= full.first_token["p99"]
    one = fleet_engine(1.0)
    needed = gpus_needed(requests, one, target=2.0)
    assert simulate(requests, one, needed, name="x").first_token["p90"] <= 2.0
    assert simulate(requests, one, needed - 1, name="x").first_token["p90"] > 2.0
    assert gpus_needed(requests, fleet_engine(0.5), target=2.0) <= needed
    assert gpus_needed(requests, one, target=1e-6) is None


def test_traces(tmp_path):
    file = tmp_path / "load.jsonl"
    file.write_text(
        '{"arrival": 2, "prompt_tokens": 10, "output_tokens": 3, "user": 7}\n\n'
        '{"arrival": 0.5, "prompt_tokens": 20, "output_tokens": 1}\n'
    )
    assert read(file) == [Request(0.5, 20, 1), Request(2.0, 10, 3)]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "holds no request"),
        ("{", "line 1: not JSON"),
        ("[1, 2, 3]", "arrival and prompt_tokens and output_tokens missing"),
        ('{"arrival": 1, "prompt_tokens": 3}', "output_tokens missing"),
        ('{"arrival": -1, "prompt_tokens": 3, "output_tokens": 1}', "arrival must be seconds"),
        ('{"arrival": NaN, "prompt_tokens": 3, "output_tokens": 1}', "arrival must be seconds"),
        ('{"arrival": 1, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens must be a whole number"),
        ('{"arrival": 1, "prompt_tokens": 3, "output_tokens": true}', "output_tokens must be a whole number"),
    ],
)
def test_traces_that_are_none(tmp_path, text, fragment):
    file = tmp_path / "load.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=fragment):
        read(file)
