"""Hundreds of random requests on a tiny random model: every block is accounted for after every step."""

import random

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

from helpers.vllm_engine import engine, tiny_model
from refreekv.engines.vllm.scheduler_side.reserve import Reserve

VOCABULARY = 512


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


POSITION, SCATTERED = "refreekv:threshold=0.3", "refreekv-heavy-hitter:threshold=0.3"


@pytest.mark.parametrize(
    ("policy", "asynchronous"),
    [
        pytest.param(POSITION, False, id="position-sync", marks=pytest.mark.vllm_full),
        pytest.param(POSITION, True, id="position-async", marks=pytest.mark.vllm_full),
        pytest.param("refreekv:threshold=0.3,frozen_layers=0", False, id="one-group", marks=pytest.mark.vllm_full),
        pytest.param(SCATTERED, False, id="scattered-sync", marks=pytest.mark.vllm_full),
        pytest.param(SCATTERED, True, id="scattered-async"),
    ],
)
def test_500_random_requests(monkeypatch, tiny, request, policy, asynchronous):
    # With blocks kept free for what moves hardly anybody would be preempted.
    monkeypatch.setattr(Reserve, "admit", lambda *_: None)
    rng = random.Random(5)
    shared = [rng.randrange(VOCABULARY) for _ in range(300)]
    finished, aborted = set(), set()
    preempted: dict[str, int] = {}
    most = 0
    with engine(
        tiny,
        policy,
        layers_per_group=6 if "one-group" in request.node.name else 1,
        kv_mib=7,
        max_model_len=640,
        max_num_seqs=24,
        max_num_batched_tokens=640,
        asynchronous=asynchronous,
        skip_tokenizer_init=True,
    ) as vllm:
        total, added, live = 500, 0, set()
        while added < total or vllm.llm.has_unfinished_requests():
            for _ in range(rng.randrange(4) if added < total else 0):
                own = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 270))]
                ids = shared[: rng.choice([0, 0, 64, 200, 300])] + own
                vllm.add(f"r{added}", ids, rng.randrange(1, 60))
                live.add(f"r{added}")
                added += 1
            if live and rng.random() < 0.08:
                gone = rng.choice(sorted(live))
                vllm.llm.abort_request([gone])
                live.discard(gone)
                aborted.add(gone)
            ended = {output.request_id for output in vllm.step() if output.finished}
            finished |= ended
            live -= ended
            most = max(most, len(vllm.scheduler.running))
            preempted |= {name: request.num_preemptions for name, request in vllm.scheduler.requests.items()}
        vllm.finish()
        freed = sum(report["blocks_freed"] for report in vllm.reports.values() if report)

    assert len(finished | aborted) == added >= total
    assert len(aborted) > 10
    assert sum(preempted.values()) > 0
    # One table for all layers frees only what every layer gives up, six layers at a time.
    assert freed > (50 if "one-group" in request.node.name else total)
    assert most > 3
