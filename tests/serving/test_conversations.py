"""Caches between requests: found by their tokens, cropped where nothing is lost by it, in files past a limit."""

import gc
import weakref

import pytest
import torch

import refreekv
from helpers.models import build, prompts
from refreekv.engines.transformers.naming import NAME
from refreekv.serving.answering import length_of
from refreekv.serving.conversations import Conversations, common_prefix

FULL = refreekv.policies.create("full")
PRUNING = refreekv.policies.create("snapkv", ratio=0.5, window=4)
MANY = 2**30


def put(held, cache, tokens, prompt=50, **options):
    held.put(cache, tokens, prompt, **options)


def answered(model, cache, tokens, count=5):
    """Tokens of prompt and answer; the cache has read all but the last."""
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **{NAME: cache}
        )
    return out[0].tolist()


def kept(model, policy=FULL, **limits):
    return Conversations(model, policy, **{"memory_limit": MANY, "disk_limit": MANY, **limits})


def prompt(length=50, seed=1):
    return prompts((length,), seed=seed)[0][0].tolist()


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize(("one", "other", "length"), [([], [1], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2)])
def test_common_prefix(one, other, length):
    assert common_prefix(one, other) == common_prefix(other, one) == length


def test_common_prefix_of_long_lists():
    one = list(range(5000))
    for place in (0, 1, 2499, 2500, 4999):
        other = one.copy()
        other[place] = -1
        assert common_prefix(one, other) == place


def test_a_conversation_goes_on_where_it_was(llama):
    held = kept(llama)
    cache = held.take(prompt())
    tokens = answered(llama, cache, prompt())
    put(held, cache, tokens)
    again = held.take([*tokens, 7, 8])
    assert again is cache
    assert length_of(again) == len(tokens) - 1
    assert held.count(in_memory=True) == 0
    assert answered(llama, again, [*tokens, 7, 8]) == answered(llama, held.new_cache(), [*tokens, 7, 8])


def test_the_longest_common_beginning_is_taken(llama):
    held = kept(llama)
    for end in ([5], [6, 7]):
        cache = held.new_cache()
        put(held, cache, answered(llama, cache, [*prompt(), *end]))
    taken = held.take([*prompt(), 6, 7, 8])
    assert length_of(taken) == 52
    assert held.count(in_memory=True) == 1


def test_another_answer_to_the_same_prompt_reads_one_token_again_where_nothing_was_evicted(llama):
    held = kept(llama)
    cache = held.new_cache()
    tokens = answered(llama, cache, prompt())
    put(held, cache, tokens)
    again = held.take(prompt())
    assert length_of(again) == 49
    assert answered(llama, again, prompt()) == tokens


def test_a_pruned_prompt_is_not_cropped_into(llama):
    held = kept(llama, PRUNING)
    cache = held.new_cache()
    tokens = answered(llama, cache, prompt())
    assert cache.report.budget < 1
    put(held, cache, tokens)
    assert length_of(held.take(prompt())) == 0  # what was evicted would be missed
    assert length_of(held.take([*prompt()[:30], 3, 3])) == 0
    # But answers may be taken back, as a chat template does that drops some of them.
    assert tokens[51] != 3
    changed = held.take([*tokens[:51], 3, 3])
    assert changed is cache
    assert length_of(changed) == 51


def test_a_pruned_prompt_is_cropped_into_where_what_was_evicted_is_kept(llama, tmp_path):
    """An earlier message that was changed, and a branch: all that is shared is read once, and is all there."""
    held = kept(llama, PRUNING, keep_evicted=refreekv.HostStore())
    cache = held.new_cache()
    tokens = answered(llama, cache, prompt())
    assert cache.report.budget < 1
    put(held, cache, tokens)
    changed = [*prompt()[:40], 3, 3, 5]
    branch = held.take(changed)
    assert branch is not cache
    assert length_of(branch) == 40
    # The first token is read over everything; the others over what is kept then.
    full = kept(llama, FULL).new_cache()
    assert answered(llama, branch, changed, 1) == answered(llama, full, changed, 1)
    assert branch.report.remembered.restored
    assert length_of(held.take([*tokens, 7])) == len(tokens) - 1


def test_what_was_evicted_goes_to_files_and_comes_back_with_its_conversation(llama, tmp_path):
    held = kept(llama, PRUNING, memory_limit=0, folder=tmp_path, keep_evicted=refreekv.HostStore())
    cache = held.new_cache()
    tokens = answered(llama, cache, prompt())
    put(held, cache, tokens)
    del cache
    gc.collect()
    assert held.keep_evicted.nbytes == (0, 0)
    again = held.take([*tokens, 7, 8])
    assert held.keep_evicted.nbytes[0] > 0
    assert answered(llama, again, [*tokens, 7, 8], 1)
    assert again.report.remembered.restored


def test_another_conversation_that_begins_alike_leaves_the_first_one_as_it_is(llama, tmp_path):
    """Such as one with the same system prompt; a few tokens are read again instead."""
    held = kept(llama, folder=tmp_path)
    cache = held.new_cache()
    tokens = answered(llama, cache, prompt())
    put(held, cache, tokens)
    assert length_of(held.take([*prompt()[:31], 3, 3])) == 0
    for memory_limit in (MANY, 0):  # from memory, and from its file
        if memory_limit == 0:
            held.free_memory()
        other = held.take([*prompt()[:40], 3, 3])
        assert other is not cache
        assert length_of(other) == 40
        assert answered(llama, other, [*prompt()[:40], 3, 3]) == answered(
            llama, held.new_cache(), [*prompt()[:40], 3, 3]
        )
        assert held.count(in_memory=True) + held.count(in_memory=False) == 1
    assert answered(llama, held.take([*tokens, 9]), [*tokens, 9]) == answered(llama, held.new_cache(), [*tokens, 9])


def test_windows_are_not_cropped():
    model = build("gemma3")
    held = kept(model)
    for end, length in (([], 0), ([9], 54)):
        cache = held.new_cache()
        tokens = answered(model, cache, prompt())
        put(held, cache, tokens)
        asked = [*tokens, 4] if end else prompt()
        assert length_of(held.take(asked)) == length
        held.clear()


@pytest.mark.parametrize("policy", [FULL, PRUNING], ids=str)
@pytest.mark.parametrize("kv_dtype", [None, "int8:recent=8"])
def test_past_the_limit_the_least_recently_used_is_in_a_file_and_comes_back(tmp_path, policy, kv_dtype):
    llama = build("llama", attention="sdpa", head_dim=16)
    held = kept(llama, policy, kv_dtype=kv_dtype, folder=tmp_path)
    talks, wanted = [], []
    for seed in range(3):
        cache = held.new_cache()
        tokens = answered(llama, cache, prompt(seed=seed))
        talks.append(tokens)
        put(held, cache, tokens)
        del cache
    whole = held.memory_bytes
    for tokens in talks:  # what each goes on with from memory
        cache = held.take([*tokens, 9])
        wanted.append(answered(llama, cache, [*tokens, 9]))
        del cache
        cache = held.new_cache()
        put(held, cache, answered(llama, cache, tokens[:50]))
        del cache
    held.memory_limit = whole // 2
    cache = held.take([*talks[0], 9])
    put(held, cache, talks[0])
    del cache
    assert held.memory_bytes <= held.memory_limit
    assert held.count(in_memory=False) == len(files(tmp_path)) == 2
    assert held.disk_bytes == sum(file.stat().st_size for file in files(tmp_path))
    for tokens, expected in zip(talks, wanted, strict=True):
        cache = held.take([*tokens, 9])
        assert length_of(cache) == len(tokens) - 1
        assert answered(llama, cache, [*tokens, 9]) == expected
        del cache
    assert files(tmp_path) == []
    held.clear()
    assert list(tmp_path.iterdir()) == []


def test_past_the_files_limit_the_oldest_is_forgotten(llama, tmp_path):
    held = kept(llama, folder=tmp_path, memory_limit=0)
    sizes = []
    for seed in range(3):
        cache = held.new_cache()
        put(held, cache, answered(llama, cache, prompt(seed=seed)))
        sizes.append(held.disk_bytes)
    held.disk_limit = sizes[0] * 2
    cache = held.new_cache()
    put(held, cache, answered(llama, cache, prompt(seed=3)))
    assert len(files(tmp_path)) == held.count(in_memory=False) == 2
    assert length_of(held.take([*prompt(seed=0), 1])) == 0
    assert length_of(held.take([*prompt(seed=3), 1])) == 50


def test_without_files_what_does_not_fit_is_forgotten_and_its_memory_is_free(llama, tmp_path):
    held = kept(llama, folder=tmp_path, memory_limit=0, disk_limit=0)
    cache = held.new_cache()
    put(held, cache, answered(llama, cache, prompt()))
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert held.count(in_memory=True) == held.count(in_memory=False) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_read_again(llama, tmp_path):
    held = kept(llama, folder=tmp_path, memory_limit=0)
    cache = held.new_cache()
    put(held, cache, answered(llama, cache, prompt()))
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    assert length_of(held.take([*prompt(), 1])) == 0
    assert files(tmp_path) == []


def test_files_are_for_their_owner_alone(llama, tmp_path):
    held = kept(llama, folder=tmp_path)
    cache = held.new_cache()
    put(held, cache, answered(llama, cache, prompt()), to_disk=True)
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert held.free_memory() == 0
    assert held.count(in_memory=False) == 1
