"""Prints which kernels storages of codes would have compiled, ahead and in use; nothing is compiled and nothing runs.

A process of its own: tests run Triton in its interpreter.
"""

import json
import sys

import torch
import triton
from compiling import LIMITS, Driver
from triton.runtime.jit import JITFunction

from refreekv.core.quantisation import Ladder, centre_of
from refreekv.core.reductions import Probes
from refreekv.kernels import dispatch, packed_ops, shared_memory
from refreekv.kernels.needs import launch_kept_first
from refreekv.kernels.packed_calls import PackedKV
from refreekv.kernels.packed_launch import launch_packed_attention
from refreekv.kernels.probe_launch import launch_both_reductions
from refreekv.storage import warm_up
from refreekv.storage.columns import Columns, Levels
from refreekv.storage.leveled import LeveledKV
from refreekv.storage.made_up import MadeUpEntries

CPU, HEADS, SIZES = torch.device("cpu"), 2, (128, 128)
LADDER = Ladder.parse("k4v2+k4v4+k6v4+k7v6")


def coded(batch, length):
    """A prompt, the rungs of its entries, and their storage."""
    keys, values = (torch.randn(batch, HEADS, length, size).bfloat16() for size in SIZES)
    rung = (torch.arange(length) % 4).to(torch.uint8)
    coded = rung[4 : length - LADDER.recent]
    levels = Levels((rung,), (tuple(int((coded == number).sum()) for number in range(4)),))
    columns = [Columns.of_ranges((0, length))] * batch
    storage = LeveledKV.gathered(
        keys, values, columns, 0, LADDER, (centre_of(keys), centre_of(values)), [levels] * batch
    )
    return keys, values, rung, storage


def use(batch, length, group):
    """What a cache does: code a prompt, decode it, attend to it, code what is generated."""
    keys, values, _, storage = coded(batch, length)
    storage.full()
    storage.attend(torch.randn(batch, HEADS * group, 1, SIZES[0]).bfloat16(), None, None, None)
    for _ in range(80):
        storage.append(keys[:, :, :1], values[:, :, :1])
    if batch == 1:
        for tokens in (length % 37 + 2, 64):  # a turn that nothing is asked about
            storage.append(keys[:, :, :tokens], values[:, :, :tokens])
            storage.attend_each(torch.randn(1, HEADS * group, tokens, SIZES[0]).bfloat16(), None, None, None)


def turn(length, tokens):
    """What a later turn of so many tokens does over coded entries, of which heads hold different numbers."""
    keys, values, rung, storage = coded(1, length)
    storage = kept(storage, rung, [length, length - 90], 0)  # as a first prompt left it
    storage = storage.append(keys[:, :, :tokens], values[:, :, :tokens])
    (row,) = storage.rows()
    held = row[0].shape[1]
    asked = min(tokens, 256)
    queries, places = torch.randn(1, 2 * HEADS, asked, SIZES[0]).bfloat16(), torch.arange(held)
    probes = Probes(
        places[-asked:][None], columns=places.int(), valid=storage.visible(0)[None], query_real=None, scaling=1.0,
        distance=0, softcap=None, sink_logits=None, sums=True,
    )  # fmt: skip
    launch_both_reductions(queries, queries, row[0][None], probes, probes._replace(distance=64, sums=False))
    launch_kept_first(torch.ones(1, HEADS, held, dtype=torch.bool))
    kept(storage, rung, [held, held - 40], 0)


def kept(storage, rung, counts, after):
    """A policy's choice of so many entries of each KV head of a storage of one row."""
    longest = max(storage.lengths[0])
    heads = tuple(torch.arange(longest - n, longest, dtype=torch.int32) for n in counts)
    asked = Levels(tuple(rung.repeat(2)[:n] for n in counts), ((0,) * 4,) * len(counts))
    return storage.keep([Columns(heads=heads)], after, [asked])


def main():
    found = set()

    def note(kernel, key, *args, **kwargs):
        found.add(f"{kernel.__name__} {key}")

    def attend(query, exact, tables, numbers, maps, *rest):
        return launch_packed_attention(query, PackedKV.of(exact, tables, numbers, maps), *rest, assembly=True)

    run = JITFunction.run
    JITFunction.run = lambda kernel, *args, warmup, **options: run(kernel, *args, warmup=True, **options)
    JITFunction._do_compile = note
    dispatch.at_once = lambda tensor: True
    packed_ops.packed_attention = attend
    shared_memory.bytes_of = lambda device: LIMITS[90]
    warm_up.available_cores = lambda: 4
    triton.runtime.driver.set_active(Driver(90))
    warm_up.warm_up(MadeUpEntries(CPU, torch.bfloat16, HEADS, SIZES, LADDER))
    ahead = sorted(found)
    uses = {}
    for batch, length, group in ((1, 300, 2), (1, 320, 4), (1, 5001, 4), (3, 416, 4)):
        found.clear()
        use(batch, length, group)
        uses[f"{batch} x {length}"] = sorted(found)
    turns = {}
    for length, tokens in ((1000, 32), (1008, 33), (2037, 48), (4096, 20), (999, 300)):
        found.clear()
        turn(length, tokens)
        turns[f"{length} + {tokens}"] = sorted(found)
    json.dump({"ahead": ahead, "uses": uses, "turns": turns}, sys.stdout)


if __name__ == "__main__":
    main()
