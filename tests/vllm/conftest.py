"""Engines inside the test process, on the real SmolLM2; everything here needs vLLM."""

import os

# Before vLLM is imported: the engine in this process, one thread, no binding to cores.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["helpers.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """SmolLM2-135M-Instruct as a folder of float32 weights, which vLLM can load."""
    ready = os.environ.get("REFREEKV_TEST_MODEL")
    if ready:
        return Path(ready)
    import torch
    from helpers import export

    torch.set_num_threads(os.cpu_count() or 1)
    return export(tmp_path_factory.mktemp("model") / "smollm2")


@pytest.fixture(scope="session")
def reference(folder):
    """The same model in transformers, with plain evictions."""
    from plain_reference import PlainModel

    return PlainModel(folder)


@pytest.fixture(scope="session")
def prompts(reference):
    """Token ids of 10 prompts, 300 to 4,000 tokens long."""
    from helpers import LENGTHS, make_prompts

    return make_prompts(reference.tokenizer, LENGTHS)
