"""Kernels fit the shared memory of GPUs that are not here: launchers compile them for such, and run nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from refreekv.kernels import packed_decode, shared_memory
from refreekv.kernels.surrogates import Tile, launch_surrogates, tile_for


def compiled(folder, *arguments):
    """What compiling.py prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, Path(__file__).with_name("compiling.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert {name.split(":")[0] for name, _, _ in printed["found"]} == {"86", "90"}
    return printed


def test_kernels_fit(tmp_path):
    printed = compiled(tmp_path)
    found = printed["found"]
    assert [line for line in found if line[1] > line[2]] == []
    # As many programs as a multiprocessor has registers for have room on it: it has a KiB more, and takes one of each.
    attention = [line for line in found if line[0].startswith("90: packed torch.bfloat16")]
    attention = [size for name, size, _ in attention if name.endswith("_packed_decode_kernel")]
    assert len(attention) == 1
    assert packed_decode.WARPS * (attention[0] + 1024) <= 232_448 + 1024
    # The interpreter runs what no compiler takes: a kernel that is not compiled here has not been tested.
    assert set(printed["kernels"]) <= {name.split()[-1] for name, _, _ in found}


@pytest.mark.slow  # Four formats at once take half a minute a GPU to compile; two of them are compiled above.
def test_kernels_of_many_formats_fit(tmp_path):
    assert [line for line in compiled(tmp_path, "slow")["found"] if line[1] > line[2]] == []


def a_layer(heads, head_size, dtype):
    keys = torch.zeros(1, 1, 100, head_size, dtype=dtype)
    return torch.zeros(1, heads, 16, head_size, dtype=dtype), keys, keys


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_what_was_measured_on_an_h100_stays(heads, head_size):
    assert tile_for(*a_layer(heads, head_size, torch.bfloat16)) == Tile(64, 3)


def test_fused_modules_that_fit_nowhere(monkeypatch):
    layer = a_layer(8, 256, torch.float32)
    monkeypatch.setattr(shared_memory, "bytes_of", lambda device: 101_376)
    assert tile_for(*layer) is None
    with pytest.raises(ValueError, match="no tile"):
        launch_surrogates(*layer, torch.ones(1, 1, 100, dtype=torch.bool), 4)


@pytest.mark.parametrize(
    ("limit", "entry", "stages"),
    [(232_448, 212, 3), (232_448, 260, 3), (232_448, 516, 2), (166_912, 132, 3), (166_912, 212, 2), (101_376, 132, 2)],
)
def test_a_third_stage_takes_no_program_its_place(limit, entry, stages, monkeypatch):
    monkeypatch.setattr(shared_memory, "bytes_of", lambda device: limit)
    assert packed_decode._stages(packed_decode.WARPS, 32 * entry, torch.device("cpu")) == stages


def test_the_limit_is_the_one_that_triton_knows(monkeypatch):
    asked = []

    def properties(index):
        asked.append(index)
        return {"max_shared_mem": 101_376}

    utils = SimpleNamespace(get_device_properties=properties)
    monkeypatch.setattr(shared_memory, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    assert shared_memory.bytes_of.__wrapped__(torch.device("cuda", 1)) == 101_376
    assert asked == [1]
