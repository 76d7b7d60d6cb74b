"""Moving what a policy keeps to the storage that suits the device and the precision."""

from collections.abc import Sequence

from torch import Tensor

from refreekv import kernels
from refreekv.core.key_codes import KeyCodes
from refreekv.core.quantisation import Ladder
from refreekv.storage.arena import KVArena, Span
from refreekv.storage.base import KVStorage
from refreekv.storage.columns import Columns, Levels
from refreekv.storage.leveled import LeveledKV
from refreekv.storage.ragged import kept_of_rows
from refreekv.storage.unfinished import UnfinishedKV

Dense = tuple[Tensor, Tensor]


def takes_arena(arena: bool | None, keys: Tensor, values: Tensor) -> bool:
    """Whether keys and values like these belong in a `KVArena`: on CUDA, unless ``arena`` says otherwise.

    The kernels move 16 bytes at a time, so that an entry must be a multiple of that.
    """
    wanted = keys.is_cuda and kernels.available() if arena is None else arena
    return wanted and all(part.shape[-1] * part.element_size() % 16 == 0 for part in (keys, values))


def compacted(
    dense: Dense,
    columns: Sequence[Columns],
    after: int,
    arena: bool | None,
    coded: tuple[Ladder, Dense, KeyCodes | None] | None = None,
    levels: Sequence[Levels] | None = None,
    read: UnfinishedKV | None = None,
) -> KVStorage:
    """What is kept of a dense layer, and the last ``after`` entries, in the storage that suits device and precision.

    Parameters
    ----------
    dense : pair of Tensor
        Keys and values ``[B, H_kv, n, D]``.
    columns : sequence of Columns
        What stays of each row, in tensors of their own that stay alive.
    behind : int
        Entries behind the prompt.
    arena : bool or None
        Whether to use storage that can grow; None: on CUDA.
    coded : tuple of Ladder, Dense and KeyCodes or None, optional
        The number formats to store in, the prompt's mean key and value ``[B, H_kv, D]``, and the model's own codes.
    levels : sequence of Levels, optional
        Of each row's ``columns``, which of the formats; None: that of what is generated.
    read : UnfinishedKV, optional
        The prompt as it was held while it was read in chunks, if that was in one of the formats.
    """
    if coded is not None:
        ladder, centres, codes = coded
        return LeveledKV.gathered(*dense, columns, after, ladder, centres, levels, codes, read)
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
    if ranges and ranges[-1][1] != end:
        raise AssertionError("a dense prompt is kept up to its end")
    first = ranges[0][1] if ranges and ranges[0][0] == 0 else 0
    start = ranges[-1][0] if ranges else end
    return [(0, first, 0 if start < first else start - first)] * heads
