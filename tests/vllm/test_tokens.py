"""Greedy tokens of the engine equal transformers with the same evictions."""

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm sets up an environment with it")

from helpers import engine, generate  # noqa: E402

POLICIES = {
    "position": "refreekv",
    "position-with-sinks": "refreekv:norm_includes_sinks=true",
    "position-8-rows": "refreekv:probe_rows=8,threshold=0.05",
    "heavy-hitter": "refreekv-heavy-hitter",
    "snapkv": "snapkv:ratio=0.4",
    "expected-attention": "expected-attention:ratio=0.5",
}
TOKENS = 16


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_alone_and_all_at_once(folder, reference, prompts, policy):
    expected = [reference.generate(ids, policy, TOKENS) for ids in prompts]
    with engine(folder, policy) as llm:
        alone = [generate(llm, [ids], TOKENS)[0] for ids in prompts]
        together = generate(llm, prompts[::-1], TOKENS)[::-1]
    assert alone == expected
    assert together == expected
