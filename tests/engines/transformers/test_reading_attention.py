"""Attention over what was read before: without a mask where nobody looks ahead, one KV head at a time elsewhere."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.models import build
from refreekv import ReFreeKVCache
from refreekv.engines.transformers import reading_attention
from refreekv.engines.transformers.naming import NAME
from refreekv.engines.transformers.reading_attention import over_what_was_read

BEHIND = 70


def entries(dtype=torch.float32, device="cpu", queries=9, size=64, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (6, queries), (kv_heads, queries + BEHIND), (kv_heads, queries + BEHIND)
    return [torch.randn(2, *shape, size, generator=generator).to(device, dtype) for shape in shapes]


def causal(query, key):
    """Boolean ``[1, 1, q, n]``, marked as transformers' own masks are."""
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(BEHIND)[None, None]
    mask._refreekv_mask = True
    return mask


def expected(query, key, value, mask, scaling=None):
    """In float64, with keys and values repeated for each query head."""
    group = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(part.double().repeat_interleave(group, 1) for part in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return (logits.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2)


class Module(torch.nn.Module):
    """What sdpa asks of an attention module."""

    num_key_value_groups = 3
    is_causal = True


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("flash", [True, False])
def test_it_is_causal_attention(flash, scaling, monkeypatch):
    monkeypatch.setattr(reading_attention, "_flash_can", lambda *_: flash)
    query, key, value = entries()
    mask = causal(query, key)
    attend = over_what_was_read(sdpa_attention_forward, sdpa_attention_forward)
    output, weights = attend(Module(), query, key, value, mask, scaling=scaling, dropout=0.0)
    assert weights is None
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), expected(query, key, value, mask, scaling), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["hidden entries", "another function"])
def test_masks_that_say_more_and_other_functions_are_heeded(why, monkeypatch):
    monkeypatch.setattr(reading_attention, "_flash_can", lambda *_: True)
    query, key, value = entries()
    mask, called = causal(query, key), []

    def mine(*args, **kwargs):
        called.append(args[2].shape[1])
        return sdpa_attention_forward(*args, **kwargs)

    if why == "hidden entries":
        mask[..., 3:6] = False
        mask._refreekv_mask = False
        attend = over_what_was_read(mine, sdpa_attention_forward)
    else:
        attend = over_what_was_read(mine, mine)
    output, _ = attend(Module(), query, key, value, mask)
    assert called == [1, 1], "one KV head at a time"
    torch.testing.assert_close(output.double(), expected(query, key, value, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_chunks_are_read_as_behind_masks(padded, monkeypatch):
    model = build("llama", attention="sdpa", head_dim=64)
    ids = torch.randint(1, 60, (2, 300), generator=torch.Generator().manual_seed(0))
    there = torch.ones_like(ids)
    there[1, : 40 if padded else 0] = 0
    used = []
    kept = reading_attention._to_the_last

    def counted(*args, **kwargs):
        used.append(args[0].shape[2])
        return kept(*args, **kwargs)

    monkeypatch.setattr(reading_attention, "_to_the_last", counted)
    found = {}
    for flash in (True, False):
        monkeypatch.setattr(reading_attention, "_flash_can", lambda *_, flash=flash: flash)
        cache = ReFreeKVCache(model, "adaptive", prompt_dtype="int8")
        with torch.inference_mode(), cache.prompt_until(300):
            for start in range(0, 300, 100):
                part = slice(start, start + 100)
                found[flash] = model(
                    ids[:, part], attention_mask=there[:, : start + 100], use_cache=True, **{NAME: cache}
                ).logits
        if flash:
            assert used == ([] if padded else [100] * 2 * model.config.num_hidden_layers)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("queries", [2, 9, 300])
def test_the_flash_kernel_ends_at_the_last_key(size, dtype, queries):
    query, key, value = entries(dtype, "cuda", queries, size)
    mask = causal(query, key)
    assert reading_attention._flash_can(query, key, value)
    attend = over_what_was_read(sdpa_attention_forward, sdpa_attention_forward)
    output, _ = attend(Module(), query, key, value, mask)
    torch.testing.assert_close(output.double(), expected(query, key, value, mask), rtol=2e-2, atol=2e-2)
