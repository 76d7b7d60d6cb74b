"""Task scores: records that survive a kill, the same in any batch, and their table."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra [eval])")

from helpers.models import VOCAB, build
from refreekv.cli.commands import app
from refreekv.engines import DEFAULT_POLICY
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.records import TaskRecord
from refreekv.evaluation.results import RecordFile, read
from refreekv.evaluation.tables import bootstrap, by_place, scores
from refreekv.evaluation.tasks.generation import Prompt, answer
from refreekv.evaluation.tasks.loading import BenchTask
from refreekv.evaluation.tasks.running import Settings, plan, run
from refreekv.evaluation.tasks.sample_task import SampleTask
from refreekv.policies import create

WORDS = [f"w{index}" for index in range(VOCAB - 2)]
HALF = create("streaming-llm", ratio=0.4)
SETTINGS = Settings("tiny", max_new_tokens=8)


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


def words(length, seed):
    ids = torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[token - 2] for token in ids)


def samples(count=4, **changes):
    return [
        Sample(f"s{i}", "made-up", words(40 + i, i), answers=(WORDS[i],), metric="share_found", **changes)
        for i in range(count)
    ]


def measured(model, tokenizer, some, policies, settings=SETTINGS, path=None, tmp_path=None, progress=None):
    """Run made-up samples as a task."""
    task = BenchTask("made-up", SampleTask(some), "score")
    planned = plan(model, tokenizer, [task], settings)
    path = path or tmp_path / f"{time.monotonic_ns()}.jsonl"
    with RecordFile(path, settings.to_dict(), {name: str(one) for name, one in policies.items()}, TaskRecord) as file:
        records = run(
            model, tokenizer, [task], planned, policies, settings, file, progress=progress or (lambda count: None)
        )
    return records, planned.left_out


def test_records_are_of_the_answers(tiny, tokenizer, tmp_path):
    records, left_out = measured(tiny, tokenizer, samples(), {"half": HALF}, tmp_path=tmp_path)
    assert not left_out
    assert [(one.sample.partition("-")[0], one.policy) for one in records] == [
        (f"s{i}", policy) for i in range(4) for policy in ("full", "chance", "half")
    ]
    for index, (full, half) in enumerate(zip(records[::3], records[2::3], strict=True)):
        prompt = Prompt(tokenizer(samples()[index].prompt)["input_ids"], [])
        for record, policy in ((full, None), (half, HALF)):
            (given,) = answer(tiny, tokenizer, [prompt], policy, max_new_tokens=8)
            assert record.text == tokenizer.decode(given.tokens, skip_special_tokens=True)
            assert (record.budget, record.bytes_kept) == (given.budget, given.bytes_kept)
            assert record.scores["score"] == (WORDS[index] in record.text)
        assert full.same_as_full is None
        assert half.same_as_full == (full.text == half.text)
        assert half.budget < 0.5
        assert half.prompt_tokens == 40 + index


def test_stop_texts_and_answer_prefix(tiny, tokenizer, tmp_path):
    (sample,) = samples(1, chat=False)
    (record, *_), _ = measured(tiny, tokenizer, [sample], {}, tmp_path=tmp_path)
    third = record.text.split()[2]
    short = replace(sample, extra={"stop": [third]})
    (stopped, *_), _ = measured(tiny, tokenizer, [short], {}, tmp_path=tmp_path)
    assert stopped.text == record.text.partition(third)[0]
    assert stopped.new_tokens < record.new_tokens
    # What the answer begins with is part of the prompt.
    prefixed = replace(sample, extra={"answer_prefix": " " + record.text.split()[0]})
    (rest, *_), _ = measured(tiny, tokenizer, [prefixed], {}, tmp_path=tmp_path)
    assert rest.prompt_tokens == record.prompt_tokens + 1
    expected = record.text.split()[1:]
    assert rest.text.split()[: len(expected)] == expected


def test_a_later_question_is_not_compressed(tiny, tokenizer, tmp_path):
    (sample,) = samples(1, question="w1 w2 w3", chat=False)
    (_, half), _ = measured(tiny, tokenizer, [sample], {"half": HALF}, tmp_path=tmp_path)
    prompt = Prompt(tokenizer(sample.prompt)["input_ids"], tokenizer("w1 w2 w3")["input_ids"])
    (given,) = answer(tiny, tokenizer, [prompt], HALF, max_new_tokens=8)
    assert half.text == tokenizer.decode(given.tokens, skip_special_tokens=True)
    assert half.prompt_tokens == 40


def test_resuming(tiny, tokenizer, tmp_path):
    path, policies = tmp_path / "out" / "results.jsonl", {"half": HALF}
    records, _ = measured(tiny, tokenizer, samples(), policies, path=path)
    stored = read(path, TaskRecord).records
    assert sorted(stored, key=str) == sorted(records, key=str)

    # Killed in the middle of a line: cut off and measured again, nothing else is.
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:11]) + lines[11][:30])
    counted = []
    again, _ = measured(tiny, tokenizer, samples(), policies, path=path, progress=counted.append)
    assert again == records
    assert path.read_bytes() == whole
    assert sum(counted) == 8
    assert len(again) == 12

    # Another sample under the same name is another sample; other settings do not go into one file.
    changed = [replace(samples()[0], prompt=words(20, 99))]
    measured(tiny, tokenizer, changed, {}, path=path)
    assert len(read(path, TaskRecord).records) == 13
    with pytest.raises(ValueError, match="max_new_tokens = 8"):
        measured(tiny, tokenizer, changed, {}, replace(SETTINGS, max_new_tokens=3), path=path)


def test_batches_give_the_same_records(tiny, tokenizer, tmp_path):
    mixed = [*samples(3), *samples(2, question="w1 w2 w3")]
    mixed = [replace(sample, id=str(index)) for index, sample in enumerate(mixed)]
    one, _ = measured(tiny, tokenizer, mixed, {"half": HALF}, tmp_path=tmp_path)
    many, _ = measured(tiny, tokenizer, mixed, {"half": HALF}, replace(SETTINGS, batch_size=3), tmp_path=tmp_path)
    assert [(record.key, record.text) for record in one] == [(record.key, record.text) for record in many]
    assert len(one) == 15


def test_chance_is_the_answer_to_another_sample(tiny, tokenizer, tmp_path):
    words_said = [f"w{index}" for index in range(VOCAB - 2)]
    some = [replace(sample, answers=tuple(words_said[index::4])) for index, sample in enumerate(samples(3))]
    records, _ = measured(tiny, tokenizer, some, {}, tmp_path=tmp_path)
    full, chance = records[::2], records[1::2]
    assert {one.policy for one in chance} == {"chance"}
    assert [one.text for one in chance] == [one.text for one in (*full[1:], full[0])]
    for sample, record in zip(some, chance, strict=True):
        assert record.scores["score"] == pytest.approx(
            sum(word in record.text for word in sample.answers) / len(sample.answers)
        )
    assert list(scores(records)[1].policy) == ["full"]


def test_long_prompts_are_left_out(tokenizer, tmp_path):
    short = build("llama", attention="sdpa", max_position_embeddings=45)
    settings = replace(SETTINGS, max_new_tokens=4)
    records, left_out = measured(short, tokenizer, samples(), {}, settings, tmp_path=tmp_path)
    assert [record.sample.partition("-")[0] for record in records[::2]] == ["s0", "s1"]
    assert "42 tokens, at most 41 can be asked" in left_out[0]
    assert len(left_out) == 2
    _, left_out = measured(short, tokenizer, samples(), {}, replace(settings, max_tokens=40), tmp_path=tmp_path)
    assert len(left_out) == 3


def record(family, sample, policy, score, budget=1.0):
    found = {} if score is None else {"score": score}
    return TaskRecord(sample, family, policy, "m", 10, 2, budget, 100, round(100 * budget), "", found)


def test_table():
    made = [record("a", f"{i}", "full", value) for i, value in enumerate((1, 1, 0, 1))]
    made += [record("a", f"{i}", "p", value, 0.5) for i, value in enumerate((1, 0, 0, 0))]
    made += [record("b", "0", "full", 0.2), record("b", "0", "p", 0.4, 0.7)]
    made += [record("c", "0", "full", None), record("c", "0", "p", None, 0.3)]
    results, policies = scores(made)
    full, policy = policies.itertuples()
    rows = {(one.family, one.policy): one for one in results.itertuples()}
    assert rows["a", "full"].score.mean == 0.75
    assert rows["a", "p"].score.mean == 0.25
    assert rows["a", "p"].change.mean == -0.5
    assert rows["a", "p"].n == 4
    assert rows["a", "p"].bytes_kept == 200
    assert rows["c", "p"].score is None
    assert (full.score, full.worst) == (pytest.approx(0.475), None)
    assert policy.change == pytest.approx((-0.5 + 0.2) / 2)
    assert policy.worst == "a"
    assert policy.budget == pytest.approx(0.5)


def test_needles_by_length_and_depth():
    made = [
        replace(record("niah", f"{length}/{depth}/{i}", "p", value), place=[length, depth])
        for length, depth, values in ((900, 0.5, (1, 0)), (400, 0.0, (1, 1)), (400, 0.5, (0, 0)))
        for i, value in enumerate(values)
    ]
    found = by_place([*made, record("a", "0", "p", 1)])
    assert list(found) == [("niah", "p")]
    assert list(found["niah", "p"].items()) == [((400, 0.0), 1), ((400, 0.5), 0), ((900, 0.5), 0.5)]


def test_bootstrap():
    assert bootstrap([0.3] * 9) == bootstrap([0.3] * 9)
    same = bootstrap([0.3] * 9)
    assert (same.mean, same.low, same.high) == pytest.approx((0.3, 0.3, 0.3))
    # 100 coin flips: the mean's standard error is 0.05.
    flips = bootstrap([0.0, 1.0] * 50)
    assert flips.mean == 0.5
    assert flips.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert flips.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)


# -- the command --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, tiny):
    path = tmp_path_factory.mktemp("model")
    tiny.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def command(*args):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["eval", *map(str, args)])


def test_command(folder, tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    args = ["--model", folder, "--data-dir", tmp_path, "--limit", 2, "--max-new-tokens", 3]
    args += ["--tasks", "gsm8k,niah:tokens=60,qasper", "--policy", "streaming-llm:ratio=0.4,0.6"]
    args += ["--out", tmp_path / "o"]
    result = command(*args, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(one["family"], one["policy"], one["n"]) for one in found["tasks"]] == [
        (family, policy, n)
        for family, n in (("gsm8k", 1), ("niah:tokens=60", 2))
        for policy in ("full", "chance", "streaming-llm:ratio=0.4", "streaming-llm:ratio=0.6")
        if n > 1 or policy != "chance"
    ]
    assert "longbench_qasper.jsonl" in found["not_run"]["qasper"]
    assert len(Path(tmp_path / "o").read_text().splitlines()) == 2 + 11
    assert [(one["length"], one["depth"]) for one in found["needles"][:2]] == [(60, 0.0), (60, 0.25)]
    shown = command(*args)
    assert shown.exit_code == 0, shown.output
    assert "not run: qasper" in shown.stdout
    assert "niah:tokens=60 (n = 2)" in shown.stdout
    assert "niah:tokens=60, full: score by length and depth" in shown.stdout
    assert "  streaming-llm:ratio=0.6 " in shown.stdout  # in one piece
    assert len(Path(tmp_path / "o").read_text().splitlines()) == 2 + 11


def test_eval_hands_tasks_over(folder, tmp_path):
    args = ["--model", folder, "--tasks", "niah:tokens=20", "--limit", 1, "--out", tmp_path / "o", "--json"]
    result = command(*args)
    assert result.exit_code == 0, result.output
    assert [one["policy"] for one in json.loads(result.stdout)["policies"]] == ["full", DEFAULT_POLICY]


def test_nothing_to_run_is_no_failure(folder, tmp_path):
    result = command("--model", folder, "--tasks", "qasper,ifeval", "--data-dir", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tasks"] == []
    assert set(found["not_run"]) == {"qasper", "ifeval"}


def test_killed_and_resumed(folder, tmp_path):
    """A real SIGKILL in the middle: the finished file holds each sample once, with the answers of an unbroken run."""
    args = ["--model", folder, "--tasks", "niah:tokens=40,multi-key-retrieval:tokens=40,keys=2", "--limit", 10]
    args += ["--max-new-tokens", 12, "--json", "--out"]
    out = tmp_path / "killed.jsonl"
    program = [sys.executable, "-m", "refreekv", "eval", *map(str, args), str(out)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out.exists() and len(out.read_bytes().splitlines()) > 8):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    kept = whole.splitlines()
    assert len(kept) < 2 + 60
    resumed = command(*args, out)
    assert resumed.exit_code == 0, resumed.output
    assert out.read_bytes().startswith(whole)  # nothing lost, nothing written anew
    unbroken = command(*args, tmp_path / "unbroken.jsonl")
    assert json.loads(resumed.stdout) == json.loads(unbroken.stdout)
    one, other = (read(path, TaskRecord).records for path in (out, tmp_path / "unbroken.jsonl"))
    assert len(out.read_bytes().splitlines()) == 2 + 60  # nothing repeated
    assert sorted(map(str, one)) == sorted(map(str, other))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "gsm9k"], "did you mean 'gsm8k'"),
        (["--tasks", "pg19", "--data-dir", "DATA"], "has no score; measure its fidelity"),
        (["--tasks", "gsm8k:after"], "has no parameter 'after'"),
        (["--policy", "snapvk"], "no policy is named"),
        (["--data-dir", "no/such/folder"], "is not a folder"),
    ],
)
def test_command_refuses(folder, args, message, tmp_path):
    (tmp_path / "pg19.jsonl").write_text(json.dumps({"id": "1", "text": "word " * 9000}) + "\n")
    result = command("--model", folder, *[str(tmp_path) if one == "DATA" else one for one in args])
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_other_files_are_refused(folder, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    result = command("--model", folder, "--tasks", "niah:tokens=20", "--limit", 1, "--out", path)
    assert result.exit_code == 2
    assert "line 1: not a results file" in result.stderr
    assert path.read_text() == "my notes\n"


def test_command_lists_tasks():
    result = command("--list")
    assert result.exit_code == 0
    assert "gsm8k" in result.stdout
    assert "generated: " in result.stdout
