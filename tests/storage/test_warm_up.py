"""What is compiled ahead is what is used, and nothing that goes wrong there shows."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refreekv import kernels
from refreekv.core.key_codes import KeyCodes
from refreekv.core.quantisation import Ladder
from refreekv.storage import trial, warm_up
from refreekv.storage.made_up import MadeUpEntries

CPU = torch.device("cpu")
LADDER = Ladder.of("k4v2", "k6v4", "int8")
GIVEN = MadeUpEntries(CPU, torch.bfloat16, 2, (64, 64), LADDER)
SLOW = ("_pack_kernel", "_code_oldest_kernel", "_unpack_kernel", "_packed_decode_kernel", "_packed_join_kernel")
"""Kernels that take long to compile."""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What would be compiled, as a process says it in which Triton is no interpreter."""
    folder = str(tmp_path_factory.mktemp("triton"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": folder}
    script = Path(__file__).parents[1] / "kernels" / "specialising.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_turn_of_another_length_compiles_nothing(printed):
    """After the first one, of which only the policy's kernels and appending are not compiled ahead."""
    (first, *others) = printed["turns"].values()
    assert {name.split()[0] for name in first} >= {"_recode_kernel", "_unpack_kernel", "_reduce_kernel", "_move_kernel"}
    known = {*printed["ahead"], *first}
    assert {name.split()[0] for name in first if name not in printed["ahead"]} <= {
        "_append_kernel", "_denominator_kernel", "_join_kernel", "_reduce_kernel", "_order_kernel", "_move_kernel",
    }  # fmt: skip
    for found in others:
        assert set(found) <= known


def test_what_is_compiled_ahead_is_what_is_used(printed):
    """For any length of the prompt; but attention to several rows, whose kernels know how many there may be."""
    ahead = [name for name in printed["ahead"] if name.split()[0] in SLOW]
    # Packing of prompts, of a turn and of what is generated; unpacking in four formats; joining, and attention, of a
    # token and of a turn's.
    assert len(ahead) == 1 + 1 + 1 + 4 + 2 + 2
    for use, found in printed["uses"].items():
        kinds = SLOW if use.startswith("1 x") else SLOW[:3]
        used = {name for name in found if name.split()[0] in kinds}
        assert len(used) >= 6, use
        assert used <= set(ahead), use


def test_each_kernel_in_a_thread_of_its_own(monkeypatch):
    """All begin before any has ended."""
    monkeypatch.setattr(warm_up, "available_cores", lambda: 8)
    together = threading.Barrier(7, timeout=30)  # three formats that are read, and coding: three ways, and anew
    done = []

    def waiting(name, told):
        real = getattr(kernels, name)

        def call(*args, **kwargs):
            together.wait()
            done.append((name, told(*args, **kwargs)))
            real(*args, **kwargs)

        monkeypatch.setattr(kernels, name, call)

    waiting("pack_rungs", lambda given: given[0].exact is not None)
    waiting("code_oldest", len)
    waiting("recode_lines", lambda given: given.target)
    waiting("unpack_lines", lambda *args, **kwargs: args[3].key_widths[0])
    warm_up.warm_up(GIVEN)
    assert not together.broken
    assert sorted(done) == [
        ("code_oldest", 1), ("pack_rungs", False), ("pack_rungs", True), ("recode_lines", 0),
        ("unpack_lines", 4), ("unpack_lines", 6), ("unpack_lines", 8),
    ]  # fmt: skip


def test_not_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(warm_up, "available_cores", lambda: 8)
    monkeypatch.setattr(warm_up, "ThreadPoolExecutor", None)
    monkeypatch.setattr(warm_up, "free_memory", lambda device: warm_up.ROOM - 1)
    warm_up.warm_up(replace(GIVEN, device=torch.device("cuda")))
    monkeypatch.setattr(warm_up, "free_memory", lambda device: warm_up.ROOM)
    with pytest.raises(TypeError):  # the pool that is None
        warm_up.warm_up(replace(GIVEN, device=torch.device("cuda")))


def test_one_core_has_nothing_to_share(monkeypatch):
    monkeypatch.setattr(warm_up, "available_cores", lambda: 1)
    monkeypatch.setattr(warm_up, "ThreadPoolExecutor", None)
    warm_up.warm_up(GIVEN)


def test_what_fails_is_for_the_trial_to_say(monkeypatch, caplog):
    monkeypatch.setattr(warm_up, "available_cores", lambda: 4)

    def fails(*args, **kwargs):
        raise RuntimeError("no compiler")

    def fails_ahead(storage):
        return fails() if threading.current_thread().name.startswith("refreekv-compile") else real(storage)

    real = warm_up.LeveledKV.full
    trial.fault.cache_clear()
    monkeypatch.setattr(trial, "due", lambda device: True)
    with caplog.at_level(logging.DEBUG, "refreekv"), monkeypatch.context() as patch:
        patch.setattr(warm_up.LeveledKV, "full", fails_ahead)
        assert trial.fault(GIVEN) is None
    assert caplog.text.count("a kernel could not be compiled ahead: no compiler") == 3
    trial.fault.cache_clear()
    monkeypatch.setattr(kernels, "pack_rungs", fails)
    assert trial.fault(GIVEN) == "RuntimeError: no compiler"
    trial.fault.cache_clear()


@pytest.mark.parametrize("available", [True, False])
def test_cores(monkeypatch, available):
    if available:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3}, raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert warm_up.available_cores() == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cores", [2, 8])
def test_on_a_gpu_nothing_is_left_to_compile(monkeypatch, cores):
    from triton import knobs

    ladder = Ladder.of("k4v2", "k4v4", "k6v4", "k7v6")
    given = MadeUpEntries(torch.device("cuda", torch.cuda.current_device()), torch.float16, 4, (128, 128), ladder)
    monkeypatch.setattr(warm_up, "available_cores", lambda: cores)
    warm_up.warm_up(given)
    compiled = []

    def noting(*, src, cache_hit, **about):
        if not cache_hit:
            compiled.append(src.name)

    monkeypatch.setattr(knobs.compilation, "listener", noting)
    monkeypatch.setattr(warm_up, "available_cores", lambda: 1)
    trial.fault.cache_clear()
    assert trial.fault(given) is None
    trial.fault.cache_clear()
    assert not set(compiled) & set(SLOW)


@pytest.mark.parametrize("codes", [False, True])
def test_no_thread_multiplies_matrices(monkeypatch, codes):
    """On a GPU each thread that does takes 32 MiB for cuBLAS, which PyTorch never gives back."""
    known = None
    if codes:
        known = KeyCodes.known(torch.stack([torch.randperm(64)] * 2), torch.rand(2, 64) + 0.5, torch.rand(2, 64) + 0.5)
    asked, jobs = Counter(), []

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    class OneByOne(contextlib.AbstractContextManager):
        def __exit__(self, *exc):
            return None

        def map(self, call, given):
            jobs.extend(given)
            with Notes():
                return [call(job) for job in jobs]

    # What kernels launch is no operator of PyTorch.
    for name in ("pack_rungs", "code_oldest", "take_out", "recode_lines", "unpack_lines", "packed_attention", "move"):
        monkeypatch.setattr(kernels, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(warm_up, "available_cores", lambda: 8)
    monkeypatch.setattr(warm_up, "ThreadPoolExecutor", lambda *args, **kwargs: OneByOne())
    warm_up.warm_up(replace(GIVEN, codes=known))
    assert len(jobs) == 2 + 3 + 2 + 2
    assert asked["sum"]
    assert not {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "vdot"} & set(asked)
