"""Greedy tokens of the engine equal transformers with the same evictions, and no block is lost on the way."""

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

from helpers.vllm_engine import engine
from refreekv.engines.vllm.scheduler_side.reserve import Reserve

# Some half a minute each on two cores: CI has the time for test_smoke.py only.
pytestmark = pytest.mark.vllm_full

POLICIES = {
    "position": "refreekv",
    "position-with-sinks": "refreekv:norm_includes_sinks=true",
    "position-8-rows": "refreekv:probe_rows=8,threshold=0.05",
    "position-worst-of-32-rows": "refreekv:probe_rows=32,probe_reduce=max,threshold=0.1",
    "heavy-hitter": "refreekv-heavy-hitter",
    "adaptive": "adaptive:min_length=256,constant=0.02",
    "snapkv": "snapkv:ratio=0.4",
    "expected-attention": "expected-attention:ratio=0.5",
}
FEATURES = {
    "chunked-prefill": {"max_num_batched_tokens": 192, "max_num_seqs": 16},
    "no-prefix-caching": {"enable_prefix_caching": False},
    "async-scheduling": {"asynchronous": True},
    "async-chunked": {"asynchronous": True, "max_num_batched_tokens": 192, "max_num_seqs": 16},
    "ngram-speculation": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    },
    "torch-compile": {"enforce_eager": False},
    "three-layers-per-group": {"layers_per_group": 3},
}
TOKENS = 16


def expect(reference, prompts, policy, tokens=TOKENS, **more):
    return [reference.generate(ids, policy, tokens, **more) for ids in prompts]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_alone_and_all_at_once(folder, reference, prompts, policy):
    expected = expect(reference, prompts, policy)
    with engine(folder, policy, enable_prefix_caching=False) as vllm:
        together = vllm.generate(prompts[::-1], TOKENS)[::-1]
        freed = [vllm.reports[f"r{index}"]["blocks_freed"] for index in range(len(prompts))]
        alone = [vllm.generate([ids], TOKENS)[0] for ids in prompts]
    assert together == expected
    assert alone == expected
    assert min(freed) > 0


@pytest.mark.parametrize("policy", ["refreekv", "refreekv-heavy-hitter"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES.keys())
def test_features(folder, reference, prompts, policy, feature):
    per_group = {"layers_per_group": feature.get("layers_per_group", 1)}
    expected = expect(reference, prompts, policy, **per_group)
    with engine(folder, policy, **feature) as vllm:
        together = vllm.generate(prompts, TOKENS)
        # With prefix caching these find most of their prompt in the cache.
        alone = [vllm.generate([ids], TOKENS)[0] for ids in prompts]
    assert together == expected
    assert alone == expected


@pytest.mark.parametrize("policy", ["refreekv", "refreekv:probe_rows=8,threshold=0.05", "refreekv-heavy-hitter"])
def test_prefix_cache(folder, reference, prompts, policy):
    """Prompts that share a prefix with what came before, answers included, and the same prompt again."""
    firsts = prompts[:5]
    expected = expect(reference, firsts, policy)
    longer = [ids + answer + ids[:200] for ids, answer in zip(firsts, expected, strict=True)]
    expected_longer = expect(reference, longer, policy)
    with engine(folder, policy) as vllm:
        assert vllm.generate(firsts, TOKENS) == expected
        assert vllm.cached == 0
        assert vllm.generate(longer, TOKENS) == expected_longer
        assert vllm.generate(firsts + longer, TOKENS) == expected + expected_longer
        hits = vllm.cached
    assert hits > sum(map(len, firsts)) // 2


# What the heavy hitters leave of these prompts is so little that nothing is ever preempted.
@pytest.mark.parametrize(("policy", "kv_mib"), [("refreekv", 155), ("snapkv:ratio=0.5", 140)])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_preemption(monkeypatch, folder, reference, prompts, policy, kv_mib, asynchronous):
    """A pool too small for all: some are preempted, computed again, and say the same."""
    # With blocks kept free for what moves hardly anybody would be.
    monkeypatch.setattr(Reserve, "admit", lambda *_: None)
    tokens = 100
    crowd = prompts[:9]
    expected = expect(reference, crowd, policy, tokens)
    preemptions = 0

    def count(vllm):
        nonlocal preemptions
        preemptions = max(preemptions, sum(r.num_preemptions for r in vllm.scheduler.requests.values()))

    with engine(folder, policy, kv_mib=kv_mib, max_model_len=2048, asynchronous=asynchronous) as vllm:
        assert vllm.generate(crowd, tokens, on_step=count) == expected
    assert preemptions > 0


@pytest.mark.parametrize("policy", ["refreekv", "refreekv-heavy-hitter"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_abort_and_stream(folder, reference, prompts, policy, asynchronous):
    """Requests arrive one by one and some are aborted; the others stream the right tokens, each as it comes."""
    expected = expect(reference, prompts, policy)
    gone, seen = {1, 4, 7, 9}, {}
    with engine(folder, policy, asynchronous=asynchronous, max_num_batched_tokens=512, max_num_seqs=16) as vllm:
        waiting = list(enumerate(prompts))
        while waiting or vllm.llm.has_unfinished_requests():
            if waiting:
                index, ids = waiting.pop(0)
                vllm.add(f"r{index}", ids, TOKENS)
            for output in vllm.step():
                seen.setdefault(output.request_id, []).append(len(output.outputs[0].token_ids))
                index = int(output.request_id[1:])
                assert list(output.outputs[0].token_ids) == expected[index][: len(output.outputs[0].token_ids)]
                if index in gone and len(output.outputs[0].token_ids) == 1 + index % 3:
                    vllm.llm.abort_request([output.request_id])
        vllm.finish()
    for index in range(len(prompts)):
        assert seen[f"r{index}"] == sorted(set(seen[f"r{index}"]))
        assert (seen[f"r{index}"][-1] == TOKENS) == (index not in gone)
