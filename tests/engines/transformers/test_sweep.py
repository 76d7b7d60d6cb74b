"""Every type of language model that transformers knows: pruned as a masked full cache is, or refused for a true cause.

A few that stand for the rest are in every run; all of them are marked slow (`make test-sweep`, some two minutes).
"""

import pytest
import torch
from transformers import CONFIG_MAPPING

import refreekv
from helpers.outcomes import CAUSES, NOT_BUILT, outcome_of
from helpers.tiny import CAUSAL, IMAGE_TEXT, tiny

STAND_FOR = {
    "axk1": "keys and values made anew from what the cache holds",  # latent attention
    "bamba": "equal",  # mamba
    "bart": "equal",  # positions from the length of the cache
    "bert": "equal",
    "bloom": "attention of its own",
    "cohere_compass": "equal",
    "diffllama": "keys or values changed after the cache",
    "dory": "equal",  # layers that run several times
    "doge": "sparse attention by a mask of its own",
    "gemma3n_text": "layers that share keys and values",
    "gemma4_text": "equal",  # full and sliding layers of different heads
    "gpt_oss": "equal",  # sinks
    "jamba": "equal",
    "jetmoe": "keys and values made anew from what the cache holds",
    "kosmos-2.5": "equal",  # positions of its own
    "lfm2": "equal",  # convolutions
    "llama4_text": "equal",  # chunks
    "mimo_v2_flash": "equal",  # values wider than keys
    "minimax": "a cache class of its own",
    "minimax_m3_vl_text": "equal",  # does one thing or another after the name of its attention
    "mllama": "equal",
    "nemotron_h": "equal",  # layers without attention
    "qwen2_vl": "equal",  # positions of three numbers
    "qwen3_next": "equal",
    "qwen3_vl": "equal",  # a text decoder without a first token of its own
    "t5gemma2": "an encoder and a decoder",
    "xlnet": "no KV cache",
    "zamba2": "no layer that keeps all tokens",
}
"""Types that stand for others, and what becomes of them with the transformers that is installed."""


@pytest.mark.parametrize("kind", STAND_FOR)
def test_types_that_stand_for_others(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    outcome = outcome_of(kind)
    if outcome.result == "not built":
        pytest.skip(outcome.detail)
    wanted = STAND_FOR[kind]
    assert (outcome.result, outcome.detail) == ("refused", wanted) or outcome.result == wanted == "equal", outcome


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*CAUSAL, *IMAGE_TEXT])
def test_all_types(kind):
    outcome = outcome_of(kind)
    if outcome.result == "not built":
        assert kind in NOT_BUILT, outcome
        pytest.skip(outcome.detail)
    assert outcome.result == "equal" or (outcome.result == "refused" and outcome.detail in CAUSES), outcome


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["bart", "bert", "gemma2", "gpt2", "kosmos-2.5", "llama", "mllama", "opt", "phi3"])
def test_captured_steps_are_right_or_not_made(kind):
    """Positions, soft caps and learned embeddings as the model has them, token by token on the device itself."""
    model = tiny(kind).to("cuda")
    ids = torch.randint(2, 100, (2, 40), generator=torch.Generator().manual_seed(1)).cuda()
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    wanted = torch.stack(model.generate(ids, **settings).logits)
    with refreekv.compress(model, "full"):
        got = torch.stack(model.generate(ids, **settings).logits)
    torch.testing.assert_close(got, wanted, atol=2e-3 * float(wanted.abs().max()), rtol=0)
