"""Following `generate`: whatever way it is called, the prompt ends where it ends and the report is of the answer."""

import copy
import functools
import inspect
import logging

import pytest
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TextGenerationPipeline,
)

import refreekv
from helpers.driving import POLICIES, PRUNING, generate, state_of
from helpers.models import build, prompts
from helpers.tiny import tiny
from refreekv import ReFreeKVCache
from refreekv.engines.transformers import decoder

WINDOW = {"policy": "streaming-llm", "size": 20}
CHUNKS = {"prefill_chunk_size": 13}
DRAFTS = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
OPTIONS = {"plain": {}, "chunks": CHUNKS, "drafts": DRAFTS, "beams": {"num_beams": 2}}


@pytest.fixture
def repeated(ids):
    """A prompt that has something to look up."""
    return torch.cat([ids, ids[:, 5:40]], 1)


def entries(model):
    """Ways to `generate` that were taken before refreekv came."""
    return {
        "partial": functools.partial(model.generate, max_new_tokens=20),
        "bound": model.generate,
        "class": functools.partial(type(model).generate, model),
        "mixin": functools.partial(GenerationMixin.generate, model),
        "wrapper": lambda *args, generate=model.generate, **kwargs: generate(*args, **kwargs),
    }


ENTRIES = ["partial", "bound", "class", "mixin", "wrapper"]
SETTINGS = {"max_new_tokens": 20, "do_sample": False}


# -- where the prompt ends -------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_generate_is_followed_whatever_it_is_called_through(model, repeated, entry, options):
    way, before = entries(model)[entry], state_of(model)
    wanted, got = ReFreeKVCache(model, **WINDOW), ReFreeKVCache(model, **WINDOW)
    answer = model.generate(repeated, past_key_values=wanted, **SETTINGS, **OPTIONS[options])
    assert torch.equal(way(repeated, past_key_values=got, **SETTINGS, **OPTIONS[options]), answer)
    assert got.report == wanted.report
    assert got.report.prunable[0].rows[0].prompt_length == 85
    got.reset()  # nothing of the call is left in the cache
    assert torch.equal(way(repeated, past_key_values=got, **SETTINGS, **OPTIONS[options]), answer)
    with refreekv.compress(model, **WINDOW) as kv:
        assert torch.equal(way(repeated, **SETTINGS, **OPTIONS[options]), answer)
        assert kv.report.tokens == wanted.report.tokens
        assert kv.report.budget == pytest.approx(wanted.report.budget)
    del wanted, got
    assert state_of(model) == before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("options", ["plain", "drafts"])
def test_what_follows_such_a_call_is_a_prompt_again(model, repeated, options, fails):
    """The call's own end is noticed, also by an exception that somebody keeps."""
    way = entries(model)["bound"]
    kept, second = [], prompts((30,), seed=5)[0]

    def run(cache, generate):
        try:
            generate(
                repeated, past_key_values=cache, **SETTINGS, **OPTIONS[options], streamer=Broken(3 if fails else 100)
            )
        except ZeroDivisionError as error:
            kept.append(error)
        with torch.no_grad():
            return model(second, past_key_values=cache).logits

    wanted, got = ReFreeKVCache(model, **WINDOW), ReFreeKVCache(model, **WINDOW)
    assert torch.equal(run(got, way), run(wanted, model.generate))
    assert got.report == wanted.report
    assert got.report.prunable[0].rows[0].prompt_length == got.get_seq_length()
    assert len(kept) == 2 * fails


class Broken:
    """A streamer that ends a call from inside."""

    def __init__(self, calls):
        self.left = calls

    def put(self, tokens):
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError

    def end(self):
        pass


@pytest.mark.parametrize("entry", ["bound", "class"])
def test_a_call_that_is_not_seen_to_begin_says_that_it_has_no_captured_steps(model, ids, entry, caplog, steps):
    way = entries(model)[entry]
    cache, wanted = ReFreeKVCache(model, **WINDOW), ReFreeKVCache(model, **WINDOW)
    cache.state.arena = True
    with caplog.at_level(logging.WARNING, logger="refreekv"):
        got = way(ids, past_key_values=cache, **SETTINGS)
    assert "call model.generate" in caplog.text
    assert steps["run"] == 0
    assert torch.equal(got, model.generate(ids, past_key_values=wanted, **SETTINGS))


def test_a_pipeline_made_before(model, ids, tmp_path):
    """It hands over a copy of the model's generation configuration, whose word on caches is the checkpoint's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from helpers.models import save_with_characters

    save_with_characters(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    model.generation_config.cache_implementation = "hybrid"
    model.generation_config.use_cache = False
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    prompt = "".join(chr(33 + 7 * place % 90) for place in range(60))
    plain = pipeline(prompt, **SETTINGS)
    with refreekv.compress(model, **WINDOW) as kv:
        assert pipeline(prompt, **SETTINGS) != plain
    assert kv.report.budget < 1
    assert pipeline(prompt, **SETTINGS) == plain


def test_generate_that_the_user_wraps_inside(model, ids):
    """Around ours, and around the class's own."""
    with refreekv.compress(model, **WINDOW):
        wanted = generate(model, ids, 20, **CHUNKS)
        for inner in (model.generate, functools.partial(type(model).generate, model)):
            model.generate = functools.partial(inner, **CHUNKS)
            assert torch.equal(generate(model, ids, 20), wanted)
            del model.generate
    assert not torch.equal(generate(model, ids, 20, **CHUNKS), wanted)


# -- drafts ----------------------------------------------------------------------------------------


def kept(report):
    """What was pruned when, and what stayed."""
    return [[(row.prompt_length, row.kept_heads, row.bytes_after) for row in layer.rows] for layer in report.prunable]


@pytest.mark.parametrize("interval", [1, 2, 4, 7, None])
@pytest.mark.parametrize("policy", POLICIES)
def test_drafts_give_what_comes_without_them(model, repeated, policy, interval):
    """Also where generated tokens are pruned, which are decided on when they are verified."""
    name, parameters = POLICIES[policy]
    settings = {"policy": name, **parameters, "decode_interval": interval}
    assistant = build("llama", attention="sdpa", num_hidden_layers=2)
    with refreekv.compress(model, **settings) as kv:
        wanted = generate(model, repeated, 30)
        report = kv.report
    fed = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for drafts in ({"assistant_model": assistant}, DRAFTS):
        with refreekv.compress(model, **settings) as kv:
            assert torch.equal(generate(model, repeated, 30, **drafts), wanted)
        assert kept(kv.report) == kept(report)
    handle.remove()
    assert fed[0] == 85
    assert (max(n for n in fed if n != 85) > 1) == (interval not in (1, 2))  # something was drafted


def test_drafts_in_a_loop_of_ones_own(model, ids):
    """What is cropped before the next call has no say in what is kept."""
    wanted, got = (ReFreeKVCache(model, **PRUNING, decode_interval=4) for _ in range(2))
    verified, wrong = torch.tensor([[9, 8, 7, 6]]), torch.tensor([[3, 2, 1]])
    with torch.no_grad():
        for cache, drafts in ((wanted, verified), (got, torch.cat([verified, wrong], 1))):
            model(ids, past_key_values=cache)
            with cache.decoding():
                model(drafts, past_key_values=cache)
                cache.crop(-(drafts.shape[1] - 4))
                model(torch.tensor([[5]]), past_key_values=cache)
    assert kept(got.report) == kept(wanted.report)
    assert got.report.prunable[1].rows[0].prompt_length == 54  # looked at again
    assert got.kept_ranges() == wanted.kept_ranges()


# -- a model that drops its cache ------------------------------------------------------------------


def longrope():
    """A Phi-3 whose rotary factors are others behind 64 tokens; there it drops the cache and reads all of it again."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"factor": 4.0, "original_max_position_embeddings": 64}
    changes = {"max_position_embeddings": 256, "original_max_position_embeddings": 64, "rope_parameters": rope}
    return build("phi3", attention="sdpa", **changes)


@pytest.mark.parametrize("length", [58, 80])  # while it answers, and at once
def test_a_cache_that_the_model_drops_is_filled_again(length):
    model, (ids, _) = longrope(), prompts((length,), seed=2)
    if length < 64 and "next_sequence_length" not in inspect.getsource(type(model).prepare_inputs_for_generation):
        pytest.skip("this transformers goes on from the last token alone")
    wanted = model.generate(ids, **SETTINGS)
    with refreekv.compress(model, "full") as kv:
        assert torch.equal(model.generate(ids, **SETTINGS), wanted)
    assert kv.report.tokens == length + 19
    own = ReFreeKVCache(model, **WINDOW)
    answer = model.generate(ids, past_key_values=own, **SETTINGS)
    assert own.report.tokens == length + 19
    assert [layer.rows[0].kept for layer in own.report.prunable] == [20] * len(own.report.prunable)
    with refreekv.compress(model, **WINDOW) as kv:
        assert torch.equal(model.generate(ids, **SETTINGS), answer)
    assert kv.report == own.report


# -- a model that has another one generate ---------------------------------------------------------


def test_a_model_that_has_another_one_generate_is_refused(ids):
    """A block on it would prune nothing."""
    outer = tiny("kosmos-2")
    try:
        outer.generate(input_ids=ids, **SETTINGS)
    except ValueError as reason:
        pytest.skip(f"does not run on text alone: {reason}")
    with (
        refreekv.compress(outer, **WINDOW),
        pytest.raises(RuntimeError, match=r"that one, .* model.text_model"),
    ):
        outer.generate(input_ids=ids, **SETTINGS)
    with refreekv.compress(outer.text_model, **WINDOW) as kv:
        outer.generate(input_ids=ids, **SETTINGS)
    assert {layer.rows[0].kept for layer in kv.report.prunable} == {20}


# -- defaults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["hybrid", "static", "quantized", "offloaded", "dynamic"])
@pytest.mark.parametrize("entry", ["model", "class", "copy of the configuration"])
def test_what_a_checkpoint_says_about_caches_is_nobodys_wish(ids, implementation, entry):
    model = build("gemma3", attention="sdpa")
    with refreekv.compress(model, **WINDOW) as kv:
        wanted, report = generate(model, ids), kv.report
    model.generation_config.cache_implementation = implementation
    model.generation_config.use_cache = False
    model.config.use_cache = False
    before = state_of(model)
    settings = {"max_new_tokens": 6, "do_sample": False}
    if entry == "copy of the configuration":
        settings = {"generation_config": copy.deepcopy(model.generation_config)}
        settings["generation_config"].update(max_new_tokens=6, do_sample=False)
    way = functools.partial(type(model).generate, model) if entry == "class" else model.generate
    with refreekv.compress(model, **WINDOW) as kv:
        way = way if entry == "class" else model.generate
        assert torch.equal(way(ids, **settings), wanted)
        assert kv.report == report
        with torch.no_grad():
            assert model(ids).past_key_values is not None
    cache = ReFreeKVCache(model, **WINDOW)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), wanted)
    assert cache.report == report
    del cache
    assert state_of(model) == before


def test_what_a_call_says_about_caches_counts(model, ids):
    plain = generate(model, ids)
    model.generation_config.use_cache = False
    with refreekv.compress(model, **WINDOW) as kv:
        assert torch.equal(generate(model, ids, use_cache=False), plain)
        assert not kv.report.prunable
        assert not torch.equal(generate(model, ids, use_cache=True), plain)
        for said in ("static", "quantized", "offloaded", "paged", "hybrid"):
            with pytest.raises(ValueError, match="cannot be combined with refreekv"):
                generate(model, ids, cache_implementation=said)
        with pytest.raises(ValueError, match="cannot be combined with refreekv"):
            functools.partial(type(model).generate, model)(ids, cache_implementation="static")
    with pytest.raises(ValueError, match="use_cache=False"):
        generate(model, ids, use_cache=False, past_key_values=ReFreeKVCache(model, **WINDOW))


def test_embeddings_are_read_with_a_cache_whatever_is_said(model, ids):
    """As transformers does it, which would make a cache of its own."""
    embeddings = model.get_input_embeddings()(ids).detach()
    with refreekv.compress(model, **WINDOW) as kv:
        wanted = generate(model, None, inputs_embeds=embeddings)
        report = kv.report
        assert torch.equal(generate(model, None, inputs_embeds=embeddings, use_cache=False), wanted)
        assert kv.report == report


def test_a_checkpoint_without_caches_is_trained_without(model, ids):
    model.config.use_cache = False
    with refreekv.compress(model, **WINDOW):
        model.train()
        model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("settings", [{}, {"generation_config": GenerationConfig(max_new_tokens=6, do_sample=False)}])
def test_a_configuration_that_says_nothing(model, ids, settings):
    with refreekv.compress(model, **WINDOW) as kv:
        model.generate(ids, **settings)
    assert kv.report.budget < 1


# -- calls inside a call ---------------------------------------------------------------------------


class Ask(LogitsProcessor):
    """Asks the model itself, in some way, at each token."""

    def __init__(self, ask):
        self.ask = ask

    def __call__(self, input_ids, scores):
        with torch.no_grad():
            self.ask(input_ids[:, -8:])
        return scores


def nested(model):
    before = model.generate
    own = ReFreeKVCache(model, "full")

    def ask(function):
        return {"logits_processor": LogitsProcessorList([Ask(function)])}

    return {
        "guidance": {"guidance_scale": 1.5},
        "negative prompt": {"guidance_scale": 1.5, "negative_prompt_ids": prompts((40,), seed=3)[0]},
        "early exit": {"assistant_early_exit": 2},
        "forward": ask(model),
        "generate": ask(lambda ids: generate(model, ids, 2)),
        "generate from before": ask(lambda ids: before(ids, max_length=10)),
        "drafts": ask(lambda ids: generate(model, ids, 9, **DRAFTS)),
        "another cache": ask(lambda ids: (own.reset(), generate(model, ids, 2, past_key_values=own))),
    }


CALLS = [
    "guidance",
    "negative prompt",
    "early exit",
    "forward",
    "generate",
    "generate from before",
    "drafts",
    "another cache",
]


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_the_report_is_of_the_outermost_call(model, ids, call, seen):
    way, settings = model.generate, nested(model)[call]
    with refreekv.compress(model, **WINDOW) as kv:
        way = model.generate if seen else way
        output = way(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **settings)
        assert kv.cache is output.past_key_values
        live = kv.report
        del output
    for report in (live, kv.report):
        assert report.tokens == 57
        assert [layer.rows[0].prompt_length for layer in report.prunable] == [50] * 4
        assert report.budget == 0.4


def test_a_block_opened_inside_a_call_has_its_own_answers(model, ids):
    reports = []

    def ask(asked):
        with refreekv.compress(model, "streaming-llm", size=6) as kv:
            generate(model, asked, 2)
        reports.append(kv.report)

    with refreekv.compress(model, **WINDOW) as kv:
        generate(model, ids, 3, logits_processor=LogitsProcessorList([Ask(ask)]))
    assert [report.prunable[0].rows[0].prompt_length for report in reports] == [8] * 3
    assert kv.report.prunable[0].rows[0].prompt_length == 50


def test_a_call_without_a_cache_has_no_report(model, ids):
    """Whatever it asks the model meanwhile."""
    with refreekv.compress(model, **WINDOW) as kv:
        generate(model, ids, 3, use_cache=False, logits_processor=LogitsProcessorList([Ask(model)]))
        assert not kv.report.prunable
        with torch.no_grad():
            model(ids)
        assert kv.report.tokens == 50


# -- captured steps --------------------------------------------------------------------------------


def test_hooks_that_transformers_leaves_do_not_end_captured_steps(model, ids, steps):
    def run(**settings):
        steps["run"] = 0
        cache = ReFreeKVCache(model, **WINDOW)
        cache.state.arena = True
        return generate(model, ids, 8, past_key_values=cache, return_dict_in_generate=True, **settings)

    wanted = run()
    with torch.no_grad():
        model(ids, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.model.layers)
    assert torch.equal(run().sequences, wanted.sequences)
    assert steps["run"] == 7
    assert len(run(output_hidden_states=True).hidden_states[-1]) == 5
    assert steps["run"] == 0
    model.config.output_hidden_states = True
    run()
    assert steps["run"] == 0


def test_which_hooks_are_left_by_transformers(model, ids):
    with torch.no_grad():
        model(ids, output_hidden_states=True)
    layer = model.model.layers[0]
    assert not decoder._hooks(layer)
    layer.register_forward_hook(print)
    assert decoder._hooks(layer) == [print]
