"""What `kernels.paged` computes, in plain torch and in host memory, a row and head at a time."""

import ctypes

import torch
from torch import Tensor

from refreekv.kernels.paged import FIRST, HELD, LIST, LISTED, REPLACED, UNIT, PagedTable, Pool, Rows


def paged_attention(
    query: Tensor,
    pool: Pool,
    layer: int,
    block_table: Tensor,
    rows: Rows,
    table: PagedTable,
    output: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    wide: torch.dtype = torch.float32,
) -> None:
    """`kernels.paged.paged_attention`, computed in ``wide``."""
    group = query.shape[1] // pool.heads
    each = zip(*(part.tolist() for part in rows[:5]), strict=True)
    for begin, end, length, at, slot in each:
        start = int(table.starts[slot])
        for head in range(pool.heads):
            kept = [*_held(pool, table, layer, slot, head), *_listed(pool, table, layer, slot, head, block_table[at])]
            tail = [_token(pool, layer, head, block_table[at], position) for position in range(start, length)]
            entries = _read(pool, kept + tail).to(wide)  # [t, 2 * D]
            if begin == end:
                continue
            mine = slice(head * group, (head + 1) * group)
            q = query[begin:end, mine].to(wide)  # [q, g, D]
            logits = torch.einsum("qgd,td->qgt", q, entries[:, : pool.size]) * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            last = torch.arange(length - (end - begin), length)
            position = torch.cat([torch.full((len(kept),), -1), torch.arange(start, length)])
            logits = logits.masked_fill((position > last[:, None])[:, None], float("-inf"))
            if sinks is not None:
                logits = torch.cat([logits, sinks[mine].to(wide)[None, :, None].expand(end - begin, -1, 1)], -1)
            weights = logits.softmax(-1)[..., : len(entries)]
            output[begin:end, mine] = torch.einsum("qgt,td->qgd", weights, entries[:, pool.size :]).to(output.dtype)


def move_to_pages(
    pool: Pool, table: PagedTable, slot: int, blocks: Tensor, firsts: Tensor, pages: Tensor, longest: int
) -> None:
    """`kernels.paged.move_to_pages`."""
    del longest
    for layer in range(pool.layers):
        for head in range(pool.heads):
            source = _listed(pool, table, layer, slot, head, blocks)
            first = int(firsts[layer, head])
            for new, entry in enumerate(_read(pool, source)):
                _view(pool, _line(pool, pages, first + new)).copy_(entry)


def _held(pool: Pool, table: PagedTable, layer: int, slot: int, head: int) -> list[int]:
    first, count = table.segments[layer, slot, head, [FIRST, HELD]].tolist()
    return [_line(pool, table.pages[slot], first + entry) for entry in range(count)]


def _listed(pool: Pool, table: PagedTable, layer: int, slot: int, head: int, blocks: Tensor) -> list[int]:
    address, count, replaced = table.segments[layer, slot, head, [LIST, LISTED, REPLACED]].tolist()
    if not count:
        return []
    positions = torch.frombuffer((ctypes.c_byte * (4 * count)).from_address(address), dtype=torch.int32).tolist()
    width = 2 * pool.size
    return [
        _token(pool, layer, head, blocks, position) if position >= 0 else replaced * UNIT + (-1 - position) * width
        for position in positions
    ]


def _line(pool: Pool, pages: Tensor, line: int) -> int:
    """First element of a line of private pages, from the pool's beginning."""
    page, within = divmod(line, pool.lines)
    block, layer = divmod(page, pool.layers)
    return int(pool.offsets[layer]) * UNIT + int(pages[block]) * pool.cache.stride(0) + within * 2 * pool.size


def _token(pool: Pool, layer: int, head: int, blocks: Tensor, position: int) -> int:
    """First element of a token of ordinary blocks."""
    block, within = divmod(position, pool.tokens)
    own = int(pool.offsets[layer]) * UNIT + int(blocks[block]) * pool.cache.stride(0)
    return own + within * pool.cache.stride(2) + head * pool.cache.stride(1)


def _view(pool: Pool, at: int) -> Tensor:
    width, each = 2 * pool.size, pool.cache.element_size()
    buffer = (ctypes.c_byte * (width * each)).from_address(pool.cache.data_ptr() + at * each)
    return torch.frombuffer(buffer, dtype=pool.cache.dtype)


def _read(pool: Pool, at: list[int]) -> Tensor:
    """Entries ``[t, 2 * D]``."""
    if not at:
        return pool.cache.new_empty(0, 2 * pool.size)
    return torch.stack([_view(pool, one) for one in at])
