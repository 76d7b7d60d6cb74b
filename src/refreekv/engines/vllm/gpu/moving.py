"""Filling a request's private blocks: with what is kept of its prompt, and with its answer's older tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refreekv.core.quantisation import SINKS
from refreekv.engines.vllm.gpu.coding import code_prompt
from refreekv.engines.vllm.gpu.held import Held, begins
from refreekv.engines.vllm.gpu.tracked import Tracked
from refreekv.kernels.paged import FIRST, HELD, PagedTable, Pool, move_to_pages, upload
from refreekv.kernels.paged_coding import Later


def move_prompt(
    pool: Pool,
    caches: Sequence[Tensor],
    table: PagedTable,
    tracked: Tracked,
    held: Held,
    blocks: Tensor,
    private: Sequence[int],
) -> None:
    """Move what is kept of a prompt; the host waits for nothing.

    Parameters
    ----------
    pool, caches, table : Pool, sequence of Tensor, PagedTable
        The cache, that of each layer, and what is kept.
    tracked, held : Tracked, Held
        The request, and how much of this rank's heads is kept.
    blocks : Tensor
        int32 ``[.]``: its ordinary blocks.
    private : sequence of int
        Its private ones.
    """
    kept, slot, device = tracked.kept, tracked.slot, pool.cache.device
    assert kept is not None
    starts, _ = held.places(pool, () if table.coded is None else table.coded.forms)
    exact = held.counts - held.coded
    # [first line, entries left out, entries] of each layer and head
    places = upload(torch.stack([begins(exact), held.coded, exact]), device)
    pages = upload(torch.tensor(private, dtype=torch.int32), device)
    move_to_pages(pool, table, slot, blocks, places[:2], pages, int(exact.max()), SINKS)
    if table.coded is not None:
        code_prompt(pool, caches, table.coded, kept, slot, blocks, held.rungs, starts, pages)
    line = torch.zeros_like(table.segments[:, slot])
    line[..., FIRST], line[..., HELD] = places[0], places[2]
    table.segments[:, slot] = line
    table.pages[slot, : len(pages)] = pages
    tracked.private = len(private)
    # What was decided stays in bits, should the request be preempted.
    kept.lists = None


def code_answer(later: Later, table: PagedTable, tracked: Tracked, blocks: Tensor, private: int) -> None:
    """Code the next tokens that came after a prompt into one private block more; the host waits for nothing."""
    coded, slot, column = table.coded, tracked.slot, tracked.private + tracked.coded
    assert coded is not None
    start = tracked.prompt + tracked.coded * later.tokens
    table.pages[slot, column].fill_(private)
    later.code(table, slot, blocks, start, column)
    tracked.coded += 1
    coded.generated[slot, 0].fill_(tracked.private)
    coded.generated[slot, 1].fill_(tracked.coded)
    table.starts[slot].fill_(start + later.tokens)
