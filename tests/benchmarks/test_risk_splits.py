"""`benchmarks/risk.py`: splits of stored results in halves."""

import dataclasses
import random
from pathlib import Path

import pytest

import risk
from refreekv import policies
from refreekv.evaluation.records import FidelityRecord
from refreekv.evaluation.results import RecordFile

RUNS = Path(__file__).parents[2] / "benchmarks" / "runs"
RUNGS = ("adaptive:constant=0.0001", "adaptive", "adaptive:constant=0.0004")
OTHERS = ("full", "adaptive:constant=0.0004,stand_ins=0", "snapkv:ratio=0.5", "adaptive@int8")
RECORD = FidelityRecord("", "f", "", "m", 100, 8, 1.0, 100, 100, 0.0, 0.0, 0.0, 1.0, True)


def write(path, losses):
    """Results of a file in which prompt ``i`` has the loss ``losses[i][j]`` at rung ``j``."""
    records = []
    for at, row in enumerate(losses):
        for policy, loss in [*zip(RUNGS, row, strict=True), *((other, 9.0) for other in OTHERS)]:
            kept = 100 - 20 * RUNGS.index(policy) if policy in RUNGS else 100
            records.append(dataclasses.replace(RECORD, sample=str(at), policy=policy, kl_mean=loss, bytes_kept=kept))
    with RecordFile(path, {}, {}, FidelityRecord) as file:
        file.append(records)


def test_a_ladder_out_of_a_file(tmp_path):
    write(tmp_path / "a.jsonl", [[0.0, 0.1, 0.2]] * 3)
    found = risk.measured(tmp_path / "a.jsonl", "adaptive")
    assert found.rungs == ["full", *RUNGS]
    assert found.losses == [[0.0, 0.0, 0.1, 0.2]] * 3, "the full cache's own noise is no damage"
    assert found.bytes[0] == [(100, 100), (100, 100), (100, 80), (100, 60)]
    assert risk.measured(tmp_path / "a.jsonl", "adaptive@").rungs == ["full", *RUNGS]
    with pytest.raises(ValueError, match="holds 1 constants of adaptive"):
        risk.measured(tmp_path / "a.jsonl", "adaptive@int8")
    with pytest.raises(ValueError, match="holds 0 constants of refreekv"):
        risk.measured(tmp_path / "a.jsonl", "refreekv")


def test_formats_that_the_policy_brings_along_come_first(tmp_path):
    """Files have them behind the policy; those from before they were there have none."""
    own = f"@{policies.create('adaptive').default_ladder}"
    write(tmp_path / "a.jsonl", [[0.0, 0.1, 0.2]] * 3)
    old = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text(old.replace('"adaptive"', f'"adaptive{own}"').replace('4"', f'4{own}"'))
    assert risk.measured(tmp_path / "b.jsonl", "adaptive").rungs == ["full", f"adaptive{own}", f"{RUNGS[2]}{own}"]


def test_risk_over_splits(tmp_path):
    rng = random.Random(0)
    write(tmp_path / "a.jsonl", [[0.0, 0.05 * (rng.random() < 0.08), 0.05 * (rng.random() < 0.5)] for _ in range(120)])
    found = risk.measured(tmp_path / "a.jsonl", "adaptive")
    kept = risk.split(found, risk=0.1, damage=0.02, splits=100)
    assert sum(kept.risks) / 100 <= 0.1
    assert set(kept.chosen) == {1, 2}
    loose = risk.split(found, risk=0.1, damage=0.1, splits=20)
    assert set(loose.chosen) == {3}
    assert set(loose.shares) == {0.6}
    strict = risk.split(found, risk=0.02, damage=0.02, splits=20)
    assert set(strict.chosen) == {1}


@pytest.mark.skipif(not RUNS.is_dir(), reason="the runs are not part of this installation")
@pytest.mark.parametrize("run", ["paths/smollm2-paths", "paths/qwen-paths", "gemma"])
def test_the_risk_is_kept_on_three_models(run):
    found = risk.measured(RUNS / f"{run}.jsonl.gz", "adaptive")
    for wanted, damage in ((0.05, 0.02), (0.1, 0.005)):
        kept = risk.split(found, risk=wanted, damage=damage, splits=200)
        assert sum(kept.risks) / 200 <= wanted
