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
        start = int(table.starts[slot])
        for head in range(pool.heads):
            kept = [*_held(pool, table, layer, slot, head), *_listed(pool, table, layer, slot, head, block_table[at])]
            tail = [_token(pool, layer, head, block_table[at], position) for position in range(start, length)]
            entries = _read(pool, kept + tail).to(wide)  # [t, 2 * D]
            before = len(kept)
            if coded is not None:
                decoded = _decoded(pool, table, coded, layer, slot, head, wide)
                entries = torch.cat([decoded, entries])
                before += len(decoded)
            if begin == end:
                continue
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
            chosen = source[:opening] + source[opening + left_out :] if left_out else source
            for new, entry in enumerate(_read(pool, chosen)):
                _view(pool, _line(pool, pages, first + new)).copy_(entry)


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
        _read(pool, [_token(pool, layer, head, blocks, position) for position in range(first, prompt)]).float().sum(0)
        for layer in range(pool.layers)
        for head in range(pool.heads)
    ]
    return torch.stack(found).view(pool.layers, pool.heads, 2 * pool.size)


def spread(
    lines: Tensor, factors: Tensor, pool: Pool, form: PackedFormat, first: int, pages: Tensor, each: int | None = None
) -> None:
    """`kernels.paged_storage.launch_spread`."""
    each = pool.coded_lines(form) if each is None else each
    for index, (line, factor) in enumerate(zip(lines, factors, strict=True), first):
        page, within = divmod(index, each)
        for into, part in zip(_coded_line(pool, form, pages, page, within), (line, factor), strict=True):
            into.copy_(part)


def _coded_line(pool: Pool, form: PackedFormat, pages: Tensor, page: int, within: int) -> tuple[Tensor, Tensor]:
    """A coded line of a page and its factors, as bytes."""
    block, layer = divmod(page, pool.layers)
    each = pool.cache.element_size()
    at = pool.cache.data_ptr() + (int(pool.offsets[layer]) * UNIT + int(pages[block]) * pool.cache.stride(0)) * each
    behind = pool.coded_lines(form) * form.line_bytes
    return _bytes(at + within * form.line_bytes, form.line_bytes), _bytes(at + behind + within * 4, 4)


def _bytes(address: int, count: int) -> Tensor:
    return torch.frombuffer((ctypes.c_byte * count).from_address(address), dtype=torch.uint8)


def _decoded(
    pool: Pool, table: PagedTable, coded: Coded, layer: int, slot: int, head: int, wide: torch.dtype
) -> Tensor:
    """Entries ``[t, 2 * D]`` that a head's codes stand for, rung by rung."""
    dual, back = coded.key_duals[layer][head].to(wide), rotation(pool.size).T.to(wide)
    parts = [torch.zeros(0, 2 * pool.size, dtype=wide)]
    later, blocks = coded.generated[slot].tolist()
    for rung, form in enumerate(coded.forms):
        first, count = coded.segments[layer, slot, head, rung].tolist()
        places = [divmod(line, pool.coded_lines(form)) for line in range(first, first + count)]
        if rung == coded.rung:
            mine = range(head * pool.coded_tokens(form), (head + 1) * pool.coded_tokens(form))
            places += [((later + block) * pool.layers + layer, line) for block in range(blocks) for line in mine]
        found = [_coded_line(pool, form, table.pages[slot], *place) for place in places]
        if found:
            lines, factors = (torch.stack(part) for part in zip(*found, strict=True))
            keys, values = form.unpack(lines, factors.view(torch.float16), wide)
            keys = keys @ dual + coded.key_means[layer, slot, head]
            parts.append(torch.cat([keys, values @ back + coded.value_means[layer, slot, head]], -1))
    return torch.cat(parts)


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
