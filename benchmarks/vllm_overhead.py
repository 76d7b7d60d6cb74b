"""What the plugin costs vLLM's scheduler and metadata builder per decode step, against stock vLLM.

    python benchmarks/vllm_overhead.py

A Llama of 30 layers that computes next to nothing, so that what is timed is the engine. For each
number of running requests and each setting, prompts are prefilled and pruned, then decode steps
are timed one by one: `schedule()`, the attention metadata of all layers, block tables and slot
mappings (`prepare`), and the scheduler's `update_from_output`. Medians over the steps, in
milliseconds. Settings take turns, so that a busy machine is unfair to none of them.

On a GPU, whose model runner is another, `metadata` is that of all layers, `tables` the block tables with what the
plugin plans for a step, `requests` which of them are in it, and `prepare` the inputs. Times are the host's.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.vllm_engine import engine, tiny_model
from refreekv.engines.vllm.launch import environment, on_cpu

os.environ.update(
    environment(),
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    OMP_NUM_THREADS="1",
)

LAYERS = 30
PROMPT = 384
CPU_PARTS = {"metadata": "_build_attention_metadata", "prepare": "_prepare_inputs"}
GPU_PARTS = {
    "metadata": "model_state.prepare_attn",
    "tables": "prepare_attn",
    "requests": "gather_batch_req_state",
    "prepare": "prepare_inputs",
}
RUNNER_PARTS = CPU_PARTS if on_cpu() else GPU_PARTS
PARTS = ("schedule", *RUNNER_PARTS, "update")


def timed(owner, name, into):
    """Replace a method of one object by one that notes how long each call takes."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            into.append(1000 * (time.perf_counter() - start))

    setattr(owner, name, call)


def measure(folder, running, steps, *, policy="refreekv:threshold=0.5,frozen_layers=0", **setting):
    """Median milliseconds of each part over the decode steps of ``running`` requests."""
    kv_mib = 16 + running * LAYERS * (PROMPT + steps + 128) * 2 * 2 * 32 * 4 // 2**20
    with engine(
        folder,
        policy,
        **setting,
        enforce_eager=on_cpu(),
        kv_mib=kv_mib,
        max_model_len=1024,
        max_num_seqs=running,
        skip_tokenizer_init=True,
    ) as vllm:
        for index in range(running):
            vllm.add(f"r{index}", [(index * 7 + place * 13) % 500 + 3 for place in range(PROMPT)], steps + 60)
        while any(request.num_output_tokens < 2 for request in vllm.scheduler.requests.values()):
            vllm.step(check=False)
        runner = vllm.core.model_executor.driver_worker.worker.model_runner
        times = {part: [] for part in PARTS}
        timed(vllm.scheduler, "schedule", times["schedule"])
        timed(vllm.scheduler, "update_from_output", times["update"])
        for part, path in RUNNER_PARTS.items():
            *owner, name = path.split(".")
            timed(getattr(runner, owner[0]) if owner else runner, name, times[part])
        assert len(vllm.scheduler.running) == running
        for _ in range(steps):
            vllm.step(check=False)
        assert len(vllm.scheduler.running) == running, "a request ended or was preempted while being timed"
        if setting.get("pruned"):
            freed = [entry.freed for entry in vllm.scheduler.connector.reclaimer.ledger.entries.values()]
            assert min(freed) > 0, "nothing was pruned: this would measure the wrong thing"
    return {part: values[-steps:] for part, values in times.items()}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--running", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--layers-per-group", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    settings = {"stock": {"pruned": False}}
    if on_cpu():
        settings |= {f"{n} a group": {"pruned": True, "layers_per_group": n} for n in arguments.layers_per_group}
    else:
        settings |= {kind: {"pruned": True, "kv_dtype": kind} for kind in ("16", "int4", "k4v2+k4v4+k6v4+k7v6")}

    results = []
    with tempfile.TemporaryDirectory() as place:
        folder = tiny_model(place, layers=LAYERS)
        for running in arguments.running:
            samples = {name: {part: [] for part in PARTS} for name in settings}
            for _ in range(arguments.rounds):
                for name, setting in settings.items():
                    found = measure(folder, running, arguments.steps, **setting)
                    for part in PARTS:
                        samples[name][part] += found[part]
            for name, parts in samples.items():
                medians = {part: statistics.median(values) for part, values in parts.items()}
                results.append({"running": running, "setting": name, "n": len(parts["schedule"]), **medians})
                columns = "  ".join(f"{part} {medians[part]:6.3f}" for part in PARTS)
                both = sum(medians.get(part, 0) for part in ("schedule", "metadata", "tables", "requests"))
                print(f"{running:3d} running  {name:20s}  {columns}  all but the last two {both:6.3f} ms", flush=True)
    if arguments.json:
        about = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d")}
        Path(arguments.json).write_text(json.dumps({**about, "layers": LAYERS, "results": results}, indent=1))


if __name__ == "__main__":
    main()
