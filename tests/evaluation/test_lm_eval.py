"""lm-eval with a compressed model: tiny random weights, local tasks over generated data, no network."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra [eval])")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from helpers.models import VOCAB, build
from refreekv import ReFreeKVCache
from refreekv.evaluation.tasks.lm_eval_model import CompressedLM

WORDS = [f"w{index}" for index in range(VOCAB - 2)]
HALF = {"name": "streaming-llm", "spec": "streaming-llm:ratio=0.3"}


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(
        WordLevel({word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<unk>")


def evaluate(model, tokenizer, task, batch_size=1, **options):
    """lm-eval's own run of one local task; its results, and the model with what it kept."""
    compressed = CompressedLM(model, HALF["spec"], tokenizer=tokenizer, batch_size=batch_size)
    manager = TaskManager(include_defaults=False)
    return simple_evaluate(compressed, tasks=[task], task_manager=manager, bootstrap_iters=10, **options), compressed


@pytest.fixture(scope="module")
def model():
    return build("llama", attention="sdpa")


def text(rng, length):
    return " ".join(rng.choice(WORDS) for _ in range(length))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("task") / "test.jsonl"
    rows = [
        {
            "question": text(rng, rng.randint(30, 50)),
            "choices": [text(rng, size) for size in (1, 2, 3)],
            "gold": rng.randrange(3),
            "answer": text(rng, 2),
        }
        for _ in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task(documents, **changes):
    return {
        "task": "made-up",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        **changes,
    }


def choices(documents):
    return task(
        documents,
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="{{gold}}",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )


def generation(documents):
    return task(
        documents,
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )


@torch.no_grad()
def two_stages(model, cache, context, continuation):
    """The log-likelihood, token by token through any cache that was filled with the context."""
    logits = model(torch.tensor([context]), past_key_values=cache).logits[0, -1]
    total, greedy = 0.0, True
    for token in continuation:
        total += logits.log_softmax(-1)[token].item()
        greedy &= logits.argmax().item() == token
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return total, greedy


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def scored(request):
    """Models whose layers may all be pruned, and with sliding windows that cannot be cropped."""
    return build(request.param, attention="sdpa")


@pytest.mark.parametrize("spec", ["streaming-llm:ratio=0.3", "refreekv:threshold=0.1,frozen_layers=0"])
def test_likelihoods_are_those_of_the_pruned_cache(scored, tokenizer, spec):
    rng = random.Random(1)
    contexts = [[rng.randrange(2, VOCAB) for _ in range(40)] for _ in range(2)]
    requests = [
        (("", ""), context, [rng.randrange(2, VOCAB) for _ in range(size)])
        for size in (4, 1, 6)
        for context in contexts
    ]
    compressed = CompressedLM(scored, spec, tokenizer=tokenizer)
    results = compressed._loglikelihood_tokens(requests, disable_tqdm=True)
    moved = []
    for (_, context, continuation), (value, greedy) in zip(requests, results, strict=True):
        expected = two_stages(scored, ReFreeKVCache(scored, compressed.policy), context, continuation)
        assert (value, greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1])
        if len(continuation) > 1:
            full, _ = two_stages(scored, DynamicCache(config=scored.config), context, continuation)
            moved.append(abs(full - value))
    # The point of two stages: what was evicted shows.
    assert max(moved) > 1e-2
    assert len(compressed.budgets) == 2
    assert max(compressed.budgets) < 1


def test_first_token_is_that_of_the_full_prompt(model, tokenizer):
    context = list(range(2, 42))
    compressed = CompressedLM(model, HALF["spec"], tokenizer=tokenizer)
    ((value, _),) = compressed._loglikelihood_tokens([(("", ""), context, [7])], disable_tqdm=True)
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1]
    assert value == pytest.approx(logits.log_softmax(-1)[7].item(), abs=1e-4)


def test_long_contexts_lose_their_start(model, tokenizer):
    compressed = CompressedLM(model, HALF["spec"], tokenizer=tokenizer, max_length=32)
    assert compressed._fitted((("", ""), list(range(60)), [1, 2, 3])) == tuple(range(30, 60))
    with pytest.raises(ValueError, match="does not fit"):
        compressed._fitted((("", ""), [1], [1] * 40))


def test_multiple_choice_task(model, tokenizer, documents):
    results, compressed = evaluate(model, tokenizer, choices(documents))
    assert not hasattr(model, "_refreekv_attachment")  # it left nothing behind
    right = 0
    for row in map(json.loads, documents.read_text().splitlines()):
        context = tokenizer(row["question"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            continuation = tokenizer(choice)["input_ids"]
            cache = ReFreeKVCache(model, compressed.policy)
            scores.append(two_stages(model, cache, context, continuation)[0])
        right += scores.index(max(scores)) == row["gold"]
    assert results["results"]["made-up"]["acc,none"] == pytest.approx(right / 5)
    assert len(compressed.budgets) == 5
    assert 0.25 < sum(compressed.budgets) / 5 < 0.4


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_task(model, tokenizer, documents, batch_size):
    results, compressed = evaluate(model, tokenizer, generation(documents), batch_size, log_samples=True)
    answers = {doc["doc"]["question"]: doc["resps"][0][0] for doc in results["samples"]["made-up"]}
    differs = 0
    for question, answer in answers.items():
        inputs = tokenizer(question, return_tensors="pt", return_token_type_ids=False)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        pruned = model.generate(**inputs, **options, past_key_values=ReFreeKVCache(model, HALF["name"], ratio=0.3))
        full = model.generate(**inputs, **options)
        length = inputs["input_ids"].shape[1]
        said, other = (tokenizer.decode(out[0, length:], skip_special_tokens=True) for out in (pruned, full))
        if "<unk>" not in tokenizer.decode(pruned[0, length:]):  # lm-eval stops at it
            assert answer.split() == said.split()
        differs += said != other
    assert differs > 0
    assert len(compressed.budgets) == 5
    assert sum(compressed.budgets) / 5 < 0.4


def test_registered_by_name():
    from lm_eval.api.registry import get_model

    assert get_model("refreekv") is CompressedLM


def test_what_cannot_be_measured_is_refused(model, tokenizer, documents):
    perplexity = task(
        documents,
        output_type="loglikelihood_rolling",
        doc_to_target="{{question}}",
        doc_to_text="",
        metric_list=[{"metric": "word_perplexity"}],
    )
    with pytest.raises(NotImplementedError, match="made-up asks for rolling log-likelihoods"):
        evaluate(model, tokenizer, perplexity)
    with pytest.raises(NotImplementedError, match="two stages only"):
        CompressedLM(model, "refreekv", tokenizer=tokenizer)._model_call(torch.ones(1, 4, dtype=torch.long))
