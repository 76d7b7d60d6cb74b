"""Moving what a policy keeps, in the precision it has, to the storage that suits the device."""

from collections.abc import Sequence

from torch import Tensor

from refreekv import kernels
from refreekv.storage.arena import KVArena, Span
from refreekv.storage.columns import Columns
from refreekv.storage.ragged import RaggedKV, kept_of_rows


def takes_arena(arena: bool | None, keys: Tensor, values: Tensor) -> bool:
    """Whether keys and values like these belong in a `KVArena`: on CUDA, unless ``arena`` says otherwise.

    The kernels move 16 bytes at a time, so that an entry must be a multiple of that.
    """
    wanted = keys.is_cuda and kernels.available() if arena is None else arena
    return wanted and all(part.shape[-1] * part.element_size() % 16 == 0 for part in (keys, values))


def compacted(
    dense: tuple[Tensor, Tensor],
    columns: Sequence[Columns],
    after: int,
    arena: bool | None,
) -> KVArena | RaggedKV:
    """What is kept of a dense layer, and the last ``after`` entries, as they are, in storage that suits the device.

    Parameters
    ----------
    dense : pair of Tensor
        Keys and values ``[B, H_kv, n, D]``.
    columns : sequence of Columns
        What stays of each row, in tensors of their own that stay alive.
    after : int
        Entries behind the prompt.
    arena : bool or None
        Whether to use storage that can grow; None: on CUDA.
    """
    if not takes_arena(arena, *dense):
        return kept_of_rows(list(zip(*dense, strict=True)), columns, after)
    keys, values = dense
    heads, length = keys.shape[1:3]
    lengths = [tuple(count + after for count in row.for_heads(heads)) for row in columns]
    # One kernel for the whole layer, from where the prompt's entries are to where they stay.
    spans = [span for row in columns for span in _spans(row, heads, length - after)]
    return KVArena.gathered(keys, values, lengths, spans, length - after)


def _spans(columns: Columns, heads: int, end: int) -> list[Span]:
    """How `kernels.gather` is told about one row; what follows ``end`` follows what is kept."""
    if columns.ranges is None:
        # An empty tensor has no address to look at: nothing listed is a gap from the start.
        lines = [(head.data_ptr(), len(head), 0) if len(head) else (0, 0, end) for head in columns.heads]
        return lines * heads if len(lines) == 1 else lines
    ranges = columns.ranges
    first = ranges[0][1] if ranges and ranges[0][0] == 0 else 0
    start = ranges[-1][0] if ranges and ranges[-1][1] == end else end
    if ranges not in ((), ((0, first),), ((start, end),), ((0, first), (start, end))):
        raise AssertionError("one gap in a dense prompt")
    return [(0, first, 0 if start < first else start - first)] * heads
