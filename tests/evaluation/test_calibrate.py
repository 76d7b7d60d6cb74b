"""`refreekv calibrate`: the file it writes, what takes it, and what is refused."""

import dataclasses
import json

import pytest
import torch

import refreekv
from helpers.command_line import assert_refused, runner, save_chat_model, words
from helpers.models import build, characters
from refreekv import Calibration, policies
from refreekv.engines import DEFAULT_POLICY
from refreekv.engines.transformers import identity
from refreekv.evaluation.checking import calibrate as calibrating
from refreekv.evaluation.data.samples import Sample

STEPS = ("full", "adaptive:constant=0.0001", "adaptive", "adaptive:constant=0.0004")


def made(model, losses, risk=0.05, damage=0.02, **changes):
    given = {
        "model": identity.described(model),
        "steps": STEPS,
        "losses": tuple(map(tuple, losses)),
        "shares": (1.0, 0.6, 0.5, 0.4),
        "risk": risk,
        "damage": damage,
        "continuation": 48,
        "refreekv": refreekv.__version__,
    }
    return Calibration(**{**given, **changes})


QUIET = [[0.0, 0.001, 0.002, 0.003]] * 38


@pytest.fixture(scope="module")
def other():
    return build("llama", attention="sdpa", seed=3)


def test_the_loosest_rung_that_keeps_the_risk(llama):
    assert made(llama, QUIET).step == 3
    # One of 39 damaged: (1 + 1) / 40 = 0.05.
    assert made(llama, [*QUIET, [0.0, 0.0, 0.01, 0.03]]).step == 3
    assert made(llama, [*QUIET, [0.0, 0.0, 0.03, 0.0]]).step == 3
    two = made(llama, [*QUIET[1:], [0.0, 0.0, 0.01, 0.03], [0.0, 0.0, 0.01, 0.03]])
    assert two.step == 2
    assert two.policy() == policies.create("adaptive")
    assert two.bounds == [1 / 40, 1 / 40, 1 / 40, 3 / 40]
    none = made(llama, [[0.0, 1.0, 1.0, 1.0]] * 40)
    assert none.step == 0
    assert none.policy() == policies.create("full")
    assert "nothing looser keeps that risk" in str(none)


def test_the_full_cache_does_no_damage_however_it_differs_from_itself(llama):
    noisy = made(llama, [[0.5, 0.001, 0.001, 0.001]] * 40)
    assert noisy.noisy == 40
    assert noisy.step == 3


def test_what_is_no_number_is_damage(llama):
    assert made(llama, [[0.0, 0.0, 0.0, float("nan")]] * 40).step == 2


@pytest.mark.parametrize(("risk", "needed"), [(0.05, 19), (0.01, 99)])
def test_too_few_prompts_are_refused_with_the_number_that_is_needed(llama, risk, needed):
    with pytest.raises(ValueError, match=rf"a risk of {risk:g} needs {needed} prompts.*there are 18"):
        made(llama, QUIET[:18], risk=risk)
    model, tokenizer = llama, characters()
    prompts = [Sample(id=str(n), family="own", prompt="abc") for n in range(18)]
    with pytest.raises(ValueError, match=f"needs {needed} prompts"):
        refreekv.calibrate(model, tokenizer, prompts, risk=risk)


def test_a_number_format_goes_with_all_rungs_but_the_first(llama):
    coded = made(llama, QUIET, kv_dtype="int8")
    assert str(coded.stored()) == "int8"
    assert made(llama, [[0.0, 1.0, 1.0, 1.0]] * 40, kv_dtype="int8").stored() is None


def test_a_file_and_back(llama, tmp_path):
    before = made(llama, [*QUIET, [0.0, 0.0, 0.03, 0.03]], kv_dtype="int8", dtype="float32", device="cpu")
    before.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == dataclasses.replace(
        before, model=json.loads(json.dumps(before.model))
    )
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["chosen"] == before.steps[before.step]
    assert {"format", "version", "model", "losses", "risk", "damage"} <= set(written)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:200], "is no calibration, or was cut off"),
        (lambda text: "{}", "is no calibration; `refreekv calibrate` writes one"),
        (lambda text: text.replace('"version": 3', '"version": 7'), "version 7 .* reads version 3; calibrate anew"),
        (lambda text: text.replace('"chosen": "adaptive:constant=0.0004"', '"chosen": "adaptive"'), "damaged: it says"),
        (lambda text: text.replace('"risk": 0.05', '"risk": 0.01'), "damaged: a risk of 0.01 needs 99 prompts"),
        (lambda text: text.replace('"risk": 0.05', '"risk": 1.5'), "damaged: risk is a share"),
        (lambda text: text.replace("adaptive", "adaptiv"), "damaged: no policy is named"),
    ],
)
def test_files_that_are_refused(llama, tmp_path, spoil, message):
    file = tmp_path / "c.json"
    made(llama, QUIET).save(file)
    file.write_text(spoil(file.read_text()))
    with pytest.raises(ValueError, match=message):
        Calibration.load(file)


def test_compress_takes_it(llama, tmp_path, ids):
    file = tmp_path / "c.json"
    made(llama, QUIET).save(file)
    for calibration in (file, str(file), Calibration.load(file)):
        with refreekv.compress(llama, calibration=calibration) as kv:
            llama.generate(ids, max_new_tokens=2, do_sample=False)
        assert kv.report.policy == "adaptive:constant=0.0004"
    cache = refreekv.ReFreeKVCache(llama, calibration=file)
    assert cache.policy.constant == 0.0004


def test_another_model_is_refused(llama, other, model, tmp_path):
    file = tmp_path / "c.json"
    made(llama, QUIET).save(file)
    with pytest.raises(ValueError, match=r"c\.json was made for another model of the same shape"):
        refreekv.ReFreeKVCache(other, calibration=file)
    with (
        pytest.raises(ValueError, match=r"c\.json was made for .*, with num_key_value_heads = 2; this .* has 1"),
        refreekv.compress(build("llama", attention="sdpa", num_key_value_heads=1), calibration=str(file)),
    ):
        pass
    # The same model in another precision is the same model.
    refreekv.ReFreeKVCache(model.to(torch.bfloat16), calibration=file)


def test_beside_a_policy_it_is_refused(llama):
    calibration = made(llama, QUIET)
    for more in ({"policy": "snapkv:ratio=0.5"}, {"kv_dtype": "int8"}, {"constant": 0.1}):
        with pytest.raises(ValueError, match="a calibration says itself"):
            refreekv.ReFreeKVCache(llama, calibration=calibration, **more)


@pytest.fixture(scope="module")
def measured(llama):
    prompts = [
        Sample(id=str(n), family="own", prompt=f"{n} " + "the bridge is closed " * (n % 5 + 1)) for n in range(12)
    ]
    seen = []
    found = refreekv.calibrate(
        llama,
        characters(),
        prompts,
        risk=0.2,
        damage=0.05,
        policy="adaptive:min_length=8,window=4,constant=1e-2,copying=2,stand_ins=0",
        on_prompt=lambda sample: seen.append(sample.id),
    )
    assert seen == [str(n) for n in range(12)]
    return found


def test_calibrating_a_model(measured, llama):
    assert measured.steps[0] == "full"
    constants = [policies.parse(step).constant for step in measured.steps[1:]]
    assert constants == sorted(constants)
    assert constants[4] == 0.01
    assert list(measured.shares) == sorted(measured.shares, reverse=True), "looser steps hold fewer bytes"
    assert measured.shares[0] == 1.0
    assert measured.prompts == 12
    damaged = [sum(row[at] for row in measured.damaged) for at in range(len(measured.steps))]
    assert damaged[1] < damaged[-1], "the loosest hurts more than the strictest"
    assert measured.bounds[measured.step] <= 0.2
    if measured.step + 1 < len(measured.steps):
        assert measured.bounds[measured.step + 1] > 0.2
    assert refreekv.ReFreeKVCache(llama, calibration=measured).policy == measured.policy()


def test_policies_without_a_constant_are_refused(llama):
    prompts = [Sample(id=str(n), family="own", prompt="abc") for n in range(20)]
    with pytest.raises(ValueError, match="'snapkv' has no constant or threshold"):
        refreekv.calibrate(llama, characters(), prompts, policy="snapkv:ratio=0.5")


def test_prompts_are_not_chosen_among(llama):
    """One that cannot be measured is not left out silently: it may be one that hurts."""
    prompts = [Sample(id=str(n), family="own", prompt="abc" * (3_000 if n == 7 else 1)) for n in range(20)]
    with pytest.raises(ValueError, match=r"1 of 20 prompts cannot be measured.*\(7: .*context"):
        refreekv.calibrate(llama, characters(), prompts)


def test_rungs_out_of_a_dials_range_are_left_out():
    from refreekv.policies.constants import at_factors

    assert [one.threshold for one in at_factors(policies.parse("refreekv:threshold=0.2"), (0.5, 1, 4, 8))] == [
        0.1,
        0.2,
        0.8,
    ]


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
    path.write_text("\n---\n".join(words(40 + n, n) for n in range(10)), encoding="utf-8")
    return path


def test_the_commands(refree, folder, file, tmp_path):
    out = tmp_path / "calibration.json"
    policy = "adaptive:min_length=8,window=4"
    asked = ["--prompts", str(file), "--risk", "0.1", "--out", str(out), "--policy", policy]
    done = refree("calibrate", str(folder), *asked)
    assert done.code == 0, done.err
    assert "◀ chosen" in done.out
    assert "prompts like these" in done.out
    assert f"Written: {out}" in done.out.replace("\n", "")
    chosen = json.loads(out.read_text())["chosen"]
    as_json = json.loads(refree("calibrate", str(folder), *asked, "--json").out)
    assert as_json["chosen"] == chosen
    assert [one["policy"] for one in as_json["steps"]] == json.loads(out.read_text())["steps"]
    said = ["--prompt", words(60, 3), "--max-new-tokens", "3", "--calibration", str(out)]
    answer = json.loads(refree("generate", "--model", str(folder), *said, "--json").out)
    assert answer["policy"] == chosen
    assert answer["report"]["verified"] is None
    for where in ("prompt", "answer:tokens=2"):
        again = json.loads(refree("generate", "--model", str(folder), *said, "--json", "--verify", where).out)
        assert again["report"]["verified"]["where"] == where.partition(":")[0]
        assert again["report"]["verified"]["allowed"] == 0.02
    served = refree("serve", str(folder), "--calibration", str(out), "--dry-run")
    assert served.code == 0, served.err
    assert json.dumps({"policy": chosen})[1:-1] in served.out.replace("\\", "")


def test_what_the_commands_refuse(refree, folder, file, tmp_path):
    asked = ["calibrate", str(folder), "--prompts", str(file)]
    assert_refused(refree(*asked), "a risk of 0.05 needs 19 prompts", "there are 10")
    assert_refused(refree(*asked, "--risk", "2"), "risk is a share of prompts")
    assert_refused(refree(*asked, "--risk", "0.2", "--damage", "0"), "damage is a divergence in nats")
    assert_refused(refree(*asked, "--risk", "0.2", "--policy", "snapkv:ratio=0.5"), "has no constant or threshold")
    assert_refused(refree(*asked, "--risk", "0.2", "--out", str(tmp_path)), "cannot be written")
    generate = ["generate", "--model", str(folder), "--prompt", "w1 w2"]
    assert_refused(refree(*generate, "--calibration", str(tmp_path / "none.json")), "there is no file")
    assert_refused(refree(*generate, "--calibration", str(file)), "is no calibration")
    assert_refused(refree(*generate, "--calibration", "x", "--kv-dtype", "int8"), "leave --policy and --kv-dtype out")
    assert_refused(refree(*generate, "--verify", "question"), "verify reads prompt or answer again")
    assert_refused(refree("serve", str(folder), "--calibration", str(file), "--dry-run"), "is no calibration")
    assert_refused(
        refree("serve", str(folder), "--calibration", str(file), "--policy", "full", "--dry-run"), "leave --policy out"
    )
    assert_refused(refree("serve", str(folder), "--dry-run", "--verify", "prompt"), "--engine transformers only")
    assert_refused(refree("chat", "--model", str(folder), "--calibration", str(file)), "is no calibration")


def test_serve_refuses_another_models_and_coded_calibrations(refree, folder, llama, tmp_path):
    out = tmp_path / "c.json"
    made(llama, QUIET).save(out)
    assert_refused(refree("serve", str(folder), "--calibration", str(out), "--dry-run"), "was made for")
    from transformers import AutoModelForCausalLM

    made(AutoModelForCausalLM.from_pretrained(folder), QUIET, kv_dtype="int8").save(out)
    assert_refused(
        refree("serve", str(folder), "--calibration", str(out), "--dry-run"), "kv_dtype='int8'", "--kv-dtype 16"
    )


def test_the_default_is_the_one_default():
    assert calibrating.calibrate.__kwdefaults__["policy"] == DEFAULT_POLICY
