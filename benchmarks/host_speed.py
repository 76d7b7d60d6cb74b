"""How fast codes come from pinned host memory: by a copy, by the kernel of captured steps, and read where they are.

    python benchmarks/host_speed.py                      # one layer of Llama-3-70B: 8 KV heads of 128, 32,768 entries
    python benchmarks/host_speed.py --length 131072 --kind int8

GB/s are bytes that cross the bus a second, medians of 20.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from devices import header
from packed_speed import EXACT, Level, form_of, maps
from refreekv.kernels.packed_calls import PackedKV
from refreekv.kernels.packed_launch import launch_packed_attention
from refreekv.kernels.storage import launch_fetch, launch_move
from refreekv.storage.arena import KVArena
from refreekv.storage.hosted import HostArena

KV_HEADS, HEADS, SIZE = 8, 64, 128


def arena_of(kind: str, length: int) -> KVArena:
    """Random codes of one layer on the device."""
    level = Level(form_of(kind), KV_HEADS, length)
    return KVArena(level.lines, level.factors, [(length,) * KV_HEADS], [0])


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call on the device."""
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--kind", default="int4")
    given = parser.parse_args(arguments)
    here = arena_of(given.kind, given.length)
    there, form = HostArena.moved(here), form_of(given.kind)
    size = sum(part.nbytes for part in (here.keys, here.values))
    print(f"{header()}; {given.kind}, {given.length:,} entries of {KV_HEADS} KV heads: {size / 2**20:.0f} MiB\n")

    def say(name: str, call: Callable[[], object]) -> None:
        taken = seconds(call)
        print(f"{name:34} {1e3 * taken:7.2f} ms {size / taken / 1e9:7.1f} GB/s", flush=True)

    say("copy to the device", lambda: here.keys.copy_(there.keys[: len(here.keys)], non_blocking=True))
    say("copy to the host", lambda: there.keys[: len(here.keys)].copy_(here.keys, non_blocking=True))
    bytes_each = form.line_bytes, 4
    for programs in (8, 16, 32, 64, 132):
        say(f"fetch, {programs} programs", lambda n=programs: launch_fetch(there.table, here.table, *bytes_each, n))
    say("move to the host", lambda: launch_move(here.table, there.table, *bytes_each, given.length))
    query = torch.randn(1, HEADS, 1, SIZE, device="cuda", dtype=torch.bfloat16)
    like = torch.empty(0, SIZE, device="cuda", dtype=torch.bfloat16)
    exact, own = KVArena.like(like, like, [(EXACT,) * KV_HEADS]), maps()
    exact.keys.normal_()
    exact.values.normal_()
    for name, lines in (("attention over them here", here), ("attention over them there", there)):
        held = PackedKV(exact.table, [lines.table], [form], own)
        say(name, lambda held=held: launch_packed_attention(query, held, SIZE**-0.5, None, None))


if __name__ == "__main__":
    main()
