"""Layers and views of random numbers that the tests of policies share."""

import torch

from refreekv.pruning.calls import AttentionCall, Entries, Queries
from refreekv.pruning.decide import layer_view


def random_layer(seed, n, batch=2, heads=4, kv_heads=2, dim=6, pads=(), sharp=2.0):
    """Keys, values and all queries of a prompt, with left padding in some rows."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, kv_heads, n, dim, generator=generator) for _ in range(2))
    queries = sharp * torch.randn(batch, heads, n, dim, generator=generator)
    valid = None
    if pads:
        valid = torch.ones(batch, n, dtype=torch.bool)
        for row, count in enumerate(pads):
            valid[row, :count] = False
    return keys, values, queries, valid


def view_of(policy, keys, values, queries, valid=None, scores=None, earlier=None):
    n = keys.shape[2]
    entries = Entries(keys, values, valid, torch.arange(n), Queries.of_call(queries, 0, valid), earlier)
    call = AttentionCall(queries, None)
    return layer_view(policy.probe_plan(n), call, entries, 0, 1, scores)
