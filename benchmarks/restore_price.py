"""What ``keep_evicted`` costs: a prompt's reading beside one without it, and the way back when the next turn begins.

    python benchmarks/restore_price.py                                  # Llama-3-8B's shape, 8k and 32k tokens, on CUDA
    python benchmarks/restore_price.py --lengths 32768 --policy streaming-llm:ratio=0.25 --json
    python benchmarks/restore_price.py --seconds 60                     # ends in about a minute, with what was measured

Random weights, as times do not depend on them. All times are from an idle device to an idle device; medians of runs
that take turns, with and without. Each part is printed when it is measured: the way back before what takes longer.

    full, plain, kept
                  reading the prompt into transformers' own cache, and without and with ``keep_evicted``, in turns;
                  ``pruning`` and ``extra`` are the medians of the ratios plain / full and kept / plain
    first         the same with it for the first time in a process, which pins the host memory, after a short prompt
                  (``short``), which compiles kernels
    host          bytes that are kept, and what part of a full cache's they are
    ideal         these bytes over the bandwidth that a copy of 1 GiB of pinned memory to the device reaches
    restore       all layers' entries brought back, one after the other, and nothing else; ``ratio`` is restore / ideal
    turn          reading a question of 32 tokens: over everything that comes back, over what was kept, and over
                  transformers' own full cache; and the first of each, which may compile
    decoding      bytes on the device while an answer is generated, without and with ``keep_evicted``
    peak          most memory above the model's and the caches' during the turn (CUDA only)
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import refreekv
from devices import header
from overhead import SHAPES, prefill
from refreekv.engines.transformers.attachment import attached

QUESTION = 32


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """From an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second from pinned host memory to the device, the best of ten copies."""
    source = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / min(seconds(device, lambda: target.copy_(source, non_blocking=True)) for _ in range(10))


def read(model: Any, ids: torch.Tensor, cache: Any) -> None:
    """Read a prompt, or a later turn's, and let everything be carried out."""
    if isinstance(cache, refreekv.ReFreeKVCache):
        with cache.prompt_until(cache.get_seq_length() + ids.shape[1]):
            prefill(model, ids, cache)
        cache.state.finish()
    else:
        prefill(model, ids, cache)


def restore(cache: Any) -> None:
    """Bring all layers' entries back, and drop them."""
    past = cache.state.past
    length = past.length
    assert past.begins(length)
    for layer in cache.pruned_layers:
        past.take(layer.ordinal, layer.device, length)
    past.crop(length)  # as if the turn had not begun


class Clock:
    """Says when the time is up: measuring ends then, with what was measured."""

    def __init__(self, limit: float | None):
        self._end = math.inf if limit is None else time.perf_counter() + limit

    def rounds(self, count: int, least: int = 1) -> Iterator[int]:
        """Up to ``count`` rounds, ``least`` of them whatever the time is."""
        for number in range(count):
            if number >= least and time.perf_counter() > self._end:
                return
            yield number

    @property
    def up(self) -> bool:
        """Whether nothing more is to be begun."""
        return time.perf_counter() > self._end


@torch.inference_mode()
def measure(
    model: Any, length: int, policy: str, store: refreekv.HostStore, clock: Clock, repeats: int = 5
) -> Iterator[dict[str, Any]]:
    """The numbers for a prompt of one length, part by part; the way back before what takes longer."""
    device, most = model.device, min(model.config.vocab_size, 1000)
    ids = torch.randint(1, most, (1, length), device=device)
    question = torch.randint(1, most, (1, QUESTION), device=device)

    def new(keep: bool) -> Any:
        return refreekv.ReFreeKVCache(model, policy, keep_evicted=store if keep else None)

    def compiled(size: int) -> float:
        return seconds(device, lambda: read(model, ids[:, :size], new(True)))

    begin = time.perf_counter()
    read(model, ids[:, :2048], new(False))  # compiled kernels, copy scores
    yield {"part": "ready", "length": length, "policy": policy, "plain": time.perf_counter() - begin}
    # A short prompt compiles what keeping needs and pins little; the rest of the first long one's time is pinning.
    yield {"part": "first", "length": length, "short": compiled(min(length, 1024)), "first": compiled(length)}
    everything = new(True)
    read(model, ids, everything)
    report = everything.report
    host, speed = report.remembered.host_bytes, bandwidth(device)
    back = [seconds(device, lambda: restore(everything)) for _ in clock.rounds(repeats)]
    yield {
        "part": "restore",
        "length": length,
        "host": host,
        "host_share": host / report.bytes_before,
        "bandwidth": speed,
        "ideal": host / speed,
        "restore": statistics.median(back),
        "ratio": statistics.median(back) * speed / host,
    }
    if clock.up:
        return
    full, plain, kept = [], [], []
    read(model, ids, DynamicCache(config=model.config))  # plain and kept were read before
    for _ in clock.rounds(repeats):
        gc.collect()
        full.append(seconds(device, lambda: read(model, ids, DynamicCache(config=model.config))))
        plain.append(seconds(device, lambda: read(model, ids, new(False))))
        kept.append(seconds(device, lambda: read(model, ids, new(True))))
    yield {
        "part": "prompt",
        "length": length,
        "full": statistics.median(full),
        "plain": statistics.median(plain),
        "kept": statistics.median(kept),
        "pruning": statistics.median(b / a for a, b in zip(full, plain, strict=True)) - 1,
        "extra": statistics.median(b / a for a, b in zip(plain, kept, strict=True)) - 1,
    }
    if clock.up:
        return
    caches = {"everything": everything, "kept": new(False), "full": DynamicCache(config=model.config)}
    for name in ("kept", "full"):
        read(model, ids, caches[name])
    turns: dict[str, list[float]] = {name: [] for name in caches}
    peak = 0
    for _ in clock.rounds(repeats, least=2):  # the first one compiles
        for name, cache in caches.items():
            if device.type == "cuda" and name == "everything":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            turns[name].append(seconds(device, lambda cache=cache: read(model, question, cache)))
            if device.type == "cuda" and name == "everything":
                peak = torch.cuda.max_memory_allocated(device) - before
    assert everything.report.remembered.restored
    yield {
        "part": "turn",
        "length": length,
        "turn": {name: statistics.median(found) for name, found in turns.items()},
        "first_turn": {name: found[0] for name, found in turns.items()},
        "decoding": [caches[name].report.bytes_after for name in ("kept", "everything")],
        "peak": peak,
    }


def line(found: dict[str, Any]) -> str:
    """The numbers of one part as text."""
    ms = {name: f"{value * 1e3:.1f} ms" for name, value in found.items() if isinstance(value, float)}
    if found["part"] == "ready":
        said = f"{found['policy']}: kernels and copy scores {ms['plain']}"
    elif found["part"] == "first":
        said = f"for the first time: {ms['short']} with a short prompt, which compiles, then {ms['first']}"
    elif found["part"] == "restore":
        said = (
            f"host {found['host'] / 2**20:.0f} MiB ({found['host_share']:.0%} of the full cache) at "
            f"{found['bandwidth'] / 1e9:.1f} GB/s: ideal {ms['ideal']}, restore {ms['restore']} "
            f"(x {found['ratio']:.2f})"
        )
    elif found["part"] == "prompt":
        said = f"{ms['full']} full, {ms['plain']} plain ({found['pruning']:+.2%}), "
        said += f"{ms['kept']} kept ({found['extra']:+.2%})"
    else:
        turn, first = found["turn"], found["first_turn"]
        times = ", ".join(f"{name} {turn[name] * 1e3:.1f} ms (first {first[name] * 1e3:.0f})" for name in turn)
        said = (
            f"of {QUESTION} tokens over {times}; while decoding {found['decoding'][0] / 2**20:.0f} and "
            f"{found['decoding'][1] / 2**20:.0f} MiB, peak of the turn {found['peak'] / 2**20:.0f} MiB"
        )
    return f"{found['length']:>7,} {found['part']:>8} {said}"


def main() -> None:
    """Parse the arguments and print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", default="64GiB", help="of host memory")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, help="after which nothing more is begun, for all lengths together")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[arguments.shape], max_position_embeddings=2**17)).eval()
    torch.set_default_dtype(torch.float32)
    if device.type == "cuda":
        print(header(), flush=True)
    store = refreekv.HostStore.parse(f"host:limit={arguments.limit}")
    assert store is not None
    clock = Clock(arguments.seconds)
    with attached(model):
        for length in arguments.lengths:
            if clock.up:
                print(f"{length:>7,}: not measured, as the time is up", flush=True)
                continue
            for found in measure(model, length, arguments.policy, store, clock, arguments.repeats):
                print(json.dumps(found) if arguments.json else line(found), flush=True)


if __name__ == "__main__":
    main()
