"""refreekv below and above other things: pipelines, flash attention, accelerate."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerFast, pipeline
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import refreekv
from helpers.driving import PRUNING, Uneven, generate, state_of
from helpers.models import build, prompts
from refreekv import ReFreeKVCache


@pytest.fixture
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<s>": 1, **{f"w{index}": index for index in range(2, 128)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", padding_side="left")


def test_pipeline(model, tokenizer):
    batch, mask = prompts((40, 23), seed=2)
    texts = [
        " ".join(f"w{token}" for token in row[keep.bool()].tolist()) for row, keep in zip(batch, mask, strict=True)
    ]
    made_before = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    full = [made_before(text, **settings)[0]["generated_text"] for text in texts]
    with refreekv.compress(model, **PRUNING) as kv:
        made_within = pipeline("text-generation", model=model, tokenizer=tokenizer)
        for pipe in (made_before, made_within):
            got = [row[0]["generated_text"] for row in pipe(texts, batch_size=2, **settings)]
            assert [len(row.rows) for row in kv.report.prunable] == [2] * 4
            assert kv.report.budget < 1
            wanted = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 40:]
            assert got == tokenizer.batch_decode(wanted)
            assert got != full
    assert [made_before(text, **settings)[0]["generated_text"] for text in texts] == full


def stand_in_flash(seen):
    """A function that behaves as the flash functions do.

    Masks are ``[B, n]`` or None, several queries are causal by themselves, the name of the
    implementation is read off the configuration, and learned sinks are understood.
    """

    def attention(module, query, key, value, attention_mask, scaling=None, s_aux=None, **kwargs):
        seen.append((module.config._attn_implementation, module.is_causal, module.layer_idx))
        queries, entries = query.shape[2], key.shape[2]
        allowed = torch.ones(queries, entries, dtype=torch.bool).tril(entries - queries)[None, None]
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), entries)
            allowed = allowed & attention_mask.bool()[:, None, None]
        window = kwargs.get("sliding_window")
        if window is not None:
            allowed = allowed & ~torch.ones(queries, entries, dtype=torch.bool).tril(entries - queries - window)
        groups = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        weights = logits.softmax(-1)[..., :entries]
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    return attention


@pytest.mark.parametrize("policy", ["refreekv", "uneven"])
@pytest.mark.parametrize(("lengths", "second"), [((50,), (9,)), ((50, 31, 40), (9, 1, 4))], ids=["batch1", "batch3"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_flash_attention_is_delegated_to(name, lengths, second, policy):
    seen = []
    AttentionInterface.register("stand_in_flash", stand_in_flash(seen))
    AttentionMaskInterface.register("stand_in_flash", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    if name == "gpt_oss":
        second = (9,) * len(second)  # padding between turns is part of a sliding window
    model, plain = build(name), build(name)
    model.config._attn_implementation = "stand_in_flash"
    (first, mask), (later, more) = prompts(lengths, seed=3), prompts(second, seed=4)
    settings = {"return_dict_in_generate": True, "output_logits": True}
    reports, logits = [], []
    for each in (model, plain):
        given = (
            {"policy": Uneven()} if policy == "uneven" else {"policy": "refreekv", "threshold": 0.2, "frozen_layers": 0}
        )
        cache = ReFreeKVCache(each, **given)
        one = generate(each, first, past_key_values=cache, prefill_chunk_size=17, attention_mask=mask, **settings)
        whole = torch.cat([mask, torch.ones(len(first), 6, dtype=torch.long), more], 1)
        sequence = torch.cat([one.sequences, later], 1)
        two = generate(each, sequence, past_key_values=cache, attention_mask=whole, **settings)
        logits.append(torch.stack(one.logits + two.logits))
        reports.append([[row.kept_heads for row in layer.rows] for layer in cache.report.prunable])
        assert cache.report.budget < 1
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert reports[0] == reports[1]
    assert {name for name, _, _ in seen} == {"stand_in_flash"}
    assert all(causal for _, causal, _ in seen)
    assert {layer for _, _, layer in seen} == set(range(4))
    del cache
    assert model.config._attn_implementation == "stand_in_flash"


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_accelerate_hooks(model, ids, offload, tmp_path):
    """Weights that accelerate brings in layer by layer."""
    accelerate = pytest.importorskip("accelerate")
    with refreekv.compress(model, **PRUNING) as kv:
        wanted, report = generate(model, ids), kv.report
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    before = state_of(model, weights=False)
    with refreekv.compress(model, **PRUNING) as kv:
        assert torch.equal(generate(model, ids), wanted)
    assert kv.report == report
    assert report.budget < 1
    cache = ReFreeKVCache(model, **PRUNING)
    assert torch.equal(generate(model, ids, past_key_values=cache), wanted)
    del cache
    assert state_of(model, weights=False) == before
