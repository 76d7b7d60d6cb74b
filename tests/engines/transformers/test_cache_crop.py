"""Taking back the last tokens of a pruned cache."""

import pytest
import torch
from transformers import DynamicCache

from helpers import reference
from helpers.driving import RAGGED, Uneven, check_bytes, feed, greedy, kv_bytes, prefill
from helpers.models import VOCAB, build, prompts
from refreekv import ReFreeKVCache
from refreekv.engines.transformers.accounting import entry_bytes


def test_crop_undoes_decoding(llama, new_cache):
    cache, never = new_cache(), new_cache()
    _, mask = prefill(llama, cache)
    prefill(llama, never)
    with cache.decoding():
        feed(llama, cache, torch.randint(2, VOCAB, (4, 6), generator=torch.Generator().manual_seed(0)), mask)
    cache.crop(-6)
    assert cache.get_seq_length() == never.get_seq_length() == mask.shape[1]
    for cropped, other in zip(cache.layers, never.layers, strict=True):
        assert torch.equal(cropped.keys, other.keys)
        assert torch.equal(cropped.values, other.values)
    nexts = torch.tensor([[5], [6], [7], [8]])
    for _ in range(3):
        (left, after), (right, _) = feed(llama, cache, nexts, mask), feed(llama, never, nexts, mask)
        assert torch.equal(left, right)
        mask, nexts = after, right[:, -1].argmax(-1, keepdim=True)
    assert cache.report == never.report


RULES = {
    "position": (("refreekv", {"threshold": 0.2, "frozen_layers": 0}), {"threshold": 0.2}),
    "attention": (("refreekv-heavy-hitter", {"threshold": 0.1, "frozen_layers": 0}), {"threshold": 0.1}),
    "window": (("streaming-llm", {"size": 20}), {"size": 20}),
    "uneven": ((Uneven(), {}), {}),
}


@pytest.mark.parametrize("remove", [3, 20, 37])
@pytest.mark.parametrize("ranking", RULES)
def test_crop_into_the_pruned_prompt(llama, ranking, remove):
    """What the policy kept before that point stays, and what was evicted there stays evicted."""
    (policy, parameters), rule = RULES[ranking]
    probes = {"recent": 8, "probe_rows": 8} if ranking == "attention" else {}
    model = build("llama")
    model.set_attn_implementation(reference.NAME)
    masked = reference.MaskedReference(model, reference.Rule(ranking, frozen_layers=0, **rule, **probes))
    ids, _ = prompts((50,), seed=4)
    masked.turn(ids, None, 1)
    masked.crop(remove)
    cache = ReFreeKVCache(llama, policy, **parameters)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        cache.crop(-remove)
    assert cache.get_seq_length() == 50 - remove
    check_bytes(cache, cache.report)
    lost = 0
    for layer, held in masked.evicted.items():
        assert cache.layers[layer].keys.shape[0] == (~held[0]).sum()
        lost += held.sum()
    assert lost > 0
    for token in ([[9]], [[8]]):
        with torch.no_grad():
            got = llama(torch.tensor(token), past_key_values=cache).logits
        wanted = masked.feed(torch.tensor(token), torch.ones(1, 1, dtype=torch.long))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_crop_then_a_new_prompt_is_pruned_again(llama):
    cache = ReFreeKVCache(llama, "streaming-llm", size=20)
    ids, _ = prompts((50,), seed=4)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        cache.crop(-10)
        llama(ids[:, :15], past_key_values=cache)
    assert cache.get_seq_length() == 55
    for layer in cache.report.prunable:
        assert layer.rows[0].kept == 20
        assert layer.rows[0].prompt_length == 55
        assert layer.bytes_after == 20 * entry_bytes(cache.layers[0])


@pytest.mark.parametrize(("remove", "kept"), [(7, 13), (20, 4), (30, 4), (47, 3)])
def test_a_new_prompt_after_a_deep_crop_counts_right(llama, remove, kept):
    """The report after the next prompt counts the tokens that are still in the sequence, evicted or not."""
    cache = ReFreeKVCache(llama, "streaming-llm", size=20)
    ids, _ = prompts((50,), seed=4)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        cache.crop(-remove)
        llama(ids[:, :5], past_key_values=cache)
    for layer in cache.report.prunable:
        assert layer.rows[0].prompt_length == 50 - remove + 5
        assert layer.rows[0].kept == min(kept + 5, 20)
    check_bytes(cache, cache.report)


def test_crop_below_everything_that_was_kept(llama):
    """Without sinks nothing is left before the window: the next token has only itself to see."""
    cache = ReFreeKVCache(llama, "streaming-llm", size=20, sinks=0)
    ids, _ = prompts((50,), seed=4)
    hidden = torch.full((1, 1, 1, 21), torch.finfo(torch.float32).min)
    hidden[..., -1] = 0
    full = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        cache.crop(-30)
        got = llama(torch.tensor([[9]]), past_key_values=cache).logits
        llama(ids[:, :20], past_key_values=full)
        wanted = llama(
            torch.tensor([[9]]), past_key_values=full, attention_mask=hidden, position_ids=torch.tensor([[20]])
        )
    torch.testing.assert_close(got, wanted.logits, rtol=0, atol=1e-4)


def test_crop_of_everything_leaves_an_empty_cache(llama, new_cache):
    cache = new_cache()
    prefill(llama, cache)
    cache.crop(-max(RAGGED))
    assert cache.get_seq_length() == 0
    assert cache.report.bytes_after == kv_bytes(cache) == 0
    ids, mask = prompts((30, 33), seed=3)
    fresh = new_cache()
    assert torch.equal(greedy(llama, ids, mask, cache), greedy(llama, ids, mask, fresh))
    assert cache.report == fresh.report
    assert fresh.report.budget < 1


def test_crop_takes_what_dynamic_cache_takes(llama, new_cache):
    cache = new_cache()
    prefill(llama, cache)
    length, held = cache.get_seq_length(), kv_bytes(cache)
    cache.crop(0)
    assert (cache.get_seq_length(), kv_bytes(cache)) == (length, held)
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(5)
