"""What the kernels over segments compute, in plain torch and in host memory, a segment at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refreekv.core.coded_lines import from_lines, half_of, line_bytes, to_lines
from refreekv.kernels.table import CAPACITY, KEY, LENGTH, VALUE, entries


def kept_first(keep: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.kept_first`."""
    length = keep.shape[-1]
    slot = torch.where(keep, keep.cumsum(-1) - 1, length)
    index = torch.arange(length, dtype=torch.int32, device=keep.device).expand_as(keep)
    order = torch.zeros(*keep.shape[:-1], length + 1, dtype=torch.int32, device=keep.device)
    return order.scatter_(-1, slot, index)[..., :length], keep.sum(-1, dtype=torch.int32)


def append(keys: Tensor, values: Tensor, table: Tensor, groups: Sequence[int] | None = None) -> None:
    """`kernels.append`."""
    keys, values = _stored(keys, values, groups)
    kv_heads, tokens = keys.shape[1:3]
    for segment, (_, _, length, capacity) in enumerate(table.tolist()):
        if capacity == 0:
            continue
        row, head = divmod(segment, kv_heads)
        stored_keys, stored_values = entries(table, segment, (keys.shape[-1], values.shape[-1]), keys.dtype)
        line = (length + torch.arange(tokens)) % capacity
        stored_keys[line] = keys[row, head]
        stored_values[line] = values[row, head]
        table[segment, LENGTH] += tokens


def gather(
    keys: Tensor, values: Tensor, table: Tensor, spans: Tensor, end: int, groups: Sequence[int] | None = None
) -> None:
    """`kernels.gather`."""
    keys, values = _stored(keys, values, groups)
    kv_heads = keys.shape[1]
    for segment, ((_, _, length, _), (index, first, skip)) in enumerate(
        zip(table.tolist(), spans.tolist(), strict=True)
    ):
        row, head = divmod(segment, kv_heads)
        position = torch.arange(length)
        if index:
            listed = entries(torch.tensor([[index, 0, first, first]]), 0, (1, 1), torch.int32)[0][:, 0].long()
            position = torch.cat([listed, torch.arange(end, end + length - first)])
        else:
            position = torch.where(position < first, position, position + skip)
        stored_keys, stored_values = entries(table, segment, (keys.shape[-1], values.shape[-1]), keys.dtype)
        stored_keys[:length] = keys[row, head][position]
        stored_values[:length] = values[row, head][position]


def _stored(keys: Tensor, values: Tensor, groups: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Entries ``[..., D]`` as segments hold them: as they are, or as lines."""
    if groups is None:
        return keys, values
    stored = []
    for part, group in zip((keys, values), groups, strict=True):
        lines = to_lines(part.reshape(-1, part.shape[-1]), group)
        stored.append(lines.view(*part.shape[:-1], lines.shape[-1]))
    return stored[0], stored[1]


def move(source: Tensor, target: Tensor, key_bytes: int, value_bytes: int) -> None:
    """`kernels.move`."""
    for old, new in zip(source.tolist(), target.tolist(), strict=True):
        length = min(old[LENGTH], new[LENGTH])
        line = torch.tensor([[old[KEY], old[VALUE], length, length], [new[KEY], new[VALUE], length, length]])
        sizes = (key_bytes, value_bytes)
        for there, here in zip(entries(line, 0, sizes, torch.uint8), entries(line, 1, sizes, torch.uint8), strict=True):
            here.copy_(there)


def ragged_decode(
    query: Tensor,
    table: Tensor,
    value_size: int,
    scaling: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """`kernels.ragged_decode`."""
    batch, heads, _, head_size = query.shape
    kv_heads = len(table) // batch
    group = heads // kv_heads
    out = query.new_zeros(batch, 1, heads, value_size)
    for segment in range(len(table)):
        row, head = divmod(segment, kv_heads)
        keys, values = _entries(table, segment, (head_size, value_size), query.dtype, groups)
        held = min(int(table[segment, LENGTH]), int(table[segment, CAPACITY]))
        skipped = held - min(held, window) if window > 0 else 0
        mine = slice(head * group, (head + 1) * group)
        out[row, 0, mine] = decode_segment(
            query[row, mine, 0],
            keys[skipped:held],
            values[skipped:held],
            scaling,
            softcap,
            None if sinks is None else sinks[mine],
        ).to(out)
    return out


def _entries(
    table: Tensor, segment: int, sizes: tuple[int, int], dtype: torch.dtype, groups: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Keys ``[capacity, D]`` and values of one segment: views, or what lines stand for, exactly."""
    if groups is None:
        return entries(table, segment, sizes, dtype)
    lengths = line_bytes(sizes[0], groups[0]), line_bytes(sizes[1], groups[1])
    keys, values = (
        from_lines(lines, size, group, half_of(dtype), torch.float32)
        for lines, size, group in zip(entries(table, segment, lengths, torch.uint8), sizes, groups, strict=True)
    )
    return keys, values


def decode_segment(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """A group's query heads ``[g, D]`` over one segment ``[n, D]``, ``[n, Dv]``: ``[g, Dv]``, float32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(wide) @ keys.to(wide).T * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(wide)[:, None]], 1)
    if logits.shape[1] == 0:
        return values.new_zeros(len(query), values.shape[1], dtype=wide)
    return logits.softmax(1)[:, : len(keys)] @ values.to(wide)
