"""Whose session it is: blocks belong to the thread or context that opened them, on one model, too."""

import asyncio
import contextlib
import contextvars
import gc
import itertools
import logging
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import refreekv
from helpers.driving import PRUNING, generate, state_of
from helpers.models import build, prompts
from refreekv import ReFreeKVCache
from refreekv.engines.transformers.api import CompressionSession

SPECS = [
    PRUNING,
    {"policy": "streaming-llm", "size": 20},
    {"policy": "snapkv", "size": 16, "window": 4},
    {"policy": "full"},
    {"policy": "adaptive", "min_length": 16},
]
WINDOW = SPECS[1]


@pytest.fixture
def busy():
    """Threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def arena(monkeypatch):
    """Storage and captured steps as on CUDA, for the caches that blocks make."""
    made = CompressionSession.new_cache

    def new_cache(self, **settings):
        cache = made(self, **settings)
        cache.state.arena = True
        return cache

    monkeypatch.setattr(CompressionSession, "new_cache", new_cache)


def in_thread(function, *args, **kwargs):
    """The result of a function called in a thread that is started here."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args, **kwargs)))
    thread.start()
    thread.join()
    return results[0]


def answer(model, ids, spec, steps=6):
    if spec is None:
        return generate(model, ids, steps).tolist(), None
    with refreekv.compress(model, **spec) as kv:
        tokens = generate(model, ids, steps).tolist()
    return tokens, kv.report


def serve(model, jobs, threads=8):
    """Answers of all jobs, some at a time."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda job: answer(model, *job), jobs))


@pytest.mark.usefixtures("busy")
def test_requests_in_threads_are_as_alone(model):
    """Five policies and plain calls on one model, 200 requests in 8 threads."""
    before = state_of(model)
    asked = [prompts((length,), seed=length)[0] for length in (50, 41, 33, 60, 28)]
    kinds = list(itertools.product(asked, [*SPECS, None]))
    wanted = [answer(model, *kind) for kind in kinds]
    assert len({str(tokens) for tokens, _ in wanted[:5]}) > 2  # policies make a difference
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    got = serve(model, [kinds[place % len(kinds)] for place in order])
    assert got == [wanted[place % len(kinds)] for place in order]
    assert state_of(model) == before


@pytest.mark.usefixtures("busy", "arena")
def test_requests_in_threads_share_captured_steps(model, steps):
    asked = [prompts((length,), seed=length)[0] for length in (50, 41)]
    kinds = list(itertools.product(asked, [*SPECS[:2], None]))
    wanted = [answer(model, *kind) for kind in kinds]
    assert steps["run"] > 0
    assert serve(model, kinds * 4, threads=4) == wanted * 4


def test_plain_calls_beside_a_block_are_plain(model, ids):
    wanted = generate(model, ids)
    with refreekv.compress(model, **WINDOW) as kv:
        inside = generate(model, ids)
        report = kv.report
        assert torch.equal(in_thread(generate, model, ids), wanted)
        with torch.no_grad():
            assert type(in_thread(model, ids).past_key_values).__name__ == "DynamicCache"
        assert kv.report == report
    assert not torch.equal(inside, wanted)


@pytest.mark.usefixtures("busy")
def test_plain_calls_while_blocks_come_and_go(model, ids):
    """Hooks are put in and taken out under a call's feet."""
    wanted, over = generate(model, ids, 2), threading.Event()

    def come_and_go():
        while not over.is_set():
            with refreekv.compress(model, **WINDOW):
                pass

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert all(torch.equal(generate(model, ids, 2), wanted) for _ in range(150))
    finally:
        over.set()
        thread.join()


def test_a_block_is_handed_over_to_a_thread(model, ids):
    """As with a streamer, whose reader runs beside generate."""
    with refreekv.compress(model, **WINDOW) as kv:
        wanted = generate(model, ids)
    with refreekv.compress(model, **WINDOW) as kv:
        assert torch.equal(in_thread(kv.run, generate, model, ids, 6), wanted)
        report = kv.report
    assert report.budget < 1
    with pytest.raises(RuntimeError, match="was left"):
        kv.run(generate, model, ids)


def test_only_functions_are_handed_over(model):
    async def later():
        """Would run when the block is not in force any more."""

    def tokens():
        yield 1

    with refreekv.compress(model) as kv:
        for function in (later, tokens):
            with pytest.raises(TypeError, match="open a compress block inside"):
                kv.run(function)


def test_a_block_may_be_left_while_a_thread_answers(model, ids):
    """The answer goes on as it began, and the model is as before when it ends."""
    with refreekv.compress(model, **WINDOW) as kv:
        wanted = generate(model, ids)
        report = kv.report
    before, begun, left = state_of(model), threading.Event(), threading.Event()

    class Slow:
        def put(self, tokens):
            begun.set()
            left.wait()

        def end(self):
            pass

    results = []
    with refreekv.compress(model, **WINDOW) as kv:
        thread = threading.Thread(
            target=lambda: results.append(kv.run(generate, model, ids, streamer=Slow(), return_dict_in_generate=True))
        )
        thread.start()
        begun.wait()
    left.set()
    thread.join()
    assert torch.equal(results.pop().sequences, wanted)
    assert kv.report == report
    assert state_of(model) == before


def test_a_block_that_served_nobody_says_so(model, ids, caplog):
    with caplog.at_level(logging.WARNING, logger="refreekv"):
        with refreekv.compress(model, **WINDOW) as kv:
            in_thread(generate, model, ids)
        assert "kv.run" in caplog.text
        caplog.clear()
        with refreekv.compress(model, **WINDOW):
            in_thread(generate, model, ids)
            generate(model, ids)
        with refreekv.compress(model, **WINDOW) as kv:
            in_thread(kv.run, generate, model, ids)
        with refreekv.compress(model, **WINDOW):
            pass
    assert not caplog.records


@pytest.mark.parametrize("copied", [True, False])
def test_pools_and_copied_contexts(model, ids, copied):
    plain = generate(model, ids)
    with ThreadPoolExecutor(1) as pool, refreekv.compress(model, **WINDOW) as kv:
        wanted = generate(model, ids)
        context = contextvars.copy_context() if copied else contextvars.Context()
        got = pool.submit(context.run, generate, model, ids).result()
        assert torch.equal(got, wanted if copied else plain)
        assert kv.report.budget < 1
    assert torch.equal(context.run(generate, model, ids), plain)  # the copy lives on, the block does not


def test_tasks_have_blocks_of_their_own(model, ids):
    plain = generate(model, ids)
    wanted = [answer(model, ids, spec) for spec in SPECS]
    before = state_of(model)

    async def task(spec):
        with refreekv.compress(model, **spec) as kv:
            await asyncio.sleep(0)
            tokens = (await asyncio.to_thread(generate, model, ids)).tolist()
            await asyncio.sleep(0)
            return tokens, kv.report

    async def beside():
        await asyncio.sleep(0)
        return await asyncio.to_thread(generate, model, ids)

    async def all_of_them():
        return await asyncio.gather(*map(task, SPECS), beside())

    *got, other = asyncio.run(all_of_them())
    assert got == wanted
    assert torch.equal(other, plain)
    assert state_of(model) == before


def test_blocks_left_out_of_order(model, ids):
    before, plain = state_of(model), generate(model, ids)
    wanted = [answer(model, ids, spec) for spec in SPECS[:2]]
    first, second = (refreekv.compress(model, **spec) for spec in SPECS[:2])
    one, two = first.__enter__(), second.__enter__()
    assert answer_of(model, ids, two) == wanted[1]
    first.__exit__(None, None, None)
    assert answer_of(model, ids, two) == wanted[1]
    assert not one.report.prunable
    second.__exit__(None, None, None)
    assert torch.equal(generate(model, ids), plain)
    assert state_of(model) == before


def answer_of(model, ids, kv):
    return generate(model, ids).tolist(), kv.report


def test_generators_hold_blocks_open(model, ids):
    """As long as they are stepped, in whatever thread they end."""
    before, plain = state_of(model), generate(model, ids)
    wanted = answer(model, ids, WINDOW)

    def answers():
        with refreekv.compress(model, **WINDOW) as kv:
            while True:
                yield answer_of(model, ids, kv)

    one, other = answers(), answers()
    assert next(one) == next(other) == next(one) == wanted
    in_thread(one.close)
    assert next(other) == wanted
    other.close()
    assert torch.equal(generate(model, ids), plain)
    left = answers()
    in_thread(next, left)  # opened in a context that is gone
    assert torch.equal(generate(model, ids), plain)
    del left
    gc.collect()
    assert state_of(model) == before


def test_nested_blocks_in_threads(model, ids):
    wanted = [answer(model, ids, spec) for spec in SPECS[:3]]
    barrier = threading.Barrier(2)

    def work(outer, inner):
        with refreekv.compress(model, **SPECS[outer]) as kv:
            barrier.wait()
            with refreekv.compress(model, **SPECS[inner]) as nested:
                first = answer_of(model, ids, nested)
            barrier.wait()
            assert not kv.report.prunable
            return first, answer_of(model, ids, kv)

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(work, (0, 1), (1, 2)))
    assert got == [(wanted[1], wanted[0]), (wanted[2], wanted[1])]


def test_an_exception_in_one_thread_leaves_the_other_alone(model, ids):
    wanted, before = answer(model, ids, WINDOW), state_of(model)
    with refreekv.compress(model, **WINDOW) as kv:

        def fail():
            with contextlib.suppress(ZeroDivisionError), refreekv.compress(model, **PRUNING):
                raise ZeroDivisionError

        in_thread(fail)
        assert answer_of(model, ids, kv) == wanted
    assert state_of(model) == before


def test_contexts_keep_no_model_alive():
    """A context variable outlives blocks, and whatever it held would live as long."""
    ids = prompts((30,), seed=1)[0]
    model = build("llama", attention="sdpa")
    cache = ReFreeKVCache(model, **WINDOW)
    type(model).generate(model, ids, past_key_values=cache, max_new_tokens=2)
    del cache
    with refreekv.compress(model, **WINDOW):
        generate(model, ids)
        type(model).generate(model, ids, max_new_tokens=2)
        context = contextvars.copy_context()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert context is not None


def test_one_cache_serves_one_call_at_a_time(model, ids):
    cache = ReFreeKVCache(model, **WINDOW)
    inside, refused = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        refused.wait()

    handle = model.model.layers[2].mlp.register_forward_pre_hook(wait)
    thread = threading.Thread(target=generate, args=(model, ids), kwargs={"past_key_values": cache})
    thread.start()
    inside.wait()
    with pytest.raises(RuntimeError, match="in another thread"), torch.no_grad():
        model(ids, past_key_values=cache)
    handle.remove()
    refused.set()
    thread.join()
    assert cache.get_seq_length() == 55
