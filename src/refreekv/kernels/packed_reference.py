"""What the kernels over packed lines compute, in plain torch and in host memory, a segment at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat, PackedMaps
from refreekv.kernels.reference import as_written
from refreekv.kernels.table import CAPACITY, LENGTH, entries


def lines_of(table: Tensor, segment: int, form: PackedFormat) -> tuple[Tensor, Tensor]:
    """Lines ``[capacity, line_bytes]`` and factors ``[capacity, 2]`` of one segment in host memory, as views."""
    lines, factors = entries(table, segment, (form.line_bytes, 4), (torch.uint8,) * 2)
    return lines, factors.view(torch.float16)


@as_written
def pack(
    keys: Tensor,
    values: Tensor,
    source: Tensor | None,
    table: Tensor,
    form: PackedFormat,
    maps: PackedMaps,
    spans: Tensor,
    end: int,
    starts: Tensor | None,
) -> None:
    """`kernels.pack_lines`."""
    kv_heads = maps.key_mean.shape[1]
    for segment in range(len(table)):
        row, head = divmod(segment, kv_heads)
        first = 0 if starts is None else int(starts[segment])
        position = _chosen(spans, segment, int(table[segment, LENGTH]) - first, end)
        if source is None:
            some = keys[row, head][position], values[row, head][position]
        else:
            stored = entries(source, segment, (form.key_size, form.value_size), (keys.dtype, values.dtype))
            some = stored[0][position], stored[1][position]
        coded = to_code_space(*some, maps, segment, kv_heads)
        into = lines_of(table, segment, form)
        for there, new in zip(into, form.pack(*coded), strict=True):
            there[first : first + len(position)] = new


def _chosen(spans: Tensor, segment: int, count: int, end: int) -> Tensor:
    index, first, skip = spans[segment].tolist()
    position = torch.arange(count)
    if not index:
        return torch.where(position < first, position, position + skip)
    listed = entries(torch.tensor([[index, 0, first, first]]), 0, (1, 1), (torch.int32,) * 2)[0][:, 0].long()
    return torch.cat([listed, torch.arange(end, end + count - first)])[:count]


def to_code_space(keys: Tensor, values: Tensor, maps: PackedMaps, segment: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Entries ``[n, D]`` of a segment in code space, float32 or wider."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    row, head = divmod(segment, kv_heads)
    own = maps.of_segment(row, head)
    return (
        (keys.to(wide) - own.key_mean) @ own.key_matrix.to(wide).T,
        (values.to(wide) - own.value_mean) @ own.value_matrix.to(wide).T,
    )


@as_written
def packed_attention(
    query: Tensor,
    exact: Tensor,
    tables: Sequence[Tensor],
    forms: Sequence[PackedFormat],
    maps: PackedMaps,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """`kernels.packed_attention`, computed in ``wide``: as a judge of others in float64."""
    batch, heads, _, size = query.shape
    kv_heads = len(exact) // batch
    group, value_size = heads // kv_heads, maps.value_mean.shape[-1]
    out = query.new_zeros(batch, 1, heads, value_size, dtype=torch.promote_types(query.dtype, wide))
    for segment in range(len(exact)):
        row, head = divmod(segment, kv_heads)
        own = maps.of_segment(row, head)
        mine = slice(head * group, (head + 1) * group)
        q = query[row, mine, 0].to(wide)  # [g, D]
        held = min(int(exact[segment, LENGTH]), int(exact[segment, CAPACITY]))
        keys, values = (
            part[:held].to(wide) for part in entries(exact, segment, (size, value_size), (query.dtype,) * 2)
        )
        logits, contents = [q @ keys.T], [values]
        for table, form in zip(tables, forms, strict=True):
            length = min(int(table[segment, LENGTH]), int(table[segment, CAPACITY]))
            lines, factors = lines_of(table, segment, form)
            coded_keys, coded_values = form.unpack(lines[:length], factors[:length], wide)
            asked = q @ own.key_dual.to(wide).T
            logits.append(asked @ coded_keys.T + (q @ own.key_mean.to(wide))[:, None])
            contents.append(coded_values @ own.value_back.to(wide).T + own.value_mean.to(wide))
        scores = torch.cat(logits, 1) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        entries_of_all = scores.shape[1]
        if sinks is not None:
            scores = torch.cat([scores, sinks[mine].to(wide)[:, None]], 1)
        if entries_of_all:
            out[row, 0, mine] = (scores.softmax(1)[:, :entries_of_all] @ torch.cat(contents)).to(out)
    return out if wide == torch.float64 else out.to(query.dtype)
