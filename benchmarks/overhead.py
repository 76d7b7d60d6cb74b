"""What pruning costs, against the prefill it belongs to.

    python benchmarks/overhead.py                       # CPU: SmolLM2-135M's shape
    python benchmarks/overhead.py --device cuda         # GPU: Llama-3-8B's shape
    python benchmarks/overhead.py --device cuda --policies "refreekv:threshold=0.3;adaptive;adaptive:stand_ins=0"
    python benchmarks/overhead.py --model $(python benchmarks/models.py smollm2-135m) --policies adaptive --lengths 2101

Random weights, unless a model is named: the time does not depend on them. Their attention is nearly uniform, so
the threshold is set to 0.3, at which such attention keeps about half of each layer: the
pruning step really selects, gathers and frees. A named model reads Python's own documentation.

Per prompt length, medians of runs that take turns, the full cache and all policies:

    full     one prefill into transformers' DynamicCache
    pruned   the same prefill into a pruned cache, all of refreekv included
    extra    the median of the ratios pruned / full of the same turn
    first    the same of a model's first prompt ever, with the pass that measures its copy scores
    again    the same of its first prompt in a process that finds these scores on disk
    step     the pruning steps alone (probe, select, compact; all layers), timed one by one
             with the device idle in between, host waits included; with --cpu-seconds, all of this is in
             seconds of the processor, which other programs on a shared machine change less
    peak     most memory above the model's during the prefill (CUDA only), and during the
             pruning steps, beside n x n of one head and layer, which must never be there
"""

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pydoc_data.topics import topics

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import refreekv
from checkpoints import load
from refreekv.engines.transformers import copy_scores
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.naming import NAME

SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


class Clock:
    """Wall time on the CPU, or its own seconds; device events on CUDA."""

    def __init__(self, device: torch.device, cpu_seconds: bool = False):
        self.cuda = device.type == "cuda"
        self._now = time.process_time if cpu_seconds else time.perf_counter

    def time(self, call: Callable[[], object]) -> float:
        """Seconds that ``call`` takes, from an idle device to an idle device."""
        if not self.cuda:
            start = self._now()
            call()
            return self._now() - start
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


class Steps:
    """Times each pruning step by standing in for `ReFreeKVLayer.after_attention`."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.seconds = 0.0
        self.peak = 0

    def __enter__(self) -> "Steps":
        self.original = ReFreeKVLayer.after_attention
        original = self.original

        def timed(layer, call):
            if self.clock.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            self.seconds += self.clock.time(lambda: original(layer, call))
            if self.clock.cuda:
                self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)

        ReFreeKVLayer.after_attention = timed
        return self

    def __exit__(self, *exc: object) -> None:
        ReFreeKVLayer.after_attention = self.original


def prefill(model, ids, cache):
    """One forward over the whole prompt, logits of the last token only."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **{NAME: cache})


def peak_of(call: Callable[[], object], cuda: bool) -> int | None:
    """Most device memory above the present during ``call``; None on the CPU."""
    if not cuda:
        call()
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def ratio(ones: list[float], others: list[float]) -> float | None:
    """The median of ``one / other - 1``, turn by turn."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True)) - 1 if ones else None


@torch.inference_mode()
def measure(
    model,
    ids: torch.Tensor,
    policies: dict[str, refreekv.policies.Policy],
    repeats: int,
    step_repeats: int,
    clock: Clock,
) -> list[dict[str, object]]:
    """All figures of one prompt length; a row each policy."""
    length = ids.shape[1]

    def run_full() -> object:
        return prefill(model, ids, DynamicCache(config=model.config))

    def run_pruned(policy) -> object:
        return prefill(model, ids, refreekv.ReFreeKVCache(model, policy))

    # These are the warm-up as well.
    peaks, reports = {}, {}
    turns, first, again = ({name: [] for name in policies} for _ in range(3))
    for name, policy in policies.items():
        # Inside compress, here and below, so that the model is prepared once and not in every run.
        with refreekv.compress(model, policy):
            run_pruned(policy)
            peaks[name] = peak_of(lambda policy=policy: run_pruned(policy), clock.cuda)
            reports[name] = prefill(model, ids, None)[NAME].report
    run_full()
    peak_full = peak_of(run_full, clock.cuda)
    full = []
    for _ in range(repeats):
        full.append(clock.time(run_full))
        for name, policy in policies.items():
            with refreekv.compress(model, policy), tempfile.TemporaryDirectory() as folder:
                turns[name].append(clock.time(lambda policy=policy: run_pruned(policy)))
                if policy.reads_copy_scores:
                    os.environ["XDG_CACHE_HOME"] = folder  # where there are no scores, and then there are
                    for times in (first, again):
                        copy_scores._KNOWN.pop(model, None)
                        times[name].append(clock.time(lambda policy=policy: run_pruned(policy)))
    rows = []
    for name, policy in policies.items():
        steps = []
        for _ in range(step_repeats):
            with refreekv.compress(model, policy), Steps(clock) as step:
                run_pruned(policy)
            steps.append(step.seconds)
        report, pruned = reports[name], turns[name]
        row: dict[str, object] = {
            "policy": name,
            "length": length,
            "kept": report.budget,
            "kv_bytes_full": report.bytes_before,
            "kv_bytes_pruned": report.bytes_after,
            "full_s": statistics.median(full),
            "pruned_s": statistics.median(pruned),
            "step_s": statistics.median(steps),
            "full_all": full,
            "pruned_all": pruned,
            "step_share": statistics.median(steps) / statistics.median(full),
            "end_to_end": ratio(pruned, full),
            "first": ratio(first[name], full),
            "again": ratio(again[name], full),
            "n_by_n_bytes": length * length * model.dtype.itemsize,
        }
        if clock.cuda:
            row |= {"peak_full": peak_full, "peak_pruned": peaks[name], "peak_step": step.peak}
        rows.append(row)
    return rows


def main() -> None:
    """Parse the arguments, measure, print a table and maybe write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="a real one: a .gguf file, a folder or a hub id; default: random weights")
    parser.add_argument("--dtype", default="float32", help="of a real model")
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-3-8b on CUDA, else smollm2-135m")
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--policies", default="refreekv:threshold=0.3", help="separated by semicolons")
    parser.add_argument("--cpu-seconds", action="store_true", help="of the processor, not of the clock (CPU only)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step-repeats", type=int, default=2, help="of the pruning steps alone")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    if arguments.model:
        model, tokenizer, what = load(arguments.model, arguments.device, arguments.dtype)
        text = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), return_tensors="pt").input_ids
        what = f"{what}, {arguments.dtype}"
    else:
        shape = arguments.shape or ("llama-3-8b" if device.type == "cuda" else "smollm2-135m")
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, tie_word_embeddings=True)
        with device:
            torch.set_default_dtype(torch.bfloat16)
            model = LlamaForCausalLM(config).eval()
            torch.set_default_dtype(torch.float32)
        text, what = None, f"{shape}, bf16, random weights"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or 'CPU'}"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    threads += ", seconds of the processor" if arguments.cpu_seconds else ""
    header = f"{what}; {name}{threads}; torch {torch.__version__}; {date.today()}"
    print(header)
    columns = ["prompt", "kept", "full s", "pruned s", "extra", "first", "again", "step s", "step/full"]
    if device.type == "cuda":
        columns += ["peak full", "peak pruned", "peak step", "n x n"]
    print(" ".join(f"{column:>11}" for column in columns), "policy, all runs in ms")
    policies = {name: refreekv.policies.parse(name) for name in arguments.policies.split(";")}
    rows = []
    for length in (int(part) for part in arguments.lengths.split(",")):
        ids = torch.randint(1, model.config.vocab_size, (1, length)) if text is None else text[:, :length]
        found = measure(
            model,
            ids.to(device),
            policies,
            arguments.repeats,
            arguments.step_repeats,
            Clock(device, arguments.cpu_seconds),
        )
        rows += found
        for row in found:
            cells = [f"{row['length']}", f"{row['kept']:.1%}", f"{row['full_s']:.4f}", f"{row['pruned_s']:.4f}"]
            cells += ["–" if row[key] is None else f"{row[key]:+.2%}" for key in ("end_to_end", "first", "again")]
            cells += [f"{row['step_s']:.4f}", f"{row['step_share']:.2%}"]
            if device.type == "cuda":
                peaks = [row[key] for key in ("peak_full", "peak_pruned", "peak_step", "n_by_n_bytes")]
                cells += [f"{peak / 2**20:.0f} MiB" for peak in peaks]
            times = ", ".join(f"{1e3 * seconds:.0f}" for seconds in sorted(row["pruned_all"]))
            print(" ".join(f"{cell:>11}" for cell in cells), row["policy"], times, flush=True)
        print(f"{'':11} full: {', '.join(f'{1e3 * seconds:.0f}' for seconds in sorted(found[0]['full_all']))}")
    if arguments.json:
        with open(arguments.json, "w") as file:  # noqa: PTH123
            json.dump({"setup": header, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
