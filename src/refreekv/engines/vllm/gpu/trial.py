"""Whether a device's kernels code entries into pages and attend to them as their plain versions do.

Kernels are compiled for each card, by the Triton that is installed. So they are tried on some made-up entries before
anything relies on them, as in `refreekv.storage.trial`: in pages like the model's own, so that what is compiled for
the trial is what is used.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_lines import PackedFormat
from refreekv.kernels.paged import LIST, LISTED, Coded, PagedTable, Pool, Rows, move_to_pages, paged_attention
from refreekv.kernels.paged_coding import Chosen, Later, Source, centres_in_blocks, code_to_pages
from refreekv.storage.trial import CLOSE
from refreekv.storage.warm_up import available_cores

EACH, TAIL = 48, 20
"""Entries of a head in each rung, and tokens behind them."""


def fault(
    pool: Pool,
    group: int,
    forms: Sequence[PackedFormat],
    codes: KeyCodes | None,
    scaling: float,
    softcap: float | None,
    rung: int = -1,
) -> str | None:
    """What is wrong with coded entries on the device of a cache; None if nothing is.

    Parameters
    ----------
    pool : Pool
        The cache, for what its pages are like and where; nothing of it is read or written.
    group : int
        Query heads of a KV head.
    forms, codes : sequence of PackedFormat, KeyCodes or None
        How entries will be coded, in one of the layers.
    scaling, softcap
        Of the model's attention.
    rung : int
        That of tokens that are coded later.
    """
    device, told, rung = pool.cache.device, (pool, forms, codes), rung % len(forms)
    try:
        if device.type == "cuda":
            _compile(device, *told, group, scaling, softcap, rung)
        with torch.inference_mode(False), torch.no_grad():
            places = device, torch.device("cpu")
            tried, plain = (_attended(_coded(place, *told, rung), group, scaling, softcap) for place in places)
    except Exception as error:  # a compiler's, a driver's, whatever keeps kernels from running
        return f"{type(error).__name__}: {error}".splitlines()[0]
    off = float((tried - plain).norm() / plain.norm())
    return None if off <= CLOSE else f"attention differs by {off:.2g} of its size from what it is to be"


def _compile(
    device: torch.device,
    like: Pool,
    forms: Sequence[PackedFormat],
    codes: KeyCodes | None,
    group: int,
    scaling: float,
    softcap: float | None,
    rung: int,
) -> None:
    """Have attention and the coding of each rung compiled side by side: one after the other takes twice as long."""
    from refreekv.kernels.paged_join import MANY

    def attend() -> None:
        place = _coded(device, like, forms, codes, rung, each=0)
        for rows in (1, MANY):
            _attended(place, group, scaling, softcap, rows)

    def code(form: PackedFormat) -> None:
        _coded(device, like, [form], codes, 0 if form == forms[rung] else None)

    def run(job: Callable[[], None]) -> None:
        # Both are settings of a thread.
        with torch.inference_mode(False), torch.no_grad():
            job()

    jobs = [attend, *(partial(code, form) for form in forms)]
    with ThreadPoolExecutor(min(len(jobs), available_cores()), thread_name_prefix="refreekv-compile") as threads:
        list(threads.map(run, jobs))


def _coded(
    device: torch.device,
    like: Pool,
    forms: Sequence[PackedFormat],
    codes: KeyCodes | None,
    rung: int | None,
    each: int = EACH,
) -> tuple[Pool, PagedTable]:
    """Pages with ``each`` made-up entries of a head in each rung, coded out of the last blocks.

    The sequence's tail is in the blocks from 1 on; in a rung that is given a block of it is coded, unless there are no
    entries.
    """
    generator = torch.Generator().manual_seed(0)
    rungs, heads, size, dtype = len(forms), like.heads, like.size, like.cache.dtype
    lines = [like.coded_lines(form) for form in forms]
    needed = [-(-heads * each // own) for own in lines]
    later = 0 if rung is None else like.coded_tokens(forms[rung])
    ordinary, private = -(-(later + TAIL) // like.tokens), -(-sum(needed) // like.layers)
    blocks, prompt = 1 + ordinary + private + 1, rungs * EACH
    read = torch.arange(blocks, blocks - (-prompt // like.tokens), dtype=torch.int32)
    memory = torch.randn(like.layers, blocks + len(read), like.tokens, heads, 2 * size, generator=generator)
    memory[:, blocks:] += 0.5
    memory = memory.to(device, dtype)
    pool = Pool.of([part.transpose(1, 2) for part in memory])
    used = read.to(device)
    source = Source.in_blocks(pool, used, prompt).of_layers(slice(0, 1))
    means = [part[:1] for part in centres_in_blocks(pool, used, prompt)]
    table = PagedTable.empty(pool, 1, blocks)
    coded = Coded.empty(pool, 1, forms, None if codes is None else [codes] * pool.layers, -1 if rung is None else rung)
    coded.key_means[0, 0], coded.value_means[0, 0] = means[0][0], means[1][0]
    counts = torch.full((1, heads, rungs), each)
    # [1, R, H_kv, n]: each rung has every R-th entry
    numbers = torch.arange(rungs * EACH, dtype=torch.int32).view(EACH, rungs).T
    listed = source.lines[numbers.to(device)][None, :, None].expand(1, -1, heads, -1).contiguous()
    chosen = Chosen.of(listed, counts, forms)
    pages = torch.arange(1 + ordinary, blocks, dtype=torch.int32)
    firsts = [sum(needed[:at]) * lines[at] for at in range(rungs)]
    maps = coded.maps.around(*means).of_span(slice(0, 1))
    if each:
        _move_one(pool, table, used, pages.to(device))
    code_to_pages(pool, forms, maps, source, chosen, firsts, pages.to(device))
    table.pages[0, : len(pages)] = pages.to(device)
    first = torch.tensor(firsts) + each * torch.arange(heads)[:, None]
    coded.segments[0, 0] = torch.stack([first, counts[0]], -1).to(device)
    if later and each:
        blocks_of = torch.arange(1, 1 + ordinary, dtype=torch.int32, device=device)
        Later(pool, coded, layers=1).code(table, 0, blocks_of, 0, private)
        coded.generated[0, 0], coded.generated[0, 1] = private, 1
        table.starts[0] = later
    return pool, replace(table, coded=coded)


def _move_one(pool: Pool, table: PagedTable, blocks: Tensor, pages: Tensor) -> None:
    """Have the moving of exact entries compiled: what it writes is written over."""
    zero = torch.zeros(1, dtype=torch.int32, device=pages.device)
    table.segments[0, 0, :, LIST], table.segments[0, 0, :, LISTED] = zero.data_ptr(), 1
    places = torch.zeros(2, pool.layers, pool.heads, dtype=torch.int64, device=pages.device)
    move_to_pages(pool, table, 0, blocks, places, pages, 1)
    table.segments.zero_()


def _attended(of: tuple[Pool, PagedTable], group: int, scaling: float, softcap: float | None, rows: int = 1) -> Tensor:
    """Attention over such entries, of so many rows alike: on the CPU."""
    pool, table = of
    generator, device, dtype = torch.Generator().manual_seed(1), pool.cache.device, pool.cache.dtype
    end = int(table.starts[0]) + TAIL
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=device)
    begins, ends, zeros = numbers[:-1], numbers[1:], torch.zeros_like(numbers[1:])
    block_table = torch.arange(1, 1 - (-end // pool.tokens), dtype=torch.int32, device=device)[None]
    query = torch.randn(1, pool.heads * group, pool.size, generator=generator).to(device, dtype)
    query = query.expand(rows, -1, -1).contiguous()
    output = torch.empty_like(query)
    alike = Rows(begins, ends, zeros + end, zeros, zeros, 1, whole=True)
    paged_attention(query, pool, 0, block_table, alike, table, output, scaling=scaling, softcap=softcap)
    return output.float().cpu()
