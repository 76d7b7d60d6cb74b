"""The planner's simulated engine against vLLM itself: the same load, the same pool, step by step.

    python benchmarks/simulation_check.py --json check.json        # a random model that computes next to nothing
    python benchmarks/simulation_check.py --model FOLDER --kv-mib 100 --policy refreekv

Runs vLLM's own engine in this process (CPU or GPU), with the full cache and with each policy
through the plugin, adds requests at given steps, and notes how many run in every step. The
simulation gets the same requests, the pool's size, and what share of its prompt each request
kept. Compared are requests running (mean over steps), steps and preemptions; time is not:
a step is a step.
"""

import argparse
import datetime
import json
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from refreekv.planner.engine import Engine, Replica
from refreekv.planner.trace import Request

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""vLLM's engine in this process; read when it is imported."""
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}


@dataclass(frozen=True)
class Run:
    """What a run gave, real or simulated.

    Attributes
    ----------
    mean_running : float
        Requests running, averaged over steps.
    most_running, steps, preemptions : int
        Requests in one step at most; steps; times that a request gave its blocks back.
    """

    mean_running: float
    most_running: int
    steps: int
    preemptions: int


@dataclass(frozen=True)
class Load:
    """Requests and the pool they share.

    Attributes
    ----------
    requests : list of Request
        Their arrival is a number of steps.
    kv_mib, block, step_tokens, running : int
        The engine's pool, block size, token budget and request limit.
    """

    requests: list[Request]
    kv_mib: int
    block: int
    step_tokens: int
    running: int


def make_load(arguments: argparse.Namespace) -> Load:
    """Prompts of different length that arrive a few steps apart."""
    rng = random.Random(arguments.seed)
    step, requests = 0.0, []
    for _ in range(arguments.requests):
        step += rng.expovariate(1 / arguments.apart)
        prompt, output = rng.randint(*arguments.prompt), rng.randint(*arguments.output)
        requests.append(Request(float(int(step)), prompt, output))
    return Load(requests, arguments.kv_mib, arguments.block, arguments.step_tokens, arguments.running)


def measure(folder: str, load: Load, policy: str | None, vocabulary: int) -> tuple[Run, list[float], int]:
    """Run vLLM; what it did, the share of its prompt that each request kept, and the blocks of its pool."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    ours: dict[str, Any] = {}
    if policy is not None:
        from vllm.config import KVTransferConfig

        from refreekv.engines.vllm.config import PluginOptions
        from refreekv.engines.vllm.launch import engine_arguments

        ours = engine_arguments(PluginOptions(policy, 1))
        ours["kv_transfer_config"] = KVTransferConfig(**ours["kv_transfer_config"])
    config = EngineArgs(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        block_size=load.block,
        kv_cache_memory_bytes=load.kv_mib << 20,
        max_num_batched_tokens=load.step_tokens,
        max_num_seqs=load.running,
        enable_prefix_caching=False,
        enforce_eager=True,
        seed=0,
        **ours,
    ).create_engine_config()
    engine = LLMEngine.from_vllm_config(config)
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    rng = random.Random(1)
    waiting = list(enumerate(load.requests))
    running: list[int] = []
    kept = [1.0] * len(load.requests)
    seen: dict[str, int] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1].arrival <= step:
            index, request = waiting.pop(0)
            ids = [rng.randrange(3, vocabulary) for _ in range(request.prompt)]
            params = SamplingParams(temperature=0, max_tokens=request.output, ignore_eos=True, detokenize=False)
            engine.add_request(str(index), {"prompt_token_ids": ids}, params)
        if not engine.has_unfinished_requests():
            step += 1  # nothing to do: time goes on
            continue
        before = {request.request_id for request in scheduler.running}
        outputs = engine.step()
        step += 1
        # Those that ran in this step: still there, or finished with it.
        finished = {output.request_id for output in outputs if output.finished}
        running.append(len({request.request_id for request in scheduler.running} | (finished & (before | finished))))
        for request in [*scheduler.running, *scheduler.waiting]:
            seen[request.request_id] = max(seen.get(request.request_id, 0), request.num_preemptions)
        for output in outputs:
            if output.finished and policy is not None:
                report = (getattr(output, "kv_transfer_params", None) or {}).get("refreekv") or {}
                kept[int(output.request_id)] = _kept(report)
    blocks = pool.num_gpu_blocks - 1  # one is the null block
    engine.engine_core.shutdown()
    return Run(sum(running) / len(running), max(running), len(running), sum(seen.values())), kept, blocks


def _kept(report: dict[str, Any]) -> float:
    for name in ("budget", "kept_share", "kept"):
        if isinstance(report.get(name), float):
            return float(report[name])
    raise KeyError(f"no kept share in the plugin's report: {sorted(report)}")


def simulate(load: Load, kept: Sequence[float], tokens: int) -> Run:
    """The same in the planner's engine, whose pool holds so many tokens of all layers."""
    shares = {(request.prompt, request.output): share for request, share in zip(load.requests, kept, strict=True)}
    by_prompt = {prompt: share for (prompt, _), share in shares.items()}

    def blocks_for(prompt: int, output: int, complete: bool) -> int:
        held = round(by_prompt[prompt] * prompt) + output if complete else prompt
        return -(-held // load.block)

    replica = Replica(Engine(tokens // load.block, blocks_for, lambda *_: 1.0, load.step_tokens, load.running))
    for request in load.requests:
        replica.advance(request.arrival)
        replica.add(request)
    replica.advance(float("inf"))
    totals = replica.totals
    return Run(totals.running_steps / totals.steps, totals.most_running, totals.steps, totals.preemptions)


def main() -> None:
    """Run both for every policy and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder that vLLM loads; default: a tiny random one")
    parser.add_argument("--policy", action="append", default=[], help="default: the full cache and half a window")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prompt", type=int, nargs=2, default=(150, 900))
    parser.add_argument("--output", type=int, nargs=2, default=(20, 200))
    parser.add_argument("--apart", type=float, default=4.0, help="steps between arrivals, on average")
    parser.add_argument("--kv-mib", type=int, default=9)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    load = make_load(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.model or _tiny(place)
        config = AutoConfig.from_pretrained(folder)
        results = []
        for policy in [None, *(arguments.policy or ["streaming-llm:ratio=0.5"])]:
            real, kept, blocks = measure(folder, load, policy, config.vocab_size)
            # With a block table for each layer a block holds tokens of one layer.
            layers = 1 if policy is None else config.num_hidden_layers
            tokens = blocks * load.block // layers
            simulated = simulate(load, kept, tokens)
            off = simulated.mean_running / real.mean_running - 1
            name = policy or "full cache"
            results.append(
                {
                    "policy": name,
                    "pool_tokens": tokens,
                    "kept": [round(share, 4) for share in kept],
                    "vllm": asdict(real),
                    "simulated": asdict(simulated),
                    "off": off,
                }
            )
            print(f"{name}: vLLM {real}\n{' ' * len(name)}  simulated {simulated}: {off:+.1%} running", flush=True)
    if arguments.json:
        import vllm

        about = {
            "vllm": vllm.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": arguments.model or "random, 6 layers",
            "load": asdict(load),
            "results": results,
        }
        arguments.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _tiny(place: str) -> str:
    """A Llama with random weights that computes next to nothing: scheduling does not depend on it."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, num_key_value_heads=1, max_position_embeddings=2048, **TINY)
    LlamaForCausalLM(config).save_pretrained(place)
    return place


if __name__ == "__main__":
    main()
