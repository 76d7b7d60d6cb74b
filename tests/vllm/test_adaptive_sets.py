"""The adaptive policy in vLLM: copy scores as the library measures them, and the same sets kept."""

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

import torch
from transformers import AutoModelForCausalLM

import refreekv
from helpers.vllm_engine import engine, tiny_model
from refreekv.engines.transformers.copy_scores import copy_scores
from refreekv.engines.vllm.worker_side.rounding import keep_mask


@pytest.mark.parametrize(
    "arguments", [{}, {"max_num_batched_tokens": 192, "max_num_seqs": 16, "asynchronous": True}], ids=["once", "chunks"]
)
def test_copy_scores_are_the_library_s(tmp_path, arguments):
    folder = tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with refreekv.compress(model, policy="adaptive"):
        expected = torch.stack(list(copy_scores(model)))
    with engine(folder, "adaptive", max_model_len=640, kv_mib=32, skip_tokenizer_init=True, **arguments) as vllm:
        found = torch.stack([layer.facts.copy_scores for layer in vllm.state.layers.values()])
        assert not vllm.state.requests, "the calibration's own prompt is still remembered"
        prompt = [1 + place * 7 % 500 for place in range(600)]
        vllm.generate([prompt])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3, "all heads score alike: this would show nothing"


@pytest.mark.vllm_full
def test_kept_sets_and_tokens_are_the_library_s(folder, reference, prompts, monkeypatch):
    long = [ids for ids in prompts if len(ids) >= 512]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    with engine(folder, "adaptive") as vllm:
        decide = vllm.state._decide

        def noted(request_id, tracked):
            found[tracked.prompt] = dict(tracked.selections)
            decide(request_id, tracked)

        monkeypatch.setattr(vllm.state, "_decide", noted)
        tokens = vllm.generate(long)
    differ = 0
    for ids in long:
        cache = refreekv.ReFreeKVCache(model, "adaptive", shared=True)
        model.generate(torch.tensor([ids]), past_key_values=cache, max_new_tokens=1, do_sample=False)
        for layer, heads in enumerate(cache.kept_ranges()):
            selection = found[len(ids)][layer]
            kept = torch.ones(len(ids), dtype=torch.bool) if selection is None else keep_mask(selection, len(ids))
            expected = torch.zeros_like(kept)
            (ranges,) = heads
            for start, stop in ranges:
                expected[start:stop] = True
            differ += int((kept != expected).sum())
    # 211,000 positions in all layers: the last bit decides on one whose peak is the unit itself, and its neighbours.
    assert differ <= 3
    assert tokens == [reference.generate(ids, "adaptive") for ids in long]
    assert max(vllm.reports[f"r{index}"]["blocks_freed"] for index in range(len(long))) > 0
