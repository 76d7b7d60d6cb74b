"""Few queries behind a mask: the heads of a group are attended to as more queries of one head."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from refreekv.engines.transformers.ragged_attention import FEW, by_group

BATCH, HEADS, KV_HEADS, ENTRIES, SIZE = 2, 6, 2, 150, 16


def drawn(queries):
    """Queries, keys and values of another size, and a module."""
    torch.manual_seed(0)
    query = torch.randn(BATCH, queries, HEADS, SIZE, dtype=torch.float64).transpose(1, 2)  # as projections leave them
    key, value = (torch.randn(BATCH, KV_HEADS, ENTRIES, n, dtype=torch.float64) for n in (SIZE, 8))
    return SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True, training=False), query, key, value


def masks(queries):
    """Of each kind: of all rows and heads, of each row, of each head; boolean and additive."""
    shown = torch.rand(BATCH, HEADS, queries, ENTRIES) < 0.6
    shown[..., -1] = True
    added = torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, torch.finfo(torch.float64).min)
    return [shown[:1, :1], shown[:, :1], shown, added, added[:1, :1].expand(BATCH, -1, -1, -1)]


@pytest.mark.parametrize("queries", [2, 33, FEW])
def test_it_is_the_same_attention(queries):
    module, query, key, value = drawn(queries)
    for mask in masks(queries):
        want = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)[0]
        got = by_group(sdpa_attention_forward)(module, query, key, value, mask, scaling=0.3)[0]
        assert got.shape == want.shape == (BATCH, queries, HEADS, 8)
        torch.testing.assert_close(got, want)


def test_no_keys_are_copied():
    module, query, key, value = drawn(9)
    seen = []

    def attention(module, query, key, value, mask, **kwargs):
        seen.append((module.num_key_value_groups, module.is_causal, query.shape[1], key.data_ptr(), mask.shape[1:]))
        return query.transpose(1, 2)[..., :8], None

    for mask in masks(9)[1:3]:
        by_group(attention)(module, query, key, value, mask)
    rows = 9 * HEADS // KV_HEADS
    assert seen == [(1, True, KV_HEADS, key.data_ptr(), (n, rows, ENTRIES)) for n in (1, KV_HEADS)]


@pytest.mark.parametrize(("queries", "masked"), [(FEW + 1, True), (1, True), (9, False)])
def test_others_go_as_they_came(queries, masked):
    """A mask for many queries would be more than keys and values; one query, or none to hide, needs no help."""
    module, query, key, value = drawn(queries)
    given = masks(queries)[0] if masked else None

    def attention(*arguments, **kwargs):
        assert all(a is b for a, b in zip(arguments, (module, query, key, value, given), strict=True))
        return query, None

    by_group(attention)(module, query, key, value, given)
