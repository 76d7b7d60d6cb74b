"""Codes in host memory: what comes out is what comes out without, whenever copies run; and what does not fit goes."""

import copy

import pytest
import torch

import refreekv
from helpers.copies import COPIES
from helpers.driving import POLICIES, Uneven, feed, prefill
from helpers.models import build, prompts
from refreekv import ReFreeKVCache
from refreekv.cli.running import store_of
from refreekv.core.footprint import LayerKV, Reader, chunked_bytes
from refreekv.core.quantisation import FLUSH, KVDtype
from refreekv.engines.transformers import ragged_attention
from refreekv.engines.transformers.host_tier import MARGIN, HostTier, parse_host_memory, spread
from refreekv.storage.hosted import HostArena
from refreekv.storage.leveled import LeveledKV

LADDER = "k4v2+k6v4+int8:recent=4"
READER = Reader(activation=64)
LAYERS = 5
CASES = {name: POLICIES[name] for name in ("heavy-hitter", "joint")} | {"uneven": (Uneven(), {})}


@pytest.fixture(scope="module")
def llama():
    return build("llama", attention="sdpa", head_dim=16, num_hidden_layers=LAYERS)


def pair(model, policy="full", limit=None, copies="late", free=lambda device: 0, **settings):
    """A cache as it is on a device, and one whose codes go to host memory."""
    both = [ReFreeKVCache(model, policy, prompt_dtype="int8:recent=4", **settings) for _ in range(2)]
    for cache in both:
        cache.state.arena = True
    both[1].state.host = HostTier(limit, READER, free=free, copies=COPIES[copies]())
    return both


def hosted(cache):
    return [layer.ordinal for layer in cache.pruned_layers if layer.ragged.in_host_memory]


def generated(model, cache, ids, mask, steps=FLUSH + 4, **more):
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=steps, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, **more,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("case", CASES)
def test_captured_steps_give_what_they_give_without(llama, case, copies, steps):
    (policy, parameters), lengths = CASES[case], (150, 60, 121) if case == "uneven" else (150,)
    ids, mask = prompts(lengths, seed=3)
    plain, cache = pair(llama, policy, copies=copies, kv_dtype=LADDER, **parameters)
    wanted, found = (generated(llama, one, ids, mask) for one in (plain, cache))
    assert torch.equal(wanted, found)
    assert hosted(cache) == list(range(LAYERS))
    assert not hosted(plain)
    assert steps["made"] == 2  # one reads what is on the device, the other what is brought there
    assert steps["run"] == 2 * (FLUSH + 3)
    assert cache.report.bytes_after == pytest.approx(plain.report.bytes_after, rel=0.5)
    coded = sum(arena.nbytes for layer in cache.pruned_layers for arena in layer.ragged.lines.rungs)
    assert cache.report.host_bytes == coded > 0
    assert plain.report.host_bytes == 0


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("case", CASES)
def test_chunks_give_what_they_give_without(llama, case, copies):
    (policy, parameters), lengths = CASES[case], (150, 60, 121) if case == "uneven" else (150,)
    ids, mask = prompts(lengths, seed=3)
    plain, cache = pair(llama, policy, copies=copies, kv_dtype=LADDER, **parameters)
    outcome = [generated(llama, one, ids, mask, prefill_chunk_size=40) for one in (plain, cache)]
    assert torch.equal(*outcome)
    assert hosted(cache) == list(range(LAYERS))
    again, longer = prompts((90,) * len(lengths), seed=8)[0], torch.ones(len(lengths), FLUSH + 4, dtype=torch.long)
    more = []
    for one in (plain, cache):  # a second turn, in chunks over what is in host memory
        kept = torch.cat([mask, longer[:, :-1]], 1)
        with one.prompt_until(one.get_seq_length() + 90):
            for piece in again.split(40, 1):
                logits, kept = feed(llama, one, piece, kept)
        more.append(logits)
    assert torch.equal(*more)


def test_a_short_turn_reads_what_is_in_host_memory_once(llama, monkeypatch):
    """Each of its tokens would have all of that come over the bus."""
    monkeypatch.setattr(ragged_attention, "reads_many", lambda device: True)
    rows = []
    attend_each = LeveledKV.attend_each
    monkeypatch.setattr(LeveledKV, "attend_each", lambda own, *given: rows.append(own) or attend_each(own, *given))
    found = []
    for cache in pair(llama, kv_dtype=LADDER):
        ids, mask = prompts((150,), seed=3)
        feed(llama, cache, ids, mask)
        cache.state.finish()
        if cache.state.host is not None:
            for layer in cache.pruned_layers:
                layer.ragged.move_to_host()
        rows.clear()
        turn = prompts((7,), seed=8)[0]
        found.append(feed(llama, cache, turn, torch.ones_like(mask))[0])
        assert len(rows) == (0 if cache.state.host is not None else LAYERS)
    torch.testing.assert_close(*found, rtol=0, atol=2e-4)


@torch.no_grad()
def test_nothing_is_left_of_a_turn_that_nobody_looked_at(llama):
    """Its chunks lay in host memory, and stayed there until the next turn."""
    cache = pair(llama, "adaptive", kv_dtype="k4v2+k4v4", min_length=16)[1]
    ids, turn = prompts((1700,), seed=1)[0], prompts((100,), seed=2)[0]
    with cache.prompt_until(1700):
        llama(ids, past_key_values=cache)
    hosts = []
    with cache.prompt_until(1800):
        for piece in turn.split(50, 1):
            llama(piece, past_key_values=cache)
            hosts.append(cache.state.host._prompts)
    assert all(layer._earlier_length == 1700 for layer in cache.pruned_layers)
    assert hosts[0] is not None
    assert hosts[1] is None


@torch.no_grad()
def test_a_prompt_lies_in_host_memory_while_it_is_read(llama):
    ids = prompts((200,), seed=1)[0]
    sizes = []
    for cache in pair(llama, "streaming-llm", ratio=0.3, kv_dtype="int4:recent=4"):
        with cache.prompt_until(200):
            for piece in ids.split(50, 1)[:-1]:
                llama(piece, past_key_values=cache)
            sizes.append([layer.reading.prompt.host_nbytes for layer in cache.pruned_layers])
            assert cache.report.host_bytes == sum(sizes[-1])
    assert sizes[0] == [0] * LAYERS
    # 196 columns of 4 heads: 16 elements of 8 bits a side and two scales.
    assert sizes[1] == [196 * cache.first.kv_heads * 36] * LAYERS


@pytest.mark.parametrize("which", ["half", "one", "none"])
def test_a_limit_says_how_many_layers_go(llama, which):
    ids, mask = prompts((150,), seed=3)
    plain, cache = pair(llama, "full", limit=1, kv_dtype="int4:recent=4")
    prefill(llama, plain, (150,))
    each = sum(arena.nbytes for arena in plain.first.ragged.lines.rungs)
    wanted = {"half": [1, 3], "one": [2], "none": []}[which]
    cache.state.host.limit = {"half": 2 * each + each // 2, "one": each, "none": each - 1}[which]
    generated(llama, cache, ids, mask, 2)
    assert hosted(cache) == wanted
    assert cache.report.host_bytes <= cache.state.host.limit * 1.2  # and room to grow


def test_what_fits_stays_on_the_device(llama):
    ids, mask = prompts((150,), seed=3)
    _, cache = pair(llama, "full", kv_dtype="int4:recent=4", free=lambda device: 2**40)
    generated(llama, cache, ids, mask, 2, prefill_chunk_size=40)
    assert hosted(cache) == []
    # Of five layers two fit, and two more would fill what copies pass through.
    each = sum(arena.nbytes for arena in cache.first.ragged.lines.rungs)
    room = {"bytes": 2**40}
    cache.state.host._free = lambda device: room["bytes"]
    fitting = {MARGIN: [], MARGIN - each: [0, 2, 4], MARGIN - 2 * each: [0, 1, 3, 4], 0: [0, 1, 2, 3, 4]}
    for bytes_left, wanted in fitting.items():
        room["bytes"] = bytes_left
        cache.state.host.distribute(cache.pruned_layers)
        assert hosted(cache) == wanted
        room["bytes"] = 2**40  # and back
        cache.state.host.distribute(cache.pruned_layers)
        assert hosted(cache) == []


def test_a_forecast_says_how_many_layers_of_a_prompt_go(llama):
    keys = torch.zeros(1, 4, 50, 16)
    number, layer = KVDtype("int8"), LayerKV("full", 4, 16, 16, itemsize=4)
    left = {}
    tier = HostTier(None, READER, free=lambda device: MARGIN + left["bytes"])
    taken = [chunked_bytes([layer] * 20, 4000, 50, number, 0, READER, hosted=count) for count in range(21)]
    assert taken[1] > taken[0]  # what passes through takes more than one layer
    assert taken[3:] == sorted(taken[3:], reverse=True)
    lines = int(layer.unfinished_lines(4000, number))
    assert taken[7] - taken[8] == lines == (4000 - 64) * 4 * 36
    for room, count in ((taken[0], 0), (taken[0] - 1, 4), (taken[7], 7), (taken[7] - 1, 8), (0, 20)):
        left["bytes"] = room
        tier.begin((keys, keys), 20, 4000, number)
        assert sum(tier.place(ordinal) is not None for ordinal in range(20)) == count
    left["bytes"] = taken[7]
    tier.begin((keys, keys), 20, 4000, number, earlier=1000)
    # A copy of earlier tokens in full takes as much as so many layers' codes.
    more = -(-layer.bytes(1000) // lines)
    assert sum(tier.place(ordinal) is not None for ordinal in range(20)) == 7 + more > 7


def test_spread():
    found = [sorted(spread(count, 5)) for count in range(6)]
    assert found == [[], [2], [1, 3], [0, 2, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]
    for layers in range(1, 90, 7):
        assert all(len(spread(count, layers)) == count for count in range(layers + 1))


@torch.no_grad()
def test_rows_crops_and_copies(llama):
    outcome = []
    for cache in pair(llama, Uneven(), kv_dtype=LADDER):
        logits, mask = prefill(llama, cache, (150, 60, 121))
        more = prompts((50,) * 3, seed=8)[0]
        with cache.decoding():
            first, longer = feed(llama, cache, more, mask)
            cache.crop(-20)
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            twin = copy.deepcopy(cache)
            longer = longer[[2, 0, 0], :-20]
            for layer in cache.pruned_layers:
                for arena in layer.ragged.lines.rungs:
                    arena.keys.fill_(0x55)  # the copy has its own
            second, _ = feed(llama, twin, more[:, :3], longer)
        outcome.append((logits, first, second))
        assert hosted(twin) == hosted(cache)
    for one, other in zip(*outcome, strict=True):
        assert torch.equal(one, other)
    assert hosted(cache) == list(range(LAYERS))
    assert all(type(arena) is HostArena for layer in twin.pruned_layers for arena in layer.ragged.lines.rungs)


@torch.no_grad()
def test_a_copy_in_the_middle_of_a_prompt(llama):
    ids, outcome = prompts((160,), seed=4)[0], []
    for cache in pair(llama, "full", kv_dtype=LADDER):
        with cache.prompt_until(160):
            for piece in ids.split(40, 1)[:2]:
                llama(piece, past_key_values=cache)
            twin = copy.deepcopy(cache)
            for layer in cache.pruned_layers:
                layer.reading.prompt._lines[0].fill_(0x55)
        with twin.prompt_until(160):
            for piece in ids.split(40, 1)[2:]:
                logits = llama(piece, past_key_values=twin).logits
        outcome.append(logits)
    assert torch.equal(*outcome)


@torch.no_grad()
def test_caches_take_turns_and_prompts_end_early(llama):
    """One step serves caches of other lengths; a prompt that is given up leaves nothing behind."""
    ids = [prompts((length,), seed=length) for length in (150, 90, 230)]
    outcome = []
    for place in range(2):
        caches = [pair(llama, "full", kv_dtype="int4:recent=4")[place] for _ in ids]
        with caches[0].prompt_until(500):
            llama(ids[0][0], past_key_values=caches[0])
        caches[0].reset()
        found = []
        with refreekv.compress(llama, kv_dtype="int4:recent=4"):
            for cache, (some, mask) in zip(caches, ids, strict=True):
                found.append(generated(llama, cache, some, mask, 6))
            for cache in caches:
                more = torch.tensor([[5, 6, 7]])
                longer = torch.cat([torch.ones(1, cache.get_seq_length(), dtype=torch.long), torch.ones_like(more)], 1)
                whole = torch.cat([torch.zeros(1, cache.get_seq_length(), dtype=torch.long), more], 1)
                found.append(generated(llama, cache, whole, longer, 40))
        outcome.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*outcome, strict=True))


def test_what_cannot_be_is_refused(llama):
    with pytest.raises(ValueError, match="this model is on cpu: put it on one CUDA device"):
        ReFreeKVCache(llama, "full", kv_dtype="int4", host_memory="auto")
    with (
        pytest.raises(ValueError, match="'full' stores what it keeps as the model computes it: pass kv_dtype"),
        refreekv.compress(llama, "full", host_memory="8GiB"),
    ):
        pass
    with pytest.raises(ValueError, match="keep_evicted brings all of a conversation back to the GPU"):
        ReFreeKVCache(llama, "full", kv_dtype="int4", host_memory="auto", keep_evicted="host")
    assert store_of("auto", torch.device("cuda")) is not None
    assert store_of("auto", torch.device("cuda"), "8GiB") is None
    assert store_of("host", torch.device("cuda"), "8GiB") is not None
    with pytest.raises(ValueError, match="host_memory '8' has no unit"):
        ReFreeKVCache(llama, "full", kv_dtype="int4", host_memory="8")
    odd = build("llama", attention="sdpa", head_dim=8)
    cache = ReFreeKVCache(odd, "adaptive")
    cache.state.host = HostTier(None, READER)
    with pytest.raises(ValueError, match="packs heads of a multiple of 16 elements"), torch.no_grad():
        odd(prompts((20,), seed=1)[0], past_key_values=cache)
    assert parse_host_memory("8GiB") == 2**33
    assert parse_host_memory(5) == 5
    for wrong in (0, -3):
        with pytest.raises(ValueError, match="more than 0 bytes"):
            parse_host_memory(wrong)
    with pytest.raises(TypeError, match="host_memory is a size"):
        parse_host_memory(1.5)
