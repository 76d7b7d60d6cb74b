"""Attention over exact entries and packed lines in plain torch, a segment at a time: what kernels are compared with."""

import torch
from torch import Tensor

from refreekv.kernels.packed_calls import PackedKV
from refreekv.kernels.packed_reference import lines_of
from refreekv.kernels.reference import as_written
from refreekv.kernels.table import LENGTH, entries


@as_written
def packed_attention(
    query: Tensor,
    held: PackedKV,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """`kernels.packed_attention`, computed in ``wide``: as a judge of others in float64."""
    held.check(query, sinks)
    exact, tables, forms, maps = held
    batch, heads, _, size = query.shape
    kv_heads = len(exact) // batch
    group, value_size = heads // kv_heads, maps.value_mean.shape[-1]
    out = query.new_zeros(batch, 1, heads, value_size, dtype=torch.promote_types(query.dtype, wide))
    for segment in range(len(exact)):
        row, head = divmod(segment, kv_heads)
        own = maps.of_segment(row, head)
        mine = slice(head * group, (head + 1) * group)
        q = query[row, mine, 0].to(wide)  # [g, D]
        count = int(exact[segment, LENGTH])
        keys, values = (
            part[:count].to(wide) for part in entries(exact, segment, (size, value_size), (query.dtype,) * 2)
        )
        logits, contents = [q @ keys.T], [values]
        for table, form in zip(tables, forms, strict=True):
            length = int(table[segment, LENGTH])
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
