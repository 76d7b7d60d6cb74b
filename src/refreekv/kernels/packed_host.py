"""Attention over exact entries and packed lines on a CPU, in few passes; tests hold a plain version.

Codes are made numbers and no more: the grid's steps and middles go into the query, and out of the sum of values. The
lines of a rung are unpacked together where their segments lie one behind the other, as in an arena.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from refreekv.core.packed_lines import FACTOR_BYTES, WIDTHS, PackedFormat, Side, step
from refreekv.kernels.packed_calls import PackedKV
from refreekv.kernels.reference import as_written
from refreekv.kernels.table import CAPACITY, KEY, LENGTH, VALUE, entries


@as_written
def packed_attention(
    query: Tensor, held: PackedKV, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """`kernels.packed_attention`, in float32 or the queries' wider type."""
    held.check(query, sinks)
    exact, tables, forms, maps = held
    batch, heads, _, size = query.shape
    kv_heads = len(exact) // batch
    wide, value_size = torch.promote_types(query.dtype, torch.float32), maps.value_mean.shape[-1]
    # [B, H, 1, D] -> [B, H_kv, group, D]
    asked = query.to(wide).view(batch, kv_heads, -1, size)
    coded = asked @ maps.key_dual.to(wide).mT
    shift = asked @ maps.key_mean.to(wide)[..., None]  # [B, H_kv, group, 1]
    rungs = [_Rung(table, form, coded.flatten(0, 1)) for table, form in zip(tables, forms, strict=True)]
    out = query.new_zeros(batch, 1, heads, value_size)
    for segment, count in enumerate(exact[:, LENGTH].tolist()):
        row, head = divmod(segment, kv_heads)
        keys, values = (
            part[:count].to(wide) for part in entries(exact, segment, (size, value_size), (query.dtype,) * 2)
        )
        logits = [asked[row, head] @ keys.mT, *(rung.logits(segment) + shift[row, head] for rung in rungs)]
        lengths = [part.shape[1] for part in logits]
        group = asked.shape[2]
        mine = slice(head * group, (head + 1) * group)
        if sinks is not None:
            logits.append(sinks[mine, None].to(wide) / scaling)
        scores = torch.cat(logits, 1) * scaling
        if softcap is not None:
            capped = scores[:, : sum(lengths)]
            scores[:, : sum(lengths)] = softcap * torch.tanh(capped / softcap)
        if not sum(lengths):
            continue
        weights = scores.softmax(1).split([*lengths, scores.shape[1] - sum(lengths)], 1)
        result = weights[0] @ values
        if rungs:
            coded_weights = weights[1 : 1 + len(rungs)]
            sums = [rung.mixed(segment, own) for rung, own in zip(rungs, coded_weights, strict=True)]
            between, mass = torch.stack(sums).sum(0), torch.cat(coded_weights, 1).sum(1, keepdim=True)
            place = maps.of_segment(row, head)
            result = result + between @ place.value_back.to(wide).T + mass * place.value_mean.to(wide)
        out[row, 0, mine] = result.to(out.dtype)
    return out


class _Rung:
    """The lines of a rung as numbers, and queries for them.

    ``queries`` are ``[segments, group, D]`` in code space.
    """

    def __init__(self, table: Tensor, form: PackedFormat, queries: Tensor):
        self._form = form
        held = [(address, factors, n) for address, factors, n, _ in table.tolist()]
        starts, lines, factors = _joined(table, held, form)
        self._parts = [(start, start + n) for start, (_, _, n) in zip(starts, held, strict=True)]
        wide = queries.dtype
        self._factors = factors.to(wide)
        split = form.keys.bytes
        self._keys = _numbers(form.keys, lines[:, :split], wide)
        self._values = _numbers(form.values, lines[:, split : split + form.values.bytes], wide)
        channel, worth, middle = _fields(form.keys)
        self._queries = queries[..., channel] * worth.to(wide)
        self._middles = self._queries @ middle.to(wide)[:, None]  # [segments, group, 1]

    def logits(self, segment: int) -> Tensor:
        """Products with a segment's keys, less those with their mean: ``[group, n]``."""
        start, stop = self._parts[segment]
        products = self._queries[segment] @ self._keys[start:stop].mT
        return (products - self._middles[segment]) * self._factors[start:stop, 0]

    def mixed(self, segment: int, weights: Tensor) -> Tensor:
        """The sum of a segment's values in code space by weights ``[group, n]``: ``[group, Dv]``."""
        start, stop = self._parts[segment]
        own = weights * self._factors[start:stop, 1]
        channel, worth, middle = _fields(self._form.values)
        total = own @ self._values[start:stop] - own.sum(1, keepdim=True) * middle.to(own)
        return own.new_zeros(len(own), self._form.value_size).index_add_(1, channel, total * worth.to(own))


def _joined(
    table: Tensor, held: Sequence[tuple[int, int, int]], form: PackedFormat
) -> tuple[list[int], Tensor, Tensor]:
    """Where each segment's lines begin, all lines ``[n, line_bytes]`` and all factors ``[n, 2]``: views if possible."""
    capacities: list[int] = table[:, CAPACITY].tolist()
    one_by_one = all(
        held[at][0] + capacities[at] * form.line_bytes == held[after][0]
        and held[at][1] + capacities[at] * FACTOR_BYTES == held[after][1]
        for at, after in pairwise(range(len(held)))
    )
    whole = table.new_zeros(1, 4)
    starts, at = [], 0
    if one_by_one and sum(n for _, _, n in held) * 5 >= sum(capacities) * 4:
        for capacity in capacities:
            starts.append(at)
            at += capacity
        whole[0, KEY], whole[0, VALUE], whole[0, LENGTH], whole[0, CAPACITY] = held[0][0], held[0][1], at, at
        lines, factors = entries(whole, 0, (form.line_bytes, FACTOR_BYTES), (torch.uint8,) * 2)
        return starts, lines, factors.view(torch.float16)
    pairs = []
    for segment, (_, _, n) in enumerate(held):
        lines, factors = entries(table, segment, (form.line_bytes, FACTOR_BYTES), (torch.uint8,) * 2)
        pairs.append((lines[:n], factors[:n]))
        starts.append(at)
        at += n
    return starts, torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]).view(torch.float16)


def _numbers(side: Side, packed: Tensor, wide: torch.dtype) -> Tensor:
    """The fields of packed codes ``[n, bytes]`` as numbers ``[n, fields]``, plane by plane and place by place."""
    found = torch.empty(len(packed), sum(plane.count for plane in side.planes), dtype=wide)
    at = 0
    for plane in side.planes:
        part = packed[:, plane.start : plane.start + plane.used]
        for place in range(8 // plane.bits):
            field = part >> (place * plane.bits) if place else part
            if (place + 1) * plane.bits < 8:
                field = field & (2**plane.bits - 1)
            found[:, at : at + plane.used] = field
            at += plane.used
    return found


@functools.cache
def _fields(side: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Of each field: its channel, int64; what one of it is worth; and its middle, which levels are counted from."""
    channels, worths, middles = [], [], []
    widths = [width for width in side.widths for _ in range(side.size // 4)]
    assert set(widths) <= set(WIDTHS)
    for plane in side.planes:
        for (start, stop), shift in zip(plane.channels, plane.shifts, strict=True):
            for channel in range(start, stop):
                channels.append(channel)
                worths.append(step(widths[channel]) * 2**shift)
                middles.append((2**plane.bits - 1) / 2)
    return torch.tensor(channels), torch.tensor(worths), torch.tensor(middles)
