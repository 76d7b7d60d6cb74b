"""What the kernels over packed lines compute, in plain torch and in host memory, a segment at a time."""

import torch
from torch import Tensor

from refreekv.core.packed_lines import FACTOR_BYTES, PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.kernels.packed_calls import Moved, Oldest, Transfer
from refreekv.kernels.reference import as_written, take_out
from refreekv.kernels.table import LENGTH, entries


def lines_of(table: Tensor, segment: int, form: PackedFormat) -> tuple[Tensor, Tensor]:
    """Lines ``[capacity, line_bytes]`` and factors ``[capacity, 2]`` of one segment in host memory, as views."""
    lines, factors = entries(table, segment, (form.line_bytes, FACTOR_BYTES), (torch.uint8,) * 2)
    return lines, factors.view(torch.float16)


@as_written
def pack(given: Transfer) -> None:
    """`kernels.pack_lines`."""
    given.check(packs=True)
    keys, values, source, table, form, maps, spans, end, _, starts = given
    kv_heads = given.kv_heads
    firsts = [0] * len(table) if starts is None else starts.tolist()
    coded = []
    for segment, (first, length) in enumerate(zip(firsts, table[:, LENGTH].tolist(), strict=True)):
        row, head = divmod(segment, kv_heads)
        position = _chosen(spans, segment, length - first, end)
        if source is None:
            some = keys[row, head][position], values[row, head][position]
        else:
            stored = entries(source, segment, (form.key_size, form.value_size), (keys.dtype, values.dtype))
            some = stored[0][position], stored[1][position]
        coded.append(to_code_space(*some, maps, segment, kv_heads))
    # Each entry codes alone: so all of them at once.
    counts = [len(part) for part, _ in coded]
    # [entries, D], each with what its head's channels count
    heads = [maps.of_segment(*divmod(segment, kv_heads)).key_worth for segment in range(len(table))]
    worth = torch.cat([own.expand(n, -1) for own, n in zip(heads, counts, strict=True)])
    packed = form.pack(torch.cat([part for part, _ in coded]), torch.cat([part for _, part in coded]), worth)
    for segment, (first, *new) in enumerate(zip(firsts, *(part.split(counts) for part in packed), strict=True)):
        for there, own in zip(lines_of(table, segment, form), new, strict=True):
            there[first : first + len(own)] = own


def code_oldest(given: Oldest) -> None:
    """`kernels.code_oldest` of one layer."""
    given.check()
    firsts, counts, starts = given.told
    given.table[:, LENGTH] = starts + counts
    spans = torch.stack([torch.zeros_like(firsts), torch.zeros_like(firsts), firsts], -1)
    pack(
        Transfer(
            given.keys, given.values, given.exact, given.table, given.form, given.maps, spans, 0, int(counts.max()),
            starts,
        )
    )  # fmt: skip
    lines = [part.shape[-1] * part.element_size() for part in (given.keys, given.values)]
    take_out(given.exact, torch.stack([firsts, counts]), *lines)


@as_written
def unpack(given: Transfer) -> None:
    """`kernels.unpack_lines`."""
    given.check(packs=False)
    keys, values, target, table, form, maps, spans, end, _, starts = given
    kv_heads = given.kv_heads
    wide = torch.promote_types(keys.dtype, torch.float32)
    for segment in range(len(table)):
        row, head = divmod(segment, kv_heads)
        first, length = 0 if starts is None else int(starts[segment]), int(table[segment, LENGTH])
        if length <= first:
            continue
        where = _places(spans, segment, length - first, end)
        if target is None:
            into = keys[row, head], values[row, head]
        else:
            into = entries(target, segment, (form.key_size, form.value_size), (keys.dtype, values.dtype))
        own = maps.of_segment(row, head)
        lines, factors = lines_of(table, segment, form)
        coded = form.unpack(lines[first:length], factors[first:length], wide)
        # k = A^-1 w + mean, and the dual is the transposed A^-1
        into[0][where] = torch.addmm(own.key_mean.to(wide), coded[0], own.key_dual.to(wide)).to(keys.dtype)
        into[1][where] = torch.addmm(own.value_mean.to(wide), coded[1], own.value_back.T.to(wide)).to(values.dtype)


@as_written
def recode(given: Moved) -> None:
    """`kernels.recode_lines`."""
    given.check()
    table, sources, rungs, at, starts, forms, target, maps, _ = given
    form, counts, kv_heads = forms[target], table[:, LENGTH].tolist(), maps.key_mean.shape[1]
    number = torch.cat([start + torch.arange(n) for start, n in zip(starts.tolist(), counts, strict=True)])
    worth = maps.key_worth.expand(len(table) // kv_heads, -1, -1).flatten(0, 1)  # [segments, D]
    worth = worth.repeat_interleave(table[:, LENGTH], 0)  # [entries, D]
    lines = torch.empty(len(number), form.line_bytes, dtype=torch.uint8)
    factors = torch.empty(len(number), FACTOR_BYTES // 2, dtype=torch.float16)
    for rung, own in enumerate(forms):
        some = rungs[number] == rung
        if not bool(some.any()):
            continue
        held, place = sources[rung : rung + 1].clone(), at[number[some]]
        held[0, LENGTH:] = place.max() + 1
        line, factor = (part[place] for part in lines_of(held, 0, own))
        if rung != target:
            line, factor = form.pack(*own.unpack(line, factor, torch.float32), worth[some])
        lines[some], factors[some] = line, factor
    new = zip(lines.split(counts), factors.split(counts), strict=True)
    for segment, parts in enumerate(new):
        for there, part in zip(lines_of(table, segment, form), parts, strict=True):
            there[: len(part)] = part


def _places(spans: Tensor, segment: int, count: int, end: int) -> slice | Tensor:
    """`_chosen`, as a slice where it is one."""
    index, first, skip = spans[segment].tolist()
    if index or 0 < first < count:
        return _chosen(spans, segment, count, end)
    start = 0 if first else skip
    return slice(start, start + count)


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
