"""Fidelity's results files, tables and sweeps."""

import json
import math
from dataclasses import replace

import pytest
import torch

from helpers.fidelity import bench, tokens
from refreekv import policies
from refreekv.evaluation import sweeps
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity import runner
from refreekv.evaluation.fidelity.formats import parse
from refreekv.evaluation.records import FidelityRecord
from refreekv.evaluation.results import RecordFile, read
from refreekv.evaluation.tables import bootstrap_families, fidelity, markdown

# -- results files ------------------------------------------------------------------------------


def samples(count, family="numbers"):
    return [Sample(f"s{seed}", family, " ".join(map(str, tokens(20 + seed, seed)))) for seed in range(count)]


CHOSEN = sweeps.choose(["refreekv:threshold=0.2,frozen_layers=1", "streaming-llm:ratio=0.5", "refreekv-heavy-hitter"])


def run(model, path, some=None, chosen=None, *, on_sample=lambda: None, seed=0, **settings):
    some = samples(4) if some is None else some
    return runner.run(
        bench(model, continuation=5), some, chosen or CHOSEN, path, on_sample=on_sample, seed=seed, **settings
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("torn", ["nothing", "half a line", "a sample's end", "a line break", "the first line"])
def test_killed_and_resumed_gives_the_same_table(llama, tmp_path, torn):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    run(llama, whole)
    left = 2

    def kill():
        nonlocal left
        left -= 1
        if not left:
            raise Killed

    with pytest.raises(Killed):
        run(llama, broken, on_sample=kill)
    content = broken.read_bytes()
    assert len(content.splitlines()) == 2 + 2 * 4
    lengths = {"nothing": 0, "half a line": 40, "a line break": 1, "the first line": len(content) - 30}
    cut = lengths.get(torn, len(b"".join(content.splitlines(keepends=True)[-2:])))
    broken.write_bytes(content[: len(content) - cut])
    run(llama, broken)
    first, second = read(whole), read(broken)
    keys = [(record.sample, record.policy) for record in second.records]
    assert len(broken.read_bytes().splitlines()) == 2 + len(set(keys)) == 2 + len(keys) == 2 + 4 * 4
    assert first.keys == second.keys
    one, other = (fidelity(results.records).to_dict() for results in (first, second))
    assert_close(one, other)
    again = broken.read_bytes()
    run(llama, broken)
    assert broken.read_bytes() == again


def assert_close(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for left, right in zip(one, other, strict=True):
            assert_close(left, right)
    else:
        assert one == (pytest.approx(other, abs=1e-6) if isinstance(one, float) else other)


def test_more_policies_and_samples_join_a_file(llama, tmp_path):
    path = tmp_path / "results.jsonl"
    run(llama, path, samples(1), sweeps.choose(["streaming-llm:ratio=0.5"]))
    records = run(llama, path, samples(2))
    assert len(records) == 2 * 4
    assert len({(record.sample, record.policy) for record in records}) == 8
    assert read(path).policies.keys() == CHOSEN.keys()


def test_other_settings_are_refused(llama, tmp_path):
    path = tmp_path / "results.jsonl"
    run(llama, path, samples(1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"seed = 0.*now seed = 1.*not mixed"):
        run(llama, path, seed=1)
    with pytest.raises(ValueError, match="continuation = 5; now continuation = 6"):
        runner.run(bench(llama, continuation=6), samples(1), CHOSEN, path, seed=0)
    changed = {name: str(policy) for name, policy in CHOSEN.items()} | {"streaming-llm:ratio=0.5": "something else"}
    with pytest.raises(ValueError, match="something else"):
        RecordFile(path, read(path).setup, changed, FidelityRecord)
    assert path.read_bytes() == before
    path.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="line 1: not a results file"):
        run(llama, path)


def test_two_writers_are_refused(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "results.jsonl"
    with RecordFile(path, {"a": 1}, {}, FidelityRecord), pytest.raises(BlockingIOError, match="another process"):
        RecordFile(path, {"a": 1}, {}, FidelityRecord)
    RecordFile(path, {"a": 1}, {}, FidelityRecord).__exit__(None, None, None)


def test_too_long_samples_are_left_out(llama, tmp_path):
    with RecordFile(tmp_path / "r.jsonl", {"a": 1}, {}, FidelityRecord) as results:
        planned = runner.plan(bench(llama), samples(3), CHOSEN, results, max_tokens=21)
        assert [one.sample.id for one in planned.jobs] == ["s0", "s1"]
        assert "22 tokens are more than the 21" in planned.skipped["numbers", "s2"]
        long = Sample("long", "numbers", "5 " * 4090)
        planned = runner.plan(bench(llama), [long], CHOSEN, results)
        assert "the model's context of 4,096" in planned.skipped["numbers", "long"]


# -- tables -------------------------------------------------------------------------------------


RECORD = FidelityRecord(
    "a", "one", "p", "m", 10, 5, budget=0.5, bytes_full=100, bytes_kept=50, kl_mean=1.0, kl_p99=2.0, kl_max=3.0,
    top1=0.5, same_path=False,
)  # fmt: skip


def test_summary_by_hand():
    records = [
        RECORD,
        replace(RECORD, sample="b", kl_mean=3.0, same_path=True, budget=0.7, answer_nll_change=0.5),
        replace(RECORD, family="two", kl_mean=8.0, top1=1.0, kl_max=9.0),
        replace(RECORD, policy="full", kl_mean=0.0, same_path=True, budget=1.0, bytes_kept=100),
    ]
    summary = fidelity(records)
    assert list(summary.overall.policy) == ["full", "p"]
    _, row = summary.overall.itertuples()
    assert row.n == 3
    assert row.kl == pytest.approx((2.0 + 8.0) / 2)
    assert (row.worst_family, row.worst_kl) == ("two", 8.0)
    assert row.top1 == pytest.approx((0.5 + 1.0) / 2)
    assert row.same_path == pytest.approx((0.5 + 0.0) / 2)
    assert row.budget == pytest.approx((0.6 + 0.5) / 2)
    assert row.answer_nll_change == 0.5
    assert (row.bytes_full, row.bytes_kept, row.kl_max) == (300, 150, 9.0)
    assert list(summary.families["one"].policy) == ["full", "p"]
    assert list(summary.families["two"].policy) == ["p"]
    _, one = summary.families["one"].itertuples()
    assert (one.n, one.kl, one.worst_family) == (2, 2.0, None)
    assert one.kl_interval == (1.0, 3.0)
    text = markdown(summary, setup={"model": "m", "environment": {"torch": "1"}})
    assert "| full (noise floor) | 1 |" in text
    assert "8.000 two" in text
    assert "- environment: torch 1" in text
    assert fidelity(reversed(records)).to_dict()["families"] == summary.to_dict()["families"]
    assert json.loads(json.dumps(summary.to_dict()))["overall"][1]["n"] == 3


def test_bootstrap():
    assert bootstrap_families({"one": [1.0], "two": [5.0]}) is None
    assert bootstrap_families({"one": [2.0, 2.0, 2.0], "two": [4.0]}) == (3.0, 3.0)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator, dtype=torch.float64).tolist()
    low, high = bootstrap_families({"one": values})
    mean = sum(values) / 400
    assert low < mean < high
    # The normal interval of a mean of 400 is 2 * 1.96 / 20 wide.
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap_families({"one": values}) == (low, high)
    assert bootstrap_families({"one": values}, seed=1) != (low, high)
    # A second family as wide: the mean of two means varies less by the square root of two.
    low, high = bootstrap_families({"one": values, "two": [-value for value in values]})
    assert high - low == pytest.approx(2 * 1.96 / 20 / math.sqrt(2), rel=0.15)


# -- sweeps -------------------------------------------------------------------------------------


def test_expansion():
    assert sweeps.expand("refreekv") == ["refreekv"]
    assert sweeps.expand("refreekv:threshold=0.001, 0.01,0.05") == [
        "refreekv:threshold=0.001",
        "refreekv:threshold=0.01",
        "refreekv:threshold=0.05",
    ]
    assert sweeps.expand("p:a=1,2,b=x,y") == ["p:a=1,b=x", "p:a=1,b=y", "p:a=2,b=x", "p:a=2,b=y"]
    with pytest.raises(ValueError, match="name=value"):
        sweeps.expand("refreekv:0.1,threshold=2")
    with pytest.raises(ValueError, match="stands twice"):
        sweeps.expand("refreekv:threshold=0.1,threshold=0.2")


def test_choice_is_by_what_policies_are_not_how_they_are_written():
    chosen = sweeps.choose(["refreekv:sinks=4,threshold=0.01,0.05", "refreekv", "full", "streaming-llm:ratio=0.5"])
    assert list(chosen) == ["refreekv", "refreekv:threshold=0.05", "streaming-llm:ratio=0.5"]
    assert all(policies.parse(name) == policy for name, policy in chosen.items())
    with pytest.raises(ValueError, match="did you mean"):
        sweeps.choose(["refrekv"])


@pytest.mark.parametrize("name", sweeps.SUITES)
def test_suites(name):
    chosen = sweeps.choose(suites=[name])
    assert all(parse(spec) == policy for spec, policy in chosen.items())
    with pytest.raises(ValueError, match="paper-ablations"):
        sweeps.suite("paper")


def test_ablations_vary_everything_the_paper_does():
    chosen = list(sweeps.choose(suites=["paper-ablations"]).values())
    ours = [policy for policy in chosen if policy.name == "refreekv"]
    for name in ("threshold", "probe_rows", "frozen_layers", "norm_includes_sinks"):
        assert len({getattr(policy, name) for policy in ours}) > 1
    assert any(policy.name == "refreekv-heavy-hitter" for policy in chosen)


def test_peers_are_all_policies():
    chosen = sweeps.choose(suites=["peers"])
    assert {policy.name for policy in chosen.values()} == set(policies.available()) - {"full"}
    assert {f"streaming-llm:ratio={ratio}" for ratio in sweeps.RATIOS} <= chosen.keys()
    assert {"top-p:p=0.9", "top-p", "refreekv:threshold=0.1"} <= chosen.keys()
