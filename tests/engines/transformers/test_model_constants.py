"""What is kept of a model on disk: for the same weights only, and never in the way."""

import copy
import logging

import pytest
import torch

from helpers import models
from refreekv.engines.transformers import copy_scores, model_constants
from refreekv.engines.transformers.attachment import attached


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "refreekv" / "models"


@pytest.fixture
def saved(tmp_path):
    """Load a small model from its files, each time anew."""
    place = tmp_path / "model"
    models.build("llama", attention="sdpa").save_pretrained(place)
    kind = type(models.build("llama"))
    return lambda: kind.from_pretrained(place).eval()


@pytest.fixture
def passes(monkeypatch):
    """Models that were measured."""
    seen, measure = [], copy_scores._measure
    monkeypatch.setattr(copy_scores, "_measure", lambda model: seen.append(model) or measure(model))
    return seen


def scores(model):
    with attached(model):
        return copy_scores.copy_scores(model)


# -- copy scores -----------------------------------------------------------------------------------


def test_a_model_file_is_measured_once(saved, passes, folder):
    first = scores(saved())
    assert len(passes) == 1
    assert len(list(folder.glob("*.safetensors"))) == 1
    second = scores(saved())
    assert len(passes) == 1
    assert len(first) == len(second) > 1
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype == torch.float32


def edit_one_number(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-4


def swap_heads(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.flip(0)


def through_data(model):
    """A change that autograd does not count."""
    model.model.norm.weight.data[0] *= 1.5


def another_rotation(model):
    model.config.rope_parameters["rope_theta"] *= 2


@pytest.mark.parametrize(
    "change", [edit_one_number, swap_heads, through_data, another_rotation, torch.nn.Module.bfloat16]
)
def test_a_changed_model_is_another_one(saved, change):
    model = saved()
    before = model_constants.key_of(model)
    change(model)
    assert model_constants.key_of(model) not in (before, None)


def test_a_model_that_changes_after_it_was_measured_is_not_looked_up_again(saved, passes, folder):
    model = saved()
    before = scores(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(3.0)
    after = scores(model)
    assert len(passes) == 2
    assert not all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert len(list(folder.glob("*"))) == 1


def test_the_key_does_not_hang_on_where_or_how_a_model_runs(saved):
    model = saved()
    key = model_constants.key_of(model)
    assert len(key) == 64
    with attached(model):
        assert model_constants.key_of(model) == key
    assert model_constants.key_of(copy.deepcopy(model)) == key
    model.config._name_or_path = "elsewhere"
    assert model_constants.key_of(model) == key


def adapt(model):
    vars(model.model.layers[0].self_attn.q_proj)["_active_adapter"] = ["a"]


def train(model):
    model(torch.arange(8)[None]).logits.sum().backward()


def send_away(model):
    model.model.layers[0].to("meta")


@pytest.mark.parametrize("change", [adapt, train, send_away])
def test_what_is_not_for_the_disk(saved, change):
    model = saved()
    change(model)
    assert model_constants.key_of(model) is None


def test_models_of_no_file_leave_nothing(passes, folder):
    scores(models.build("llama", attention="sdpa"))
    assert len(passes) == 1
    assert not folder.exists()


# -- the files -------------------------------------------------------------------------------------

KEY = "0" * 64


def test_names_are_added_to_those_that_are_there(folder):
    assert model_constants.load(KEY) == {}
    model_constants.store(KEY, {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16)})
    model_constants.store(KEY, {"b": torch.zeros(1), "c": torch.tensor([[1, 2]])})
    found = model_constants.load(KEY)
    assert found.keys() == {"a", "b", "c"}
    assert found["a"].tolist() == [0, 1, 2]
    assert found["b"].tolist() == [0]
    assert found["c"].tolist() == [[1, 2]]
    assert model_constants.load("1" * 64) == {}
    assert [file.name for file in folder.iterdir()] == [f"{KEY}.safetensors"]


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    """One bit of the numbers themselves, which no header tells of."""
    return data[:-1] + bytes([data[-1] ^ 1])


def empty(data):
    return b""


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_file_is_no_file(saved, passes, folder, caplog, damage):
    want = scores(saved())
    (file,) = folder.glob("*")
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.INFO, logger="refreekv"):
        got = scores(saved())
    assert len(passes) == 2
    assert len([record for record in caplog.records if "is ignored" in record.message]) == 1
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    # It was written anew.
    scores(saved())
    assert len(passes) == 2


def test_another_model_s_file_under_this_name_is_no_file(folder):
    model_constants.store(KEY, {"a": torch.ones(1)})
    (folder / f"{KEY}.safetensors").rename(folder / f"{'1' * 64}.safetensors")
    assert model_constants.load("1" * 64) == {}


def test_a_folder_that_cannot_be_written_is_no_error(saved, passes, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, logger="refreekv"):
        assert len(scores(saved())) > 1
    assert len(passes) == 1
    assert "not kept" in caplog.text


def test_nobody_s_home(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(model_constants.Path, "home", homeless)
    assert model_constants.folder() is None
    model_constants.store(KEY, {"a": torch.ones(1)})
    assert model_constants.load(KEY) == {}


@pytest.mark.parametrize(
    ("platform", "parts"), [("linux", (".cache",)), ("darwin", ("Library", "Caches")), ("win32", ("AppData", "Local"))]
)
def test_the_platform_s_own_folder(monkeypatch, platform, parts, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(model_constants.sys, "platform", platform)
    monkeypatch.setattr(model_constants.Path, "home", lambda: tmp_path)
    assert model_constants.folder() == tmp_path.joinpath(*parts, "refreekv", "models")
