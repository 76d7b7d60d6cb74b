"""Prints which kernels storages of codes would have compiled, ahead and in use; nothing is compiled and nothing runs.

A process of its own: tests run Triton in its interpreter.
"""

import json
import sys

import torch
import triton
from compiling import LIMITS, Driver
from triton.runtime.jit import JITFunction

from refreekv import kernels
from refreekv.core.quantisation import Ladder, centre_of
from refreekv.kernels import packed_ops, shared_memory
from refreekv.kernels.packed_calls import PackedKV
from refreekv.kernels.packed_launch import launch_packed_attention
from refreekv.storage import warm_up
from refreekv.storage.columns import Columns, Levels
from refreekv.storage.leveled import LeveledKV

CPU, HEADS, SIZES = torch.device("cpu"), 2, (128, 128)
LADDER = Ladder.parse("k4v2+k4v4+k6v4+k7v6")


def use(batch, length, group):
    """What a cache does: code a prompt, decode it, attend to it, code what is generated."""
    keys, values = (torch.randn(batch, HEADS, length, size).bfloat16() for size in SIZES)
    rung = (torch.arange(length) % 4).to(torch.uint8)
    coded = rung[4 : length - LADDER.recent]
    levels = Levels((rung,), (tuple(int((coded == number).sum()) for number in range(4)),))
    columns = [Columns.of_ranges((0, length))] * batch
    storage = LeveledKV.gathered(
        keys, values, columns, 0, LADDER, (centre_of(keys), centre_of(values)), [levels] * batch
    )
    storage.full()
    storage.attend(torch.randn(batch, HEADS * group, 1, SIZES[0]).bfloat16(), None, None, None)
    length = storage.lengths[0][0] - 80
    kept = [Columns.of_ranges((0, length))] * batch
    storage = storage.keep(kept, 80, [Levels((rung[:length],), ((0,) * 4,))] * batch)
    for _ in range(80):
        storage.append(keys[:, :, :1], values[:, :, :1])


def main():
    found = set()

    def note(kernel, key, *args, **kwargs):
        found.add(f"{kernel.__name__} {key}")

    def attend(query, exact, tables, numbers, maps, *rest):
        return launch_packed_attention(query, PackedKV.of(exact, tables, numbers, maps), *rest, assembly=True)

    run = JITFunction.run
    JITFunction.run = lambda kernel, *args, warmup, **options: run(kernel, *args, warmup=True, **options)
    JITFunction._do_compile = note
    kernels._at_once = lambda tensor: True
    packed_ops.packed_attention = attend
    shared_memory.bytes_of = lambda device: LIMITS[90]
    warm_up.available_cores = lambda: 4
    triton.runtime.driver.set_active(Driver(90))
    warm_up.warm_up(CPU, torch.bfloat16, HEADS, SIZES, LADDER, None)
    ahead = sorted(found)
    uses = {}
    for batch, length, group in ((1, 300, 2), (1, 320, 4), (1, 5001, 4), (3, 416, 4)):
        found.clear()
        use(batch, length, group)
        uses[f"{batch} x {length}"] = sorted(found)
    json.dump({"ahead": ahead, "uses": uses}, sys.stdout)


if __name__ == "__main__":
    main()
