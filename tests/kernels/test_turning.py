"""What a conversation's turns compile, as real ones launch it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each turn launched, and would have compiled, as a process says it in which Triton is no interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder, tests = tmp_path_factory.mktemp("triton"), str(Path(__file__).parents[1])
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    script = Path(__file__).with_name("turning.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "count", "launched"),
    [
        ("waiting", 10, {"_append_kernel", "_prepare_kernel", "_packed_decode_kernel", "_packed_join_kernel"}),
        ("kept", 14, {"_recode_kernel", "_unpack_kernel", "_append_kernel", "_take_out_kernel", "_asked_kernel"}),
        ("everything", 14, {"_gather_kernel", "_unpack_kernel", "_pack_kernel", "_asked_kernel"}),
    ],
)
def test_only_the_first_turns_compile(said, kind, count, launched):
    """Turns of 16 to 300 tokens behind 1,000 to 9,000, of which heads keep different numbers."""
    first, *calls = said[kind]
    known, turns = set(first["compiled"]), 0
    assert not first["turn"]
    for call in calls:
        if call["turn"] and turns >= 2:
            assert set(call["compiled"]) <= known
        known |= set(call["compiled"])
        if call["turn"]:
            turns += 1
            asked = set() if kind == "waiting" else {"_reduce_kernel", "_needs_kernel", "_order_kernel"}
            assert set(call["launches"]) >= launched | asked
    assert turns == count
    assert all(len(set(call["held"])) > 1 for call in calls[:3])
