"""Triton kernels, each beside a plain torch version that CPUs use and tests compare with.

The functions here pick by device: CUDA tensors go to Triton, others to the reference. On machines
without Triton the references serve CUDA tensors, too.

All that take tables raise ValueError or TypeError for shapes, devices or types that do not go with each other, before
anything is read or written: what is done with addresses nobody can check any more.
"""

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from refreekv.core import needs as needs_in_torch
from refreekv.core import reductions, selection, slices
from refreekv.core import surrogates as surrogates_in_torch
from refreekv.core.needs import Grading, Needs, Rules
from refreekv.core.packed_lines import PackedFormat, PackedMaps
from refreekv.core.quantisation import centre_of
from refreekv.core.reductions import ProbeReductions, Probes
from refreekv.core.surrogates import Surrogates
from refreekv.core.weight_blocks import WeightBlocks, sliced, unpacked
from refreekv.kernels import ops, packed_ops, packed_reference, probe_blocks, reference
from refreekv.kernels.packed_calls import Moved, Oldest, Transfer
from refreekv.kernels.table import Format

__all__ = [
    "Format",
    "Moved",
    "Needs",
    "Oldest",
    "ProbeReductions",
    "Probes",
    "Transfer",
    "append",
    "asked",
    "available",
    "block_linear",
    "both_reductions",
    "centres",
    "code_oldest",
    "fetch",
    "gather",
    "kept_first",
    "leveled",
    "make_surrogates",
    "mapped_means",
    "move",
    "needed",
    "pack_lines",
    "pack_rungs",
    "packed_attention",
    "probe_reductions",
    "put_surrogates",
    "ragged_decode",
    "recode_lines",
    "take_out",
    "uni_metric_cut",
    "unpack_lines",
]


@functools.cache
def available() -> bool:
    """Whether Triton is installed and a CUDA device is there to run its kernels: compute capability 8.0 or more."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def _at_once(tensor: Tensor) -> bool:
    """Whether to launch kernels without PyTorch's way to an operator, which costs the host more than the launches.

    What is compiled needs operators.
    """
    return tensor.is_cuda and available() and not torch.compiler.is_compiling()


def probe_reductions(query: Tensor, key: Tensor, probes: Probes) -> ProbeReductions:
    """Per-position peak and mean of the probes' attention, ``[B, H_kv, n]`` float32 each.

    Parameters, results and errors are those of `core.reductions.probe_reductions`, the plain version.
    On CUDA two kernels read the keys once each, or one where ``logsumexp`` is known, and no row is ever written out:
    memory is the results and, where it is not, one float32 a query, head and split of the keys. On a CPU it goes in
    blocks (`probe_blocks`).
    """
    reductions.check_heads(query.shape[1], key.shape[1])
    if probes.scaling is None:
        probes = probes._replace(scaling=query.shape[-1] ** -0.5)
    if key.is_cuda and available():
        reduce = ops.probe_reductions_on_cuda if _at_once(key) else ops.probe_reductions_op
        peak, mean = reduce(query, key, *probes)
        return ProbeReductions(peak, mean if probes.sums else None)
    plain = probe_blocks.probe_reductions if key.device.type == "cpu" else reductions.probe_reductions
    return plain(query, key, probes)


def both_reductions(
    query: Tensor, other_query: Tensor, key: Tensor, probes: Probes, other: Probes
) -> tuple[ProbeReductions, ProbeReductions]:
    """`probe_reductions` of two sets of queries over the same keys: on CUDA one kernel reads these once for both.

    What the two say of keys and of attention, ``columns``, ``valid``, ``scaling``, ``softcap`` and ``sink_logits``,
    must be the same; ValueError if it is not.
    """
    for name in ("columns", "valid", "scaling", "softcap", "sink_logits"):
        one, two = getattr(probes, name), getattr(other, name)
        if one is not two and (isinstance(one, Tensor) or isinstance(two, Tensor) or one != two):
            raise ValueError(f"two probes of the same keys differ in their {name}; reduce them one after the other")
    if not _at_once(key):
        return probe_reductions(query, key, probes), probe_reductions(other_query, key, other)
    from refreekv.kernels.probe_launch import launch_both_reductions

    reductions.check_heads(query.shape[1], key.shape[1])
    peak, mean, other_peak, other_mean = launch_both_reductions(query, other_query, key, probes, other)
    return (
        ProbeReductions(peak, mean if probes.sums else None),
        ProbeReductions(other_peak, other_mean if other.sums else None),
    )


def needed(
    window: ProbeReductions,
    spread: ProbeReductions,
    scores: Tensor | None,
    rules: Rules,
    *,
    real: Tensor | None = None,
    earlier: Tensor | None = None,
    grading: Grading | None = None,
    origins: Tensor | None = None,
) -> Needs:
    """The entries that probed queries look at, their surroundings, and all of the heads that copy.

    Parameters and results are those of `core.needs.needs`, which this is on the CPU, with padding, without copy
    scores and where all heads keep one set. Else it is three launches on CUDA. With ``grading`` their rungs come with
    them, those of `core.needs.levels`. ``origins``, integers ``[B | 1, H_kv]``, say that each head's real entries are
    those from there on.
    """
    peak, plain = window.peak, (real is None or origins is not None) and not rules.together
    long = origins is not None or peak.shape[-1] >= rules.min_length
    if peak.is_cuda and available() and plain and scores is not None and long:
        from refreekv.kernels.needs import launch_needs

        return launch_needs(window, spread, scores, rules, earlier, grading, origins)
    found = needs_in_torch.needs(window, spread, scores, rules, real=real, earlier=earlier)
    if grading is None:
        return found
    return found._replace(levels=needs_in_torch.levels(window, spread, scores, *grading, real=real))


def uni_metric_cut(
    rows: Tensor, *, sinks: int, threshold: float, includes_sinks: bool = False, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where the position ranking may be cut, and what that loses.

    Parameters and results are those of `core.selection.uni_metric_cut`, which this is on the CPU and
    with padding. Without, it is three launches on CUDA.
    """
    if rows.is_cuda and available() and valid is None and threshold > 0:
        from refreekv.kernels.cut import launch_cut

        return launch_cut(rows, sinks, threshold, includes_sinks)
    return selection.uni_metric_cut(rows, sinks=sinks, threshold=threshold, includes_sinks=includes_sinks, valid=valid)


def kept_first(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the kept entries are. One launch on CUDA, and the host does not wait for it.

    Parameters
    ----------
    keep : Tensor
        Boolean ``[B, G, n]``.

    Returns
    -------
    order, counts : Tensor
        int32 ``[B, G, n]``, the indices of the True entries in ascending order and then zeros; and
        how many they are, ``[B, G]``.
    marks : Tensor
        uint8 ``[B, G, bytes]``: a bit for each entry, the first in the lowest bit.
    """
    if keep.is_cuda and available():
        from refreekv.kernels.needs import launch_kept_first

        return launch_kept_first(keep)
    return reference.kept_first(keep)


def asked(
    columns: Tensor, ordinals: Tensor, real: Tensor | None, *, rows: int, spread: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a prompt's queries, the last ones and some over all of it. One launch on CUDA.

    Parameters
    ----------
    columns, ordinals, real : Tensor
        Integers ``[B | 1, r]`` twice and boolean ``[B | 1, r]`` or None, as `pruning.calls.Queries` has them.
    rows, spread : int
        How many of the last ones, and at most how many over all of it; 0: none.
    count : int
        How many are given out: the last of those that are not asked stand in front where there are fewer.

    Returns
    -------
    index, columns, ordinals, real : Tensor
        ``[B | 1, count]``: which they are, of each what is known, and whether it is asked.
    """
    if columns.is_cuda and available():
        from refreekv.kernels.queries import launch_asked

        return launch_asked(columns, ordinals, real, rows, spread, count)
    return reference.asked(columns, ordinals, real, rows, spread, count)


def centres(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`core.quantisation.centre_of` of keys and of values ``[B, H_kv, n, D]`` without padding. Two launches on CUDA."""
    if keys.is_cuda and available() and max(keys.dtype.itemsize, values.dtype.itemsize) <= 4:
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
        float32 ``[1, H_kv, D, D]``: `core.packed_lines.PackedMaps`' of keys and of values.
    """
    if means[0].is_cuda and available() and max(mean.dtype.itemsize for mean in means) <= 4:
        from refreekv.kernels.means import launch_mapped_means

        return launch_mapped_means(means, matrices)
    return reference.mapped_means(means, matrices)


def leveled(
    order: Tensor, kept: Tensor, levels: Tensor, *, rungs: int, first: int, recent: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rungs of the kept entries in their order, and of those that are coded, which are in each. One launch on CUDA.

    Parameters
    ----------
    order, kept : Tensor
        ``[B, 1 | G, n]`` and ``[B, 1 | G]`` int32, as `kept_first` gives them.
    levels : Tensor
        uint8 ``[B, 1 | G, n]``: the rung of each entry, kept or not; what is above the last one counts as that.
    rungs : int
        How many there are.
    first, recent : int
        Kept entries at the beginning and at the end that are not coded.

    Returns
    -------
    ordered, counts : Tensor
        uint8 ``[B, G, n]``, of which each line's first ``kept`` say something, and int32 ``[B, rungs, G]``.
    listed, packed : Tensor
        int32 ``[B, G, n]``: the entries that are coded, those of the first rung first; and their rungs in their own
        order, four of them in a byte of uint8 ``[B, G, n / 4]``, the first in the lowest bits.
    """
    if levels.is_cuda and available():
        from refreekv.kernels.needs import launch_leveled

        return launch_leveled(order, kept, levels, rungs, first, recent)
    return reference.leveled(order, kept, levels, rungs, first, recent)


def make_surrogates(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    keep: Tensor,
    *,
    count: int,
    real: Tensor | None = None,
    asked: Tensor | None = None,
) -> Surrogates:
    """Surrogates of all that is not kept.

    Parameters, results and meaning are those of `core.surrogates.make`, but ``keep``: boolean
    ``[B, H_kv, n]``, whose opposite that takes.
    """
    rows = queries.shape[1] // keys.shape[1] * queries.shape[2]
    if keys.is_cuda and available() and real is None and asked is None and count <= 16 and rows <= 128:
        from refreekv.kernels.surrogates import launch_surrogates, tile_for

        if tile := tile_for(queries, keys, values):
            return launch_surrogates(queries, keys, values, keep, count, tile)
    gone = ~keep if real is None else real & ~keep
    return surrogates_in_torch.make(queries, keys, values, gone, count=count, real=real, asked=asked)


def put_surrogates(chosen: Surrogates, keys: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """Write surrogates over the entries ``[B, H_kv, n, D]`` whose places they take; what is kept with them."""
    if keys.is_cuda and available():
        from refreekv.kernels.surrogates import launch_put

        return launch_put(chosen, keys, values, keep)
    surrogates_in_torch.put(chosen, keys, values)
    return keep.scatter(-1, chosen.columns, keep.gather(-1, chosen.columns) | chosen.real)


def append(keys: Tensor, values: Tensor, table: Tensor, form: Format) -> None:
    """Put new entries behind each segment's last one, in place.

    Parameters
    ----------
    keys, values : Tensor
        ``[B, H_kv, q, D]`` and ``[B, H_kv, q, Dv]``.
    table : Tensor
        See `kernels.table`; ``B * H_kv`` segments. Its lengths grow by ``q``, or by what there is capacity for.
    form : Format
        How the segments hold entries. Types that are narrower than theirs are widened, exactly.
    """
    if _at_once(keys):
        ops.append_on_cuda(keys, values, table, form)
    else:
        ops.append(keys, values, table, *form)


def gather(
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    spans: Tensor,
    form: Format,
    *,
    end: int,
    longest: int,
) -> None:
    """Fill segments with chosen entries of dense keys and values; the table says how many.

    Parameters
    ----------
    keys, values : Tensor
        ``[B, H_kv, n, D]`` and ``[B, H_kv, n, Dv]``.
    table : Tensor
        See `kernels.table`.
    spans : Tensor
        ``[segments, 3]`` int64: ``(0, first, skip)`` takes the entries ``0 .. first - 1`` and then
        those from ``first + skip`` on; ``(address, first, 0)`` those that the ``first`` int32
        numbers at ``address`` name, and then those from ``end`` on.
    form : Format
        As in `append`.
    end : int
        See ``spans``.
    longest : int
        Entries of the longest segment.
    """
    if _at_once(keys):
        ops.gather_on_cuda(keys, values, table, spans, end, longest, form)
    else:
        ops.gather(keys, values, table, spans, end, longest, *form)


def move(source: Tensor, target: Tensor, *, key_bytes: int, value_bytes: int, longest: int) -> None:
    """Copy entries segment by segment, as many as both tables' lengths allow.

    Parameters
    ----------
    source, target : Tensor
        See `kernels.table`.
    key_bytes, value_bytes : int
        Of one entry; multiples of 4.
    longest : int
        Entries of the longest segment.
    """
    (ops.move_on_cuda if _at_once(source) else ops.move)(source, target, key_bytes, value_bytes, longest)


def fetch(source: Tensor, target: Tensor, *, key_bytes: int, value_bytes: int) -> None:
    """Copy entries segment by segment, as many as the source holds when the device gets there.

    Unlike `move` it depends on nothing that the host knows, so that one launch in a CUDA graph serves all lengths.

    Parameters
    ----------
    source, target : Tensor
        See `kernels.table`. The target's lengths become those of the source, or what it has capacity for.
    key_bytes, value_bytes : int
        Of one entry; multiples of 4.
    """
    if _at_once(source):
        from refreekv.kernels.storage import launch_fetch

        launch_fetch(source, target, key_bytes, value_bytes)
    else:
        reference.fetch(source, target, key_bytes, value_bytes)


def take_out(table: Tensor, told: Tensor, *, key_bytes: int, value_bytes: int) -> None:
    """Take entries out of segments, in place: those behind them move up, and the table's lengths become less.

    Parameters
    ----------
    table : Tensor
        See `kernels.table`.
    told : Tensor
        int64 ``[2, segments]``: of each segment the first entry that goes, and how many do. They must be there.
    key_bytes, value_bytes : int
        Of one entry; multiples of 4.
    """
    if _at_once(table):
        from refreekv.kernels.storage import launch_take_out

        launch_take_out(table, told, key_bytes, value_bytes)
    else:
        reference.take_out(table, told, key_bytes, value_bytes)


def ragged_decode(
    query: Tensor,
    table: Tensor,
    form: Format,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query a row over segments of any lengths.

    Parameters
    ----------
    query : Tensor
        ``[B, H, 1, D]``; the heads of a group, ``H / H_kv`` of them, share a segment.
    table : Tensor
        See `kernels.table`; ``B * H_kv`` segments. One without entries gives zeros.
    form : Format
        How the segments hold entries; queries may be of another type.
    scaling : float, optional
        Factor on the logits; ``D ** -0.5`` if None.
    softcap, sinks
        As ``softcap`` and ``sink_logits`` in `core.probes.attention_rows`.

    Returns
    -------
    Tensor
        ``[B, 1, H, Dv]`` of the type of ``query``, as attention functions return it.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = ops.ragged_decode(query, table, *form, scaling, softcap, sinks)
    return out


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
    if _at_once(keys):
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
    if _at_once(given[0].keys):
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
    if _at_once(layers[0].exact):
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
    if _at_once(keys):
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
    if _at_once(given.table):
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


def block_linear(x: Tensor, blocks: WeightBlocks, bias: Tensor | None = None) -> Tensor:
    """Multiply with weights in blocks: ``x @ weight.T + bias``.

    Parameters
    ----------
    x : Tensor
        ``[..., K]``.
    blocks : WeightBlocks
        The weights, ``[N, K]``.
    bias : Tensor, optional
        ``[N]``.

    Returns
    -------
    Tensor
        ``[..., N]``, of the type of ``x``. On CUDA a few rows are multiplied with the codes as they are; for more
        of them, and on CPUs, weights are unpacked, some rows of the matrix at a time.
    """
    triton = _at_once(blocks.low)
    if triton:
        from refreekv.kernels import block_products

        flat = x.reshape(-1, x.shape[-1])  # [M, K]
        if len(flat) <= block_products.MOST_ROWS:
            return block_products.product(flat.contiguous(), blocks, bias).view(*x.shape[:-1], blocks.shape[0])

    rows = block_rows(*blocks.shape)

    def unpack(index: int) -> Tensor:
        some = sliced(blocks, index * rows, (index + 1) * rows)
        return block_products.unpack(some, x.dtype) if triton else unpacked(some, x.dtype)

    return slices.product(x, blocks.shape[0], rows, unpack, None if bias is None else bias.to(x.dtype))


UNPACKED = 2**25
"""Weights in blocks that are unpacked at a time."""


def block_rows(count: int, size: int) -> int:
    """Rows of a matrix ``[N, K]`` in blocks that are unpacked at a time."""
    return min(count, max(1, UNPACKED // size))
