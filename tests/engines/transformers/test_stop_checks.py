"""Stop checks that are read one token late change nothing that anybody sees."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import utils
from transformers.generation.streamers import BaseStreamer

import refreekv
from helpers.driving import RAGGED
from helpers.models import build, prompts
from refreekv.engines.transformers import decoder, graph, stop_checks

pytestmark = pytest.mark.skipif(
    not hasattr(utils, "DeferredStopCheck"), reason="this transformers cannot read stop checks late"
)


class Event:
    """CPUs do all in order: nothing is to be waited for."""

    def __init__(self, device=None, blocking=False):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def deferring(monkeypatch):
    """Defer on the CPU, too; what was asked, and what the answers were."""
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(stop_checks, "DEVICES", {"cpu"})
    answers = []
    asked = decoder.Decoder.may_capture

    def noted(self, cache):
        answers.append(asked(self, cache))
        return answers[-1]

    monkeypatch.setattr(decoder.Decoder, "may_capture", noted)
    return answers


class Streamed(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.ended += 1


def new_cache(model, **settings):
    cache = refreekv.ReFreeKVCache(model, "refreekv", threshold=0.2, frozen_layers=1, **settings)
    cache.state.arena = True
    return cache


def answered(model, ids, mask, **settings):
    cache, streamer = new_cache(model), Streamed() if len(ids) == 1 else None
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, do_sample=False, pad_token_id=0, streamer=streamer,
        output_scores=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    # Another turn reads what is in the cache, and where it believes to be.
    more = torch.cat([out.sequences, prompts((5,) * len(ids), seed=9)[0]], dim=1)
    longer = torch.cat([mask, torch.ones(len(ids), more.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
    length = cache.get_seq_length()
    held = [layer.ragged.lengths for layer in cache.pruned_layers]
    again = model.generate(
        more, attention_mask=longer, past_key_values=cache, do_sample=False, pad_token_id=0, max_new_tokens=6,
        eos_token_id=None,
    )  # fmt: skip
    return out.sequences, torch.stack(out.scores), length, held, streamer, again


@pytest.mark.parametrize("lengths", [(60,), RAGGED], ids=["alone", "batch"])
@pytest.mark.parametrize("end", ["eos", "length"])
def test_answers_caches_scores_and_streams_are_the_same(lengths, end, llama, deferring, monkeypatch):
    ids, mask = prompts(lengths, seed=3)
    probe = answered(llama, ids, mask, max_new_tokens=24, eos_token_id=None)[0]
    deferring.clear()
    settings = {"max_new_tokens": 24, "eos_token_id": None}
    if end == "eos":
        # The last row to finish does so in the middle.
        ends = [int(row[ids.shape[1] + 9]) for row in probe]
        settings["eos_token_id"] = ends
    late = answered(llama, ids, mask, **settings)
    assert deferring == [True, True]
    monkeypatch.setattr(stop_checks, "DEVICES", set())
    plain = answered(llama, ids, mask, **settings)
    assert len(deferring) == 2
    for mine, other in zip((*late[:2], late[5]), (*plain[:2], plain[5]), strict=True):
        assert torch.equal(mine, other)
    assert late[2:4] == plain[2:4]
    if late[4] is not None:
        assert (late[4].tokens, late[4].ended) == (plain[4].tokens, plain[4].ended)
    assert (plain[0].shape[1] < ids.shape[1] + 24) == (end == "eos")


def test_the_stream_comes_while_the_answer_goes_on(llama, deferring):
    """One token late, not all at the end."""
    ids, _ = prompts((40,), seed=1)
    lengths = []

    class Watching(Streamed):
        def put(self, value):
            super().put(value)
            lengths.append(cache.get_seq_length())

    cache = new_cache(llama)
    llama.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, streamer=Watching())
    assert deferring == [True]
    # The prompt comes first; the last token is not fed.
    assert lengths[1:] == [41, 42, 43, 44, 45, 45]


def test_only_for_caches_that_decode_through_captured_steps(llama, deferring):
    ids, mask = prompts((40,), seed=1)

    def run(cache, model=llama):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False)

    for cache in (
        new_cache(llama, decode="eager"),
        new_cache(llama, decode_interval=2),
        refreekv.ReFreeKVCache(llama),
    ):
        run(cache)
    hybrid = build("gemma3", attention="sdpa")
    run(new_cache(hybrid), hybrid)
    assert deferring == [False] * 4
    # Another cache of another model, while ours is in use elsewhere.
    with stop_checks.deferred_stop_checks(lambda cache: True):
        assert not utils.DeferredStopCheck.is_supported(torch.device("cpu"), DynamicCache(), True, is_assistant=False)
        ours = new_cache(llama)
        assert utils.DeferredStopCheck.is_supported(torch.device("cpu"), ours, True, is_assistant=False)
        assert not utils.DeferredStopCheck.is_supported(torch.device("cpu"), ours, True, is_assistant=True)


def test_only_on_the_device_that_events_are_recorded_on(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cache = new_cache(llama)
    with stop_checks.deferred_stop_checks(lambda cache: True):
        for device, expected in (("cuda:0", False), ("cuda:1", True), ("cuda", True)):
            supported = utils.DeferredStopCheck.is_supported(torch.device(device), cache, True, is_assistant=False)
            assert supported == expected, device


def test_a_model_that_refused_its_capture_does_without(deferring, monkeypatch):
    model = build("llama", attention="sdpa")
    ids, mask = prompts((40,), seed=1)

    def broken(*args):
        raise TypeError("no such argument")

    monkeypatch.setattr(graph.Step, "__init__", broken)
    with refreekv.compress(model) as kv:
        for _ in range(2):
            cache = kv.new_cache()
            cache.state.arena = True
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert deferring == [True, False]


def test_transformers_is_left_as_it_was(llama):
    original = utils.DeferredStopCheck.__dict__["is_supported"].__func__
    entered, leave = threading.Barrier(3), threading.Event()

    def hold():
        with stop_checks.deferred_stop_checks(lambda cache: False):
            entered.wait()
            leave.wait()

    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(hold) for _ in range(2)]
        entered.wait()
        assert utils.DeferredStopCheck.is_supported is not original
        leave.set()
        for one in held:
            one.result()
    assert utils.DeferredStopCheck.is_supported is original
    config = GenerationConfig(max_new_tokens=2, do_sample=False)
    with refreekv.compress(llama), pytest.raises(ValueError, match="Greedy methods"):
        llama.generate(prompts((20,), seed=1)[0], generation_config=config, num_return_sequences=2)
    assert utils.DeferredStopCheck.is_supported is original


def test_threads_that_take_turns_leave_each_others_caches_alone(llama, deferring):
    """What is taken back at the end of one answer is taken back while others use the step."""
    texts = [prompts((40 + 7 * n,), seed=n)[0] for n in range(4)]

    def answer(ids, arena):
        cache = new_cache(llama)
        cache.state.arena = arena
        for _ in range(3):
            ends = [int(ids[0, 7]), int(ids[0, 11])]
            # An end is no padding: transformers makes up no mask that would hide it in a later turn.
            ids = llama.generate(
                ids, past_key_values=cache, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=ends[0]
            )
        if arena:
            for layer in cache.pruned_layers:
                assert layer.ragged.table.tolist() == layer.ragged._lines()
        return ids, cache.get_seq_length()

    wanted = [answer(ids, None) for ids in texts]
    deferring.clear()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda ids: answer(ids, True), texts * 3))
    finally:
        sys.setswitchinterval(interval)
    assert deferring == [True] * 36
    for (one, length), (other, other_length) in zip(got, wanted * 3, strict=True):
        assert torch.equal(one, other)
        assert length == other_length
