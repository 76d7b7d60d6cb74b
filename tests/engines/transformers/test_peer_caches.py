"""The peer policies through a real cache: pruned models equal masked ones, heads of different length included."""

import pytest
import torch

from helpers.driving import RAGGED, check_bytes, feed, prefill
from helpers.equivalence import assert_same, check_nothing_evicted, loop, turns_of
from helpers.models import build, prompts
from helpers.peer_reference import FREE, SLOW, PeerReference, make
from helpers.reference import NAME as REFERENCE
from refreekv import ReFreeKVCache

FIXED = [name for name in SLOW if name not in FREE]
END_TO_END = {
    "ada-kv": {"size": 14, "window": 3, "safeguard": 0.1},
    "top-p": {"p": 0.8, "window": 2, "frozen_layers": 1},
    "gvote": {"p": 0.6, "samples": 3, "window": 9},
    "h2o": {"ratio": 0.4, "queries": 8},
    "snapkv": {"size": 16, "window": 4, "kernel": 5},
    "pyramidkv": {"ratio": 0.4, "window": 3},
    "expected-attention": {"ratio": 0.4, "window": 9, "sinks": 2},
    "tova": {"size": 12},
    "keydiff": {"ratio": 0.3},
    "cake": {"ratio": 0.4, "window": 4, "gamma": 20.0, "tau1": 1.6},
}
UNEVEN = ("ada-kv", "top-p", "gvote")
SECOND = (17, 3, 1, 9)


def masked(name, architecture="llama"):
    model = build(architecture)
    model.set_attn_implementation(REFERENCE)
    return PeerReference(model, name, END_TO_END[name])


def as_counts(report):
    """Kept entries by layer and row, a number a KV head."""
    return {layer.index: [row.kept_heads for row in layer.rows] for layer in report.prunable}


def assert_counts(report, counts):
    for layer, rows in as_counts(report).items():
        for got, wanted in zip(rows, counts[layer], strict=True):
            assert got * (len(wanted) // len(got)) == wanted


@pytest.mark.parametrize("lengths", [(61,), RAGGED], ids=["batch1", "batch4"])
@pytest.mark.parametrize("name", END_TO_END)
def test_two_pruned_turns_equal_a_masked_full_cache(name, lengths):
    turns = turns_of(lengths, (17,) if len(lengths) == 1 else SECOND)
    reference, wanted, counts = masked(name), [], []
    for ids, mask in turns:
        wanted.append(reference.turn(ids, mask, 8))
        counts.append(dict(reference.kept_counts))
    if name in UNEVEN:
        assert any(len(set(heads)) > 1 for turn in counts for rows in turn.values() for heads in rows)
    assert min(min(heads) for rows in counts[0].values() for heads in rows) < min(lengths)
    model = build("llama", attention="sdpa")
    for chunk in (None, 13):
        cache = ReFreeKVCache(model, make(name, END_TO_END[name]))
        got, reports = loop(model, cache, turns, chunk)
        assert_same(got, wanted)
        for report, expected in zip(reports, counts, strict=True):
            assert_counts(report, expected)
        check_bytes(cache, cache.report)


@pytest.mark.parametrize("architecture", ["gemma3", "gpt_oss"])
@pytest.mark.parametrize("name", ["ada-kv", "top-p", "h2o", "cake"])
def test_other_architectures(name, architecture):
    """Sliding-window layers beside the pruned ones, another scaling, learned sinks."""
    turns = turns_of(RAGGED, (17,) * 4)
    reference = masked(name, architecture)
    wanted = [reference.turn(ids, mask, 8) for ids, mask in turns]
    model = build(architecture, attention="eager")
    got, reports = loop(model, ReFreeKVCache(model, make(name, END_TO_END[name])), turns, 13)
    assert_same(got, wanted)
    assert all(report.budget < 0.95 for report in reports)


def copied_bytes(layer):
    """What giving one layer's heads one length really takes: the rows that are no views of its storage."""
    if layer.ragged is None:
        return 0
    storages = [tensor.untyped_storage() for row in layer.ragged.rows() for tensor in row]
    own = {tensor.untyped_storage().data_ptr() for tensor in (layer.keys, layer.values)}
    return sum(storage.nbytes() for storage in storages if storage.data_ptr() not in own)


@pytest.mark.parametrize("name", UNEVEN)
def test_bytes_are_exactly_the_kept_entries(name):
    """Each KV head costs what it keeps: not the longest head's, not each query head's."""
    model = build("llama", attention="sdpa")
    cache = ReFreeKVCache(model, make(name, END_TO_END[name]))
    _, mask = prefill(model, cache)
    entry = 2 * 8 * 4  # key and value, head size, bytes of float32
    for step in range(3):
        report = cache.report
        check_bytes(cache, report)
        assert report.padded_bytes == max(copied_bytes(layer) for layer in cache.pruned_layers) > 0
        assert "padded during attention" in str(report)
        for layer in report.prunable:
            if layer.bytes_after < layer.bytes_before:
                kept = [heads * (2 // len(heads)) for heads in as_counts(report)[layer.index]]
                assert all(len(heads) == 2 for heads in kept)
                assert layer.bytes_after == sum(sum(heads) + 2 * step for heads in kept) * entry
                assert cache.layers[layer.index].keys.shape == (layer.bytes_after // entry, 8)
        _, mask = feed(model, cache, torch.full((4, 1), 7), mask)
    assert cache.report.bytes_after < 0.8 * cache.report.bytes_before
    uneven = [heads for rows in as_counts(cache.report).values() for heads in rows if len(set(heads)) > 1]
    assert len(uneven) >= 4


@torch.no_grad()
@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("into", [3, 12], ids=["what was generated", "the prompt"])
def test_crop_with_uneven_heads(name, into):
    model, reference = build("llama", attention="sdpa"), masked(name)
    cache = ReFreeKVCache(model, make(name, END_TO_END[name]))
    ids, mask = prompts(RAGGED, seed=3)
    drafts, others = (prompts((5,) * 4, seed=seed)[0] for seed in (4, 5))
    reference.prompt_ends = True
    reference.feed(ids, mask)
    reference.prompt_ends = False
    reference.feed(drafts, torch.ones_like(drafts))
    reference.cache.crop(-into)
    reference.mask = reference.mask[:, :-into]
    reference.evicted = {layer: gone[..., : reference.mask.shape[1]] for layer, gone in reference.evicted.items()}
    wanted = reference.feed(others, torch.ones_like(others))
    _, mask = prefill(model, cache)
    with cache.decoding():
        _, mask = feed(model, cache, drafts, mask)
        cache.crop(-into)
        check_bytes(cache, cache.report)
        got, _ = feed(model, cache, others, mask[:, :-into])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    check_bytes(cache, cache.report)


NOTHING = [("full", {}), ("top-p", {"p": 1.0}), ("gvote", {"p": 1.0}), ("top-p", {"frozen_layers": "all"})]
NOTHING += [(name, {"ratio": 1.0}) for name in (*FIXED, "cake")] + [("ada-kv", {"size": 10**6})]


@pytest.mark.parametrize(("name", "parameters"), NOTHING, ids=str)
def test_nothing_evicted_is_bit_for_bit_the_full_cache(name, parameters):
    check_nothing_evicted("llama", "sdpa", RAGGED, SECOND, name, parameters)
