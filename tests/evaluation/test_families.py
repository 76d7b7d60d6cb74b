"""Task families: made-up rows in the formats of the datasets, and generated text."""

import json
import random
import re
import sys
import types
from pathlib import Path

import pytest

from refreekv.evaluation.data import families, stress, stress_code, stress_text
from refreekv.evaluation.data.datasets import DataMissing
from refreekv.evaluation.data.families import DATASETS, load, names, split
from refreekv.evaluation.tasks.scoring import metrics, score

LONG = {"context": "Bo lives in Rome.", "input": "Where does Bo live?", "answers": ["Rome", "in Rome"], "id": "row"}
RULER = {
    "input": "A list.\n1. a 2. b\nQuestion: which?",
    "outputs": ["a", "b"],
    "answer_prefix": " Answer:",
    "index": 4,
}
KEY, VALUE = "0f-k", "9c-v"
ROWS = {
    "gsm8k.jsonl": [
        {"question": f"{i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(9)
    ],
    "theoremqa.jsonl": [
        {"Question": "2·3?", "Answer": 6, "Answer_type": "integer", "Picture": None, "id": "a/b.json"},
        {"Question": "See it.", "Answer": 1, "Answer_type": "integer", "Picture": "p.png", "id": "c"},
        {"Question": "Even?", "Answer": True, "Answer_type": "bool", "Picture": None, "id": "d"},
    ],
    "truthfulqa.jsonl": [
        {
            "Question": "Is tin alive?",
            "Best Answer": "No",
            "Correct Answers": "It is not; No",
            "Incorrect Answers": "Yes; Sometimes",
        }
    ],
    "humaneval.jsonl": [
        {
            "task_id": "T/0",
            "prompt": "def one():\n",
            "entry_point": "one",
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n",
        }
    ],
    "mt_bench.jsonl": [{"question_id": 5, "category": "x", "turns": ["Write a poem.", "Now shorter."]}],
    "qmsum_meetings.jsonl": [{"meeting_id": 1, "transcript": "A: hello"}, {"meeting_id": 2, "transcript": "B: bye"}],
    "qmsum_queries.jsonl": [{"meeting_id": 2, "kind": "general", "input": "Who left?", "answers": ["B"]}],
    "pg19.jsonl": [{"id": "7", "text": " ".join(f"word{i}" for i in range(9000))}],
    "wikitext2.jsonl": [{"id": "w", "text": "tale " * 900}, {"id": "short", "text": "tale " * 20}],
    "kv_retrieval_75.jsonl": [{"ordered_kv_records": [["a", "b"], [KEY, VALUE]], "key": KEY, "value": VALUE}],
    "longbench_lcc.jsonl": [{"context": "a = 1\n", "input": "", "answers": ["b = a"], "_id": "c"}],
    "longbench_triviaqa.jsonl": [{"context": "Q: x A: y", "input": "Q: z", "answers": ["w"], "_id": "t"}],
}
for dataset in DATASETS.values():
    for name in dataset.files:
        ROWS.setdefault(name, [RULER if name.startswith("ruler") else LONG])
ROWS["kv_retrieval_140.jsonl"] = ROWS["kv_retrieval_75.jsonl"]


@pytest.fixture
def folder(tmp_path):
    for name, rows in ROWS.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_dataset_loads_and_gold_scores_full(name, folder):
    samples = load(name, data_dir=folder)
    assert samples
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.family == name
        assert sample.prompt.strip()
        assert json.dumps(sample.extra)
        assert not sample.metric or sample.metric in metrics()
        if sample.metric:
            text = f"The answer is {sample.answers[0]}." if sample.metric == "theoremqa" else ", ".join(sample.answers)
            assert score(sample, text)["score"] == 1
            assert score(sample, "quite elsewhere")["score"] < 0.5


def test_gsm8k_hides_the_calculator_marks(folder):
    sample = load("gsm8k", data_dir=folder)[3]
    assert sample.answers == ("It is 4.\n#### 4",)
    assert "3 + 1?" in sample.prompt


def test_theoremqa_skips_pictures(folder):
    assert [sample.extra["answer_type"] for sample in load("theoremqa", data_dir=folder)] == ["integer", "bool"]


def test_truthfulqa_has_both_sides(folder):
    (sample,) = load("truthfulqa", data_dir=folder)
    assert sample.answers == ("No", "It is not")
    assert sample.extra["incorrect"] == ["Yes", "Sometimes"]


def test_mt_bench_second_turn_is_the_question(folder):
    (sample,) = load("mt-bench", data_dir=folder)
    assert (sample.prompt, sample.question, sample.metric) == ("Write a poem.", "Now shorter.", "")


def test_question_after_the_context(folder):
    for name, item in DATASETS.items():
        if not item.splits:
            with pytest.raises(ValueError, match="cannot come after"):
                load(f"{name}:after", data_dir=folder)
            continue
        (whole,), (apart,) = load(name, data_dir=folder), load(f"{name}:after", data_dir=folder)
        assert apart.family == f"{name}:after"
        assert whole.prompt == f"{apart.prompt}\n\n{apart.question}"
        assert not whole.question
        assert apart.answers == whole.answers
        assert apart.id != whole.id


def test_meetings_are_joined_by_number(folder):
    (sample,) = load("qmsum-meetings", data_dir=folder)
    assert "B: bye" in sample.prompt
    assert "hello" not in sample.prompt


def test_kv_retrieval_prompt_is_json(folder):
    (sample,) = load("kv-retrieval-75:after", data_dir=folder)
    assert json.loads(sample.prompt[sample.prompt.index("{") :]) == {"a": "b", KEY: VALUE}
    assert KEY in sample.question


def test_books_are_cut_at_words_and_go_on(folder):
    samples = load("pg19:chars=1000,following=100", data_dir=folder)
    text = ROWS["pg19.jsonl"][0]["text"]
    assert len(samples) == (len(text) - 1100) // 1000 + 1
    for sample in samples:
        assert 980 < len(sample.prompt) < 1020
        assert f"{sample.prompt} {sample.answers[0]}" in text
        assert not sample.chat
        assert re.fullmatch(r"word\d+", sample.prompt.split()[0])


def test_short_articles_are_left_out(folder):
    (sample,) = load("wikitext2", data_dir=folder)
    assert sample.id.endswith("-w")
    assert sample.answers[0].startswith("tale")


def test_sampling_is_deterministic_and_in_order(folder):
    every = [sample.id for sample in load("gsm8k", data_dir=folder)]
    some = [sample.id for sample in load("gsm8k", data_dir=folder, limit=4, seed=1)]
    assert some == [sample.id for sample in load("gsm8k", data_dir=folder, limit=4, seed=1)]
    assert some == sorted(some, key=every.index)
    assert len(set(some)) == 4
    assert any(some != [s.id for s in load("gsm8k", data_dir=folder, limit=4, seed=seed)] for seed in range(2, 6))
    with pytest.raises(ValueError, match="at least 1"):
        load("gsm8k", data_dir=folder, limit=0)


def test_missing_and_wrong_data_say_so(tmp_path):
    with pytest.raises(DataMissing, match=r"has no gsm8k\.jsonl"):
        load("gsm8k", data_dir=tmp_path)
    with pytest.raises(DataMissing, match=r"not on the hub.*kv_retrieval_75\.jsonl"):
        load("kv-retrieval-75")
    (tmp_path / "gsm8k.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="no field 'answer'"):
        load("gsm8k", data_dir=tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match=r"gsm8k\.jsonl, line 1: not JSON"):
        load("gsm8k", data_dir=tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text("")
    with pytest.raises(DataMissing, match="holds no sample"):
        load("gsm8k", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm9k", "did you mean 'gsm8k'"),
        ("niah:token=3", "did you mean 'tokens'"),
        ("niah:tokens=many", "of type int"),
        ("niah:tokens=-1", "must be positive"),
        ("niah:after", "cannot come after"),
        ("question-after:facts=99", "cannot be made"),
        ("multi-key-retrieval:keys=90000", "cannot be made"),
    ],
)
def test_errors_help(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def hub(monkeypatch, rows):
    """A package named datasets that knows one dataset, and what it was asked for."""
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_hub_rows_have_other_names(monkeypatch):
    asked = hub(monkeypatch, [{"_id": "h", "context": "c", "question": "who?", "answers": ["me"]}])
    (sample,) = load("qasper_e")
    assert asked == [("Xnhyacinth/LongBench", "qasper_e", "test")]
    assert "who?" in sample.prompt
    row = {"question": "q", "best_answer": "No", "correct_answers": ["No", "Not"], "incorrect_answers": ["Yes"]}
    hub(monkeypatch, [row])
    assert load("truthfulqa")[0].answers == ("No", "Not")
    paragraphs = [{"title": "T", "paragraph_text": "body"}]
    musique = {"id": "m", "paragraphs": paragraphs, "question": "q", "answer": "a", "answer_aliases": ["A"]}
    hub(monkeypatch, [{**musique, "answerable": False}, {**musique, "answerable": True}])
    (sample,) = load("musique")
    assert "Passage 1:\nT\nbody" in sample.prompt
    assert sample.answers == ("a", "A")
    parts = {"title": ["T", "U"], "sentences": [["one. ", "two."], ["three."]]}
    hub(monkeypatch, [{"id": "h", "question": "q", "answer": "a", "context": parts}])
    assert "one. two.\nPassage 2:\nU" in load("hotpotqa")[0].prompt


def test_hub_out_of_reach(monkeypatch):
    hub(monkeypatch, ConnectionError("no route"))
    with pytest.raises(DataMissing, match=r"could not be read from the hub \(ConnectionError: no route\)"):
        load("gsm8k")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataMissing, match=r"refreekv\[eval\]"):
        load("gsm8k")


def test_names_and_lists():
    listing = names()
    assert set(listing) == set(DATASETS) | set(stress.FAMILIES)
    assert all(summary and "\n" not in summary for summary in listing.values())
    assert split(["gsm8k,niah:tokens=500,depths=3,qasper:after", "gsm8k"]) == [
        "gsm8k",
        "niah:tokens=500,depths=3",
        "qasper:after",
    ]
    assert families.parse("niah:tokens=500, depths=3") == ("niah", {"tokens": 500, "depths": 3}, False)


# -- generated families -------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(stress.FAMILIES))
def test_generated_families(name):
    samples = load(name, limit=6, seed=5)
    assert samples == load(name, limit=6, seed=5)
    assert samples[:3] == load(name, limit=3, seed=5)
    assert samples != load(name, limit=6, seed=6)
    assert len({sample.id for sample in samples}) == len({sample.prompt for sample in samples}) == 6
    for sample in samples:
        assert json.dumps(sample.extra)
        whole = sample.system + sample.prompt
        if sample.metric == "share_found":
            # The answer is in the text, and not given away by the question.
            for answer in sample.answers:
                assert answer in whole
                assert answer not in (sample.question or whole.rpartition("\n\n")[2])
        if sample.answers:
            gold = ", ".join(sample.answers)
            if sample.extra.get("instructions"):
                gold = f"{sample.extra['instructions'][0]['phrase']} {gold}"
            assert score(sample, gold)["score"] == 1
            assert score(sample, "I do not know")["score"] < 0.5


@pytest.mark.parametrize("name", sorted(name for name in stress.FAMILIES if "tokens" in stress.parameters(name)))
def test_size_is_roughly_what_was_asked_for(name):
    # What is asked and told beside the text weighs more in short prompts.
    for tokens, most in ((512, 1.75), (4096, 1.15), (32768, 1.05)):
        for sample in load(f"{name}:tokens={tokens}", limit=3):
            length = len(sample.system + sample.prompt)
            chars = stress_code.CHARS_PER_TOKEN if name == "long-code" else stress_text.CHARS_PER_TOKEN
            assert 0.95 < length / (chars * tokens) < most, (name, tokens, length)


def test_every_kind_of_stress_can_be_made_long():
    asked = {"multi-key-retrieval", "multi-value-retrieval", "variable-tracking", "question-after", "instructions"}
    asked |= {"system-prompt", "few-shot-arithmetic", "long-code", "niah"}
    assert asked <= set(stress.FAMILIES)
    assert all("tokens" in stress.parameters(name) for name in stress.FAMILIES)


def test_text_is_not_degenerate():
    parts = stress_text.sentences(random.Random(0), 6000)
    assert len(set(parts)) > 0.99 * len(parts)
    starts = {" ".join(part.split()[:2]) for part in parts}
    assert len(starts) > len(parts) / 3
    words = re.findall(r"[a-z]+", " ".join(parts).lower())
    assert len(set(words)) > 500
    assert not re.search(r"\ba [aeiou]", " ".join(parts))


def test_needles_go_through_depths_and_lengths():
    samples = load("niah:tokens=1200,lengths=2,depths=3", limit=6)
    assert [(s.extra["length"], s.extra["depth"]) for s in samples] == [
        (length, depth) for length in (600, 1200) for depth in (0, 0.5, 1)
    ]
    for sample in samples:
        text = sample.prompt.rpartition("\n\n")[0]
        assert text.index(sample.answers[0]) / len(text) == pytest.approx(sample.extra["depth"], abs=0.12)


def test_variable_chains_are_resolvable():
    for sample in load("variable-tracking:tokens=600", limit=8):
        text, _, question = sample.prompt.rpartition("\n\n")
        values = {}
        for match in re.finditer(
            r"Set (\w{5}) to (\d{5})|(\w{5}) starts out as (\d{5})|Let (\w{5}) be (\d{5})"
            r"|Then (\w{5}) takes the value of (\w{5})|(\w{5}) is given what (\w{5}) holds|Copy (\w{5}) to (\w{5})",
            text,
        ):
            one, other = [group for group in match.groups() if group]
            if match.group(11):
                one, other = other, one
            values[one] = values.get(other, other)
        wanted = re.search(r"\d{5}", question).group()
        assert {name for name, value in values.items() if value == wanted} == set(sample.answers)


def test_arithmetic_is_right():
    for sample in load("few-shot-arithmetic:shots=5,steps=4", limit=10):
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", sample.prompt + sample.answers[0])
        assert len(steps) == 6 * 4
        for one, sign, other, result in steps:
            assert {"+": int(one) + int(other), "-": int(one) - int(other), "*": int(one) * int(other)}[sign] == int(
                result
            )
            assert int(result) >= 0


def test_code_compiles_and_questions_are_right():
    for sample in load("long-code:tokens=1500", limit=12):
        files = re.split(r"^# file: (.+)$", sample.prompt.partition("\n\nWhat ")[0], flags=re.MULTILINE)[1:]
        sources = dict(zip(files[::2], files[1::2], strict=True))
        space = {}
        for path, source in sources.items():
            if not path.endswith("__init__.py"):
                exec(compile(source, path, "exec"), space)
        asked = sample.prompt.rpartition("\n\n")[2]
        if match := re.search(r"value of (\w+) in", asked):
            assert space[match.group(1)] == int(sample.answers[0])
        elif match := re.search(r"What does (\w+)\((\d+)\) return", asked):
            assert space[match.group(1)](int(match.group(2))) == int(sample.answers[0])
        else:
            module = re.search(r"from (\S+) import$", sample.prompt).group(1).replace(".", "/") + ".py"
            first = re.search(r"^def (\w+)", sources[module], re.MULTILINE)
            assert sample.answers == (f" {first.group(1)}",)


def test_confidential_prompts_do_not_hand_out_the_secret():
    for sample in load("system-prompt", limit=12):
        for secret in sample.extra.get("secrets", ()):
            assert secret in sample.system
            assert secret not in sample.prompt


def test_nothing_of_the_data_is_shipped():
    package = Path(families.__file__).parent
    assert not list(package.rglob("*.jsonl"))
