"""Moving what a policy keeps to the storage that suits the device and the precision."""

from collections.abc import Sequence

from torch import Tensor

from refreekv import kernels
from refreekv.core.coded_lines import fits
from refreekv.core.quantisation import KVDtype
from refreekv.storage.arena import KVArena, Span
from refreekv.storage.coded_arena import CodedArena
from refreekv.storage.columns import Columns, pieces
from refreekv.storage.quantised import QuantisedKV
from refreekv.storage.ragged import RaggedKV

Dense = tuple[Tensor, Tensor]


def takes_arena(arena: bool | None, keys: Tensor, values: Tensor, kv_dtype: KVDtype | None) -> bool:
    """Whether keys and values like these belong in a `KVArena`: on CUDA, unless ``arena`` says otherwise.

    The kernels move 16 bytes at a time, so that an entry must be a multiple of that. Of the number
    formats one has an arena: int8 of which no entries stay as they are.
    """
    wanted = keys.is_cuda and kernels.available() if arena is None else arena
    if kv_dtype is not None:
        return wanted and all(fits(kv_dtype, part.shape[-1]) for part in (keys, values))
    return wanted and all(part.shape[-1] * part.element_size() % 16 == 0 for part in (keys, values))


def compacted(
    source: Dense | RaggedKV,
    kept: Sequence[Columns],
    columns: Sequence[Columns],
    behind: int,
    arena: bool | None,
    kv_dtype: KVDtype | None,
    centres: Dense | None = None,
) -> RaggedKV:
    """What is kept, and the last ``behind`` entries, in storage of their own.

    Parameters
    ----------
    source : RaggedKV or pair of Tensor
        A ragged storage, or dense keys and values ``[B, H_kv, n, D]``.
    kept : sequence of Columns
        What stays of each row, counted within its entries.
    columns : sequence of Columns
        The same in logical columns, in tensors of their own that stay alive; of a dense source
        these are equal.
    behind : int
        Entries behind the prompt.
    arena : bool or None
        Whether to use storage with room to grow; None: on CUDA.
    kv_dtype : KVDtype or None
        The precision to store in.
    centres : pair of Tensor or None
        The prompt's mean key and mean value ``[B, H_kv, D]``, for number formats that take these out.
    """
    if isinstance(source, QuantisedKV):
        return source.keep(kept, behind)
    if isinstance(source, tuple):
        if takes_arena(arena, *source, kv_dtype):
            return _gathered(*source, columns, behind, kv_dtype)
        rows = list(zip(*source, strict=True))
    else:
        rows = (source.lines if isinstance(source, CodedArena) else source).rows()
    keys, values = [], []
    for row, (key, value) in zip(kept, rows, strict=True):
        stored = key.shape[1] - behind
        keys.append([*pieces(key, row), key[:, stored:]])
        values.append([*pieces(value, row), value[:, stored:]])
    storage = RaggedKV.from_pieces(keys, values)
    if isinstance(source, CodedArena):
        return source.of_lines(storage)
    if kv_dtype is not None:
        return QuantisedKV.of(kv_dtype, storage, centres, behind)
    return KVArena.of(storage) if takes_arena(arena, storage.keys, storage.values, None) else storage


def _gathered(
    keys: Tensor, values: Tensor, columns: Sequence[Columns], behind: int, kv_dtype: KVDtype | None
) -> KVArena:
    """One kernel for the whole layer, from where the prompt's entries are to where they stay."""
    heads, length = keys.shape[1:3]
    lengths = [tuple(count + behind for count in row.for_heads(heads)) for row in columns]
    spans = [span for row in columns for span in _spans(row, heads, length - behind)]
    if kv_dtype is not None:
        return CodedArena.gathered(keys, values, lengths, spans, length - behind, number=kv_dtype)
    return KVArena.gathered(keys, values, lengths, spans, length - behind)


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
