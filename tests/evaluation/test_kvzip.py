"""KVzip in the bench: against attention matrices of plain forward passes over the context and the request."""

from dataclasses import replace

import pytest
import torch

from helpers.fidelity import NumberTokenizer, bench, job, tokens
from helpers.models import build
from refreekv import ReFreeKVCache
from refreekv.evaluation import sweeps
from refreekv.evaluation.fidelity import kvzip
from refreekv.evaluation.fidelity.formats import parse
from refreekv.evaluation.fidelity.prefill import SharedPrefill


class Words(NumberTokenizer):
    """A tokenizer that knows the requests, too."""

    def __call__(self, text, **_):
        words = text.replace(kvzip.FIRST, "3 4 5").replace(kvzip.LATER, "6 7").strip()
        return {"input_ids": [int(word) for word in words.split()]}


def attention(model, ids):
    """Of a plain pass: ``[H, n, n]`` by layer."""
    return [layer[0] for layer in model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions]


@pytest.mark.parametrize(("length", "chunk"), [(60, 2000), (90, 40)])
@torch.no_grad()
def test_scores_are_the_highest_attention_of_saying_it_again(length, chunk, monkeypatch):
    model, context = build("llama", attention="eager"), tokens(length, 0)
    monkeypatch.setattr(kvzip.requests, "__defaults__", (chunk,))
    pieces = list(kvzip.requests(Words(), context))
    heads = model.config.num_key_value_heads
    expected = [torch.full((heads, length), torch.inf) for _ in range(model.config.num_hidden_layers)]
    for piece, asked in pieces:
        own = torch.arange(length + len(asked))
        seen = (own < 4) | ((own >= piece.start) & (own < piece.stop)) | (own >= length)
        for layer, full in zip(expected, attention(model, [*context, *asked]), strict=True):
            rows = full[:, length:] * seen
            rows = rows / rows.sum(-1, keepdim=True)  # softmax over what is looked at alone
            layer[:, piece] = rows[..., piece].unflatten(0, (heads, -1)).amax((1, 2))
    attached = ReFreeKVCache(model, "full")
    shared = SharedPrefill(model, context, {"kvzip:ratio=0.5": parse("kvzip:ratio=0.5")}, Words())
    for found, wanted in zip(shared._said_again(model, Words(), context), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    del attached


def test_requests():
    context = list(range(10, 30))
    first, second = kvzip.requests(Words(), context, chunk=10)
    assert first == (slice(4, 14), [3, 4, 5, *context[4:14]])
    assert second == (slice(14, 20), [6, 7, *context[6:14], *context[14:]])


def test_the_best_pairs_of_all_layers_stay():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(2, 100, generator=generator) * scale for scale in (1.0, 0.1)]
    masks = kvzip.kept(scores, 0.5)
    assert sum(int(mask.sum()) for mask in masks) == 200
    always = torch.zeros(100, dtype=torch.bool)
    always[:4] = always[-32:] = True
    for mask in masks:
        assert bool(mask[:, always].all())
    others = torch.cat([score[:, ~always].flatten() for score in scores])
    chosen = torch.cat([mask[:, ~always].flatten() for mask in masks])
    assert float(others[chosen].min()) >= float(others[~chosen].max())
    # Sinks and newest stay, whatever the ratio.
    assert sum(int(mask.sum()) for mask in kvzip.kept(scores, 0.01)) == 4 * 36


def test_in_the_bench():
    model = build("llama", attention="sdpa", head_dim=16)
    chosen = sweeps.choose(["kvzip:ratio=0.4", "kvzip:ratio=0.4@int4", "kvzip:ratio=1.0", "snapkv:ratio=0.4"])
    assert list(chosen) == ["kvzip:ratio=0.4", "kvzip:ratio=0.4@int4", "kvzip:ratio=1.0", "snapkv:ratio=0.4"]
    made = replace(bench(model), tokenizer=Words())
    (records,) = made.measure([job(length=300, asked={"full": None, **chosen})])
    by_name = {record.policy: record for record in records}
    plain, coded = by_name["kvzip:ratio=0.4"], by_name["kvzip:ratio=0.4@int4"]
    assert plain.budget == pytest.approx(0.4, abs=1e-3)
    assert plain.kept_heads == coded.kept_heads
    assert len({share for layer in plain.kept_heads for share in layer}) > 1
    assert coded.bytes_kept < 0.7 * plain.bytes_kept
    assert by_name["kvzip:ratio=1.0"].kl_mean < 1e-6 < plain.kl_mean


def test_specifications():
    for spec in ("kvzip", "kvzip:ratio=2", "kvzip:ratio=0.5,window=3", "kvzip:size=9"):
        with pytest.raises(ValueError, match="takes a ratio and nothing else"):
            parse(spec)
