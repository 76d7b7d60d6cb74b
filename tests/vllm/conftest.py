"""Engines inside the test process, on the real SmolLM2; everything here needs vLLM."""

import importlib.metadata
import os
from pathlib import Path

import pytest

SETTINGS = {
    # The engine in this process, one thread, no binding to cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
if any(one.metadata["Name"] in ("vllm", "vllm-cpu") for one in importlib.metadata.distributions()):
    # Before vLLM is imported, which reads them then.
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """SmolLM2-135M-Instruct as a folder of float32 weights, which vLLM can load."""
    ready = os.environ.get("REFREEKV_TEST_MODEL")
    if ready:
        return Path(ready)
    import torch

    from helpers.vllm_engine import export

    torch.set_num_threads(os.cpu_count() or 1)
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
