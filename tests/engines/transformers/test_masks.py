"""What a mask hides is not padding: it stays, in exact storage and in CUDA's; transformers' cache is the judge."""

import logging

import pytest
import torch
from transformers import DynamicCache

import refreekv
from helpers.driving import RAGGED, Uneven
from helpers.models import build, prompts

LOW = torch.finfo(torch.float32).min
STORAGES = [None, True]
STORAGE = pytest.mark.parametrize("arena", STORAGES, ids=["exact", "arena"])


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def branches(n=46, start=30, stop=38):
    """Two branches behind one prefix: the second does not see the first. A mask, and positions."""
    mask = causal(n)
    mask[stop:, start:stop] = False
    positions = torch.cat([torch.arange(stop), torch.arange(start, start + n - stop)])
    return mask[None, None], positions[None]


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, LOW)


def cache_of(model, arena, policy="full", **parameters):
    cache = refreekv.ReFreeKVCache(model, policy, **parameters)
    cache.state.arena = arena
    return cache


@torch.no_grad()
def feed(model, cache, ids, mask=None, positions=None):
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def check_as_plain(model, calls, arena, dropped=0):
    """The same calls on both caches, logits compared: nothing but ``dropped`` padding leaves, and nothing is shown."""
    plain, cache = DynamicCache(config=model.config), cache_of(model, arena)
    seen = 0
    for ids, mask, positions in calls:
        want, got = feed(model, plain, ids, mask, positions), feed(model, cache, ids, mask, positions)
        torch.testing.assert_close(got[:, -1], want[:, -1], atol=1e-4, rtol=1e-4)
        seen += ids.shape[1]
    in_arena = arena or (arena is None and model.device.type == "cuda")
    wanted = ((dropped, seen),) if in_arena else ((0, seen),)
    assert all(heads == (wanted,) * len(heads) for heads in cache.kept_ranges())
    return cache


@STORAGE
@pytest.mark.parametrize("form", [lambda mask: mask, additive, lambda mask: mask.expand(-1, 8, -1, -1)])
def test_branches_behind_one_prefix(form, arena, llama, ids):
    mask, positions = branches()
    rest = ids[:, :46]
    # The next token goes on with the first branch, and then one with the second.
    first, second = torch.ones(1, 1, 1, 47, dtype=torch.bool), torch.ones(1, 1, 1, 48, dtype=torch.bool)
    first[..., 38:46] = False
    second[..., 30:38] = second[..., 46] = False
    at = torch.tensor([[38]])
    calls = [(rest, form(mask), positions), (ids[:, 46:47], form(first), at), (ids[:, 47:48], form(second), at)]
    check_as_plain(llama, calls, arena)


@STORAGE
def test_drafts_in_a_tree(arena, llama, ids):
    """Several tokens in one call, none of which the next one need see."""
    mask = torch.ones(1, 1, 4, 34, dtype=torch.bool)
    mask[0, 0] &= torch.ones(4, 34, dtype=torch.bool).tril(30)
    mask[0, 0, 2:, 30:32] = False
    after = torch.ones(1, 1, 1, 35, dtype=torch.bool)
    after[..., 32:34] = False
    calls = [
        (ids[:, :30], None, None),
        (ids[:, 30:34], mask, torch.tensor([[30, 31, 30, 31]])),
        (ids[:, 34:35], after, torch.tensor([[32]])),
        (ids[:, 35:36], None, torch.tensor([[36]])),
    ]
    cache = check_as_plain(llama, calls, arena)
    cache.crop(-4)
    assert cache.kept_ranges()[0][0] == ((0, 32),)


@STORAGE
def test_two_documents_in_one_prompt(arena, llama, ids):
    """The first one is a leading run that the last query does not see, but it was read."""
    mask = causal(40)
    mask[20:, :20] = False
    positions = torch.arange(20).repeat(2)[None]
    more = torch.ones(1, 1, 1, 41, dtype=torch.bool)
    more[..., 20:40] = False
    calls = [(ids[:, :40], mask[None, None], positions), (ids[:, 40:41], more, torch.tensor([[20]]))]
    check_as_plain(llama, calls, arena)


@STORAGE
@pytest.mark.parametrize("chunk", [7, 20, 25])
def test_a_prompt_in_chunks_of_which_only_the_first_sees_the_first_document(chunk, arena, llama, ids):
    mask = causal(40)
    mask[20:, :20] = False
    positions = torch.arange(20).repeat(2)[None]
    plain, cache = DynamicCache(config=llama.config), cache_of(llama, arena)
    with cache.prompt_until(40):
        for start in range(0, 40, chunk):
            part = slice(start, min(start + chunk, 40))
            given = (ids[:, part], mask[None, None, part, : part.stop], positions[:, part])
            feed(llama, plain, *given)
            feed(llama, cache, *given)
    more = torch.ones(1, 1, 1, 41, dtype=torch.bool)
    more[..., 20:40] = False
    given = (ids[:, 40:41], more, torch.tensor([[20]]))
    torch.testing.assert_close(feed(llama, cache, *given), feed(llama, plain, *given), atol=1e-4, rtol=1e-4)
    assert cache.kept_ranges()[0][0] == ((0, 41),)


def hole(n, start, stop, rows=1):
    mask = torch.ones(rows, n, dtype=torch.long)
    mask[:, start:stop] = 0
    return mask


@STORAGE
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_hole_that_a_later_call_fills(attention, arena, ids):
    model = build("llama", attention=attention)
    calls = [
        (ids[:, :40], hole(40, 12, 20), None),
        (ids[:, 40:41], hole(41, 12, 20), None),
        (ids[:, 41:42], hole(42, 12, 15), None),
        (ids[:, 42:43], None, None),
        (ids[:, 43:48], hole(48, 2, 30), None),
        (ids[:, 48:49], None, None),
    ]
    check_as_plain(model, calls, arena)


@STORAGE
def test_leading_padding_goes_and_a_hole_behind_it_stays(arena, llama):
    ids = prompts((50,), seed=1)[0]
    mask = hole(40, 20, 25)
    mask[:, :6] = 0
    longer = torch.ones(1, 41, dtype=torch.long)
    longer[:, :6] = 0
    calls = [(ids[:, :40], mask, None), (ids[:, 40:41], longer, None)]
    check_as_plain(llama, calls, arena, dropped=6)


@STORAGE
@pytest.mark.parametrize("policy", ["full", "window", "uneven"])
def test_rows_that_differ(policy, arena, llama):
    """Padding, a hole, both, none: what goes is padding, and what a policy evicts among what the last token sees."""
    model = llama
    name, parameters = {"window": ("streaming-llm", {"size": 20}), "uneven": (Uneven(), {})}.get(policy, (policy, {}))
    ids, mask = prompts(RAGGED, seed=3)
    mask[0, 10:15] = 0
    mask[2, 30:33] = 0
    mask[2, 40] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, plain = cache_of(model, arena, name, **parameters), DynamicCache(config=model.config)
    feed(model, cache, ids, mask, positions)
    feed(model, plain, ids, mask, positions)
    kept = torch.zeros(len(cache.pruned_layers), 4, 2, 53, dtype=torch.bool)
    for row in range(4):
        for layer, heads in enumerate(cache.kept_ranges(row)):
            for head in range(2):
                for start, stop in heads[head % len(heads)]:
                    kept[layer, row, head, start:stop] = True
    dense = all(layer.ragged is None for layer in cache.pruned_layers)
    padding = mask.cumsum(-1) == 0
    if not dense:
        assert not kept[..., :52][padding[None, :, None].expand(4, 4, 2, -1)].any()
    hidden = (mask == 0) & ~padding
    assert kept[..., :52][hidden[None, :, None].expand(4, 4, 2, -1)].all()
    assert policy == "full" or not kept[..., :52].all()
    token, next_mask = ids[:, :1], torch.ones(4, 53, dtype=torch.long)
    next_mask[:, :52] = mask
    at = positions[:, -1:] + 1
    got = feed(model, cache, token, next_mask, at)
    if policy == "uneven":  # for which no mask of a plain cache stands
        plain = cache_of(model, None, name)
        feed(model, plain, ids, mask, positions)
        want = feed(model, plain, token, next_mask, at)
    else:
        left = torch.cat([kept[0, :, 0, :52], torch.ones(4, 1, dtype=torch.bool)], 1)
        want = feed(model, plain, token, next_mask * left, at)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@STORAGE
def test_a_mask_that_comes_only_with_a_later_call(arena, llama, ids):
    """What was read is no padding, wherever it is: a later mask may hide it, and one after that show it."""
    calls = [
        (ids[:, :30], None, None),
        (ids[:, 30:35], hole(35, 0, 10), None),
        (ids[:, 35:36], hole(36, 0, 10), None),
        (ids[:, 36:37], None, None),
    ]
    check_as_plain(llama, calls, arena)


@STORAGE
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_models_with_sliding_layers(name, arena, ids):
    model = build(name, attention="eager")
    check_as_plain(
        model,
        [(ids[:, :40], hole(40, 12, 20), None), (ids[:, 40:41], torch.ones(1, 41, dtype=torch.long), None)],
        arena,
    )
    mask, positions = branches()
    by_kind = {"full_attention": additive(mask), "sliding_attention": additive(mask & causal(46).triu(-15))}
    cache = cache_of(model, arena)
    feed(model, cache, ids[:, :46], by_kind, positions)
    assert cache.kept_ranges()[0][0] == ((0, 46),)


# -- generate --------------------------------------------------------------------------------------


def answers(model, cache, ids, mask, **settings):
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, min_new_tokens=8, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **settings,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@STORAGE
@pytest.mark.parametrize(
    ("rows", "settings"),
    [(1, {}), (3, {}), (1, {"num_beams": 2}), (3, {"num_beams": 2}), (1, {"prefill_chunk_size": 13})],
    ids=str,
)
def test_generate_with_a_hole(rows, settings, arena, llama, steps):
    ids, mask = prompts((40, 33, 36)[:rows], seed=3)
    mask[0, 10:17] = 0
    got, logits = answers(llama, cache_of(llama, arena), ids, mask, **settings)
    want, others = answers(llama, DynamicCache(config=llama.config), ids, mask, **settings)
    assert torch.equal(got, want)
    torch.testing.assert_close(logits, others, atol=1e-4, rtol=1e-4)
    assert steps["run"] == 0


def test_why_a_hole_is_not_decoded_through_a_captured_step_is_said(model, caplog):
    with caplog.at_level(logging.WARNING, "refreekv"):
        answers(model, cache_of(model, True), prompts((40,), seed=3)[0], hole(40, 10, 17))
    assert "the attention mask hides tokens that are no padding" in caplog.text


@STORAGE
def test_a_later_turn_that_hides_what_was_read(arena, llama, steps):
    ids = prompts((60,), seed=3)[0]
    both = cache_of(llama, arena), DynamicCache(config=llama.config)
    for cache in both:
        answers(llama, cache, ids[:, :40], torch.ones(1, 40, dtype=torch.long))
    run = steps["run"]
    assert run == (7 if arena else 0)
    outcome = [answers(llama, cache, ids, hole(60, 5, 20)) for cache in both]
    assert torch.equal(outcome[0][0], outcome[1][0])
    torch.testing.assert_close(outcome[0][1], outcome[1][1], atol=1e-4, rtol=1e-4)
    assert steps["run"] == run
    # Shown again, all of it is there, and captured steps with it.
    last = prompts((75,), seed=3)[0]
    outcome = [answers(llama, cache, last, torch.ones(1, 75, dtype=torch.long)) for cache in both]
    torch.testing.assert_close(outcome[0][1], outcome[1][1], atol=1e-4, rtol=1e-4)
    assert steps["run"] == (run + 7 if arena else 0)


def test_padding_is_as_before_and_needs_no_mask_while_decoding(llama, steps):
    ids, mask = prompts(RAGGED, seed=3)
    cache = cache_of(llama, True)
    first, _ = answers(llama, cache, ids, mask)
    assert steps["run"] == 7
    for row, length in enumerate(RAGGED):
        assert cache.kept_ranges(row)[0][0] == ((52 - length, 59),)
    # A second turn, padded between: that is padding, too, where another row has none.
    more, second = prompts((9, 3, 1, 5), seed=4)
    longer = torch.cat([mask, torch.ones(4, 8, dtype=torch.long), second], 1)
    answers(llama, cache, torch.cat([first, more], 1), longer)
    assert steps["run"] == 14
    assert cache.kept_ranges(1)[0][0] == ((12, 60), (66, 76))
    assert not any(layer.holds_hidden for layer in cache.pruned_layers)


# -- refused ---------------------------------------------------------------------------------------


@STORAGE
@pytest.mark.parametrize("policy", ["full", "streaming-llm:size=20"])
def test_padding_on_the_right_and_rows_without_tokens_are_refused(policy, arena, llama):
    ids, _ = prompts((40, 40), seed=3)
    right, nothing = torch.ones(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.long)
    right[1, 35:] = 0
    nothing[1] = 0
    with pytest.raises(ValueError, match=r"hides the last column of the prompt in row 1.*left-padded"):
        feed(llama, cache_of(llama, arena, policy), ids, right)
    with pytest.raises(ValueError, match=r"hides every token of row 1"):
        feed(llama, cache_of(llama, arena, policy), ids, nothing)


@STORAGE
def test_masks_over_too_few_tokens_are_refused_and_over_more_are_cut(arena, llama, ids):
    cache = cache_of(llama, arena, "streaming-llm:size=20")
    feed(llama, cache, ids[:, :40])
    want = feed(llama, cache, ids[:, 40:41])
    cache.crop(-1)
    longer = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    torch.testing.assert_close(feed(llama, cache, ids[:, 40:41], longer), want)
    cache.crop(-1)
    # As long as what is held, which masks do not count by.
    with pytest.raises(ValueError, match=r"covers 21 tokens and the cache has seen 41"):
        feed(llama, cache, ids[:, 40:41], torch.ones(1, 1, 1, 21, dtype=torch.bool))


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arena", [None, False], ids=["arena", "exact"])
def test_on_a_gpu(arena, ids, steps):
    model = build("llama", attention="sdpa").cuda()
    mask, positions = branches()
    first = torch.ones(1, 1, 1, 47, dtype=torch.bool)
    first[..., 38:46] = False
    calls = [(ids[:, :46], mask, positions), (ids[:, 46:47], first, torch.tensor([[38]]))]
    on_gpu = [tuple(None if part is None else part.cuda() for part in call) for call in calls]
    check_as_plain(model, on_gpu, arena)
    holed = [(ids[:, :40].cuda(), hole(40, 12, 20).cuda(), None), (ids[:, 40:41].cuda(), None, None)]
    check_as_plain(model, holed, arena)
    rows, padded = (part.cuda() for part in prompts((40, 33, 36), seed=3))
    plain = [answers(model, DynamicCache(config=model.config), rows, padded)]
    got = [answers(model, cache_of(model, arena), rows, padded)]
    assert steps["run"] == (7 if arena is None else 0)
    padded[0, 10:17] = 0
    plain.append(answers(model, DynamicCache(config=model.config), rows, padded))
    got.append(answers(model, cache_of(model, arena), rows, padded))
    assert steps["run"] == (7 if arena is None else 0)
    for (tokens, logits), (others, wanted) in zip(got, plain, strict=True):
        assert torch.equal(tokens, others)
        torch.testing.assert_close(logits, wanted, atol=2e-3, rtol=2e-3)
