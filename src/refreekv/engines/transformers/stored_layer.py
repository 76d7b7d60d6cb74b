"""What a layer holds of the tokens it has seen: dense, ragged, or the chunks of a prompt that goes on.

A layer starts *dense*, exactly as transformers' `DynamicLayer`: ``keys`` and ``values`` are ``[B, H_kv, n, D]``, with
padding. Once entries were evicted it is *ragged*: what is kept lies in flat storage of its own (`KVStorage`).

Lengths are logical everywhere outside: positions, masks and `get_seq_length` count all tokens ever seen, so that rotary
positions stay true whatever is evicted.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from refreekv.engines.transformers.prompt import PromptState
from refreekv.engines.transformers.reading import Reading
from refreekv.pruning.masks import mask_for_columns
from refreekv.pruning.padding import Padding
from refreekv.pruning.queries import HeldQueries
from refreekv.pruning.records import after_crop
from refreekv.report import RowReport
from refreekv.storage.base import KVStorage
from refreekv.storage.columns import Columns, lasting


class StoredLayer(DynamicLayer):
    """The entries of one full-attention layer, which rows and tokens can be taken from.

    Attributes
    ----------
    index : int
        Index of the layer in the model.
    ordinal : int
        Index among the layers that may be pruned.
    state : PromptState
        What the layers of a cache share.
    ragged : KVStorage or None
        The storage once something was evicted; ``keys`` and ``values`` are then its flat
        tensors.
    reports : list of RowReport
        Of the last pruning, one a row, without the bytes; none before the first.
    kept_columns : list of Columns
        Logical columns of what the last pruning kept, a row each. The entries after it have the
        columns from the logical length it was made at on, without a gap.
    reading : Reading or None
        Of a prompt whose chunks go on and are coded as they come; ``keys`` and ``values`` are None between its calls,
        or those of what was there before.
    holds_hidden : bool
        Whether the mask of the last prompt hid some of what is stored: then masks are to be looked at
        while decoding, too.
    """

    def __init__(self, index: int, ordinal: int, state: PromptState):
        super().__init__()
        self.index = index
        self.ordinal = ordinal
        self.state = state
        self._clear()

    def _clear(self) -> None:
        self.ragged: KVStorage | None = None
        self.reading: Reading | None = None
        self.reports: list[RowReport] = []
        self.kept_columns: list[Columns] = []
        self.holds_hidden = False
        self._length = 0
        self._pruned_length = 0
        # Logical length at the end of the last prompt that the policy was asked about: what is left of it may be asked
        # to stay.
        self._earlier_length = 0
        self._padding = Padding()
        self._queries = HeldQueries()

    # -- what is stored ----------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Logical length: all tokens seen, padding included, evicted or not."""
        return self._length

    @property
    def dense(self) -> tuple[Tensor, Tensor]:
        """``keys`` and ``values`` ``[B, H_kv, n, D]``; only while nothing was evicted, and a copy where coded."""
        assert self.ragged is None
        if self._is_put_away:
            assert self.reading is not None
            held = self.reading.whole()
            assert isinstance(held, tuple)
            return held
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    @property
    def _is_put_away(self) -> bool:
        """Whether an unfinished prompt is held coded, and nothing of it in full precision."""
        return self.reading is not None and (self.keys is None or not self.keys.numel())

    @property
    def batch(self) -> int:
        """Rows that the layer holds."""
        return self.ragged.batch if self.ragged is not None else self._shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer; 0 before the first token."""
        return self.ragged.kv_heads if self.ragged is not None else self._shape[1]

    @property
    def _shape(self) -> tuple[int, int]:
        """Rows and KV heads of a layer that is not ragged."""
        if self._is_put_away:
            assert self.reading is not None
            return self.reading.prompt.shape
        return (self.keys.shape[0], self.keys.shape[1]) if self.keys is not None and self._length else (0, 0)

    @property
    def sizes(self) -> tuple[int, int]:
        """Head sizes of keys and values; only where there are any."""
        held = self.ragged or (None if self.reading is None else self.reading.prompt)
        return held.sizes if held is not None else (self.dense[0].shape[-1], self.dense[1].shape[-1])

    @property
    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Types of keys and values as the model has them; only where there are any."""
        held = self.ragged or (None if self.reading is None else self.reading.prompt)
        return held.types if held is not None else (self.dense[0].dtype, self.dense[1].dtype)

    @property
    def generated_since(self) -> int:
        """Generated tokens since the last pruning, where these are pruned, too."""
        return self._queries.generated_tokens

    @property
    def padding_bytes(self) -> int:
        """Bytes of what says which of the stored entries are padding."""
        return 0 if self.padding is None else self.padding.nbytes

    def columns(self, row: int) -> Columns:
        """Logical columns of the stored entries of ``row``; only when ragged."""
        return self.kept_columns[row].extended(self._pruned_length, self._length)

    def row_mask(self, mask: Tensor, row: int, heads: int) -> Tensor:
        """The part of a mask over logical columns that concerns the stored entries of ``row``."""
        return mask_for_columns(mask, row, self.columns(row).padded(mask.device), heads)

    def _store(self, ragged: KVStorage) -> None:
        self.ragged = ragged
        self.keys, self.values = ragged.keys, ragged.values

    def _take_over(self, held: KVStorage | tuple[Tensor, Tensor]) -> None:
        if isinstance(held, tuple):
            self.keys, self.values = held
        else:
            self._store(held)

    def _finish_reading(self) -> None:
        """Hold an unfinished prompt in full precision, as if it had not been coded."""
        reading, self.reading = self.reading, None
        if reading is not None:
            self._take_over(reading.whole())

    # -- in place ----------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Make sure that a captured forward has room for more entries in the arena."""
        assert self.ragged is not None
        if self.ragged.reserve(tokens):
            self._store(self.ragged)

    def note_moved(self) -> None:
        """Look where entries are after the storage was changed in place by others."""
        assert self.ragged is not None
        self._store(self.ragged)

    def note_appended(self, tokens: int) -> None:
        """Count entries that a captured forward wrote to the arena."""
        assert self.ragged is not None
        self.ragged.note_appended(tokens)
        self._length += tokens

    def free_rows(self, rows: Sequence[int]) -> None:
        """Give back the memory of finished rows; see `PrunedCache.free_rows`."""
        if self.ragged is None or not self.ragged.tables:
            raise ValueError("only rows of a cache that decodes on CUDA can be freed; keep the others instead")
        self.ragged.free_rows(rows)
        self._store(self.ragged)

    # -- what generate calls between forwards ------------------------------------------------

    def reset(self) -> None:
        """Forget everything and release the memory; the layer can take a new prompt."""
        self.keys = self.values = None
        self.is_initialized = False
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number as in `DynamicLayer.crop`.

        Cropping into the pruned prompt removes what is left of it there; what was evicted
        before that point does not come back.
        """
        self.state.finish()
        tokens_to_remove = int(tokens_to_remove)  # a tensor would make one of every length
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        remove = min(-tokens_to_remove, self._length)
        if remove == 0:
            return
        length = self._length - remove
        if self.state.verification is not None:
            self.state.verification.cropped(length)
        if length == 0:
            self.reset()
            return
        self._finish_reading()
        self._queries = self._queries.cropped(remove)
        self._padding = self._padding.cropped(length)
        self._earlier_length = min(self._earlier_length, length)
        if self.ragged is None:
            super().crop(-remove)
            # A copy, as the view that is left would hold on to what was removed.
            self.keys, self.values = (entries.clone() for entries in self.dense)
        else:
            self._crop_ragged(length)
        self._length = length

    def _crop_ragged(self, length: int) -> None:
        assert self.ragged is not None
        if length < self._pruned_length:
            self.kept_columns = lasting([columns.below(length) for columns in self.kept_columns], length)
            self.reports = after_crop(self.reports, self.kept_columns, self._pruned_length - length)
            self._pruned_length = length
        elif self.ragged.drop(self._length - length):
            return
        rest, heads = length - self._pruned_length, self.ragged.kv_heads
        lengths = [[kept + rest for kept in columns.for_heads(heads)] for columns in self.kept_columns]
        self._store(self.ragged.truncate(lengths))

    def _take_rows(self, indices: Sequence[int]) -> None:
        """Put the rows ``indices`` of the batch, in that order, in place of the present ones."""
        self.state.finish()
        if self._length == 0:
            return
        if self.state.past is not None and self.ordinal == 0:
            self.state.past.take_rows(indices)
        self._finish_reading()
        if self.state.verification is not None:
            self.state.verification.take_rows(self, indices)
        if self.ragged is None:
            keys, values = self.dense
            index = torch.tensor(indices, device=keys.device)
            self.keys, self.values = keys.index_select(0, index), values.index_select(0, index)
        else:
            self.kept_columns = [self.kept_columns[row] for row in indices]
            self._store(self.ragged.select_rows(indices))
        if self.reports:
            self.reports = [self.reports[row] for row in indices]
        self._padding = self._padding.of_rows(indices)
        self._queries = self._queries.of_rows(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put row ``beam_idx[i]`` at row ``i``, for beam search."""
        self._take_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, the copies next to each other."""
        self._take_rows([row for row in range(self.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (integers, or a boolean mask) of the batch."""
        self._take_rows(torch.arange(self.batch)[indices.cpu()].tolist())

    def offload(self) -> None:
        """Not supported: storage moves when it is pruned."""
        raise NotImplementedError("a ReFreeKVCache cannot be offloaded to the CPU layer by layer")

    # -- files -------------------------------------------------------------------------------

    def check_between_calls(self) -> None:
        """Raise ValueError in the middle of a prompt, of which more is held than can be told of."""
        if self._padding.start is not None or self._queries.prompt is not None or self.reading is not None:
            raise ValueError("the cache is in the middle of a prompt that comes in chunks: save it after the last one")

    @property
    def marks(self) -> dict[str, int]:
        """Logical lengths: now, at the last pruning that moved entries, and at the end of the last prompt judged."""
        return {"length": self._length, "pruned": self._pruned_length, "settled": self._earlier_length}

    @property
    def padding(self) -> Tensor | None:
        """Boolean ``[B, columns]``: padding that is still stored; None: there is none."""
        return self._padding.stored

    @property
    def generated(self) -> tuple[Tensor, ...]:
        """Queries of tokens generated since the last pruning, where generated tokens are pruned, too."""
        return self._queries.generated

    def restore(
        self,
        entries: KVStorage | tuple[Tensor, Tensor],
        marks: Mapping[str, int],
        *,
        columns: Sequence[Columns],
        reports: Sequence[RowReport],
        hides: bool,
        padding: Tensor | None,
        generated: Sequence[Tensor],
    ) -> None:
        """Become what another layer was, of which these are the parts: dense entries, or a storage."""
        self._clear()
        self.is_initialized = True
        if isinstance(entries, tuple):
            self.keys, self.values = entries
        else:
            self._store(entries)
        held = self.dense[0] if self.ragged is None else self.ragged.keys
        self.device, self.dtype = held.device, held.dtype
        self._length, self._pruned_length, self._earlier_length = (marks[n] for n in ("length", "pruned", "settled"))
        self.kept_columns, self.reports, self.holds_hidden = list(columns), list(reports), hides
        self._padding, self._queries = Padding(padding), HeldQueries(generated=tuple(generated))
