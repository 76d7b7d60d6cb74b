"""The method end to end on a real model and a real document."""

import numpy as np
import pytest
import torch

import refreekv
from helpers import numpy_reference as slow
from refreekv.evaluation import sweeps
from refreekv.evaluation.data.encoding import Encoded
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity.bench import Bench, Job

pytestmark = pytest.mark.real_model

THRESHOLD = 0.01


@pytest.fixture(scope="module")
def prompt(smollm2):
    """A chat prompt of more than 2,000 tokens around a chapter of Python's own documentation."""
    from pydoc_data.topics import topics

    _, tokenizer = smollm2
    document = topics["compound"][:9000]
    messages = [{"role": "user", "content": f"{document}\n\nWhich statement runs a block with a context manager?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert inputs["input_ids"].shape[1] >= 2000
    return inputs


@pytest.fixture(scope="module")
def last_rows(smollm2, prompt):
    """The last prompt token's attention in every layer, from the model's own eager attention; [layer][H, n]."""
    model, _ = smollm2
    ids = prompt["input_ids"]
    with torch.inference_mode():
        past = model(ids[:, :-1]).past_key_values
        model.set_attn_implementation("eager")
        try:
            weights = model(ids[:, -1:], past_key_values=past, output_attentions=True).attentions
        finally:
            model.set_attn_implementation("sdpa")
    return [layer[0, :, 0].float().numpy() for layer in weights]


@pytest.fixture(scope="module")
def full(smollm2, prompt):
    """What the full cache answers."""
    with torch.inference_mode():
        return smollm2[0].generate(**prompt, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("includes_sinks", [False, True])
def test_cuts_are_those_of_the_models_own_attention(smollm2, prompt, last_rows, includes_sinks):
    model, _ = smollm2
    cache = refreekv.ReFreeKVCache(model, "refreekv", threshold=THRESHOLD, norm_includes_sinks=includes_sinks)
    with torch.inference_mode():
        model(**prompt, past_key_values=cache, logits_to_keep=1)
    n = prompt["input_ids"].shape[1]
    evicted = 0
    for layer, rows in zip(cache.report.layers, last_rows, strict=True):
        (row,) = layer.rows
        assert row.prompt_length == n
        if layer.index < 2:
            assert row.kept == n
            continue
        # Rows computed by another route differ in the last digits, so the cut may move by what
        # such digits weigh: its loss must still be the threshold's, judged by the other route.
        ranking = slow.ranked_positions(n, 4)
        wide = np.asarray(rows, dtype=np.float64)
        loss = slow.loss_of_prefix(wide, ranking, row.kept, 4, includes_sinks)
        assert loss <= THRESHOLD + 1e-4
        assert row.metric == pytest.approx(loss, abs=1e-4)
        if row.kept > 4:
            assert slow.loss_of_prefix(wide, ranking, row.kept - 1, 4, includes_sinks) > THRESHOLD - 1e-4
        expected = slow.cut_fast(rows, 4, THRESHOLD, includes_sinks)
        assert abs(row.cut - expected) <= max(3, 0.01 * n)
        evicted += n - row.kept
    assert evicted > 0.1 * n * len(last_rows)


def test_generation_reads_what_is_kept_and_the_bytes_are_true(smollm2, prompt):
    model, tokenizer = smollm2
    n = prompt["input_ids"].shape[1]
    with refreekv.compress(model, bits=16) as kv, torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    cache, report = out.past_key_values, kv.report
    text = tokenizer.decode(out.sequences[0, n:], skip_special_tokens=True)
    assert text.strip()
    generated = out.sequences.shape[1] - n
    assert report.tokens == n + generated - 1  # the last token was never fed back
    per_token = 2 * 3 * 64 * 4  # keys and values, 3 KV heads of 64, float32: native GQA, not 9 heads
    for layer in report.layers:
        (row,) = layer.rows
        heads = row.kept_heads * (1 if len(row.kept_heads) > 1 else 3)
        assert layer.bytes_after == (sum(heads) + 3 * (generated - 1)) * per_token // 3
        assert layer.bytes_before == (n + generated - 1) * per_token
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(held.values()) == report.bytes_after
    assert report.bytes_after < 0.9 * report.bytes_before


def test_the_default_stores_few_bits_and_answers_alike(smollm2, prompt, full):
    model, _ = smollm2
    with torch.inference_mode(), refreekv.compress(model) as kv:
        coded = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(coded, full)
    assert kv.report.bytes_after < 0.25 * kv.report.bytes_before  # float32
    assert sum(kv.report.formats.values()) == pytest.approx(1)
    assert min(kv.report.formats.values()) > 0.01


def test_nothing_evicted_is_the_full_cache(smollm2, prompt, full):
    model, _ = smollm2
    with torch.inference_mode(), refreekv.compress(model, "refreekv", threshold=0.0):
        same = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(full, same)


def test_bench_equals_runs_of_each_policy_alone(smollm2, prompt):
    """On real weights and text, in float32: what the bench reads through masks is what pruned caches give."""
    model, tokenizer = smollm2
    ids, steps = prompt["input_ids"][:, :320], 6
    specs = ["refreekv:threshold=0.05", "adaptive:constant=0.012,min_length=64", "cake:ratio=0.3", "gvote:p=0.9"]
    chosen = sweeps.choose(specs)
    one = Job(Sample("1", "text", ""), Encoded(ids[0].tolist(), [], [], ""), {"full": None, **chosen})
    (records,) = Bench(model, tokenizer, "SmolLM2", continuation=steps).measure([one])
    assert records[0].kl_max < 1e-5
    with torch.inference_mode():
        path = model.generate(ids, max_new_tokens=steps, do_sample=False, repetition_penalty=1.0)[:, 320:]
        full = model(torch.cat([ids, path], 1)).logits[0, -steps:].double().log_softmax(-1)
        for record in records[1:]:
            cache = refreekv.ReFreeKVCache(model, chosen[record.policy])
            model(ids, past_key_values=cache, logits_to_keep=1)
            assert record.budget == pytest.approx(cache.report.budget, abs=1e-4)
            assert record.budget < 0.95
            with cache.decoding():
                positions = torch.arange(320, 320 + path.shape[1])[None]
                pruned = model(path, past_key_values=cache, position_ids=positions).logits[0].double().log_softmax(-1)
            kl = (full.exp() * (full - pruned)).sum(-1)
            assert record.kl_mean == pytest.approx(kl.mean().item(), abs=1e-4)
