"""Task scores of the vLLM benchmark, without an engine."""

import argparse

import pytest

from helpers.models import characters
from refreekv.evaluation.data.encoding import encode
from refreekv.evaluation.data.families import load
from refreekv.evaluation.data.samples import Sample
from vllm_gpu import score_of, scores_table, task_scores, word_f1

TASKS = "niah:tokens=60;multi-key-retrieval:tokens=60"


def options_of(tasks, folder=None):
    return argparse.Namespace(tasks=tasks, samples=3, data_dir=folder)


def test_right_answers_score_one_and_what_follows_them_is_not_read(tmp_path):
    tokenizer = characters()
    tokenizer.add_special_tokens({"eos_token": "\x02"})
    tokenizer.save_pretrained(tmp_path)
    samples = [sample for name in TASKS.split(";") for sample in load(name, limit=3)]
    asked = [encode(tokenizer, sample) for sample in samples]
    right = [tokenizer(" ".join(sample.answers), add_special_tokens=False)["input_ids"] for sample in samples]

    def answer(prompts):
        assert prompts == [one.context + one.question for one in asked]
        return right

    scores = task_scores(options_of(TASKS), str(tmp_path), answer)
    assert scores == {name: [1] * 3 for name in TASKS.split(";")}
    end = tokenizer.eos_token_id
    worse = task_scores(options_of(TASKS), str(tmp_path), lambda _: [*right[:4], *([end, *ids] for ids in right[4:])])
    assert worse == dict(zip(TASKS.split(";"), ([1] * 3, [1, 0, 0]), strict=True))
    # Differences of 0, 0, 0, 0, -1 and -1: their standard deviation is .516.
    table = scores_table([{"mode": "stock", "scores": scores}, {"mode": "other", "scores": worse}])
    assert table.endswith("| other | 1.000 | 0.333 | -0.333 ± 0.413 (n = 6) |")


def test_families_that_only_lm_eval_scores_have_the_words_f1(tmp_path):
    row = '{"_id": "1", "input": "Who?", "context": "A text.", "answers": ["the cat sat", "no"]}\n'
    (tmp_path / "longbench_qasper.jsonl").write_text(row)
    (sample,) = load("qasper", data_dir=tmp_path)
    assert not sample.metric
    assert score_of(sample, "No!") == 1
    assert score_of(sample, "A cat ran") == pytest.approx(0.5)
    assert score_of(sample, "dogs") == 0


@pytest.mark.parametrize("pair", [("The cat, sat", "cat sat down"), ("", "a"), ("yes", "Yes."), ("x_y", "xy z xy")])
def test_the_words_f1_is_lm_evals(pair):
    metrics = pytest.importorskip("lm_eval.tasks.longbench.metrics")
    assert word_f1(*pair) == pytest.approx(metrics.qa_f1_score(*pair))


def test_samples_without_answers_are_refused():
    with pytest.raises(SystemExit, match="books have no answers"):
        score_of(Sample("1", "books", "text"), "text")
