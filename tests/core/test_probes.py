"""Probe rows against float64, and the memory they need."""

import numpy as np
import pytest
import torch

from helpers import numpy_reference as slow
from refreekv.core import probes
from refreekv.core.probes import attention_rows, causal_visibility


def random_case(seed, batch=2, heads=6, kv_heads=2, probe_rows=3, n=37, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, probe_rows, dim, generator=generator).to(dtype)
    key = torch.randn(batch, kv_heads, n, dim, generator=generator).to(dtype)
    valid = torch.ones(batch, n, dtype=torch.bool)
    valid[0, :5] = False
    visible = causal_visibility(valid, torch.arange(n - probe_rows, n))
    return query, key, visible


@pytest.mark.parametrize("chunk", [8, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}, {"sink_logits": torch.randn(6)}])
def test_rows_equal_float64(monkeypatch, chunk, dtype, extras):
    monkeypatch.setattr(probes, "KEY_CHUNK", chunk)
    query, key, visible = random_case(0, dtype=dtype)
    got = attention_rows(query, key, scaling=0.3, visible=visible, **extras)
    expected = slow.attention_rows(query.double(), key.double(), 0.3, visible, **extras)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)


def test_default_scaling_and_no_mask():
    query, key, _ = random_case(1)
    got = attention_rows(query, key)
    np.testing.assert_allclose(got.numpy(), slow.attention_rows(query, key, 16**-0.5), atol=2e-6)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 6, 3))


def test_a_query_that_sees_nothing_gives_zeros():
    query, key, visible = random_case(2)
    visible = visible.clone()
    visible[1, 0] = False
    got = attention_rows(query, key, visible=visible)
    assert torch.isfinite(got).all()
    assert (got[1, :, 0] == 0).all()
    torch.testing.assert_close(got[0].sum(-1), torch.ones(6, 3))


def test_large_logits_stay_finite():
    query, key, visible = random_case(3)
    got = attention_rows(query * 1e4, key, visible=visible)
    assert torch.isfinite(got).all()


def test_heads_must_divide():
    with pytest.raises(ValueError, match="cannot share"):
        attention_rows(torch.randn(1, 5, 1, 4), torch.randn(1, 2, 3, 4))


def test_keys_are_not_widened_or_copied_whole(monkeypatch):
    """Beyond the result, only one chunk of keys exists in float32: nothing of size n x n or H/H_kv x keys."""
    monkeypatch.setattr(probes, "KEY_CHUNK", 256)
    n, dim = 4096, 8
    query = torch.randn(1, 4, 1, dim, dtype=torch.bfloat16)
    key = torch.randn(1, 2, n, dim, dtype=torch.bfloat16)
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        attention_rows(query, key)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    rows_bytes = 4 * n * 4
    chunk_bytes = 2 * 256 * dim * 4
    assert largest <= max(rows_bytes, chunk_bytes) * 2
