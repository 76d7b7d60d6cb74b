"""On a GPU: greedy tokens equal those of transformers with the same evictions, in float32; no block is lost."""

import random

import pytest
import torch

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

import refreekv
from helpers.vllm_engine import engine, tiny_model
from refreekv.engines.vllm.config import PluginOptions
from refreekv.engines.vllm.launch import on_cpu

pytestmark = pytest.mark.skipif(on_cpu(), reason="needs a GPU and vLLM for it")

TOKENS, NEAR = 24, 2e-2
LENGTHS = [300, 90, 700, 517, 1000, 40]
ADAPTIVE = "adaptive:min_length=256,constant=0.02"
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
FEATURES = {
    "eager": {},
    "graphs": {"enforce_eager": False},
    "piecewise": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "chunks": {"max_num_batched_tokens": 160, "max_num_seqs": 16},
    "no-async": {"async_scheduling": False},
    "drafts": {"speculative_config": NGRAM},
    "drafts-graphs": {"speculative_config": NGRAM, "enforce_eager": False},
    "few-blocks": {"kv_mib": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"), layers=4)


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(3, 512) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def reference(folder, prompts):
    """Of a policy and a number format, tokens by transformers and how far the best was ahead of the next."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    known = {}

    def answers(policy, kv_dtype="16"):
        if (policy, kv_dtype) not in known:
            found, number = [], None if kv_dtype == "16" else kv_dtype
            for ids in prompts:
                asked = torch.tensor([ids], device="cuda")
                with refreekv.compress(model, policy=PluginOptions(policy).build(), kv_dtype=number):
                    out = model.generate(
                        asked,
                        attention_mask=torch.ones_like(asked),
                        max_new_tokens=TOKENS,
                        min_new_tokens=TOKENS,
                        do_sample=False,
                        return_dict_in_generate=True,
                        output_logits=True,
                    )
                best = [logits[0].topk(2).values for logits in out.logits]
                ahead = [float(first - second) for first, second in best]
                found.append((out.sequences[0, len(ids) :].tolist(), ahead))
            known[policy, kv_dtype] = found
        return known[policy, kv_dtype]

    return answers


def agree(tokens, expected):
    """Equal up to the first near-tie."""
    for found, (wanted, ahead) in zip(tokens, expected, strict=True):
        first = next((at for at, (one, two) in enumerate(zip(found, wanted, strict=True)) if one != two), None)
        assert first is None or ahead[first] < NEAR, f"token {first} differs, and the best was {ahead[first]} ahead"


@pytest.mark.parametrize("policy", [ADAPTIVE, "snapkv:ratio=0.4", "refreekv:threshold=0.2", "streaming-llm:size=80"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES.keys())
def test_tokens(folder, prompts, reference, policy, feature):
    with engine(folder, policy, skip_tokenizer_init=True, **feature) as vllm:
        together = vllm.generate(prompts, TOKENS)
        # With prefix caching these find their prompts in the cache, where the policy allows it.
        again = [vllm.generate([ids], TOKENS)[0] for ids in prompts]
    agree(together, reference(policy))
    agree(again, reference(policy))


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    ("policy", "kv_dtype"),
    [("full", "int8"), ("full", "k6v4"), ("full", "int4"), ("full", "k4v2+int8"), (ADAPTIVE, "auto")],
)
def test_coded_entries(folder, prompts, reference, policy, kv_dtype, eager):
    with engine(folder, policy, kv_dtype=kv_dtype, skip_tokenizer_init=True, enforce_eager=eager) as vllm:
        tokens = vllm.generate(prompts, TOKENS)
        reports = [vllm.reports[f"r{index}"] for index in range(len(prompts))]
        widths = vllm.state.table.coded.segments.shape[3]
    assert widths == {"auto": 3, "k4v2+int8": 2}.get(kv_dtype, 1)
    assert max(report["blocks_freed"] for report in reports) > 10
    assert min(report["bytes_share"] / report["kept_share"] for report in reports) < 0.8
    # The first tokens are read as they are, until private blocks are there: codes are a little off in few of them.
    same = [found[:8] == wanted[:8] for found, (wanted, _) in zip(tokens, reference(policy, kv_dtype), strict=True)]
    assert sum(same) >= len(same) // 2


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_500_random_requests(folder, asynchronous):
    """Every block is accounted for after every step."""
    rng = random.Random(5)
    shared = [rng.randrange(512) for _ in range(300)]
    limits = {"max_model_len": 640, "max_num_seqs": 24, "max_num_batched_tokens": 640, "kv_mib": 3}
    with engine(folder, "snapkv:ratio=0.4", skip_tokenizer_init=True, async_scheduling=asynchronous, **limits) as vllm:
        added, live, preempted = 0, set(), 0
        while added < 500 or vllm.llm.has_unfinished_requests():
            for _ in range(rng.randrange(4) if added < 500 else 0):
                own = [rng.randrange(512) for _ in range(rng.randrange(1, 270))]
                vllm.add(f"r{added}", shared[: rng.choice([0, 0, 64, 200, 300])] + own, rng.randrange(1, 60))
                live.add(f"r{added}")
                added += 1
            if live and rng.random() < 0.08:
                gone = rng.choice(sorted(live))
                vllm.llm.abort_request([gone])
                live.discard(gone)
            preempted = max(preempted, sum(request.num_preemptions for request in vllm.scheduler.requests.values()))
            live -= {output.request_id for output in vllm.step() if output.finished}
        vllm.finish()
        freed = sum(report["blocks_freed"] for report in vllm.reports.values() if report)
    assert preempted > 0
    assert freed > 500
