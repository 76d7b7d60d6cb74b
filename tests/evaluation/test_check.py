"""`refreekv check`: prompts of the package and of a user's own, verdicts, and formats that break a model."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import refreekv
from helpers.command_line import assert_refused, runner, save_chat_model, words
from helpers.models import characters, with_key_bias
from refreekv import policies
from refreekv.engines import DEFAULT_POLICY
from refreekv.evaluation.checking import check as checking
from refreekv.evaluation.checking import prompts, verdicts
from refreekv.evaluation.checking.verdicts import BREAKS, SURVIVES, VISIBLE, CandidateResult
from refreekv.evaluation.data.encoding import encode
from refreekv.evaluation.data.own_prompts import as_samples, read_prompts
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity import formats

TEXT = "The bridge is closed in May, and the baker opens late. "


# -- prompts ------------------------------------------------------------------------------


def test_prompts_of_the_package():
    made = prompts.rounds()
    assert made == prompts.rounds(), "the same each time"
    assert [len(one) for one in made] == [len(prompts.KINDS)] * len(prompts.SIZES)
    every = [sample for one in made for sample in one]
    assert len({sample.id for sample in every}) == len(every)
    assert {sample.family for sample in every} == set(prompts.KINDS)
    assert not any(sample.answers for sample in every), "nothing is scored"
    assert any(sample.question for sample in every)
    assert any(sample.earlier for sample in every)
    assert len({prompts.prompt("document", 600, index).prompt for index in range(3)}) == 3


@pytest.mark.parametrize("tokens", prompts.SIZES)
@pytest.mark.parametrize("kind", prompts.KINDS)
def test_a_prompt_is_about_as_long_as_it_is_to_be(kind, tokens):
    """By characters; the real tokenizer counts below."""
    sample = prompts.prompt(kind, tokens)
    length = sum(map(len, [sample.prompt, *(said for _, said in sample.earlier)]))
    per_token = {"keyed-list": 1.25, "code": 3.4}.get(kind, 4.3)
    assert 0.7 < length / per_token / tokens < 1.4


@pytest.mark.real_model
def test_the_longest_prompts_fit_a_context_of_8192(smollm2):
    _, tokenizer = smollm2
    lengths = [len(encode(tokenizer, prompts.prompt(kind, prompts.SIZES[-1])).context) for kind in prompts.KINDS]
    assert min(lengths) > 7_000
    assert max(lengths) + checking.CONTINUATION < 8_192
    assert all(512 < len(encode(tokenizer, sample).context) < 900 for sample in prompts.rounds()[0])


def test_the_value_asked_for_is_in_the_list():
    text = prompts.prompt("keyed-list", 1000).prompt
    pairs = json.loads(text[text.index("{") : text.rindex("}") + 1])
    key = text.rsplit('under "', 1)[1].split('"')[0]
    assert key in pairs
    assert len(set(pairs.values())) == len(pairs)


def test_earlier_turns_go_through_the_chat_template():
    sample = Sample(id="a", family="own", prompt="Why?", earlier=(("user", "Hi."), ("assistant", "No.")))
    assert encode(characters(), sample).text == "[user]Hi.[assistant]No.[user]Why?[assistant]"
    assert encode(characters(None), sample).text == "User: Hi.\n\nAssistant: No.\n\nWhy?"


def test_own_prompts_as_text(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("One\nand more.\n---\n\n---\nTwo.\n", encoding="utf-8")
    assert [sample.prompt for sample in read_prompts(file)] == ["One\nand more.", "Two."]
    assert [sample.id for sample in read_prompts(file)] == ["prompt-1", "prompt-2"]


def test_own_prompts_in_python(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("One.\n---\nTwo.", encoding="utf-8")
    made = Sample(id="x", family="f", prompt="Two.")
    assert as_samples(["One.", made]) == [Sample(id="prompt-1", family="own", prompt="One."), made]
    assert as_samples(file) == read_prompts(file) == as_samples(["One.", "Two."])
    with pytest.raises(TypeError, match="got one text"):
        as_samples("One.")


def test_own_prompts_as_json_lines(tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "left out"},
    ]
    lines = [
        "Only text.",
        {"prompt": "A document.", "question": "What?", "family": "reports", "id": "7", "chat": False},
        {"messages": messages},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    text, document, conversation = read_prompts(file)
    assert (text.prompt, text.family, text.id, text.chat) == ("Only text.", "own", "line-1", True)
    assert (document.question, document.family, document.id, document.chat) == ("What?", "reports", "7", False)
    assert conversation.system == "Be brief."
    assert conversation.earlier == (("user", "Hi."), ("assistant", "No."))
    assert conversation.prompt == "Why?"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no prompt"),
        ('{"text": "a"}', "line 1 .* either prompt or messages"),
        ('"a"\n{"prompt": 3}', "line 2 .* prompt is to be text, got 3"),
        ('{"prompt": " "}', "line 1 .* the prompt is empty"),
        ('"a"\nplain', "line 2 "),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "none of a user"),
        ('{"messages": [{"role": "user"}]}', "each with a role and a content"),
        ('{"prompt": "a", "chat": "no"}', "chat is to be true or false"),
        ('{"prompt": "a", "id": "1"}\n{"prompt": "b", "id": "1"}', "two prompts of family 'own' with the id '1'"),
    ],
)
def test_own_prompts_that_cannot_be_read(tmp_path, lines, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(file)


# -- verdicts -----------------------------------------------------------------------------

FLOOR = CandidateResult("full", 1.0, 0.0, 0.0, "a", 0.0, 0.0, 10)


@pytest.mark.parametrize(
    ("mean", "worst", "floor", "expected"),
    [
        (0.0, 0.0, 0.0, SURVIVES),
        (0.004, 0.03, 0.0, SURVIVES),
        (0.0041, 0.01, 0.0, VISIBLE),
        (0.001, 0.031, 0.0, VISIBLE),
        (0.05, 0.3, 0.0, VISIBLE),
        (0.051, 0.06, 0.0, BREAKS),
        (0.001, 0.31, 0.0, BREAKS),
        # A model whose own second run differs by more is judged by that.
        (0.006, 0.02, 0.002, SURVIVES),
        (0.0061, 0.02, 0.002, VISIBLE),
        (0.06, 0.3, 0.02, SURVIVES),
    ],
)
def test_verdicts(mean, worst, floor, expected):
    of = replace(FLOOR, kl_mean=mean, kl_worst=worst)
    assert verdicts.verdict(of, replace(FLOOR, kl_mean=floor, kl_worst=10 * floor)) == expected


def test_thresholds_lie_between_what_was_measured():
    """Worst of three models: the floor, eight bits and the default below; four bits between; what fails above."""
    floor = replace(FLOOR, kl_mean=0.00132, kl_worst=0.0101)
    for name, mean, worst, expected in (
        ("full", 0.00135, 0.0101, SURVIVES),
        ("full@int8", 0.00124, 0.0047, SURVIVES),
        ("adaptive", 0.00203, 0.0245, SURVIVES),
        ("full@int4, S", 0.01176, 0.1240, VISIBLE),
        ("full@int4, G", 0.01633, 0.0754, VISIBLE),
        ("snapkv:ratio=0.5@int4, G", 0.14, 1.17, BREAKS),
        ("int4 not centred, Q", 0.76, 3.6, BREAKS),
        ("refreekv, Q", 0.01026, 0.4644, BREAKS),
    ):
        assert verdicts.verdict(replace(FLOOR, kl_mean=mean, kl_worst=worst), floor) == expected, name


def test_a_result_sums_up_its_records():
    model, tokenizer = with_key_bias(16), characters()
    found = refreekv.check(model, tokenizer, prompts=_prompts(2), more=["snapkv:ratio=0.5"])
    records = [record for record in found.records if record.policy == "snapkv:ratio=0.5"]
    one = next(one for one in found.results if one.name == "snapkv:ratio=0.5")
    assert len(records) == one.prompts == 2
    assert one.kl_mean == pytest.approx(sum(record.kl_mean for record in records) / 2)
    assert one.kl_worst == max(record.kl_mean for record in records)
    assert one.worst_prompt == max(records, key=lambda record: record.kl_mean).sample
    assert one.bytes_share == pytest.approx(
        sum(record.bytes_kept for record in records) / sum(record.bytes_full for record in records)
    )
    assert one.changed_answers == sum(not record.same_path for record in records) / 2


# -- models -------------------------------------------------------------------------------


def _prompts(count):
    return [Sample(id=f"p{n}", family="own", prompt=TEXT * 6 + f"Number {n}?") for n in range(count)]


def test_a_format_that_breaks_a_model_is_found(monkeypatch):
    """The four bits that this library once had broke Qwen2.5, whose keys hold large constants."""
    model, tokenizer = with_key_bias(64), characters()
    model.lm_head.weight.data *= 4  # predictions as sure as those of trained models
    good = refreekv.check(model, tokenizer, prompts=_prompts(2))
    named = {one.name: one for one in good.results}
    assert named["full@int4"].verdict == SURVIVES
    assert not good.breaks
    # What the format was before the mean was taken out.
    monkeypatch.setattr(formats, "centre_of", lambda entries, real=None: torch.zeros_like(entries[..., 0, :]))
    bad = {one.name: one for one in refreekv.check(model, tokenizer, prompts=_prompts(2)).results}
    assert bad["full@int4"].verdict == BREAKS
    assert bad["full@int4"].kl_mean > 20 * named["full@int4"].kl_mean
    assert "breaks" in str(replace(good, results=(bad["full@int4"],)))


def test_candidates():
    found, missing = checking.candidates(with_key_bias(64), ["snapkv:ratio=0.5@int8"])
    default = policies.create(DEFAULT_POLICY)
    constants = [policies.parse(name).constant for name in found if name.partition(":")[0] == default.name]
    assert constants == [default.constant / 4, default.constant, default.constant * 4]
    assert list(found)[:2] == ["full@int8", "full@int4"]
    assert {"refreekv", "snapkv:ratio=0.5@int8", default.spec} <= set(found)
    assert missing == {}
    assert found[default.spec] == formats.parse(default.spec), "with the number formats that it brings along"
    small, missing = checking.candidates(with_key_bias(8))
    assert small[default.spec] == default, "as caches do where heads cannot be coded"
    assert set(missing) == {"full@int8", "full@int4"}
    assert not set(missing) & set(small)
    assert "multiple of 16" in missing["full@int8"]


def test_the_advice_is_what_holds_the_fewest_bytes_of_what_survives():
    results = [
        replace(FLOOR, name="full@int8", bytes_share=0.5, verdict=SURVIVES),
        replace(FLOOR, name="adaptive", bytes_share=0.4, verdict=SURVIVES),
        replace(FLOOR, name="full@int4", bytes_share=0.3, verdict=VISIBLE),
    ]
    found = checking.Check("m", "cpu", "float32", results[1], tuple(results), FLOOR, (), {}, 1.0)
    assert found.advice == "Use: refreekv.compress(model)  (40% of the bytes)"
    assert not found.breaks
    visible = replace(found, results=(results[2],))
    assert visible.advice.startswith("Nothing survives")
    assert 'refreekv.compress(model, "full", kv_dtype="int4")' in visible.advice
    broken = replace(results[1], verdict=BREAKS)
    none = replace(found, default=broken, results=(broken,))
    assert none.best is None
    assert none.breaks
    assert "full cache" in none.advice
    assert checking.code("snapkv:ratio=0.5@k6v4") == ('refreekv.compress(model, "snapkv:ratio=0.5", kv_dtype="k6v4")')


def test_each_kind_is_read_once_whatever_the_clock_says(monkeypatch):
    monkeypatch.setattr(prompts, "SIZES", (60, 70))
    monkeypatch.setattr(prompts, "rounds", lambda: [[prompts.prompt(kind, size) for kind in ("document", "prose")]
                                                    for size in (60, 70)])  # fmt: skip
    seen = []
    model = with_key_bias(16, max_position_embeddings=8192)
    found = refreekv.check(model, characters(), seconds=1e-9, on_prompt=lambda sample: seen.append(sample.id))
    assert seen == ["document-60", "prose-60"]
    assert set(found.skipped) == {"document-70", "prose-70"}
    assert all("no time left" in reason for reason in found.skipped.values())
    every = refreekv.check(model, characters(), seconds=0)
    assert every.floor.prompts == 4
    assert every.skipped == {}


def test_prompts_that_do_not_fit(monkeypatch):
    model = with_key_bias(16, max_position_embeddings=128)
    with pytest.raises(ValueError, match=r"no prompt could be measured .*p0: .* more than the model's context of 128"):
        refreekv.check(model, characters(), prompts=_prompts(1))


# -- the command line ---------------------------------------------------------------------


@pytest.fixture
def refree(capsys):
    return runner(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(f"{words(300, 1)}\n---\n{words(200, 2)}\n", encoding="utf-8")
    return path


def test_the_command_shows_a_table_and_a_line_of_code(refree, folder, file):
    done = refree("check", str(folder), "--prompts", str(file))
    assert done.code == 0
    assert "2, of 2" in done.out
    assert "bytes of float32" in done.out
    assert f"{DEFAULT_POLICY} (default)" in done.out
    assert "noise floor" in done.out
    assert "refreekv.compress(model" in done.out.splitlines()[-1]


def test_the_command_as_json(refree, folder, file):
    done = refree("check", str(folder), "--prompts", str(file), "--policy", "snapkv:ratio=0.5", "--json")
    found = json.loads(done.out)
    assert found["breaks"] is False
    assert found["default"] == DEFAULT_POLICY
    names = [one["name"] for one in found["results"]]
    assert names[-1] == "snapkv:ratio=0.5"
    assert len(found["records"]) == 2 * (len(names) + 1)
    assert found["use"].startswith("refreekv.compress(model")


def test_the_exit_code_is_one_where_the_default_breaks(refree, folder, file, monkeypatch):
    monkeypatch.setattr(checking, "verdict", lambda one, floor: BREAKS)
    done = refree("check", str(folder), "--prompts", str(file))
    assert done.code == 1
    assert "breaks this model" in done.out


def test_what_the_command_refuses(refree, folder, file, tmp_path):
    assert_refused(refree("check", str(folder), "--prompts", str(tmp_path / "none")), "cannot read")
    assert_refused(refree("check", str(folder), "--seconds", "-1"), "--seconds must be at least 0")
    assert_refused(refree("check", str(folder), "--prompts", str(file), "--policy", "nothing"), "no policy is named")
    long = tmp_path / "long.txt"
    long.write_text(words(5_000, 1), encoding="utf-8")
    assert_refused(refree("check", str(folder), "--prompts", str(long)), "no prompt could be measured", "context of")
    assert_refused(refree("check", str(tmp_path / "none"), "--prompts", str(file)), "no such file or folder")


def test_it_runs_without_extras(folder, file):
    """With torch, transformers, typer and rich: what the extras bring is not imported."""
    code = (
        "import atexit, sys\n"
        "extras = ('pandas', 'lm_eval', 'datasets', 'gguf', 'matplotlib', 'rapidfuzz', 'hypothesis')\n"
        "atexit.register(lambda: print('EXTRAS', [name for name in extras if name in sys.modules], file=sys.stderr))\n"
        "from refreekv.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(folder), "--prompts", str(file), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["results"]
    assert "EXTRAS []" in done.stderr


def test_no_gradients_and_no_trace():
    model = with_key_bias(16)
    before = set(vars(model))
    refreekv.check(model, characters(), prompts=_prompts(1))
    assert set(vars(model)) == before
    assert not any(isinstance(value, torch.Tensor) and value.grad is not None for value in model.parameters())
