"""Whether a device's kernels code entries into pages and attend to them as their plain versions do.

Kernels are compiled for each card, by the Triton that is installed. So they are tried on some made-up entries before
anything relies on them, as in `refreekv.storage.trial`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_lines import PackedFormat, PackedMaps
from refreekv.kernels.paged import Coded, PagedTable, Pool, Rows, paged_attention
from refreekv.kernels.paged_coding import Chosen, code_to_pages
from refreekv.storage.trial import CLOSE

EACH, TAIL, TOKENS = 48, 20, 16
"""Entries of a head in each rung, tokens behind them, and tokens of a block."""


def fault(
    pool: Pool, group: int, forms: Sequence[PackedFormat], codes: KeyCodes | None, scaling: float, softcap: float | None
) -> str | None:
    """What is wrong with coded entries on the device of a cache; None if nothing is.

    Parameters
    ----------
    pool : Pool
        The cache, for its heads, type and device; nothing of it is read or written.
    group : int
        Query heads of a KV head.
    forms, codes : sequence of PackedFormat, KeyCodes or None
        How entries will be coded, in one of the layers.
    scaling, softcap
        Of the model's attention.
    """
    cache = pool.cache
    try:
        with torch.inference_mode(False), torch.no_grad():
            tried, plain = (
                _attended(place, cache.dtype, pool.heads, pool.size, group, forms, codes, scaling, softcap)
                for place in (cache.device, torch.device("cpu"))
            )
    except Exception as error:  # a compiler's, a driver's, whatever keeps kernels from running
        return f"{type(error).__name__}: {error}".splitlines()[0]
    off = float((tried - plain).norm() / plain.norm())
    return None if off <= CLOSE else f"attention differs by {off:.2g} of its size from what it is to be"


def _attended(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    size: int,
    group: int,
    forms: Sequence[PackedFormat],
    codes: KeyCodes | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attention over made-up entries that are coded on a device: on the CPU."""
    generator = torch.Generator().manual_seed(0)
    rungs, line = len(forms), 2 * size * dtype.itemsize
    lines = [heads * TOKENS * line // form.entry_bytes for form in forms]
    needed = [-(-heads * EACH // each) for each in lines]
    blocks = sum(needed) + 3
    memory = torch.randn(blocks, TOKENS, heads, 2 * size, generator=generator).to(device, dtype)
    pool = Pool.of([memory.transpose(1, 2)])
    entries = torch.randn(1, heads, rungs * EACH, 2 * size, generator=generator) + 0.5
    keys, values = entries.to(device, dtype).split(size, -1)
    key_mean, value_mean = keys.float().mean(2), values.float().mean(2)
    table = PagedTable.empty(pool, 1, blocks)
    coded = Coded.empty(pool, 1, forms, None if codes is None else [codes])
    coded.key_means[0, 0], coded.value_means[0, 0] = key_mean[0], value_mean[0]
    counts = torch.full((1, heads, rungs), EACH)
    # [1, R, H_kv, n]: each rung has every R-th entry
    numbers = torch.arange(rungs * EACH, dtype=torch.int32).view(EACH, rungs).T
    chosen = Chosen.of(numbers[None, :, None].expand(1, -1, heads, -1).contiguous().to(device), counts, forms)
    pages = torch.arange(3, blocks, dtype=torch.int32)
    firsts = [sum(needed[:rung]) * lines[rung] for rung in range(rungs)]
    maps = (PackedMaps.rotated if codes is None else codes.maps)(key_mean, value_mean, dtype)
    code_to_pages(pool, forms, maps, keys, values, chosen, 0, firsts, pages.to(device))
    table.pages[0, : len(pages)] = pages.to(device)
    first = torch.tensor(firsts) + EACH * torch.arange(heads)[:, None]
    coded.segments[0, 0] = torch.stack([first, counts[0]], -1).to(device)
    zero, one, length = (torch.tensor([number], dtype=torch.int32, device=device) for number in (0, 1, TAIL))
    query = torch.randn(1, heads * group, size, generator=generator).to(device, dtype)
    output = torch.empty_like(query)
    block_table, rows = torch.stack([one, 2 * one], 1), Rows(zero, one, length, zero, zero, 1, whole=True)
    table = replace(table, coded=coded)
    paged_attention(query, pool, 0, block_table, rows, table, output, scaling=scaling, softcap=softcap)
    return output.float().cpu()
