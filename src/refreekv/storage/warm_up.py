"""Kernels over the formats of a ladder, compiled side by side before they are used one after the other.

What reads codes has kernels of its own for each format, which take seconds to compile, and attention over several
formats one of its own again. Triton and its compilers let other threads run meanwhile: on a machine with some cores all
are there when the slowest one is. They are compiled by being launched on made-up entries, in the ways in which storages
launch them. What Triton has on disk takes milliseconds.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from refreekv import kernels
from refreekv.core.device_memory import free_memory
from refreekv.core.packed_lines import FACTOR_BYTES
from refreekv.core.quantisation import FLUSH, SINKS
from refreekv.storage.arena import KVArena
from refreekv.storage.coding import Pair
from refreekv.storage.leveled import LeveledKV
from refreekv.storage.made_up import MadeUpEntries

SOME = 32
"""Entries of a head that are coded."""
MANY = 4
"""Cores from which on a later turn's attention is compiled ahead, too, which takes as long as a token's."""
ROOM = 2**29
"""Bytes that must be free on a GPU: made-up entries and what kernels take for all formats at once are some 200 MB."""

_log = logging.getLogger("refreekv")


def available_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warm_up(entries: MadeUpEntries) -> None:
    """Compile what coding, decoding and, if a token's attention reads them, attention to such entries need.

    Nothing is changed and nothing is raised: what fails here is found where it is used.
    """
    device, heads, ladder = entries.device, entries.heads, entries.ladder
    if (cores := available_cores()) < 2 or (device.type == "cuda" and free_memory(device) < ROOM):
        return

    def storage(length: int) -> tuple[LeveledKV, Pair]:
        keys, values, _ = entries.drawn(length)
        return entries.stored(keys, values), (keys, values)

    def code() -> None:
        storage(SINKS + SOME + ladder.recent)

    def decode(rung: int) -> None:
        own, _ = storage(SINKS + 1)
        whole, form, lines = own.full(), own.coding.forms[rung], own.lines.rungs[rung].table
        target = KVArena(whole.keys, whole.values, whole.lengths, [0]).table
        spans = torch.zeros(heads, 3, dtype=torch.int64, device=device)
        kernels.unpack_lines(
            whole.keys, whole.values, lines, form, own.coding.maps, spans, end=0, longest=1, target=target
        )

    def recode() -> None:
        own, _ = storage(SINKS + 1)
        sources, none = (torch.zeros(n, 4, dtype=torch.int64, device=device) for n in (len(ladder.rungs), 0))
        starts, at = torch.zeros(heads, dtype=torch.int64, device=device), none.flatten()
        maps, forms = own.coding.maps, own.coding.forms
        for form, arena in zip(forms, own.lines.rungs, strict=True):
            kernels.move(arena.table, arena.table, key_bytes=form.line_bytes, value_bytes=FACTOR_BYTES, longest=1)
        table = own.lines.rungs[0].table
        kernels.recode_lines(kernels.Moved(table, sources, at.to(torch.uint8), at, starts, forms, 0, maps, 1))

    def code_exact() -> None:
        own, (keys, values) = storage(SINKS + ladder.recent)
        own.append(keys[:, :, : 2 * FLUSH], values[:, :, : 2 * FLUSH]).code_older()

    def code_asked() -> None:
        own, (keys, values) = storage(SINKS + ladder.recent)
        own.append(keys[:, :, :1], values[:, :, :1])
        rungs = torch.zeros(heads, dtype=torch.uint8, device=device)
        own.lines.extend(own.exact, [(SINKS,) * heads], [(1,) * heads], rungs)
        own.exact.take_out(np.full((1, heads), SINKS), np.ones((1, heads), dtype=np.int64))

    def attend() -> None:
        own, _ = storage(SINKS + 1)
        query = entries.drawn(1)[2]
        tables = [arena.table for arena in own.tables]
        kernels.packed_attention(query, tables[0], tables[1:], own.coding.forms, own.coding.maps)

    def attend_turn() -> None:
        own, (keys, values) = storage(SINKS + 1)
        own.append(keys[:, :, :2], values[:, :, :2])
        own.attend_each(entries.drawn(1)[2].expand(-1, -1, 2, -1), None, None, None)

    def tried(job: Callable[[], object]) -> None:
        try:
            # Both are settings of a thread.
            with torch.inference_mode(False), torch.no_grad():
                job()
        except Exception as error:
            _log.debug("a kernel could not be compiled ahead: %s", error)

    # What belongs to the model is made here, once: a thread that multiplies matrices takes memory on a GPU for good.
    tried(lambda: storage(SINKS + 1))
    # The longest one first.
    jobs: list[Callable[[], None]] = [attend] if entries.attends else []
    jobs += [attend_turn] if entries.attends and cores >= MANY else []
    jobs += [partial(decode, rung) for rung in range(len(ladder.rungs))]
    jobs += [code_exact, code]
    if len(ladder.rungs) > 1:
        # What a later turn leaves of earlier ones, and what it brings.
        jobs += [recode, code_asked]
    with ThreadPoolExecutor(min(cores, len(jobs)), thread_name_prefix="refreekv-compile") as pool:
        list(pool.map(tried, jobs))
