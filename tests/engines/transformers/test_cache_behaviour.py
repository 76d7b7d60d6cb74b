"""A pruned cache between forward passes: beams, batches, reuse, later turns, lengths and padding."""

import pytest
import torch

import refreekv
from helpers.driving import POLICIES, PRUNING, RAGGED, feed, greedy, prefill
from helpers.models import LAYERS, PAD, VOCAB, build, prompts
from refreekv import ReFreeKVCache

# -- rows of the batch ------------------------------------------------------------------------------


def test_rows_repeat_select_and_reorder(llama, new_cache):
    """Row operations give what a cache of those rows, prefilled and pruned by itself, gives."""
    cache = new_cache()
    _, mask = prefill(llama, cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([7, 0, 3, 3, 4, 1, 6, 5]))
    cache.batch_select_indices(torch.tensor([True, False, True, True, True, False, True, False]))
    rows = [3, 1, 1, 2, 3]  # of the original batch
    mask = mask[rows]
    tokens = torch.tensor([[5], [6], [7], [8], [9]])
    got = []
    for _ in range(3):
        logits, mask = feed(llama, cache, tokens, mask)
        got.append(logits[:, -1])
        tokens = logits[:, -1].argmax(-1, keepdim=True)
    for place, row in enumerate(rows):
        single = new_cache()
        ids, _whole = prompts(RAGGED, seed=3)
        own = ids[row : row + 1, -RAGGED[row] :]
        with torch.no_grad():
            llama(own, past_key_values=single)
            token = torch.tensor([[5 + place]])
            for step in got:
                logits = llama(token, past_key_values=single).logits[:, -1]
                torch.testing.assert_close(logits[0], step[place], rtol=0, atol=1e-4)
                token = logits.argmax(-1, keepdim=True)
        assert any(layer.rows[0].kept < layer.rows[0].prompt_length for layer in single.report.prunable)
        for layer, other in zip(cache.report.prunable, single.report.prunable, strict=True):
            assert layer.rows[place].kept == other.rows[0].kept


@pytest.mark.parametrize("form", ["compress", "cache"])
@pytest.mark.parametrize("policy", POLICIES)
def test_beam_search(llama, policy, form):
    """The scores that beam search reports are those of its sequences on a pruned cache."""
    name, parameters = POLICIES[policy]
    ids, mask = prompts(RAGGED, seed=5)
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
        "length_penalty": 0.0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    if form == "compress":
        with refreekv.compress(llama, name, **parameters):
            output = llama.generate(ids, **settings)
    else:
        output = llama.generate(ids, past_key_values=ReFreeKVCache(llama, name, **parameters), **settings)
    full = llama.generate(ids, **settings)
    assert output.sequences.shape == (8, max(RAGGED) + 6)
    assert not torch.allclose(output.sequences_scores, full.sequences_scores, atol=1e-2)  # pruning did something
    for place, sequence in enumerate(output.sequences):
        row = place // 2
        cache = ReFreeKVCache(llama, name, **parameters)
        new = sequence[max(RAGGED) :]
        with torch.no_grad():
            logits = [llama(ids[row : row + 1, -RAGGED[row] :], past_key_values=cache).logits[:, -1]]
            logits += [llama(token.view(1, 1), past_key_values=cache).logits[:, -1] for token in new[:-1]]
        chosen = torch.cat(logits).log_softmax(-1).gather(1, new[:, None]).sum()
        torch.testing.assert_close(chosen, output.sequences_scores[place], rtol=0, atol=1e-3)


def test_beam_search_without_eviction_is_that_of_the_full_cache(llama):
    ids, mask = prompts(RAGGED, seed=5)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3}
    with refreekv.compress(llama, "refreekv", threshold=0.0) as kv:
        pruned = llama.generate(ids, do_sample=False, **settings)
    assert torch.equal(pruned, llama.generate(ids, do_sample=False, **settings))
    assert kv.report.budget == 1.0


def test_num_return_sequences_of_sampling(llama):
    ids, mask = prompts((40, 25), seed=6)
    with refreekv.compress(llama, **PRUNING) as kv:
        torch.manual_seed(0)
        out = llama.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert out.shape == (6, 44)
    kept = [[row.kept for row in layer.rows] for layer in kv.report.prunable]
    assert all(counts[:3] == [counts[0]] * 3 and counts[3:] == [counts[3]] * 3 for counts in kept)
    assert kv.report.budget < 1


# -- one cache, several uses ------------------------------------------------------------------------


def test_reset_and_reuse(llama, new_cache):
    cache = new_cache()
    first, mask = prompts(RAGGED, seed=7)
    other, other_mask = prompts((33, 44), seed=8)
    wanted = greedy(llama, first, mask, cache)
    report = cache.report
    cache.reset()
    assert cache.get_seq_length() == 0
    assert greedy(llama, other, other_mask, cache).shape == (2, 50)
    cache.reset()
    assert torch.equal(greedy(llama, first, mask, cache), wanted)
    assert cache.report == report
    assert report.budget < 1


def test_reset_after_an_interrupted_forward(llama):
    cache = ReFreeKVCache(llama, **PRUNING)
    ids, mask = prompts(RAGGED, seed=7)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = llama.model.layers[2].self_attn.o_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prefill(llama, cache)
    handle.remove()
    cache.reset()
    assert torch.equal(greedy(llama, ids, mask, cache), greedy(llama, ids, mask, ReFreeKVCache(llama, **PRUNING)))


def test_second_turn_with_all_ids_and_with_new_ids(llama, new_cache):
    ids, mask = prompts(RAGGED, seed=9)
    more, _ = prompts((11,) * 4, seed=10)
    results, reports = [], []
    for only_new in (False, True):
        cache = new_cache()
        answer = greedy(llama, ids, mask, cache)
        sequence = torch.cat([answer, more], 1)
        whole = torch.cat([mask, torch.ones(4, 6 + 11, dtype=torch.long)], 1)
        given = sequence[:, cache.get_seq_length() :] if only_new else sequence
        assert given.shape[1] == (12 if only_new else max(RAGGED) + 17)
        results.append(greedy(llama, given, whole, cache)[:, given.shape[1] :])
        reports.append(cache.report)
    assert torch.equal(results[0], results[1])
    assert reports[0] == reports[1]
    for layer in reports[0].prunable:
        for row, length in zip(layer.rows, RAGGED, strict=True):
            assert row.prompt_length == length + 6 + 11
    assert reports[0].budget < 0.95


def test_multi_token_steps_while_decoding(llama, new_cache):
    """Several tokens in one call give what they give one by one, and nothing is pruned."""
    together, single = new_cache(), new_cache()
    _, mask = prefill(llama, together)
    prefill(llama, single)
    kept = together.report
    tokens = torch.randint(2, VOCAB, (4, 5), generator=torch.Generator().manual_seed(1))
    with together.decoding():
        at_once, _ = feed(llama, together, tokens, mask)
    with single.decoding():
        steps = []
        for column in range(5):
            logits, mask = feed(llama, single, tokens[:, column : column + 1], mask)
            steps.append(logits)
    torch.testing.assert_close(at_once, torch.cat(steps, 1), rtol=0, atol=1e-4)
    assert together.get_seq_length() == single.get_seq_length() == max(RAGGED) + 5
    assert together.report == single.report
    for before, after in zip(kept.prunable, together.report.prunable, strict=True):
        assert [row.kept for row in before.rows] == [row.kept for row in after.rows]
    assert kept.budget < 1


def test_multi_token_steps_without_a_mask(llama):
    """Batch 1 and no padding: the causal mask among the new tokens must come from somewhere."""
    together, single = ReFreeKVCache(llama, **PRUNING), ReFreeKVCache(llama, **PRUNING)
    ids, _ = prompts((55,), seed=11)
    tokens = torch.tensor([[9, 8, 7, 6, 5]])
    with torch.no_grad():
        llama(ids, past_key_values=together)
        llama(ids, past_key_values=single)
        with together.decoding():
            at_once = llama(tokens, past_key_values=together).logits
        steps = [llama(token.view(1, 1), past_key_values=single).logits for token in tokens[0]]
    torch.testing.assert_close(at_once, torch.cat(steps, 1), rtol=0, atol=1e-4)
    assert together.report.budget < 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("policy", POLICIES)
def test_prompt_lookup_decoding(policy, attention):
    """Drafted tokens are verified in one call and cropped: what comes out is what comes without drafts.

    None are fed with the prompt, which they would see unpruned.
    """
    model = build("llama", attention=attention)
    name, parameters = POLICIES[policy]
    ids, _ = prompts((20,), seed=12)
    ids = ids.repeat(1, 3)  # so that the prompt has something to look up
    mask = torch.ones_like(ids)
    plain = ReFreeKVCache(model, name, **parameters)
    wanted = greedy(model, ids, mask, plain, steps=30)
    calls = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assisted = ReFreeKVCache(model, name, **parameters)
    drafts = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    got = greedy(model, ids, mask, assisted, steps=30, **drafts)
    handle.remove()
    assert torch.equal(got, wanted)
    assert calls[0] == ids.shape[1]
    assert any(count > 1 for count in calls[1:])  # something was drafted
    for left, right in zip(plain.report.prunable, assisted.report.prunable, strict=True):
        assert [(row.prompt_length, row.kept) for row in left.rows] == [(r.prompt_length, r.kept) for r in right.rows]
    assert assisted.report.budget < 1
    with refreekv.compress(model, name, **parameters):
        inside = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, **drafts)
    assert torch.equal(inside, wanted)


def test_an_assistant_model(llama):
    ids, mask = prompts((50,), seed=13)
    assistant = build("llama", attention="sdpa", num_hidden_layers=2)
    wanted = greedy(llama, ids, mask, ReFreeKVCache(llama, **PRUNING), steps=10)
    cache = ReFreeKVCache(llama, **PRUNING)
    assert torch.equal(greedy(llama, ids, mask, cache, steps=10, assistant_model=assistant), wanted)
    assert cache.report.budget < 1


def test_an_assistant_model_with_windows_that_is_compressed_as_well():
    """Its drafts are taken back out of layers with a window, too, which the 50 tokens overfill."""
    model, assistant = build("gemma3", attention="sdpa"), build("gemma3", attention="sdpa", seed=1)
    ids, _ = prompts((50,), seed=13)
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    try:
        model.generate(ids, assistant_model=assistant, **settings)
    except RuntimeError as reason:
        pytest.skip(f"this transformers does not do it itself: {reason}")
    with refreekv.compress(model, **PRUNING), refreekv.compress(assistant, **PRUNING):
        wanted = model.generate(ids, **settings)
        assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), wanted)


# -- lengths and padding ----------------------------------------------------------------------------


def test_lengths_and_positions_are_logical(llama, new_cache):
    cache = new_cache()
    positions = []
    handle = llama.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append((kwargs.get("position_ids", args[-1])).tolist()), with_kwargs=True
    )
    ids, _ = prompts((50,), seed=14)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        llama(torch.tensor([[9]]), past_key_values=cache)
        llama(torch.tensor([[9, 8]]), past_key_values=cache)
    handle.remove()
    assert positions == [[list(range(50))], [[50]], [[51, 52]]]
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [53] * LAYERS
    assert cache.get_mask_sizes(1, LAYERS - 1) == (54, 0)
    assert max(layer.kept for entry in cache.report.prunable[1:] for layer in entry.rows) < 53


def test_right_padding_is_refused(llama, new_cache):
    ids, mask = prompts((30, 20), seed=15)
    ids, mask = ids.flip(1), mask.flip(1)
    assert ids[1, -1] == PAD
    with pytest.raises(ValueError, match="left-padded"), torch.no_grad():
        llama(ids, attention_mask=mask, past_key_values=new_cache())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_batch_with_a_full_length_row_only(attention):
    """A mask without padding is as no mask."""
    model = build("llama", attention=attention)
    ids, mask = prompts((40, 40), seed=16)
    with refreekv.compress(model, **PRUNING) as kv:
        masked = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        kept = [[row.kept for row in layer.rows] for layer in kv.report.prunable]
        plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(masked, plain)
    assert kept == [[row.kept for row in layer.rows] for layer in kv.report.prunable]
    assert kv.report.budget < 1


def test_inputs_embeds(llama):
    ids, mask = prompts(RAGGED, seed=17)
    with refreekv.compress(llama, **PRUNING) as kv:
        wanted = llama.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, max(RAGGED) :]
        report = kv.report
        embeds = llama.get_input_embeddings()(ids).detach()
        got = llama.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(got[:, -6:], wanted)
    assert kv.report == report
    assert report.budget < 1
