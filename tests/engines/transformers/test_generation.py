"""Greedy answers with a physically pruned cache: the right cache, the right prompt, alone and in batches."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import refreekv
from helpers.models import VOCAB, build
from refreekv.engines.transformers import graph
from refreekv.engines.transformers.attachment import attached
from refreekv.evaluation.tasks import generation
from refreekv.evaluation.tasks.generation import Prompt, answer
from refreekv.policies import create

WORDS = [f"w{index}" for index in range(VOCAB - 2)]
HALF = create("streaming-llm", ratio=0.4)


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(
        WordLevel({word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tiny():
    return build("llama", attention="sdpa")


def ids(length, seed):
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def step_by_step(model, cache, prompt, steps):
    """Greedy tokens through plain forward calls."""
    with torch.no_grad():
        context = torch.tensor([prompt.context])
        with cache.prompt_until(len(prompt.context)):
            logits = model(context, past_key_values=cache).logits
        with cache.decoding():
            if prompt.question:
                logits = model(torch.tensor([prompt.question]), past_key_values=cache).logits
            tokens = [logits[0, -1].argmax().item()]
            while len(tokens) < steps:
                logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
                tokens.append(logits[0, -1].argmax().item())
    return tokens


@pytest.mark.parametrize("question", [0, 9])
@pytest.mark.parametrize("policy", [HALF, create("refreekv", threshold=0.1, frozen_layers=0)], ids=lambda one: one.name)
def test_answers_are_those_of_the_pruned_cache(tiny, tokenizer, policy, question):
    differs = 0
    for seed in range(4):
        prompt = Prompt(ids(40, seed), ids(question, 90 + seed))
        (given,) = answer(tiny, tokenizer, [prompt], policy, max_new_tokens=8)
        cache = refreekv.ReFreeKVCache(tiny, policy)
        assert given.tokens == step_by_step(tiny, cache, prompt, 8)
        # Only the context was pruned: the question and the answer are all there.
        report = cache.report
        assert all(row.prompt_length == 40 for layer in report.prunable for row in layer.rows)
        assert given.budget == pytest.approx(report.budget)
        assert given.bytes_kept == report.bytes_after < given.bytes_full == report.bytes_before
        (full,) = answer(tiny, tokenizer, [prompt], None, max_new_tokens=8)
        assert full.bytes_kept == full.bytes_full == report.bytes_before
        differs += full.tokens != given.tokens
    assert differs


@pytest.mark.parametrize("policy", [None, HALF], ids=["full", "half"])
def test_a_batch_gives_what_each_row_gives(tiny, tokenizer, policy):
    prompts = [Prompt(ids(length, length), []) for length in (30, 44, 37)]
    together = answer(tiny, tokenizer, prompts, policy, max_new_tokens=6)
    alone = [answer(tiny, tokenizer, [prompt], policy, max_new_tokens=6)[0] for prompt in prompts]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.budget for one in together] == pytest.approx([one.budget for one in alone])
    # Padding is nobody's.
    assert [one.bytes_full for one in together] == [one.bytes_full for one in alone]
    assert [one.bytes_kept for one in together] == [one.bytes_kept for one in alone]
    with pytest.raises(ValueError, match="one by one"):
        answer(tiny, tokenizer, [replace(prompts[0], question=[5]), prompts[1]], policy, max_new_tokens=2)


def test_greedy_whatever_the_model_says(tiny, tokenizer):
    prompt = Prompt(ids(30, 1), [])
    (plain,) = answer(tiny, tokenizer, [prompt], HALF, max_new_tokens=8)
    before = tiny.generation_config.to_dict()
    tiny.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=33)
    try:
        (given,) = answer(tiny, tokenizer, [prompt], HALF, max_new_tokens=8)
    finally:
        tiny.generation_config.update(**before)
    assert given.tokens == plain.tokens


@pytest.mark.parametrize("question", [0, 1, 9])
def test_answers_are_decoded_through_captured_steps(tiny, tokenizer, question, monkeypatch):
    class InArenas(refreekv.ReFreeKVCache):
        """As on CUDA."""

        def __init__(self, *args, **parameters):
            super().__init__(*args, **parameters)
            self.state.arena = True

    prompts = [Prompt(ids(length, length), ids(question, 90)) for length in (30, 44)]
    batches = [[prompt] for prompt in prompts] if question else [prompts]
    given = {}
    made, run = graph.Step.__init__, graph.Step.__call__
    steps = {"made": 0, "run": 0}

    def count(name, function):
        def counted(*args):
            steps[name] += 1
            return function(*args)

        return counted

    monkeypatch.setattr(graph.Step, "__init__", count("made", made))
    monkeypatch.setattr(graph.Step, "__call__", count("run", run))
    for kind in (refreekv.ReFreeKVCache, InArenas):
        monkeypatch.setattr(generation, "ReFreeKVCache", kind)
        with attached(tiny):
            answers = [one for batch in batches for one in answer(tiny, tokenizer, batch, HALF, max_new_tokens=8)]
        # Storage with room to grow holds more bytes.
        given[kind] = [(one.tokens, one.budget, one.bytes_full) for one in answers]
    assert given[InArenas] == given[refreekv.ReFreeKVCache]
    # The first new token is the prompt's own; a question of one token is a step as well.
    assert steps == {"made": 1, "run": (7 + (question == 1)) * len(batches)}
