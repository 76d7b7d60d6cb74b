"""What the kernels over segments compute, in plain torch and in host memory, a segment at a time."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from refreekv.core.autocast import without_autocast
from refreekv.core.packed_maps import in_code_space
from refreekv.kernels.table import (
    CAPACITY,
    KEY,
    LENGTH,
    VALUE,
    Format,
    check_entries,
    check_move,
    check_query,
    check_spans,
    check_take_out,
    entries,
)

P = ParamSpec("P")
R = TypeVar("R")


def kept_first(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.kept_first`."""
    length = keep.shape[-1]
    eights = torch.nn.functional.pad(keep, (0, -length % 8)).unflatten(-1, (-1, 8))  # [B, G, bytes, 8]
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=keep.device)
    slot = torch.where(keep, keep.cumsum(-1) - 1, length)
    index = torch.arange(length, dtype=torch.int32, device=keep.device).expand_as(keep)
    order = torch.zeros(*keep.shape[:-1], length + 1, dtype=torch.int32, device=keep.device)
    order = order.scatter_(-1, slot, index)[..., :length]
    return order, keep.sum(-1, dtype=torch.int32), (eights * weights).sum(-1, dtype=torch.uint8)


def asked(
    columns: Tensor, ordinals: Tensor, real: Tensor | None, rows: int, spread: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.asked`."""
    seen = ordinals[:, -1:] + 1
    wanted = ordinals >= seen - rows
    if spread:
        powers = 2 ** torch.arange(32, device=seen.device)
        step = 2 ** (seen // powers > spread).sum(1, keepdim=True)
        wanted = wanted | ((ordinals + 1) % step == 0)
    if real is not None:
        wanted = wanted & real
    wanted = wanted.expand(max(len(wanted), len(columns)), -1)
    index = wanted.to(torch.uint8).argsort(dim=1, stable=True)[:, -count:]
    own = (numbers.expand(len(index), -1).gather(1, index) for numbers in (columns, ordinals))
    return index, next(own), next(own), wanted.gather(1, index)


def mapped_means(means: tuple[Tensor, Tensor], matrices: tuple[Tensor, Tensor]) -> list[Tensor]:
    """`kernels.mapped_means`."""
    wide = [mean.to(torch.float32, copy=True) for mean in means]
    return [*wide, *map(in_code_space, matrices, wide)]


def leveled(
    order: Tensor, kept: Tensor, levels: Tensor, rungs: int, first: int, recent: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.leveled`."""
    groups = max(levels.shape[1], kept.shape[1])
    order, kept = order.expand(-1, groups, -1), kept.expand(-1, groups)
    ordered = levels.clamp_max(rungs - 1).expand(-1, groups, -1).gather(-1, order.long())  # [B, G, n]
    number = torch.arange(order.shape[-1], device=kept.device)
    coded = (number >= first) & (number < kept[..., None] - recent)
    each = torch.arange(rungs, dtype=torch.uint8, device=kept.device)[:, None, None]
    # [B, 1, G, n] against [R, 1, 1]: [B, R, G]
    counts = ((ordered[:, None] == each) & coded[:, None]).sum(-1, dtype=torch.int32)
    by_rung = torch.where(coded, ordered, rungs).argsort(stable=True, dim=-1)
    four = torch.where(coded, ordered, 0)[..., first:]
    four = torch.nn.functional.pad(four, (0, -four.shape[-1] % 4))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=kept.device)
    # [B, G, 4 bytes] -> [B, G, bytes]
    packed = (four.unflatten(-1, (-1, 4)) << shifts).sum(-1, dtype=torch.uint8)
    return ordered, counts, order.gather(-1, by_rung), packed


def as_written(function: Callable[P, R]) -> Callable[P, R]:
    """Compute as on CUDA, where no operator of PyTorch is asked, so that autocast changes nothing."""

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast(torch.device("cpu")):
            return function(*args, **kwargs)

    return computed


@as_written
def append(keys: Tensor, values: Tensor, table: Tensor, form: Format) -> None:
    """`kernels.append`."""
    check_entries(keys, values, table, form)
    keys, values = keys.to(form.key_type), values.to(form.value_type)
    kv_heads, tokens = keys.shape[1:3]
    for segment, (_, _, length, capacity) in enumerate(table.tolist()):
        taken = min(tokens, capacity - length)
        if taken == 0:
            continue
        row, head = divmod(segment, kv_heads)
        stored_keys, stored_values = entries(table, segment, form.sizes, form.types)
        stored_keys[length : length + taken] = keys[row, head, :taken]
        stored_values[length : length + taken] = values[row, head, :taken]
        table[segment, LENGTH] += taken


@as_written
def gather(keys: Tensor, values: Tensor, table: Tensor, spans: Tensor, end: int, form: Format) -> None:
    """`kernels.gather`."""
    check_entries(keys, values, table, form)
    check_spans(spans, table, end, keys.shape[2])
    keys, values = keys.to(form.key_type), values.to(form.value_type)
    kv_heads = keys.shape[1]
    for segment, ((_, _, length, _), (index, first, skip)) in enumerate(
        zip(table.tolist(), spans.tolist(), strict=True)
    ):
        row, head = divmod(segment, kv_heads)
        position = torch.arange(length)
        if index:
            listed = entries(torch.tensor([[index, 0, first, first]]), 0, (1, 1), (torch.int32,) * 2)[0][:, 0].long()
            position = torch.cat([listed, torch.arange(end, end + length - first)])
        else:
            position = torch.where(position < first, position, position + skip)
        stored_keys, stored_values = entries(table, segment, form.sizes, form.types)
        stored_keys[:length] = keys[row, head][position]
        stored_values[:length] = values[row, head][position]


def move(source: Tensor, target: Tensor, key_bytes: int, value_bytes: int) -> None:
    """`kernels.move`."""
    check_move(source, target, key_bytes, value_bytes)
    for old, new in zip(source.tolist(), target.tolist(), strict=True):
        length = min(old[LENGTH], new[LENGTH])
        line = torch.tensor([[old[KEY], old[VALUE], length, length], [new[KEY], new[VALUE], length, length]])
        lines = (key_bytes, value_bytes), (torch.uint8,) * 2
        for there, here in zip(entries(line, 0, *lines), entries(line, 1, *lines), strict=True):
            here.copy_(there)


def take_out(table: Tensor, told: Tensor, key_bytes: int, value_bytes: int) -> None:
    """`kernels.take_out`."""
    check_take_out(table, told, key_bytes, value_bytes)
    for segment, (first, count) in enumerate(told.T.tolist()):
        length = int(table[segment, LENGTH])
        for lines in entries(table, segment, (key_bytes, value_bytes), (torch.uint8,) * 2):
            lines[first : length - count] = lines[first + count : length].clone()
        table[segment, LENGTH] -= count


def fetch(source: Tensor, target: Tensor, key_bytes: int, value_bytes: int) -> None:
    """`kernels.fetch`."""
    check_move(source, target, key_bytes, value_bytes)
    target[:, LENGTH] = torch.minimum(source[:, LENGTH], target[:, CAPACITY])
    move(source, target, key_bytes, value_bytes)


@as_written
def ragged_decode(
    query: Tensor,
    table: Tensor,
    form: Format,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`kernels.ragged_decode`."""
    check_query(query, table, form, sinks)
    batch, heads = query.shape[:2]
    kv_heads = len(table) // batch
    group = heads // kv_heads
    out = query.new_zeros(batch, 1, heads, form.sizes[1])
    for segment in range(len(table)):
        row, head = divmod(segment, kv_heads)
        keys, values = entries(table, segment, form.sizes, form.types)
        held = int(table[segment, LENGTH])
        mine = slice(head * group, (head + 1) * group)
        out[row, 0, mine] = decode_segment(
            query[row, mine, 0],
            keys[:held],
            values[:held],
            scaling,
            softcap,
            None if sinks is None else sinks[mine],
        ).to(out)
    return out


def decode_segment(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """A group's query heads ``[g, D]`` over one segment ``[n, D]``, ``[n, Dv]``: ``[g, Dv]``, float32 or wider."""
    wide = functools.reduce(torch.promote_types, (query.dtype, keys.dtype, values.dtype), torch.float32)
    logits = query.to(wide) @ keys.to(wide).T * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(wide)[:, None]], 1)
    if logits.shape[1] == 0:
        return values.new_zeros(len(query), values.shape[1], dtype=wide)
    return logits.softmax(1)[:, : len(keys)] @ values.to(wide)
