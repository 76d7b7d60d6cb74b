"""What `kernels.paged` computes, in plain torch and in host memory, a row and head at a time."""

import ctypes

import torch
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat
from refreekv.core.rotation import rotation
from refreekv.kernels.paged import FIRST, HELD, LIST, LISTED, REPLACED, UNIT, Coded, PagedTable, Pool, Rows


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
    coded = table.coded
    each = zip(*(part.tolist() for part in rows[:5]), strict=True)
    for begin, end, length, at, slot in each:
        if begin == end:
            continue
        start = int(table.starts[slot])
        for head in range(pool.heads):
            held = _held(pool, table, layer, slot, head)
            listed = _listed(pool, table, layer, slot, head, block_table[at])
            tail = _token(pool, layer, head, block_table[at], torch.arange(start, length))
            entries = _read(pool, torch.cat([held, listed, tail])).to(wide)  # [t, 2 * D]
            before = len(held) + len(listed)
            if coded is not None:
                decoded = _decoded(pool, table, coded, layer, slot, head, wide)
                entries = torch.cat([decoded, entries])
                before += len(decoded)
            mine = slice(head * group, (head + 1) * group)
            q = query[begin:end, mine].to(wide)  # [q, g, D]
            logits = torch.einsum("qgd,td->qgt", q, entries[:, : pool.size]) * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            last = torch.arange(length - (end - begin), length)
            position = torch.cat([torch.full((before,), -1), torch.arange(start, length)])
            logits = logits.masked_fill((position > last[:, None])[:, None], float("-inf"))
            if sinks is not None:
                logits = torch.cat([logits, sinks[mine].to(wide)[None, :, None].expand(end - begin, -1, 1)], -1)
            weights = logits.softmax(-1)[..., : len(entries)]
            output[begin:end, mine] = torch.einsum("qgt,td->qgd", weights, entries[:, pool.size :]).to(output.dtype)


def move_to_pages(
    pool: Pool,
    table: PagedTable,
    slot: int,
    blocks: Tensor,
    places: Tensor,
    pages: Tensor,
    opening: int = 0,
) -> None:
    """`kernels.paged.move_to_pages`."""
    for layer in range(pool.layers):
        for head in range(pool.heads):
            first, left_out = places[:, layer, head].tolist()
            source = _listed(pool, table, layer, slot, head, blocks)
            chosen = torch.cat([source[:opening], source[opening + left_out :]])
            memory, own = _entries(pool, _line(pool, pages, torch.arange(first, first + len(chosen))))
            memory[own] = _read(pool, chosen)


def read_blocks(pool: Pool, blocks: Tensor, layers: slice, prompt: int) -> Tensor:
    """`kernels.paged_storage.launch_read`."""
    item, (block, token, head) = pool.cache.element_size(), pool.shared_strides()
    position = torch.arange(prompt)
    # [layers, H_kv, n, 2 * D]: where each element is, from the pool's beginning
    at = pool.offsets[layers, None, None, None] * UNIT + torch.arange(pool.heads)[:, None, None] * head
    at = at + (blocks.long()[position // pool.tokens] * block + position % pool.tokens * token)[:, None]
    at = at + torch.arange(2 * pool.size)
    if not at.numel():
        return pool.cache.new_empty(at.shape)
    first = int(at.min())
    count = int(at.max()) - first + 1
    buffer = (ctypes.c_byte * (count * item)).from_address(pool.cache.data_ptr() + first * item)
    return torch.frombuffer(buffer, dtype=pool.cache.dtype)[at - first]


def sum_of_blocks(pool: Pool, blocks: Tensor, first: int, prompt: int) -> Tensor:
    """Add up the entries from position ``first`` on: ``[layers, H_kv, 2 * D]`` in float32."""
    found = [
        _read(pool, _token(pool, layer, head, blocks, torch.arange(first, prompt))).float().sum(0)
        for layer in range(pool.layers)
        for head in range(pool.heads)
    ]
    return torch.stack(found).view(pool.layers, pool.heads, 2 * pool.size)


def spread(
    lines: Tensor, factors: Tensor, pool: Pool, form: PackedFormat, first: int, pages: Tensor, each: int | None = None
) -> None:
    """`kernels.paged_storage.launch_spread`."""
    each = pool.coded_lines(form) if each is None else each
    index = torch.arange(first, first + len(lines))
    for at, part in zip(_coded(pool, form, pages, index // each, index % each), (lines, factors), strict=True):
        memory, own = _memory(at, part.shape[1], torch.uint8)
        memory[own] = part


def _coded(pool: Pool, form: PackedFormat, pages: Tensor, page: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Addresses of coded lines of pages, and of their factors."""
    own = pool.offsets[page % pool.layers] * UNIT + pages.long()[page // pool.layers] * pool.cache.stride(0)
    at = pool.cache.data_ptr() + own * pool.cache.element_size()
    behind = pool.coded_lines(form) * form.line_bytes
    return at + within * form.line_bytes, at + behind + within * 4


def _memory(addresses: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory from the first of some addresses on, and where in it so many elements from each on are."""
    if not len(addresses):
        return torch.empty(0, dtype=dtype), torch.empty(0, count, dtype=torch.long)
    first, length = int(addresses.min()), count * dtype.itemsize
    buffer = (ctypes.c_byte * (int(addresses.max()) - first + length)).from_address(first)
    at = (addresses - first) // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype), at[:, None] + torch.arange(count)


def _decoded(
    pool: Pool, table: PagedTable, coded: Coded, layer: int, slot: int, head: int, wide: torch.dtype
) -> Tensor:
    """Entries ``[t, 2 * D]`` that a head's codes stand for, rung by rung."""
    dual, back = coded.key_duals[layer][head].to(wide), rotation(pool.size).T.to(wide)
    parts = [torch.zeros(0, 2 * pool.size, dtype=wide)]
    later, blocks = coded.generated[slot].tolist()
    for rung, form in enumerate(coded.forms):
        first, count = coded.segments[layer, slot, head, rung].tolist()
        lines, tokens = pool.coded_lines(form), pool.coded_tokens(form)
        line = torch.arange(first, first + count)
        page, within = line // lines, line % lines
        if rung == coded.rung:
            own = (torch.arange(later, later + blocks) * pool.layers + layer).repeat_interleave(tokens)
            page = torch.cat([page, own])
            within = torch.cat([within, torch.arange(head * tokens, (head + 1) * tokens).repeat(blocks)])
        if len(page):
            at = _coded(pool, form, table.pages[slot], page, within)
            parts_of = [_memory(one, size, torch.uint8) for one, size in zip(at, (form.line_bytes, 4), strict=True)]
            codes, factors = (memory[own] for memory, own in parts_of)
            keys, values = form.unpack(codes, factors.view(torch.float16), wide)
            keys = keys @ dual + coded.key_means[layer, slot, head]
            parts.append(torch.cat([keys, values @ back + coded.value_means[layer, slot, head]], -1))
    return torch.cat(parts)


def _held(pool: Pool, table: PagedTable, layer: int, slot: int, head: int) -> Tensor:
    first, count = table.segments[layer, slot, head, [FIRST, HELD]].tolist()
    return _line(pool, table.pages[slot], torch.arange(first, first + count))


def _listed(pool: Pool, table: PagedTable, layer: int, slot: int, head: int, blocks: Tensor) -> Tensor:
    address, count, replaced = table.segments[layer, slot, head, [LIST, LISTED, REPLACED]].tolist()
    memory, own = _memory(torch.tensor([address] if count else [], dtype=torch.long), count, torch.int32)
    position = memory[own].flatten().long()
    surrogate = replaced * UNIT + (-1 - position) * (2 * pool.size)
    return torch.where(position < 0, surrogate, _token(pool, layer, head, blocks, position.clamp(min=0)))


def _line(pool: Pool, pages: Tensor, line: Tensor) -> Tensor:
    """First elements of lines of private pages, from the pool's beginning."""
    page, within = line // pool.lines, line % pool.lines
    own = pool.offsets[page % pool.layers] * UNIT + pages.long()[page // pool.layers] * pool.cache.stride(0)
    return own + within * (2 * pool.size)


def _token(pool: Pool, layer: int, head: int, blocks: Tensor, position: Tensor) -> Tensor:
    """First elements of tokens of ordinary blocks."""
    own = pool.offsets[layer] * UNIT + blocks.long()[position // pool.tokens] * pool.cache.stride(0)
    return own + position % pool.tokens * pool.cache.stride(2) + head * pool.cache.stride(1)


def _entries(pool: Pool, at: Tensor) -> tuple[Tensor, Tensor]:
    """`_memory` of entries that begin at these elements."""
    each = pool.cache.element_size()
    return _memory(pool.cache.data_ptr() + at * each, 2 * pool.size, pool.cache.dtype)


def _read(pool: Pool, at: Tensor) -> Tensor:
    """Entries ``[t, 2 * D]``."""
    memory, own = _entries(pool, at)
    return memory[own]
