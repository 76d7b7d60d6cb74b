"""What the vLLM plugin compiles at start-up is what it uses: a kernel for four widths takes half a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_trial_compiles_what_steps_use(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("paged_specialising.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ahead = found["ahead"]
    names = [kernel.split()[0] for kernel in ahead]
    assert names.count("_paged_levels_kernel") == 1, "half a minute each"
    assert names.count("_pack_kernel") == 1
    assert set(found["side by side"]) >= {kernel for kernel in ahead if kernel.startswith(("_pack", "_paged_levels"))}
    first, second = found["of slots"]
    assert len(first) == 2
    assert first == second
    for use, kernels in found["uses"].items():
        assert kernels, use
        assert set(kernels) <= set(ahead), use
