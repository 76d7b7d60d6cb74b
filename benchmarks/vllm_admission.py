"""How many requests vLLM runs at once in a fixed K/V memory, with and without the plugin.

    python benchmarks/vllm_admission.py MODEL_FOLDER --data-dir DIR

40 requests of mixed length, or as many as asked for, arrive at once and generate a fixed number of tokens each. Nothing
here is a time: the scheduler's decisions are counted, so a busy machine changes no number.

    running       requests that run, mean over all steps until the last one has ended
    saturated     the same over the steps in which others still wait
    free          share of the pool that is free in those steps: too little for the prompt that is next
    steps         engine steps, and how many of them drain the queue: nobody waits any more
    preemptions   requests thrown out for want of memory, and computed again
    tokens/step   prompt and generated tokens computed, a step
    kept          share of the prompts that the blocks still hold after pruning, mean over requests
    target        0.85 / kept, the least that running should gain over stock

Prompts are made up by tests/vllm/helpers.py unless a folder with LongBench-style files is given.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_USE_V2_MODEL_RUNNER="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from transformers import AutoTokenizer

from helpers.vllm_engine import engine, make_prompts

STOCK = "stock"
POLICIES = (STOCK, "refreekv", "refreekv:norm_includes_sinks=true", "snapkv:ratio=0.3")


def lengths(requests: int) -> list[int]:
    """Mixed prompt lengths, 300 to 1,000 tokens, the same ones every time."""
    return [300 + 700 * (index * 17 % requests) // requests for index in range(requests)]


def data_prompts(folder: str, tokenizer, wanted: list[int]) -> list[list[int]]:
    """Prompts of the wanted lengths from the documents of a LongBench-style folder, each used once."""
    files = sorted(Path(folder).glob("longbench_*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    prompts = []
    for row, length in zip(rows, wanted, strict=False):
        question = tokenizer(f"\n\nQuestion: {row['input']}\nAnswer:")["input_ids"]
        prompts.append(tokenizer(row["context"])["input_ids"][: length - len(question)] + question)
    return prompts


def measure(folder: str, prompts: list[list[int]], tokens: int, kv_mib: int, policy: str | None) -> dict:
    """One run; ``policy`` None is stock vLLM."""
    running, saturated, free, computed, preempted = [], [], [], [], {}
    with engine(
        folder, policy or "refreekv", pruned=policy is not None, kv_mib=kv_mib, max_model_len=2048, max_num_seqs=64
    ) as vllm:
        for index, ids in enumerate(prompts):
            vllm.add(f"r{index}", ids, tokens)
        lengths_out = {}
        schedule = vllm.scheduler.schedule

        def counted(*args, **kwargs):
            output = schedule(*args, **kwargs)
            count = len(vllm.scheduler.running)
            running.append(count)
            computed.append(output.total_num_scheduled_tokens)
            if vllm.scheduler.waiting:
                saturated.append(count)
                free.append(vllm.pool.get_num_free_blocks() / vllm.pool.num_gpu_blocks)
            preempted.update({r.request_id: r.num_preemptions for r in vllm.scheduler.requests.values()})
            return output

        vllm.scheduler.schedule = counted
        while vllm.llm.has_unfinished_requests():
            for output in vllm.step(check=False):
                if output.finished:
                    lengths_out[output.request_id] = len(output.outputs[0].token_ids)
        vllm.settle()
        reports = [report for report in vllm.reports.values() if report]
    return {
        "policy": policy or STOCK,
        "requests": len(prompts),
        "mean_running": sum(running) / len(running),
        "mean_running_saturated": sum(saturated) / max(1, len(saturated)),
        "free_saturated": sum(free) / max(1, len(free)),
        "steps": len(running),
        "drain_steps": len(running) - len(saturated),
        "preemptions": sum(preempted.values()),
        "tokens_per_step": sum(computed) / len(computed),
        "kept_share": sum(r["kept_share"] for r in reports) / len(reports) if reports else 1.0,
        "kept_share_least": min((r["kept_share"] for r in reports), default=1.0),
        "output_tokens": sorted(set(lengths_out.values())),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of SmolLM2 or another small model")
    parser.add_argument("--data-dir", help="take prompts from longbench_*.jsonl in this folder")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=48, help="tokens that each request generates")
    parser.add_argument("--kv-mib", type=int, default=160)
    parser.add_argument("--policy", nargs="+", default=POLICIES)
    parser.add_argument("--json", metavar="FILE", help="add the results to this file")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    wanted = lengths(arguments.requests)
    prompts = (
        data_prompts(arguments.data_dir, tokenizer, wanted)
        if arguments.data_dir
        else make_prompts(tokenizer, wanted, seed=100)
    )
    results = []
    for name in arguments.policy:
        policy = None if name == STOCK else name
        found = measure(arguments.model, prompts, arguments.tokens, arguments.kv_mib, policy)
        results.append(found)
        gain = found["mean_running"] / results[0]["mean_running"]
        print(
            f"{found['policy']:36s} running {found['mean_running']:6.2f} "
            f"({gain:4.2f}x, target {0.85 / found['kept_share']:4.2f}x)  "
            f"saturated {found['mean_running_saturated']:6.2f}  free {found['free_saturated']:.3f}  "
            f"steps {found['steps']:4d} (drain {found['drain_steps']})  "
            f"preemptions {found['preemptions']:3d}  tokens/step {found['tokens_per_step']:6.1f}  "
            f"kept {found['kept_share']:.3f}  output {found['output_tokens']}",
            flush=True,
        )
    if arguments.json:
        about = {"date": time.strftime("%Y-%m-%d"), "kv_mib": arguments.kv_mib, "prompt_tokens": sum(map(len, prompts))}
        Path(arguments.json).write_text(json.dumps({**about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
