"""Compiles the kernels that need the most registers for an H100 that need not be there, and prints their local
and shared memory.

A process of its own: tests run Triton in its interpreter.
"""

import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import triton
from compiling import LIMITS, Driver
from triton import knobs
from triton.runtime.jit import JITFunction

from refreekv.core.packed_lines import PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import Ladder
from refreekv.core.reductions import Probes
from refreekv.kernels import shared_memory
from refreekv.kernels.packed_calls import Moved, Oldest, Transfer
from refreekv.kernels.packed_oldest import code_alike
from refreekv.kernels.packed_recode import launch_recode
from refreekv.kernels.packed_storage import launch_pack
from refreekv.kernels.packed_unpack import launch_unpack
from refreekv.kernels.probe_launch import launch_both_reductions, launch_probe_reductions
from refreekv.storage.warm_up import available_cores

HEADS, GROUP, ENTRIES = 8, 4, 4096
KIND = torch.bfloat16
LADDER = Ladder.parse("k4v2+k4v4+k6v4+k7v6")


def maps_of(size: int) -> PackedMaps:
    """Maps of heads of so many elements."""
    mean, matrix = torch.zeros(1, HEADS, size), torch.eye(size).repeat(1, HEADS, 1, 1)
    return PackedMaps.of(mean, matrix, mean, matrix, KIND)


def transfer(size: int, form: PackedFormat, arena: bool, starts: bool) -> Transfer:
    """Entries to and from lines."""
    entries, table = torch.zeros(1, HEADS, ENTRIES, size, dtype=KIND), torch.zeros(HEADS, 4, dtype=torch.int64)
    spans, firsts = torch.zeros(HEADS, 3, dtype=torch.int64), torch.zeros(HEADS, dtype=torch.int64)
    return Transfer(
        entries, entries, table if arena else None, table, form, maps_of(size), spans, ENTRIES, ENTRIES,
        firsts if starts else None,
    )  # fmt: skip


def unpack(size: int) -> None:
    """Codes of the widest format to entries, both of a prompt and of a storage."""
    for arena in (False, True):
        launch_unpack(transfer(size, LADDER.forms((size, size), sorted_keys=True)[-1], arena, False))


def pack(size: int) -> None:
    """Entries of a prompt, and of a storage, to lines of several formats."""
    for arena in (False, True):
        first, *more = [transfer(size, form, arena, arena) for form in LADDER.forms((size, size), sorted_keys=True)]
        launch_pack(first, more)


def oldest(size: int) -> None:
    """Coding what was generated."""
    given = transfer(size, LADDER.forms((size, size), sorted_keys=True)[0], False, False)
    told = torch.ones(3, HEADS, dtype=torch.int64)
    code_alike([Oldest(given.keys, given.values, given.table, given.table, given.form, given.maps, told)])


def recode(size: int) -> None:
    """Lines of other formats."""
    forms, table = LADDER.forms((size, size), sorted_keys=True), torch.zeros(HEADS, 4, dtype=torch.int64)
    listed, sources = torch.zeros(ENTRIES, dtype=torch.int64), table[: len(forms)]
    moved = Moved(table, sources, listed.to(torch.uint8), listed, listed[:HEADS], forms, 0, maps_of(size), ENTRIES)
    launch_recode(table, moved)


def probe(size: int) -> None:
    """Reductions with sums, without, and both at once."""
    query, key = torch.zeros(1, GROUP, 256, size, dtype=KIND), torch.zeros(1, 1, ENTRIES, size, dtype=KIND)
    window, spread = (Probes(torch.arange(ENTRIES)[None, -256:], sums=sums) for sums in (True, False))
    launch_probe_reductions(query, key, window)
    launch_probe_reductions(query, key, spread)
    launch_both_reductions(query, query, key, window, spread._replace(distance=64))


def main() -> None:
    found, run = [], JITFunction.run
    tool = knobs.nvidia.cuobjdump.path

    def compile_only(kernel, *args, warmup, **options):
        compiled = run(kernel, *args, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, frame = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
        found.append((kernel.__name__, options.get("HEAD", 0), registers, frame, compiled.metadata.shared))
        return compiled

    JITFunction.run = compile_only
    shared_memory.bytes_of = lambda device: LIMITS[90]
    triton.runtime.driver.set_active(Driver(90))
    # Those with the largest numbers of registers; attention over four formats takes longer than all of these.
    jobs = [partial(job, 256) for job in (unpack, oldest, recode)]
    jobs += [partial(job, 128) for job in (unpack, oldest, pack, probe)]
    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(lambda job: job(), jobs))
    print(json.dumps({"found": found, "limit": LIMITS[90]}))


if __name__ == "__main__":
    main()
