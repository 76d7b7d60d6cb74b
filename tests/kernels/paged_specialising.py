"""Prints which kernels the vLLM plugin would have compiled by its trial, and in use; nothing is compiled, nothing runs.

A process of its own: tests run Triton in its interpreter.
"""

import json
import sys
from dataclasses import replace

import torch
import triton
from compiling import LIMITS, Driver
from triton.runtime.jit import JITFunction

from refreekv.core.quantisation import Ladder
from refreekv.engines.vllm.gpu import trial
from refreekv.kernels import dispatch, paged_reference, shared_memory
from refreekv.kernels.paged import Coded, PagedTable, Pool, Rows
from refreekv.kernels.paged_coding import Later
from refreekv.kernels.paged_levels import launch_paged_levels
from refreekv.kernels.paged_storage import launch_read, launch_spread, launch_sum

LAYERS, HEADS, GROUP, SIZE, TOKENS, SLOTS = 3, 2, 4, 64, 32, 65
FORMS = Ladder.parse("k4v2+k6v4").forms((SIZE, SIZE), sorted_keys=True)


def attend(*arguments, scaling, softcap=None, sinks=None):
    launch_paged_levels(*arguments, scaling, softcap, sinks, assembly=True)


def step(pool, table, count, aligned):
    """Attention of a step with so many rows, told as vLLM tells of them or as the parts of a mixed step are."""
    numbers = torch.zeros(SLOTS + 1, dtype=torch.int32)
    ends = numbers[:count] if aligned else numbers[1 : count + 1]
    rows = Rows(numbers[:count], ends, numbers[:count], numbers[:count], numbers[:count], 1, not aligned)
    # Queries lie beside the keys and values that were computed with them.
    both = torch.zeros(count, (GROUP + 2) * HEADS * SIZE, dtype=torch.bfloat16)
    query = both[:, : GROUP * HEADS * SIZE].view(count, GROUP * HEADS, SIZE)
    block_table = torch.zeros(SLOTS, 33 - aligned, dtype=torch.int32)
    attend(query, pool, 1, block_table, rows, table, torch.empty_like(query.contiguous()), scaling=0.1)


def main():
    found = set()

    def note(kernel, key, *args, **kwargs):
        found.add(f"{kernel.__name__} {key}")

    run = JITFunction.run
    JITFunction.run = lambda kernel, *args, warmup, **options: run(kernel, *args, warmup=True, **options)
    JITFunction._do_compile = note
    dispatch.at_once = lambda tensor: True
    shared_memory.bytes_of = lambda device: LIMITS[90]
    triton.runtime.driver.set_active(Driver(90))
    trial.paged_attention, paged_reference.spread = attend, launch_spread

    memory = torch.zeros(LAYERS, 9, TOKENS, HEADS, 2 * SIZE, dtype=torch.bfloat16)
    pool = Pool.of([part.transpose(1, 2) for part in memory])
    trial._compile(torch.device("cpu"), pool, FORMS, None, GROUP, 0.1, None, len(FORMS) - 1)
    side_by_side = sorted(found)
    trial.fault(pool, GROUP, FORMS, None, 0.1, None)
    ahead = sorted(found)

    table = replace(PagedTable.empty(pool, SLOTS, 33), coded=Coded.empty(pool, SLOTS, FORMS))
    uses = {}
    for count in (1, 2, 7, 64):
        for aligned in (False, True):
            found.clear()
            step(pool, table, count, aligned)
            uses[f"{count} rows, {'mixed' if aligned else 'whole'}"] = sorted(found)
    for first, count in ((0, 16), (5, 7), (32, 1)):
        for form in FORMS:
            found.clear()
            lines, factors = (torch.zeros(count, size, dtype=torch.uint8) for size in (form.line_bytes, 4))
            launch_spread(lines, factors, pool, form, first, torch.zeros(9, dtype=torch.int32))
            uses[f"{count} lines of {form} from {first}"] = sorted(found)
    later = Later(pool, table.coded)
    for slot, start, column in ((0, 40, 9), (7, 33, 2), (16, 64, 16)):
        found.clear()
        later.code(table, slot, torch.zeros(SLOTS, 33, dtype=torch.int32)[slot], start, column)
        uses[f"slot {slot} from {start} to {column}"] = sorted(found)
    # A request's blocks are a row of vLLM's table, which may begin anywhere.
    of_slots = []
    for row in torch.zeros(2, 33, dtype=torch.int32):
        found.clear()
        launch_sum(row, pool, 4, 20 + len(of_slots))
        launch_read(row, pool, slice(len(of_slots), LAYERS), 20 + len(of_slots))
        of_slots.append(sorted(found))
    json.dump({"of slots": of_slots, "side by side": side_by_side, "ahead": ahead, "uses": uses}, sys.stdout)


if __name__ == "__main__":
    main()
