"""Two tensor-parallel processes decide as one: heads are gathered before the policy looks."""

import random

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

from helpers.vllm_engine import engine, tiny_model

pytestmark = pytest.mark.vllm_full


@pytest.mark.parametrize(
    "policy",
    [
        "refreekv:threshold=0.3",
        "refreekv-heavy-hitter:threshold=0.3",
        "adaptive:min_length=64,window=16,constant=0.3,lost_mass=0.99,hit=0.9,copying=0.0055",
    ],
)
def test_two_ranks_equal_one(tmp_path, policy):
    folder = tiny_model(tmp_path, layers=4, heads=4, kv_heads=2)
    rng = random.Random(3)
    prompts = [[rng.randrange(512) for _ in range(length)] for length in (150, 200, 333)]
    found = {}
    for ranks in (1, 2):
        options = {"tensor_parallel_size": ranks, "skip_tokenizer_init": True, "max_model_len": 512, "kv_mib": 8}
        if ranks > 1:
            options["distributed_executor_backend"] = "mp"
        with engine(folder, policy, **options) as vllm:
            tokens = vllm.generate(prompts, 12)
            found[ranks] = tokens, [vllm.reports[f"r{index}"] for index in range(3)]
    assert found[1][0] == found[2][0]
    for one, two in zip(found[1][1], found[2][1], strict=True):
        assert one.pop("metric") == pytest.approx(two.pop("metric"), abs=1e-5)
        assert one == two
    assert all(report["blocks_freed"] > 0 for report in found[2][1])
