"""``keep_evicted`` on CUDA: pinned memory and a copy stream give what the CPU gives, beside captured steps."""

import copy
import gc

import pytest
import torch

from helpers.conversations import Talk, full, turns_of
from helpers.models import build
from refreekv import HostStore, ReFreeKVCache
from refreekv.storage.host import SLAB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = {
    "heavy-hitter": ("refreekv-heavy-hitter", {"threshold": 0.1, "frozen_layers": 0}),
    "joint": ("cake", {"ratio": 0.4, "window": 4}),
    "adaptive": ("adaptive", {"min_length": 16, "constant": 0.03, "copying": 2.0, "window": 8, "lost_mass": 0.5}),
    "surrogates": ("adaptive", {"min_length": 16, "bits": 16, "constant": 0.03, "copying": 2.0, "window": 8}),
}
ALONE, BATCH = (150,), (150, 40, 121, 99)


class OnGPU(Talk):
    """The same turns, fed on the device."""

    def ask(self, ids, mask, said):
        if self.total is not None:
            self.total = self.total.cuda()
        return super().ask(ids.cuda(), mask.cuda(), said.cuda()).cpu()


def talk_of(model, case, store, padded, chunk=None, **settings):
    name, parameters = CASES[case]
    cache = ReFreeKVCache(model, name, **parameters, keep_evicted=store, **settings)
    return OnGPU(model, cache, padded=padded, chunk=chunk)


@pytest.fixture(scope="module")
def models():
    plain = build("llama", attention="sdpa", head_dim=64)
    return plain, copy.deepcopy(plain).cuda()


@pytest.mark.parametrize("chunk", [None, 37])
@pytest.mark.parametrize("lengths", [ALONE, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("case", CASES)
def test_each_question_is_read_over_everything(case, lengths, chunk, models):
    plain, model = models
    turns = turns_of(lengths, count=4, question=30)
    wanted = full(copy.deepcopy(plain), turns, padded=len(lengths) > 1)
    talk = talk_of(model, case, "host", len(lengths) > 1, chunk, prompt_dtype=None)
    for number, (turn, logits) in enumerate(zip(turns, wanted, strict=True)):
        torch.testing.assert_close(talk.ask(*turn), logits, rtol=0, atol=5e-3)
        assert talk.cache.report.remembered.restored is (True if number else None)


@pytest.mark.parametrize("lengths", [ALONE, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("case", ["heavy-hitter", "joint", "adaptive"])
def test_in_eight_bits_it_is_what_the_cpu_gives(case, lengths, models):
    plain, model = models
    turns = turns_of(lengths, count=4, question=70, answer=3)
    name, parameters = CASES[case]
    padded, settings = len(lengths) > 1, {"prompt_dtype": "int8:recent=4", "keep_evicted": "host"}
    here = Talk(copy.deepcopy(plain), None, padded=padded)
    here.cache = ReFreeKVCache(here.model, name, **parameters, **settings)
    there = talk_of(model, case, "host", padded, prompt_dtype="int8:recent=4")
    for turn in turns:
        one, other = here.ask(*turn), there.ask(*turn)
        # An element half-way between two codes may be rounded to the other side.
        assert (one[:, 0] - other[:, 0]).norm() < 0.1 * one[:, 0].norm()
    assert here.cache.report.remembered.tokens == there.cache.report.remembered.tokens


@pytest.mark.parametrize("decode", ["graph", "eager"])
def test_captured_steps_over_several_turns(decode):
    """`generate` through three turns: what is restored has the answers' entries, which captured steps wrote."""
    model = build("llama", attention="sdpa", head_dim=64).cuda()
    tokens = []
    for own in (decode, "eager"):
        cache = ReFreeKVCache(model, "snapkv", ratio=0.5, kv_dtype=None, keep_evicted="host", decode=own)
        sequence = turns_of(ALONE)[0][0].cuda()
        for turn in range(3):
            sequence = torch.cat([sequence, turns_of(ALONE, seed=turn + 5)[1][0].cuda()], 1)
            sequence = model.generate(sequence, past_key_values=cache, max_new_tokens=40, do_sample=False)
            assert cache.report.remembered.restored is (True if turn else None)
        tokens.append(sequence)
    assert torch.equal(*tokens)


def test_host_memory_is_pinned_used_again_and_given_back():
    model = build("llama", attention="sdpa", head_dim=64).cuda()
    store = HostStore(64 * SLAB)
    for _ in range(3):
        talk = talk_of(model, "heavy-hitter", store, False)
        for turn in turns_of((600,)):
            talk.ask(*turn)
        memory = store.memory(torch.device("cuda"))
        assert memory.pinned
        owned = memory.held
        del talk
        gc.collect()
        assert memory.used == 0
    assert memory.held == owned


def test_the_way_back_waits_for_nothing(models):
    """All layers' entries come back without a call that makes the host wait for the device."""
    _, model = models
    talk = talk_of(model, "adaptive", "host", False)
    first, second, third = turns_of((600,), question=40)
    talk.ask(*first)
    talk.ask(*second)
    past, device = talk.cache.state.past, torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()
    length = past.length
    assert past.begins(length)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for ordinal in range(len(talk.cache.pruned_layers)):
            past.take(ordinal, device, length + 40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    past.crop(length)
    talk.ask(*third)
    assert talk.cache.report.remembered.restored


def test_what_is_on_the_device_while_decoding_does_not_grow():
    """Of Llama's proportions: the memory after a turn is that of a cache that keeps nothing beside."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = build("llama", attention="sdpa", num_hidden_layers=8, head_dim=128, **shape, initializer_range=0.02)
    model = model.to("cuda", torch.bfloat16)
    ids = torch.randint(2, 90, (1, 8192), device="cuda")
    question = torch.randint(2, 90, (1, 32), device="cuda")
    held = []
    for store in (None, "host"):
        gc.collect()
        torch.cuda.empty_cache()
        with torch.no_grad():
            cache = ReFreeKVCache(model, "streaming-llm", size=1024, kv_dtype=None, keep_evicted=store)
            before = torch.cuda.memory_allocated()
            for part in (ids, question):
                with cache.prompt_until(cache.get_seq_length() + part.shape[1]):
                    model(part, past_key_values=cache, logits_to_keep=1)
                cache.state.finish()
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated() - before)
        del cache
    assert held[1] < 1.05 * held[0] + 2**20


def test_a_conversation_saved_on_a_gpu_goes_on_on_both_kinds_of_device(tmp_path, models):
    plain, model = models
    turns = turns_of(ALONE, count=3)
    wanted = full(copy.deepcopy(plain), turns, padded=False)
    talk = talk_of(model, "heavy-hitter", "host", False, prompt_dtype=None)
    talk.ask(*turns[0])
    talk.cache.save(tmp_path / "cache")
    for device, kind in (("cuda", OnGPU), ("cpu", Talk)):
        own = copy.deepcopy(plain).to(device)
        later = kind(own, ReFreeKVCache.load(tmp_path / "cache", own), padded=False)
        later.total = talk.total.to(device)
        for number in (1, 2):
            torch.testing.assert_close(later.ask(*turns[number]), wanted[number], rtol=0, atol=5e-3)


def test_the_oldest_goes_to_files(tmp_path, models):
    _, model = models
    turns, alone = turns_of(ALONE), HostStore()
    first = talk_of(model, "heavy-hitter", alone, False)
    first.ask(*turns[0])
    store = HostStore(int(1.5 * alone.memory(torch.device("cuda")).used), tmp_path)
    one, other = (talk_of(model, "heavy-hitter", store, False) for _ in range(2))
    one.ask(*turns[0])
    other.ask(*turns[0])
    assert one.cache.report.remembered.disk_bytes > 0 == one.cache.report.remembered.host_bytes
    one.ask(*turns[1])
    assert one.cache.report.remembered.restored
