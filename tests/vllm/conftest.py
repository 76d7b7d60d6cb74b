"""Engines inside the test process, on the real SmolLM2; everything here needs vLLM."""

import os
from pathlib import Path

import pytest

from refreekv.engines.vllm.launch import environment, installed_version, on_cpu

SETTINGS = {
    # The engine in this process, no binding to cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
collect_ignore = []
if installed_version() is not None:
    # Before vLLM is imported, which reads them then.
    for name, value in {**SETTINGS, **environment()}.items():
        os.environ.setdefault(name, value)
    if not on_cpu():
        # What whole blocks keep, as the plugin has it on CPUs; test_gpu.py has the others.
        collect_ignore += ["test_adaptive_sets.py", "test_leaks.py", "test_smoke.py", "test_tensor_parallel.py"]
        collect_ignore += ["test_tokens.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """SmolLM2-135M-Instruct as a folder of float32 weights, which vLLM can load."""
    ready = os.environ.get("REFREEKV_TEST_MODEL")
    if ready:
        return Path(ready)
    from helpers.vllm_engine import export

    return export(tmp_path_factory.mktemp("model") / "smollm2")


@pytest.fixture(scope="session")
def reference(folder):
    """The same model in transformers, with plain evictions."""
    from helpers.vllm_reference import PlainModel

    return PlainModel(folder)


@pytest.fixture(scope="session")
def prompts(reference):
    """Token ids of 10 prompts, 300 to 4,000 tokens long."""
    from helpers.vllm_engine import LENGTHS, make_prompts

    return make_prompts(reference.tokenizer, LENGTHS)
