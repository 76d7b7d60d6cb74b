"""Kernels that are wrong are found before anything relies on them."""

import pytest
import torch

import refreekv
from helpers.models import build
from refreekv import kernels
from refreekv.core.quantisation import Ladder
from refreekv.storage import trial
from refreekv.storage.made_up import MadeUpEntries

CPU = torch.device("cpu")
LADDER = Ladder.of("k4v2", "k6v4", "int8")
GIVEN = MadeUpEntries(CPU, torch.float32, 2, (64, 64), LADDER)

TRIED = trial.fault


@pytest.fixture(autouse=True)
def fresh():
    yield
    TRIED.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (80, 96)])
def test_what_is_right(sizes, dtype):
    assert trial.fault(MadeUpEntries(CPU, dtype, 2, sizes, LADDER)) is None


def test_what_is_wrong_or_does_not_run(monkeypatch):
    real, calls = kernels.packed_attention, []

    def wrong_once(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (1.1 if len(calls) == 1 else 1.0)

    monkeypatch.setattr(kernels, "packed_attention", wrong_once)
    assert "attention differ by 0.1" in trial.fault(GIVEN)
    TRIED.cache_clear()

    def fails(*args, **kwargs):
        raise RuntimeError("out of resource\nand more")

    monkeypatch.setattr(kernels, "pack_rungs", fails)
    assert trial.fault(GIVEN) == "RuntimeError: out of resource"


def test_a_lack_of_memory_is_no_fault_and_not_remembered(monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "pack_rungs", fails)
        with pytest.raises(torch.OutOfMemoryError):
            trial.fault(GIVEN)
    assert trial.fault(GIVEN) is None


def test_a_cache_goes_without_codes_where_they_are_wrong(monkeypatch, caplog):
    model = build("llama", head_dim=16)
    ids = torch.arange(5, 105)[None]
    monkeypatch.setattr(trial, "due", lambda entries: True)
    with refreekv.compress(model) as kv:
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert kv.report.formats
    monkeypatch.setattr(trial, "fault", lambda *args: "keys differ by 1")
    with refreekv.compress(model) as kv:
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert not kv.report.formats
    assert caplog.text.count("keys differ by 1; they stay in the model's precision") == 1
    with refreekv.compress(model, kv_dtype="int8"), pytest.raises(RuntimeError, match="leave kv_dtype out"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
