"""Kernels find registers enough: what they spill, a GPU keeps for every thread that it could run, and never gives back.

Compiled for an H100, which has 132 multiprocessors of 2,048 threads: 64 bytes of a thread are 17 MB of its memory, the
keys and values of 400 tokens of a model of 8 billion parameters whose prompts are in `k6v4`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton import knobs

MOST = {128: 32, 256: 112}
"""Bytes of local memory of a thread, by the elements of a head. There were kernels with 856 and with 3,416."""


def test_what_kernels_spill(tmp_path):
    try:
        assert knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(f"this Triton does not bring what reads a kernel's needs: {error}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("frames.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    found = printed["found"]
    assert {name for name, *_ in found} >= {
        "_code_oldest_kernel", "_denominator_kernel", "_pack_kernel", "_recode_kernel", "_reduce_kernel",
        "_unpack_kernel",
    }  # fmt: skip
    assert [kernel for kernel in found if kernel[3] > MOST.get(kernel[1], MOST[128])] == []
    assert [kernel for kernel in found if kernel[4] > printed["limit"]] == []
