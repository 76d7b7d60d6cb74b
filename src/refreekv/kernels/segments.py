"""Exact entries in segments behind a table (`kernels.table`): writing, moving and attending to them."""

from torch import Tensor

from refreekv.kernels import dispatch, ops, reference
from refreekv.kernels.table import Format


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
    if dispatch.at_once(keys):
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
    if dispatch.at_once(keys):
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
    (ops.move_on_cuda if dispatch.at_once(source) else ops.move)(source, target, key_bytes, value_bytes, longest)


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
    if dispatch.at_once(source):
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
    if dispatch.at_once(table):
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
