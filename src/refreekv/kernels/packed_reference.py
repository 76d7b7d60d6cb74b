"""What the kernels over packed lines compute, in plain torch and in host memory, a segment at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refreekv.core.packed_lines import FACTOR_BYTES, PackedFormat, PackedMaps
from refreekv.kernels.reference import as_written
from refreekv.kernels.table import LENGTH, Format, check_query, check_spans, check_table, entries


def lines_of(table: Tensor, segment: int, form: PackedFormat) -> tuple[Tensor, Tensor]:
    """Lines ``[capacity, line_bytes]`` and factors ``[capacity, 2]`` of one segment in host memory, as views."""
    lines, factors = entries(table, segment, (form.line_bytes, FACTOR_BYTES), (torch.uint8,) * 2)
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
    check_pack(keys, values, source, table, form, maps, spans, end, starts)
    kv_heads = maps.key_mean.shape[1]
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


@as_written
def unpack(
    keys: Tensor,
    values: Tensor,
    target: Tensor | None,
    table: Tensor,
    form: PackedFormat,
    maps: PackedMaps,
    spans: Tensor,
    end: int,
    starts: Tensor | None,
) -> None:
    """`kernels.unpack_lines`."""
    check_unpack(keys, values, target, table, form, maps, spans, end, starts)
    kv_heads = maps.key_mean.shape[1]
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


def _places(spans: Tensor, segment: int, count: int, end: int) -> slice | Tensor:
    """`_chosen`, as a slice where it is one."""
    index, first, skip = spans[segment].tolist()
    if index or 0 < first < count:
        return _chosen(spans, segment, count, end)
    start = 0 if first else skip
    return slice(start, start + count)


def check_unpack(
    keys: Tensor,
    values: Tensor,
    target: Tensor | None,
    table: Tensor,
    form: PackedFormat,
    maps: PackedMaps,
    spans: Tensor,
    end: int,
    starts: Tensor | None,
) -> None:
    """Check what `kernels.unpack_lines` is given; ValueError."""
    _check_beside(keys, values, target, table, form, maps, spans, end, starts)


def check_pack(
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
    """Check what `kernels.pack_lines` is given.

    Raises
    ------
    ValueError
        Shapes or devices that do not go together.
    TypeError
        Maps for entries of another type.
    """
    _check_beside(keys, values, source, table, form, maps, spans, end, starts)
    if not maps.key_sum.dtype == keys.dtype == values.dtype:
        raise TypeError(
            f"maps are for entries in {maps.key_sum.dtype}, keys are in {keys.dtype} and values in {values.dtype}: see "
            "PackedMaps.of_type"
        )


def _check_beside(
    keys: Tensor,
    values: Tensor,
    exact: Tensor | None,
    table: Tensor,
    form: PackedFormat,
    maps: PackedMaps,
    spans: Tensor,
    end: int,
    starts: Tensor | None,
) -> None:
    """Check lines and the exact entries that they are made of, or become; ValueError."""
    check_table(table, keys)
    _check_maps(maps, form, table)
    sizes = form.key_size, form.value_size
    if (keys.shape[-1], values.shape[-1]) != sizes or values.device != keys.device:
        raise ValueError(
            f"keys {list(keys.shape)} on {keys.device} and values {list(values.shape)} on {values.device}; expected "
            f"heads of {sizes[0]} and {sizes[1]} elements on one device, as the lines are of"
        )
    if exact is not None:
        check_table(exact, table)
        if exact.shape != table.shape:
            raise ValueError(f"{exact.shape[0]} segments of exact entries for {table.shape[0]} of lines")
        if spans.shape != (table.shape[0], 3) or spans.dtype != torch.int64 or not spans.is_contiguous():
            raise ValueError(f"spans are contiguous int64 [{table.shape[0]}, 3], got {spans.dtype} {list(spans.shape)}")
    elif keys.dim() != 4 or values.shape[:3] != keys.shape[:3] or keys.shape[0] * keys.shape[1] != table.shape[0]:
        raise ValueError(
            f"keys {list(keys.shape)} and values {list(values.shape)}: expected [B, H_kv, n, D] of {table.shape[0]} "
            "segments in all"
        )
    else:
        check_spans(spans, table, end, keys.shape[2])
    if starts is not None and (starts.shape != table.shape[:1] or starts.dtype != torch.int64):
        raise ValueError(f"starts are int64 [{table.shape[0]}], got {starts.dtype} {list(starts.shape)}")


def check_attention(
    query: Tensor,
    exact: Tensor,
    tables: Sequence[Tensor],
    forms: Sequence[PackedFormat],
    maps: PackedMaps,
    sinks: Tensor | None,
) -> None:
    """Check what `kernels.packed_attention` is given; ValueError or TypeError."""
    sizes = maps.key_mean.shape[-1], maps.value_mean.shape[-1]
    check_query(query, exact, Format(sizes, query.dtype, query.dtype), sinks)
    if len(tables) != len(forms):
        raise ValueError(f"{len(tables)} tables of levels for {len(forms)} formats")
    for table, form in zip(tables, forms, strict=True):
        check_table(table, exact)
        if table.shape != exact.shape:
            raise ValueError(f"a level of {table.shape[0]} segments beside {exact.shape[0]} of exact entries")
        _check_maps(maps, form, exact)


def _check_maps(maps: PackedMaps, form: PackedFormat, table: Tensor) -> None:
    kv_heads, sizes = maps.key_mean.shape[1], (maps.key_mean.shape[-1], maps.value_mean.shape[-1])
    if sizes != (form.key_size, form.value_size) or maps.key_mean.device != table.device:
        raise ValueError(
            f"maps of heads of {sizes[0]} and {sizes[1]} elements on {maps.key_mean.device} for lines of "
            f"{form.key_size} and {form.value_size} on {table.device}"
        )
    for rows in (len(maps.key_mean), len(maps.key_matrix)):
        if table.shape[0] % kv_heads or rows not in (1, table.shape[0] // kv_heads):
            raise ValueError(f"maps of {rows} rows of {kv_heads} KV heads for {table.shape[0]} segments")


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
    check_attention(query, exact, tables, forms, maps, sinks)
    batch, heads, _, size = query.shape
    kv_heads = len(exact) // batch
    group, value_size = heads // kv_heads, maps.value_mean.shape[-1]
    out = query.new_zeros(batch, 1, heads, value_size, dtype=torch.promote_types(query.dtype, wide))
    for segment in range(len(exact)):
        row, head = divmod(segment, kv_heads)
        own = maps.of_segment(row, head)
        mine = slice(head * group, (head + 1) * group)
        q = query[row, mine, 0].to(wide)  # [g, D]
        held = int(exact[segment, LENGTH])
        keys, values = (
            part[:held].to(wide) for part in entries(exact, segment, (size, value_size), (query.dtype,) * 2)
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
