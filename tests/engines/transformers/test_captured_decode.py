"""The captured step and the arena, run on the CPU without a graph: the plain cache is the judge."""

import contextlib
import copy
import functools
import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import refreekv
from helpers.driving import POLICIES, RAGGED, Uneven, feed, kv_bytes, prefill
from helpers.models import build, prompts
from refreekv.engines.transformers import fusion, graph
from refreekv.storage.arena import KVArena

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton runs: without a GPU in its interpreter."""


def caches(model, policy="refreekv", **parameters):
    """A plain cache, and one whose layers are arenas."""
    both = [refreekv.ReFreeKVCache(model, policy, **parameters) for _ in range(2)]
    both[1].state.arena = True
    return both


def both_ways(model, ids, mask, policy="refreekv", parameters=None, **settings):
    outcome = []
    for cache in caches(model, policy, **(parameters or {})):
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, do_sample=False,
            output_logits=True, return_dict_in_generate=True, **settings,
        )  # fmt: skip
        outcome.append((out, cache))
    (plain, _), (captured, cache) = outcome
    assert torch.equal(plain.sequences, captured.sequences)
    for one, other in zip(plain.logits, captured.logits, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)
    return outcome


@pytest.mark.parametrize("policy", [*POLICIES, "full", "uneven"])
@pytest.mark.parametrize("lengths", [(60,), RAGGED], ids=["alone", "batch"])
def test_captured_steps_give_what_the_plain_cache_gives(policy, lengths, llama, steps):
    name, parameters = POLICIES.get(policy, (Uneven() if policy == "uneven" else policy, {}))
    ids, mask = prompts(lengths, seed=3)
    (_, plain), (_, cache) = both_ways(llama, ids, mask, name, parameters)
    assert steps == {"made": 1, "run": 23}
    assert all(isinstance(layer.ragged, KVArena) for layer in cache.pruned_layers)
    # 24 tokens are more than the first room: storage moved, and nothing holds on to the old one.
    assert kv_bytes(cache) == cache.report.bytes_after
    assert cache.get_seq_length() == plain.get_seq_length()
    for mine, other in zip(cache.report.layers, plain.report.layers, strict=True):
        assert [row.kept_heads for row in mine.rows] == [row.kept_heads for row in other.rows]


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_architectures(name, attention, steps):
    model = build(name, attention=attention)
    ids, mask = prompts((50, 33), seed=5)
    both_ways(model, ids, mask, parameters={"threshold": 0.2, "frozen_layers": 1})
    assert steps["run"] == 23


def test_rows_that_finish_at_different_times(llama, steps):
    ids, mask = prompts(RAGGED, seed=3)
    # Tokens that rows reach early end them.
    probe = llama.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)[:, ids.shape[1] :]
    ends = [int(probe[0, 3]), int(probe[2, 9])]
    (plain, _), _ = both_ways(llama, ids, mask, parameters={"threshold": 0.2}, eos_token_id=ends)
    assert len({tuple(row.tolist()).index(0) if 0 in row else -1 for row in plain.sequences[:, ids.shape[1] :]}) > 1


def test_a_step_is_made_once_for_each_batch_size_whatever_the_length(llama, steps):
    with refreekv.compress(llama, "streaming-llm", ratio=0.5) as kv:
        for lengths in [(30,), (90,), (41, 22), (64,), (80, 17)]:
            ids, mask = prompts(lengths, seed=1)
            cache = kv.new_cache()
            cache.state.arena = True
            llama.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert steps == {"made": 2, "run": 20}


def test_two_caches_take_turns(llama, steps):
    ids, _ = prompts((50,), seed=1)
    outcome = []
    for arena in (None, True):
        pair = [refreekv.ReFreeKVCache(llama, "streaming-llm", ratio=r) for r in (0.3, 0.8)]
        texts = [ids, ids]
        for cache in pair:
            cache.state.arena = arena
        for _ in range(3):
            for which, cache in enumerate(pair):
                texts[which] = llama.generate(
                    texts[which], past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0
                )
        outcome.append(texts)
    assert all(torch.equal(a, b) for a, b in zip(*outcome, strict=True))
    assert steps["made"] == 1


def test_beams_crops_and_second_turns(llama):
    ids, mask = prompts((48, 35), seed=2)
    both_ways(llama, ids, mask, parameters={"threshold": 0.2}, num_beams=3)
    outcome = []
    for cache in caches(llama, "refreekv-heavy-hitter", threshold=0.1):
        _, kept = prefill(llama, cache)
        kept = torch.ones(len(RAGGED), cache.get_seq_length(), dtype=torch.long) * kept
        more = prompts((7,) * len(RAGGED), seed=8)[0]
        with cache.decoding():
            first, longer = feed(llama, cache, more, kept)
            cache.crop(-5)
            second, longer = feed(llama, cache, more[:, :3], longer[:, :-5])
        third, _ = feed(llama, cache, more, longer)
        copied = copy.deepcopy(cache)
        cache.reset()
        with copied.decoding():
            fourth, _ = feed(llama, copied, more[:, :1], torch.cat([longer, torch.ones_like(more)], 1))
        outcome.append((first, second, third, fourth))
    for one, other in zip(*outcome, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


def test_rows_that_are_freed_take_no_memory_and_leave_the_others_alone(llama):
    outcome = []
    for cache, free in zip(caches(llama, threshold=0.2), (False, True), strict=True):
        logits, mask = prefill(llama, cache)
        with cache.state.until(cache.get_seq_length(), generating=True):
            for _ in range(30):
                if free and _ == 3:
                    before = cache.report.bytes_after
                    cache.free_rows([1, 3])
                    assert cache.report.bytes_after < 0.7 * before
                    assert [row.bytes_after for row in cache.report.layers[0].rows][1::2] == [0, 0]
                logits, mask = feed(llama, cache, logits.view(len(RAGGED), -1).argmax(-1, keepdim=True), mask)
        outcome.append(logits[::2])
    torch.testing.assert_close(*outcome, atol=2e-4, rtol=2e-4)
    plain = caches(llama)[0]
    prefill(llama, plain)
    with pytest.raises(ValueError, match="decodes on CUDA"):
        plain.free_rows([0])


def test_a_finished_answer_is_not_kept_alive(llama):
    ids, _ = prompts((50,), seed=1)
    with refreekv.compress(llama) as kv:
        cache = kv.new_cache()
        cache.state.arena = True
        llama.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
        held = weakref.ref(cache.pruned_layers[0].ragged)
        del cache
        gc.collect()
        assert held() is None


def test_what_cannot_be_captured_runs_eagerly_and_says_why_once(caplog, steps):
    model = build("gemma3", attention="sdpa")
    ids, mask = prompts((40,), seed=1)
    with caplog.at_level(logging.WARNING, logger="refreekv"):
        both_ways(model, ids, mask)
    llama = build("llama", attention="sdpa")
    calls = []
    handle = llama.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING, logger="refreekv"):
        both_ways(llama, ids, mask)
    handle.remove()
    assert len(calls) == 48
    assert steps["run"] == 0
    reasons = [record.getMessage() for record in caplog.records if record.name == "refreekv"]
    assert len(reasons) == 2
    assert "DynamicSlidingWindowLayer" in reasons[0]
    assert "model.layers.1.mlp has forward hooks" in reasons[1]


def test_threads_that_share_a_model_take_turns(llama, steps):
    prompts_of = [prompts((40 + 7 * n,), seed=n)[0] for n in range(3)]

    def answer(ids, arena):
        cache = refreekv.ReFreeKVCache(llama, "streaming-llm", ratio=0.5)
        cache.state.arena = arena
        return llama.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)

    wanted = [answer(ids, None) for ids in prompts_of]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda ids: answer(ids, True), prompts_of))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert steps == {"made": 1, "run": 3 * 29}


def test_a_copy_of_an_attached_model_runs_itself(llama, steps):
    ids, _ = prompts((40,), seed=1)
    cache = refreekv.ReFreeKVCache(llama)
    cache.state.arena = True
    llama.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert (other(ids).logits == 0).all()
    assert (llama(ids).logits != 0).any()


def test_a_model_whose_capture_fails_goes_on_eagerly(llama, monkeypatch, caplog):
    def broken(*args):
        raise TypeError("no such argument")

    monkeypatch.setattr(graph.Step, "__init__", broken)
    ids, mask = prompts((40,), seed=1)
    with caplog.at_level(logging.WARNING, logger="refreekv"):
        both_ways(build("llama", attention="sdpa"), ids, mask)
    assert "TypeError: no such argument" in caplog.text


def test_why_a_capture_fails_is_said_from_the_innermost_error(llama, monkeypatch, caplog):
    """Triton's errors begin with a place in the code, and lead to one of what that calls."""

    def broken(*args):
        try:
            raise ValueError("at 3:4:\n    y = x + 1\n        ^\nx has two types")
        except ValueError as error:
            raise RuntimeError("at 9:8:\n    if x:\n    ^") from error

    monkeypatch.setattr(graph.Step, "__init__", broken)
    ids, mask = prompts((40,), seed=1)
    with caplog.at_level(logging.WARNING, logger="refreekv"):
        both_ways(build("llama", attention="sdpa"), ids, mask)
    assert "cannot be captured: ValueError: at 3:4: x has two types" in caplog.text


def test_memory_of_a_step_that_fails_waits_for_what_was_launched(monkeypatch):
    """A dropped step's tables are others' memory at once: kernels that still read them would write anywhere."""
    happened = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            happened.append(f"{self.name} waits for {other.name}")

    def broken(step):
        happened.append("kernels launched")
        raise RuntimeError("called a synchronizing CUDA operation")

    capture, current = Stream("capture"), Stream("current")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: contextlib.nullcontext())
    monkeypatch.setattr(graph, "_capture_stream", lambda device: capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(graph, "fused", lambda model, rows: contextlib.nullcontext())
    monkeypatch.setattr(graph.Step, "_warm_up", broken)
    step = object.__new__(graph.Step)
    step.model, step.ids, step.autocast = None, torch.zeros(1, 1, dtype=torch.long), None
    with pytest.raises(RuntimeError, match="synchronizing"):
        step._capture()
    assert happened == ["capture waits for current", "kernels launched", "current waits for capture"]


def test_eager_on_request(llama, steps):
    ids, _ = prompts((40,), seed=1)
    cache = refreekv.ReFreeKVCache(llama, decode="eager")
    cache.state.arena = True
    llama.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert steps["run"] == 0
    with pytest.raises(ValueError, match=r"decode must be one of 'graph', 'eager', got 'fast'"):
        refreekv.ReFreeKVCache(llama, decode="fast")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "mixtral"])
@pytest.mark.parametrize("rows", [1, 2])
def test_fused_modules_compute_the_same_and_leave_no_trace(name, rows):
    pytest.importorskip("triton")
    model = build(name, attention="sdpa").to(WHERE).half()
    ids = prompts((1,) * rows, seed=4)[0].to(WHERE)
    before = model(ids).logits
    state = {n: dict(vars(m)) for n, m in model.named_modules()}
    with torch.no_grad(), fusion.fused(model, rows) as count:
        after = model(ids).logits
        assert all("forward" in vars(layer.self_attn) for layer in model.model.layers)
        # Gemma's layers have norms elsewhere, Phi's dropout.
        whole = name in ("llama", "qwen2", "qwen3", "mixtral")
        assert all(("forward" in vars(layer)) is whole for layer in model.model.layers)
    # Two norms a layer and the last one, the attention's rotary embedding, and a dense MLP.
    expected = 2 * 4 + 1 + 4 + 4 * (name != "mixtral")
    if rows == 1:
        # Projections, three of them jointly but in Phi-3, and the output layer.
        expected += 4 * (2 if name == "phi3" else 4) + 4 * (name != "mixtral") + 1
    assert count >= expected
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == state
    assert (after - before).norm() <= 2e-2 * before.norm()


def test_what_decorates_a_forward_stays_around_its_replacement(monkeypatch):
    pytest.importorskip("triton")
    calls = []

    def counting(name):
        def decorator(function):
            @functools.wraps(function)
            def counted(*args, **kwargs):
                calls.append(name)
                return function(*args, **kwargs)

            return counted

        return decorator

    model = build("llama", attention="sdpa").to(WHERE).half()
    ids = prompts((1,), seed=4)[0].to(WHERE)
    before = model(ids).logits
    attention = type(model.model.layers[0].self_attn)
    monkeypatch.setattr(attention, "forward", counting("outer")(counting("inner")(attention.forward)))
    with torch.no_grad(), fusion.fused(model, 1):
        assert "forward" in vars(model.model.layers[0].self_attn)
        monkeypatch.setattr(attention, "forward", None)  # nobody needs it any longer
        after = model(ids).logits
    assert calls == ["outer", "inner"] * 4
    assert (after - before).norm() <= 2e-2 * before.norm()


def test_a_decorator_that_cannot_be_rebuilt_is_left_alone(monkeypatch):
    pytest.importorskip("triton")
    model = build("llama", attention="sdpa").to(WHERE).half()
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward
    held = {"function": plain}  # in no variable of its own

    @functools.wraps(plain)
    def opaque(*args, **kwargs):
        return held["function"](*args, **kwargs)

    monkeypatch.setattr(attention, "forward", opaque)
    with torch.no_grad(), fusion.fused(model, 1) as count:
        assert count > 0
        assert "forward" not in vars(model.model.layers[0].self_attn)


@pytest.mark.parametrize("changed", ["sums", "arguments", "nothing"])
def test_layers_that_do_something_else_keep_their_own_code(changed, monkeypatch):
    pytest.importorskip("triton")
    model = build("llama", attention="sdpa").to(WHERE).half()
    ids = prompts((1,), seed=4)[0].to(WHERE)
    own = type(model.model.layers[0]).forward

    @functools.wraps(own)
    def scaled(layer, hidden_states, *args, **kwargs):
        return own(layer, hidden_states, *args, **kwargs) + 0.5 * hidden_states

    @functools.wraps(own)
    def told(layer, hidden_states, *args, **kwargs):
        return own(layer, hidden_states, *args, **{**kwargs, "use_cache": False})

    other = {"sums": scaled, "arguments": told, "nothing": own}[changed]
    monkeypatch.setattr(type(model.model.layers[0]), "forward", other)
    before = model(ids).logits
    with torch.no_grad(), fusion.fused(model, 1):
        assert all(("forward" in vars(layer)) is (changed == "nothing") for layer in model.model.layers)
        after = model(ids).logits
    assert (after - before).norm() <= 2e-2 * before.norm()


def test_a_module_that_computes_something_else_keeps_its_own_code():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(64))
            self.eps = 1e-6

        def forward(self, x):
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)

    model = torch.nn.Sequential(OddRMSNorm())
    with fusion.fused(model, 1) as count:
        assert count == 0
