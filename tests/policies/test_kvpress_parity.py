"""Kept positions equal kvpress's, for the methods that both define alike."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from helpers.peer_reference import make
from refreekv.policies import LayerView

ROOT = Path(__file__).parents[1]

PARITY = json.loads((ROOT / "fixtures" / "kvpress_parity.json").read_text())
_spec = importlib.util.spec_from_file_location("kvpress_parity", ROOT.parent / "benchmarks" / "kvpress_parity.py")
kvpress_parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kvpress_parity)


def case_name(case):
    settings = "-".join(str(value) for value in case["parameters"].values())
    return f"{case['policy']}-{settings}-{case['shape']}-{case['layer']}"


@pytest.mark.parametrize("case", PARITY["cases"], ids=case_name)
def test_kept_positions_are_those_of_kvpress(case):
    made = kvpress_parity.inputs(case["seed"], **PARITY["shapes"][case["shape"]])
    parameters = dict(case["parameters"])
    if "scorer" in case:
        parameters |= case["scorer"]
    policy = make(case["policy"], parameters)
    n = made.keys.shape[2]
    probes = policy.probe_plan(n).rows
    rows = made.attention[:, :, n - probes :] if probes else None
    view = LayerView(made.keys, made.values, None, rows, case["layer"], case["layers"])
    selection = policy.select(view)
    keep = selection.mask(view.real) if case["policy"] == "streaming-llm" else selection.keep
    for got, wanted in zip(keep, case["kept"], strict=True):
        for g, head in enumerate(wanted):
            assert torch.equal(got[g % len(got)], kvpress_parity.decode(head, n))


def test_parity_covers_the_methods_that_are_defined_alike():
    assert {case["policy"] for case in PARITY["cases"]} == {
        "snapkv", "pyramidkv", "tova", "knorm", "keydiff", "streaming-llm", "ada-kv",
    }  # fmt: skip
    assert PARITY["versions"]["kvpress"] == "0.5.5"
