"""A few short prompts through everything at once: test_tokens.py in a minute."""

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

from helpers.vllm_engine import engine, make_prompts

POSITION = "refreekv:probe_rows=32,probe_reduce=max,threshold=0.1"
ADAPTIVE = pytest.param("adaptive:min_length=256,constant=0.02", marks=pytest.mark.vllm_full)


@pytest.mark.parametrize("policy", [POSITION, ADAPTIVE])
def test_short_prompts(folder, reference, policy):
    prompts = make_prompts(reference.tokenizer, (300, 317, 352))
    expected = [reference.generate(ids, policy, 12) for ids in prompts]
    longer = [ids + answer + ids[:40] for ids, answer in zip(prompts[:1], expected, strict=False)]
    expected_longer = [reference.generate(ids, policy, 12) for ids in longer]
    with engine(folder, policy, max_num_batched_tokens=192, max_num_seqs=16, asynchronous=True) as vllm:
        assert vllm.generate(prompts, 12) == expected
        assert vllm.generate(longer + prompts, 12) == expected_longer + expected
        assert min(report["blocks_freed"] for report in vllm.reports.values()) > 0
        # Queries all over the prompt are needed by the adaptive policy: it takes nothing from the prefix cache.
        assert (vllm.cached > 500) == policy.startswith("refreekv")
