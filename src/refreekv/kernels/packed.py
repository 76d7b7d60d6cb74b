"""Entries in packed lines (`core.packed_lines`): their means, coding, decoding, coding anew, and attention."""

from collections.abc import Sequence

from torch import Tensor

from refreekv.core.packed_lines import PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import centre_of
from refreekv.kernels import dispatch, packed_ops, packed_reference, reference
from refreekv.kernels.packed_calls import Moved, Oldest, Transfer


def centres(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`core.quantisation.centre_of` of keys and of values ``[B, H_kv, n, D]`` without padding. Two launches on CUDA."""
    if dispatch.on_triton(keys) and max(keys.dtype.itemsize, values.dtype.itemsize) <= 4:
        from refreekv.kernels.means import launch_centres

        return launch_centres(keys, values)
    return centre_of(keys), centre_of(values)


def mapped_means(means: tuple[Tensor, Tensor], matrices: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Copies in float32 of mean keys and mean values, and both in code space. One launch on CUDA.

    Parameters
    ----------
    means : pair of Tensor
        ``[B, H_kv, D]``.
    matrices : pair of Tensor
        float32 ``[1, H_kv, D, D]``: `core.packed_maps.PackedMaps`' of keys and of values.
    """
    if dispatch.on_triton(means[0]) and max(mean.dtype.itemsize for mean in means) <= 4:
        from refreekv.kernels.means import launch_mapped_means

        return launch_mapped_means(means, matrices)
    return reference.mapped_means(means, matrices)


def pack_lines(
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    form: PackedFormat,
    maps: PackedMaps,
    spans: Tensor,
    *,
    end: int,
    longest: int,
    starts: Tensor | None = None,
    source: Tensor | None = None,
) -> None:
    """Code chosen entries and write them to the packed lines of segments; the table says how many.

    Parameters
    ----------
    keys, values : Tensor
        ``[B, H_kv, n, D]`` and ``[B, H_kv, n, Dv]``; or with ``source`` the storages that it has the addresses of.
    table : Tensor
        ``[segments, 4]`` int64 as in `kernels.table`: address of a segment's first line, a multiple of 8, or of 16
        where ``form.line_bytes`` is; address of its first pair of factors, ``[capacity, 2]`` float16; length; capacity.
    form : PackedFormat
        Of the lines.
    maps : PackedMaps
        Into code space.
    spans, end
        Which entries, as in `gather`.
    longest : int
        The most that one segment takes.
    starts : Tensor, optional
        ``[segments]`` int64: the first line that is written, up to the table's length; None: 0.
    source : Tensor, optional
        A table as in `kernels.table`, of exact entries of the type of ``keys``, whose lines the spans then count.
    """
    given = Transfer(keys, values, source, table, form, maps, spans, end, longest, starts)
    if dispatch.at_once(keys):
        packed_ops.pack_lines_on_cuda(given)
    else:
        packed_ops.pack_lines(*given.flat)


def pack_rungs(given: Sequence[Transfer]) -> None:
    """Code entries to packed lines of several formats, at most `core.quantisation.MOST_RUNGS`: one launch on CUDA.

    Parameters
    ----------
    given : sequence of Transfer
        What `pack_lines` is given, once for each format; of all but the table, the format, the spans, the longest and
        the starts all have the same. Where the longest is 0, spans are not read.
    """
    if dispatch.at_once(given[0].keys):
        packed_ops.pack_lines_on_cuda(given[0], given[1:])
    else:
        for each in given:
            if each.longest:
                packed_ops.pack_lines(*each.flat)


def code_oldest(layers: Sequence[Oldest]) -> None:
    """Code exact entries of layers to lines behind those that are there, and let the ones behind them move up.

    Lengths in both tables change with it. One copy to the device and one launch on CUDA, where layers are alike. What
    is told must be there: entries to code, and capacity for their lines.
    """
    if dispatch.at_once(layers[0].exact):
        from refreekv.kernels.packed_oldest import code_alike

        code_alike(layers)
    else:
        for layer in layers:
            packed_reference.code_oldest(layer)


def unpack_lines(
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    form: PackedFormat,
    maps: PackedMaps,
    spans: Tensor,
    *,
    end: int,
    longest: int,
    starts: Tensor | None = None,
    target: Tensor | None = None,
) -> None:
    """Write what packed lines stand for to where `pack_lines` takes entries from: the way back.

    Parameters
    ----------
    keys, values : Tensor
        ``[B, H_kv, n, D]`` and ``[B, H_kv, n, Dv]``, written to; or with ``target`` the storages that it has the
        addresses of.
    table, form, maps
        Of the lines, as in `pack_lines`; the maps may be for entries of any type.
    spans, end
        Which entries the lines are of, as in `gather`.
    longest : int
        The most lines that are read of one segment.
    starts : Tensor, optional
        ``[segments]`` int64: the first line that is read, up to the table's length; None: 0.
    target : Tensor, optional
        A table as in `kernels.table`, of exact entries of the types of ``keys`` and ``values``, whose lines the spans
        then count. They must be there.
    """
    given = Transfer(keys, values, target, table, form, maps, spans, end, longest, starts)
    if dispatch.at_once(keys):
        packed_ops.unpack_lines_on_cuda(given)
    else:
        packed_ops.unpack_lines(*given.flat)


def recode_lines(given: Moved) -> None:
    """Fill segments with lines of one format, made of lines of it or of wider ones.

    A line of the format stays byte by byte what it is. Others are coded anew from what they stand for in code space.

    Parameters
    ----------
    given : Moved
        ``table`` of the segments to fill, and how many lines each gets; ``rungs`` (uint8) and ``at`` (int64)
        ``[lines]`` of all lines that are listed: the format, and the number in the storage, of what each is made of;
        ``starts`` (int64) of each segment's first one in that list. ``sources`` has a line for each of the ``forms``:
        addresses of its first line and first pair of factors, how many there are, and the bytes of a line. ``target``
        is the number of the format that is made.
    """
    if dispatch.at_once(given.table):
        from refreekv.kernels.packed_recode import launch_recode

        launch_recode(given.table, given)
    else:
        packed_reference.recode(given)


def packed_attention(
    query: Tensor,
    exact: Tensor,
    tables: Sequence[Tensor],
    forms: Sequence[PackedFormat],
    maps: PackedMaps,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query a row over exact entries and packed lines together, one softmax for all.

    Parameters
    ----------
    query : Tensor
        ``[B, H, 1, D]``; the heads of a group, ``H / H_kv`` of them, share segments.
    exact : Tensor
        See `kernels.table`; ``B * H_kv`` segments, entries of the type of ``query``.
    tables : sequence of Tensor
        Of each level, as in `pack_lines`; as many segments. Any segment may be empty.
    forms : sequence of PackedFormat
        Of each level's lines.
    maps : PackedMaps
        Of all levels.
    scaling, softcap, sinks
        As in `ragged_decode`.

    Returns
    -------
    Tensor
        ``[B, 1, H, Dv]``, as attention functions return it.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    numbers = [number for form in forms for number in form.numbers]
    out: Tensor = packed_ops.packed_attention(query, exact, tables, numbers, maps.tensors, scaling, softcap, sinks)
    return out
