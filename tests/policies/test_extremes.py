"""All policies on prompts of a few tokens, and whatever PyTorch's default type is."""

import dataclasses

import pytest
import torch

from helpers.models import build, prompts
from refreekv import ReFreeKVCache, policies

SPECS = {
    "adaptive": [
        "min_length=0",
        "min_length=0,sinks=0,window=1,constant=0.5",
        "min_length=0,constant=0.05,shared=true",
    ],
    "refreekv": [
        "threshold=0.3,frozen_layers=0",
        "threshold=0.3,frozen_layers=0,sinks=0,probe_rows=3",
        # Sinks may hold the norm by themselves, and nothing else stays.
        "threshold=0.9,frozen_layers=0,probe_rows=4,norm_includes_sinks=true",
    ],
    "refreekv-heavy-hitter": ["threshold=0.3,frozen_layers=0", "threshold=0.3,frozen_layers=0,sinks=0,recent=0"],
    "gvote": ["", "window=1"],
    "top-p": ["", "p=0.5"],
}
NEW = 3
"""Tokens of an answer."""
BUDGETS = ["ratio=0.5", "size=1", "size=1000"]


def ways(name):
    """Parameters to try a policy with: a policy that is new here needs no line."""
    takes_a_budget = "ratio" in {field.name for field in dataclasses.fields(policies.registry.get(name))}
    return SPECS.get(name, BUDGETS if takes_a_budget else [""])


ALL = [f"{name}:{how}".rstrip(":") for name in policies.available() for how in ways(name)]
POLICY = pytest.mark.parametrize("policy", ALL)


@pytest.fixture(scope="module")
def small():
    return build("llama", attention="sdpa")


@pytest.fixture(scope="module")
def packable():
    """The same with heads that number formats take."""
    return build("llama", attention="sdpa", head_dim=16)


def answer(model, policy, lengths, arena=None, kv_dtype=None):
    ids, mask = prompts(lengths, seed=1)
    cache = ReFreeKVCache(model, policy, kv_dtype=kv_dtype)
    cache.state.arena = arena
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    return out, cache


@POLICY
@pytest.mark.parametrize("lengths", [(1,), (2,), (5,), (5, 1, 2, 3)], ids=str)
def test_prompts_of_a_few_tokens(lengths, policy, small, packable):
    shape = len(lengths), max(lengths) + NEW
    out, cache = answer(small, policy, lengths)
    assert out.shape == shape
    in_arena, _ = answer(small, policy, lengths, arena=True)
    assert torch.equal(in_arena, out)
    assert answer(packable, policy, lengths, kv_dtype="int4")[0].shape == shape
    for layer in cache.report.prunable:
        assert all(min(row.kept_heads) >= 1 for row in layer.rows)


@POLICY
def test_the_default_type_decides_nothing(policy, small, packable):
    """It is the user's, and a habit to set it while a model is loaded."""
    lengths = (61, 23)
    wanted, judge = answer(small, policy, lengths)
    for default in (torch.bfloat16, torch.float16):
        torch.set_default_dtype(default)
        try:
            out, cache = answer(small, policy, lengths)
            assert answer(packable, policy, lengths, kv_dtype="int4")[0].shape == wanted.shape
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(out, wanted)
        assert [cache.kept_ranges(row) for row in (0, 1)] == [judge.kept_ranges(row) for row in (0, 1)]
        assert cache.report == judge.report
