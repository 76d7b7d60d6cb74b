"""What a layer remembers between calls: queries until its next pruning, and what an earlier prompt left."""

import weakref

import pytest
import torch

from helpers.driving import prefill
from helpers.models import prompts
from refreekv import ReFreeKVCache
from refreekv.policies import ProbePlan, create
from refreekv.pruning.calls import AttentionCall, Entries, Queries
from refreekv.pruning.joint import JointPruning
from refreekv.pruning.queries import HeldQueries


def queries(rows=2, tokens=1):
    return torch.randn(rows, 4, tokens, 8)


def test_of_a_chunk_only_what_the_plan_asks_for_stays_alive():
    held = HeldQueries().with_chunk(AttentionCall(queries(tokens=100), None), 0, 100, ProbePlan(rows=3))
    assert held.prompt.states.shape == (2, 4, 3, 8)
    assert held.prompt.states.untyped_storage().nbytes() == held.prompt.states.nbytes
    assert held.prompt.columns.tolist() == [[97, 98, 99]]
    call = AttentionCall(queries(tokens=2), None)
    both = held.with_chunk(call, 100, 102, ProbePlan(rows=3))
    assert both.prompt.columns.tolist() == [[99, 100, 101]]
    assert torch.equal(both.prompt.states[:, :, 1:], call.query)


def test_of_a_layer_that_waits_for_the_last_one_neither_entries_nor_queries_stay_alive():
    joint, call = JointPruning(), AttentionCall(queries(tokens=100), None)
    keys, values = torch.randn(2, 2, 2, 100, 8)
    part = Entries.of_dense(keys, values, None, None, Queries.of_call(call.query, 0, None), 0)
    alive = [weakref.ref(tensor) for tensor in (call.query, keys, values)]
    joint.add(create("cake", ratio=0.4, window=4), call, [part], 0, 2, lambda decisions: None)
    del call, part, keys, values
    assert [gone() for gone in alive] == [None] * 3


def test_without_a_plan_nothing_is_held():
    assert HeldQueries().with_chunk(AttentionCall(queries(), None), 0, 1, ProbePlan()) == HeldQueries()


def test_the_last_query_of_a_chunk_says_how_many_there_were():
    plan = ProbePlan(spread=4)
    held = HeldQueries().with_chunk(AttentionCall(queries(rows=1, tokens=10), None), 0, 10, plan)
    assert held.prompt.ordinals[0, -1] == 9
    held = held.with_chunk(AttentionCall(queries(rows=1, tokens=5), None), 10, 15, plan)
    assert held.prompt.ordinals[0, -1] == held.prompt.columns[0, -1] == 14
    assert {3, 7, 11} <= set(held.prompt.ordinals[0].tolist())


def test_generated_tokens_come_go_and_change_rows():
    each = [queries(tokens=tokens) for tokens in (1, 3, 1)]
    held = HeldQueries()
    for one in each:
        held = held.with_generated(one)
    assert held.generated_tokens == 5
    everything = torch.cat(each, dim=2)
    assert torch.equal(torch.cat(held.cropped(2).generated, dim=2), everything[:, :, :3])
    assert held.cropped(9).generated_tokens == 0
    assert torch.equal(torch.cat(held.of_rows([1, 1, 0]).generated, dim=2), everything[[1, 1, 0]])


def test_a_crop_ends_a_prompt_that_was_under_way():
    held = HeldQueries().with_chunk(AttentionCall(queries(tokens=9), None), 0, 9, ProbePlan(rows=2))
    assert held.cropped(1).prompt is None


def kept_after(llama, steps):
    """What a cache that prunes every 6 generated tokens keeps, after steps on it: tokens to feed or a change."""
    cache = ReFreeKVCache(llama, "snapkv", size=24, window=4, decode_interval=6)
    prefill(llama, cache, (30, 30))
    tokens = prompts((12, 12), seed=8)[0]
    with torch.no_grad(), cache.decoding():
        for step in steps:
            if callable(step):
                tokens = step(cache, tokens)
            else:
                for token in step:
                    llama(tokens[:, token : token + 1], past_key_values=cache)
    return [cache.kept_ranges(row) for row in range(2)], cache


def crop(cache, tokens):
    cache.crop(-3)
    return tokens


def swap_rows(cache, tokens):
    cache.reorder_cache(torch.tensor([1, 0]))
    return tokens.flip(0)


def test_cropped_tokens_do_not_count_towards_the_next_pruning(llama):
    whole, _ = kept_after(llama, [range(6)])
    again, cache = kept_after(llama, [range(5), crop, range(2, 6)])
    assert again == whole
    assert cache.report.budget < 0.8
    early, _ = kept_after(llama, [range(5)])
    assert early != whole


def test_rows_take_their_queries_along(llama):
    whole, _ = kept_after(llama, [range(6)])
    swapped, _ = kept_after(llama, [range(5), swap_rows, range(5, 6)])
    assert whole[0] != whole[1]
    assert swapped == whole[::-1]


@pytest.mark.parametrize("earlier", [0, 7])
def test_what_an_earlier_prompt_left_is_marked(earlier):
    keys = torch.randn(1, 2, 10, 8)
    asked = Queries.of_call(queries(rows=1), 9, None)
    entries = Entries.of_dense(keys, keys, None, None, asked, earlier)
    marks = None if entries.earlier is None else entries.earlier.flatten().tolist()
    assert marks == (None if earlier == 0 else [True] * 7 + [False] * 3)
    assert entries.columns.tolist() == list(range(10))
