"""Softmax denominators that PyTorch's attention computed, heard and handed to probes."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from helpers.models import build
from refreekv import ReFreeKVCache
from refreekv.core import reductions
from refreekv.engines.transformers import attention, denominators
from refreekv.engines.transformers.naming import NAME
from refreekv.pruning import decide

PROBED = {"min_length": 16, "constant": 0.02, "spread": 8, "window": 8, "follow": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("llama", attention="sdpa", head_dim=64)


@pytest.fixture
def probed(monkeypatch):
    """The probes of each layer; with plain reductions, which heed what they are told."""
    found = []

    def noting(query, other_query, key, *given):
        found.extend((own, key, probes) for own, probes in zip((query, other_query), given, strict=True))
        return tuple(reductions.probe_reductions(*one) for one in found[-2:])

    monkeypatch.setattr(denominators, "listens_on", lambda device: True)
    monkeypatch.setattr(decide, "both_reductions", noting)
    return found


def read(model, ids, chunk=None, **given):
    cache = ReFreeKVCache(model, "adaptive", **PROBED)
    with torch.no_grad(), cache.prompt_until(ids.shape[1]):
        for part in ids.split(chunk or ids.shape[1], 1):
            model(input_ids=part, **{NAME: cache}, **given)
    cache.state.finish()
    return cache


def told(found):
    return [probes.logsumexp for _, _, probes in found]


def test_they_are_heard_once_they_were_compared(model, probed):
    ids = torch.randint(2, 90, (2, 70))
    # Copy scores are measured before the prompt, which compares.
    read(model, ids[:, :50])
    probed.clear()
    cache = read(model, ids)
    assert len(probed) == 2 * len(cache.pruned_layers)
    for query, key, probes in probed:
        whole = reductions.attention_logits(query, key, scaling=probes.scaling)
        seen = torch.arange(70) <= probes.query_columns[:, None, :, None]
        torch.testing.assert_close(probes.logsumexp, whole.masked_fill(~seen, float("-inf")).logsumexp(-1))


def test_nothing_changes(model, probed, monkeypatch):
    ids = torch.randint(2, 90, (1, 70))
    read(model, ids)
    heard, used = read(model, ids), told(probed)
    monkeypatch.setattr(denominators, "listens_on", lambda device: False)
    probed.clear()
    other = read(model, ids)
    assert any(part is not None for part in used)
    assert told(probed) == [None] * len(probed)
    for one, two in zip(heard.pruned_layers, other.pruned_layers, strict=True):
        assert one.ragged.lengths == two.ragged.lengths
        assert torch.equal(one.ragged.full().keys, two.ragged.full().keys)


@pytest.mark.parametrize("case", ["padding", "chunks", "eager"])
def test_where_none_are_heard(model, probed, case):
    ids = torch.randint(2, 90, (2, 70))
    given, chunk = {}, None
    if case == "padding":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :9] = 0
    elif case == "chunks":
        chunk = 40
    else:
        model = build("llama", attention="eager", head_dim=64)
    read(model, ids[:, :50])
    probed.clear()
    read(model, ids, chunk, **given)
    assert probed
    assert told(probed) == [None] * len(probed)


def test_wrong_ones_are_not_believed(model, probed, monkeypatch):
    right = denominators.Listening._fitting
    monkeypatch.setattr(denominators.Listening, "_fitting", lambda self, told: right(self, told) + 0.01)
    ids = torch.randint(2, 90, (1, 70))
    for _ in range(2):
        read(model, ids)
    assert told(probed) == [None] * len(probed)


def test_a_padded_prompt_first(model, probed):
    """The modules are proved then, and what they tell is compared with the first prompt that they tell it of."""
    ids = torch.randint(2, 90, (2, 70))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for given in ({"attention_mask": mask}, {}, {}):
        probed.clear()
        read(model, ids, **given)
    assert all(part is not None for part in told(probed))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_somebody_s_own_attention_is_not_listened_to(model, probed, monkeypatch):
    def own(module, query, key, value, mask, scaling=None, **_):
        count = query.shape[2]
        assert mask is None
        seen = create_block_mask(lambda b, h, q, k: q >= k, None, None, count, count, device="cpu")
        return flex_attention(query, key, value, block_mask=seen, scale=scaling, enable_gqa=True).transpose(1, 2), None

    monkeypatch.setattr(attention, "_base_function", lambda base, module: own)
    read(model, torch.randint(2, 90, (1, 70)))
    assert told(probed) == [None] * len(probed)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("operators", [2, 1])
def test_two_operators_tell_nothing(operators, mode):
    query, key = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    call = decide.AttentionCall(query, None)
    with mode(), denominators.Listening(call) as heard:
        for _ in range(operators):
            torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True)
    assert (heard.logsumexp is None) is (operators == 2)


def test_an_operator_that_tells_when_asked():
    """As cuDNN's: its fifth argument."""
    asked = []

    class Operator:
        overloadpacket = SimpleNamespace(__name__="_scaled_dot_product_cudnn_attention")

        def __call__(self, *args, **kwargs):
            asked.append(args[4])
            return None, torch.ones(1, 2, 9, 1)

    call = decide.AttentionCall(torch.randn(1, 2, 9, 16), None)
    listening = denominators.Listening(call)
    listening.__torch_dispatch__(Operator(), (), (None, None, None, None, False, 0.0, True))
    assert asked == [True]
    assert listening.logsumexp.shape == (1, 2, 9)
