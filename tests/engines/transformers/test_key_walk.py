"""How many files a layer's keys pass on their way to storage: CONTRIBUTING states the numbers."""

import dataclasses
import sys

import pytest
import torch

from helpers.models import build
from refreekv import ReFreeKVCache
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.naming import NAME

NAMES = ("intake", "attention", "handout", "layer", "stored_layer")
ENGINE = {f"engines/transformers/{name}.py" for name in NAMES}
TO_STORAGE = {*ENGINE, "pruning/calls.py", "pruning/decide.py"}
WALKS = {
    "exact": (
        {"policy": "snapkv", "ratio": 0.5, "kv_dtype": None},
        {*TO_STORAGE, "storage/compaction.py", "storage/ragged.py"},
    ),
    "coded": ({}, {*TO_STORAGE, "storage/leveled.py", "storage/arena.py", "storage/coded_lines.py"}),
}
LOOKS = ("policies/", "core/", "kernels/")
"""What is asked about keys, and what computes with them: the policy, tensor functions, kernels."""


def holds(value, addresses, depth=0):
    """Whether a value is a tensor at one of the addresses, or has one in it."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().data_ptr() in addresses
    if isinstance(value, ReFreeKVLayer):
        return holds((value.keys,), addresses)
    if depth > 3:
        return False
    if isinstance(value, (list, tuple)):
        return any(holds(part, addresses, depth + 1) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(holds(part, addresses, depth + 1) for part in vars(value).values())
    return False


def walk(cache, read, monkeypatch):
    """Files of refreekv with a function that is given the keys of the second layer, from update on."""
    files, addresses, alive = set(), set(), []
    update = ReFreeKVLayer.update

    def note(layer, keys):
        if layer.index == 1:
            addresses.add(keys.untyped_storage().data_ptr())
            alive.append(keys)

    def noting(layer, keys, *rest, **others):
        note(layer, keys)
        found = update(layer, keys, *rest, **others)
        note(layer, layer.keys)  # dense, as the layer holds them until the prompt's end
        return found

    def called(frame, event, _):
        code = frame.f_code
        if event == "call" and addresses and "/src/refreekv/" in code.co_filename:
            given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(holds(frame.f_locals.get(name), addresses) for name in given):
                files.add(code.co_filename.rpartition("/src/refreekv/")[2])

    monkeypatch.setattr(ReFreeKVLayer, "update", noting)
    before = sys.getprofile()
    sys.setprofile(called)
    try:
        read(cache)
    finally:
        sys.setprofile(before)
    return files


@pytest.mark.parametrize("case", WALKS)
@torch.no_grad()
def test_files_that_a_key_passes(case, monkeypatch):
    model = build("llama", hidden_size=128, head_dim=32)
    settings, wanted = WALKS[case]
    ids = torch.randint(5, 60, (1, 120), generator=torch.Generator().manual_seed(0))

    def read(cache):
        model(ids, **{NAME: cache})
        cache.state.finish()

    read(ReFreeKVCache(model, **settings))  # what is measured once a model, and proved of its attention
    files = walk(ReFreeKVCache(model, **settings), read, monkeypatch)
    assert {file for file in files if not file.startswith(LOOKS)} == wanted
