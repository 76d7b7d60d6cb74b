"""Public benchmarks through lm-eval: made-up rows in the form of local files, gold answers, missing data."""

import json
import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra [eval])")

from helpers.models import VOCAB, build
from refreekv import ReFreeKVCache
from refreekv.evaluation.data import coqa
from refreekv.evaluation.data.catalogue import DATASETS, PAPER
from refreekv.evaluation.data.datasets import PUNKT, DataMissing
from refreekv.evaluation.data.encoding import MARK
from refreekv.evaluation.data.families import task_names
from refreekv.evaluation.records import TaskRecord
from refreekv.evaluation.results import RecordFile
from refreekv.evaluation.tasks import loading as task_loading
from refreekv.evaluation.tasks import sandbox
from refreekv.evaluation.tasks.loading import load
from refreekv.evaluation.tasks.running import Settings, plan, run, score
from refreekv.policies import create

LONG = {
    "context": "Bo lives in Rome.",
    "input": "Where does Bo live?",
    "answers": ["Rome today", "in Rome"],
    "_id": "r",
}
RULER = {
    "input": "A list.\n1. a 2. b\nQuestion: which?",
    "outputs": ["AX-1", "BX-2"],
    "answer_prefix": " Answer:",
    "index": 4,
}
ROWS = {
    "gsm8k.jsonl": {"question": "5 + 7?", "answer": "It is <<5+7=12>>12.\n#### 12"},
    "gpqa.jsonl": {
        "Question": "Which?",
        "Correct Answer": "right one",
        "Incorrect Answer 1": "wrong one",
        "Incorrect Answer 2": "wrong two",
        "Incorrect Answer 3": "wrong three",
    },
    "theoremqa.jsonl": {"Question": "2·3?", "Answer": 6, "Answer_type": "integer", "Picture": None, "id": "a"},
    "truthfulqa.jsonl": {
        "Question": "Is tin alive?",
        "Best Answer": "No, tin is a metal",
        "Correct Answers": "No, tin is a metal; It is not alive at all",
        "Incorrect Answers": "Yes, tin is alive",
    },
    "coqa.jsonl": {
        "id": "c",
        "source": "x",
        "story": "Bo went to Rome.",
        "questions": {"input_text": ["Who went?", "Where?"], "turn_id": [1, 2]},
        "answers": {"input_text": ["Bo", "to Rome"], "turn_id": [1, 2]},
    },
    "humaneval.jsonl": {
        "task_id": "T/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
    },
    "math500.jsonl": {
        "problem": "Half of one?",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
        "answer": "\\frac{1}{2}",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "u",
    },
    "ifeval.jsonl": {
        "key": 1,
        "prompt": "Say something without commas, in at most two sentences.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None, "relation": None}, {"num_words": 5, "relation": "less than"}],
    },
    "qmsum_meetings.jsonl": {"meeting_id": 2, "transcript": "B: goodbye then"},
    "qmsum_queries.jsonl": {"meeting_id": 2, "kind": "general", "input": "Who left?", "answers": ["the cat sat down"]},
}
TASKS = {name: one.task for name, one in DATASETS.items() if one.task}
for dataset in DATASETS.values():
    for file in (*dataset.files, *(dataset.task.files if dataset.task else ())):
        ROWS.setdefault(file, RULER if file.startswith("ruler") else LONG)

F1_TWO_OF_THREE = pytest.approx(4 / 5)
"""{rome, today} against {rome, is, today}: precision 2/3, recall 1, so F1 4/5."""

WORTH = {
    # Answers and their scores, worked out by hand; what the answer goes on with must not matter.
    "gsm8k": {"5 + 7 = 12. The answer is 12.": 1, "The answer is 13.": 0, "Twelve": 0, "So 12": 1},
    "theoremqa": {"The answer is 6.": 1, "The answer is 5.": 0},
    "coqa": {"to Rome\nQ: and": 1, "Rome": pytest.approx(2 / 3), "Paris": 0},
    "humaneval": {"    return 1\n": 1, "    return 2\n": 0, "    return (": 0},
    "math500": {
        "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.": 1,
        "Final Answer: The final answer is $0.5$. I hope it is correct.": 1,  # equivalent, not equal
        "Final Answer: The final answer is $2$. I hope it is correct.": 0,
    },
    "ifeval": {"Nothing to say": 1, "Nothing, to say": 0, "Far too many words to be allowed here": 0, "": 0},
    # LCS "the cat … down" 3 words of 4 and 4.
    "qmsum-meetings": {"the cat sat down": pytest.approx(1), "the cat lay down": pytest.approx(0.75), "": 0},
    "qmsum": {"Rome today": pytest.approx(1), "nothing": 0},
    "multi-news": {"Rome today": pytest.approx(1), "nothing": 0},
    "lcc": {"in Rome": 1, "# a comment\nin Rome\nmore": 1, "": 0},
    "ruler": {"ax-1, then BX-2": 1, "AX-1 alone": 0.5, "none": 0},
    "qa": {"Rome is today": F1_TWO_OF_THREE, "the Rome today": 1, "nothing else": 0},
}


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w1"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w1", pad_token="w0", eos_token="w1")


@pytest.fixture(scope="module")
def model():
    return build("llama", attention="sdpa", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for name, row in ROWS.items():
        (path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def no_punkt(monkeypatch):
    """IFEval's checks used here do without nltk's data, which a test must not download."""
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)
    assert TASKS["ifeval"].requires == PUNKT
    free = replace(DATASETS["ifeval"], task=replace(TASKS["ifeval"], requires=""))
    monkeypatch.setitem(DATASETS, "ifeval", free)


def loaded(name, folder, tokenizer, model):
    found, missing = load([name], tokenizer, data_dir=folder, execute_code=True)
    assert not missing
    (task,) = found
    (document,) = plan(model, tokenizer, [task], Settings("tiny")).documents[name]
    return task, document


def worth(name):
    if name in WORTH:
        return WORTH[name]
    return WORTH["ruler" if name.startswith("ruler") else "qa"]


@pytest.mark.usefixtures("no_punkt")
@pytest.mark.parametrize("name", [*sorted(set(TASKS) - {"gpqa", "truthfulqa"}), "theoremqa"])
def test_scores_are_those_worked_out_by_hand(name, folder, tokenizer, model):
    if name == "humaneval" and sandbox.isolates() is None:
        pytest.skip("this system lets users open no namespaces")
    task, document = loaded(name, folder, tokenizer, model)
    for text, value in worth(name).items():
        assert score(task, document, [text])["score"] == value, text


def test_truthfulqa_is_bleu_of_the_nearest_true_answer(folder, tokenizer, model):
    task, document = loaded("truthfulqa", folder, tokenizer, model)
    right = score(task, document, ["It is not alive at all."])
    assert right["score"] == pytest.approx(1)
    assert right["bleu_max"] == pytest.approx(100)
    wrong = score(task, document, ["Yes, tin is alive."])
    assert (wrong["bleu_acc"], right["bleu_acc"]) == (0, 1)
    # Against "No, tin is a metal.", of seven tokens ("No" "," "tin" "is" "a" "liquid" "."): six of them, four of six
    # pairs, three of five triples and two of four quadruples are found, and it is not too short.
    near = score(task, document, ["No, tin is a liquid."])
    product = 6 / 7 * 4 / 6 * 3 / 5 * 2 / 4
    assert near["score"] == pytest.approx(product**0.25, abs=1e-4)


def test_coqa_leaves_each_reference_out_in_turn():
    doc = json.loads(json.dumps(ROWS["coqa.jsonl"]))
    assert coqa.prompt(doc) == "Bo went to Rome.\n\nQ: Who went?\n\nA: Bo\n\nQ: Where?\n\nA:"
    doc["additional_answers"] = {"0": {"input_text": ["Bo", "Rome"]}, "1": {"input_text": ["He", "TO ROME"]}}
    assert coqa.references(doc) == ["to Rome", "Rome"]
    # Without the first: F1 to "Rome" is 1; without the second: to "to Rome", 2 / 3.
    assert coqa.results(doc, ["Rome\nmore"])["f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_gpqa_takes_the_likeliest_choice(folder, tokenizer, model):
    task, document = loaded("gpqa", folder, tokenizer, model)
    assert [request.args[1].strip() for request in document.requests] == ["(A)", "(B)", "(C)", "(D)"]
    gold = "ABCD".index(task.task.doc_to_target(document.doc)[1])
    assert f"({'ABCD'[gold]}) right one" in document.requests[0].args[0]
    likely = [(-1.0 if index == gold else -2.0, False) for index in range(4)]
    assert score(task, document, likely)["score"] == 1
    assert score(task, document, likely[1:] + likely[:1])["score"] == 0


def test_the_paper_s_tasks_are_all_there():
    assert len(PAPER) == len(set(PAPER)) == 13
    assert set(PAPER) <= set(task_names())
    assert {"humaneval", "ifeval", "math500", "niah"} <= set(task_names())
    assert sum(name.startswith("ruler-") for name in task_names()) == 13  # RULER has thirteen


@pytest.mark.parametrize("name", [name for name, one in TASKS.items() if one.context_end])
def test_questions_can_come_after(name, folder, tokenizer, model):
    _, whole = loaded(name, folder, tokenizer, model)
    _, apart = loaded(f"{name}:after", folder, tokenizer, model)
    (text,), (marked,) = ([request.args[0] for request in one.requests] for one in (whole, apart))
    context, _, question = marked.partition(MARK)
    assert context + question == text
    asked = {"qmsum-meetings": "Who left?"}.get(name, "which?" if name.startswith("ruler") else "Bo live?")
    if name != "multi-news":
        assert asked in question
        assert asked not in context


def test_missing_data_is_listed(tmp_path, tokenizer):
    found, missing = load(["gsm8k", "qasper", "niah:tokens=50", "theoremqa"], tokenizer, data_dir=tmp_path)
    assert [task.name for task in found] == ["niah:tokens=50"]
    assert missing.keys() == {"gsm8k", "qasper", "theoremqa"}
    assert "has no longbench_qasper.jsonl" in missing["qasper"]
    found, missing = load(["musique-original", "humaneval"], tokenizer)
    assert not found
    assert "give --data-dir with musique_original.jsonl" in missing["musique-original"]
    assert "--execute-code" in missing["humaneval"]


def test_a_hub_out_of_reach_is_listed(monkeypatch, tokenizer):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found, missing = load(["gsm8k"], tokenizer)
    assert not found
    assert missing["gsm8k"] == (
        "its data could not be had (ConnectionError: no route); give --data-dir with gsm8k.jsonl"
    )


def test_ifeval_without_its_download_says_so_in_one_line(monkeypatch, folder, tokenizer):
    import nltk

    def find(place):
        raise LookupError("a page of text\n" * 20)

    monkeypatch.setattr(nltk.data, "find", find)
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)
    found, missing = load(["ifeval"], tokenizer, data_dir=folder)
    assert not found
    assert "python -m nltk.downloader punkt_tab" in missing["ifeval"]
    assert "\n" not in missing["ifeval"]


def test_a_missing_package_is_named(monkeypatch, folder, tokenizer):
    monkeypatch.setattr(task_loading._LmEvalTasks, "task", _fails_to_import)
    _, missing = load(["math500"], tokenizer, data_dir=folder)
    assert "No module named 'math_verify'" in missing["math500"]
    assert "pip install 'refreekv[eval]'" in missing["math500"]


def _fails_to_import(self, base, changes):
    raise ModuleNotFoundError("No module named 'math_verify'")


def test_wrong_files_are_refused(tmp_path, tokenizer):
    (tmp_path / "longbench_qasper.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="no field 'context'"):
        load(["qasper"], tokenizer, data_dir=tmp_path)
    (tmp_path / "longbench_qasper.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        load(["qasper"], tokenizer, data_dir=tmp_path)
    (tmp_path / "longbench_qasper.jsonl").write_text("")
    _, missing = load(["qasper"], tokenizer, data_dir=tmp_path)
    assert "holds no sample" in missing["qasper"]


def test_choice_of_samples(tmp_path, tokenizer):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def chosen(**options):
        return load(["gsm8k"], tokenizer, data_dir=tmp_path, **options)[0][0].indices

    assert chosen() is None
    assert chosen(limit=20) is None
    assert chosen(limit=4, seed=1) == chosen(limit=4, seed=1) == sorted(set(chosen(limit=4, seed=1)))
    assert any(chosen(limit=4, seed=1) != chosen(limit=4, seed=seed) for seed in range(2, 6))


def test_samples_keep_their_own_numbers(tmp_path, tokenizer, model):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,), _ = load(["gsm8k"], tokenizer, data_dir=tmp_path, limit=3)
    documents = plan(model, tokenizer, [task], Settings("tiny")).documents["gsm8k"]
    assert [document.id.partition("-")[0] for document in documents] == [str(index) for index in task.indices]
    for index, document in zip(task.indices, documents, strict=True):
        assert document.requests[0].args[0].endswith(f"Q: {index} + 1?\nA:")


def test_missing_is_an_error_of_files():
    assert issubclass(DataMissing, FileNotFoundError)


@torch.no_grad()
def two_stages(model, cache, context, continuation):
    """A log-likelihood, token by token on a cache that was filled with the context."""
    logits, total = model(torch.tensor([context]), past_key_values=cache).logits[0, -1], 0.0
    for token in continuation:
        total += logits.log_softmax(-1)[token].item()
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return total


def test_choices_are_compared_on_the_pruned_cache(tmp_path, model):
    words = [f"w{index}" for index in range(2, VOCAB)]
    rng = random.Random(0)
    rows = [
        {name: " ".join(rng.choices(words, k=size)) for name, size in (("Question", 40), ("Correct Answer", 3))}
        | {f"Incorrect Answer {index}": " ".join(rng.choices(words, k=3)) for index in (1, 2, 3)}
        for _ in range(6)
    ]
    (tmp_path / "gpqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = Tokenizer(WordLevel({word: index for index, word in enumerate(["<pad>", "(", *words])}, unk_token="("))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="(", pad_token="<pad>")
    # The first token comes from the whole prompt, whatever is evicted: the second decides.
    change = {
        "doc_to_choice": ["w9 w33", "w9 w60", "w9 w81", "w9 w12"],
        "doc_to_target": lambda doc: "ABCD".index(doc["answer"][1]),
    }
    (task,), _ = load(["gpqa"], tokenizer, data_dir=tmp_path)
    for key, value in change.items():
        task.task.set_config(key, value)
    policy, settings = create("streaming-llm", ratio=0.3), Settings("tiny")
    planned = plan(model, tokenizer, [task], settings)
    with RecordFile(tmp_path / "out.jsonl", settings.to_dict(), {"p": str(policy)}, TaskRecord) as file:
        records = run(model, tokenizer, [task], planned, {"p": policy}, settings, file)
    moved = 0
    for document, (full, chance, pruned) in zip(planned.documents["gpqa"], batched(records, 3), strict=True):
        context = tokenizer(document.requests[0].args[0])["input_ids"]
        best = {}
        for name, make in (
            ("full", lambda: DynamicCache(config=model.config)),
            ("p", lambda: ReFreeKVCache(model, policy)),
        ):
            likelihoods = {
                choice: two_stages(model, make(), context, tokenizer(choice)["input_ids"])
                for choice in change["doc_to_choice"]
            }
            best[name] = max(likelihoods, key=likelihoods.get)
        assert (full.text.strip(), pruned.text.strip()) == (best["full"], best["p"])
        right = change["doc_to_choice"]["ABCD".index(document.doc["answer"][1])]
        assert (full.scores["score"], pruned.scores["score"]) == (best["full"] == right, best["p"] == right)
        assert (chance.policy, chance.scores["score"]) == ("chance", 0.25)
        assert pruned.budget < 0.4
        moved += best["full"] != best["p"]
    assert moved  # what was evicted shows


def batched(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]
