"""A cache layer that holds what a policy keeps, and nothing else.

The layer starts *dense*, exactly as transformers' `DynamicLayer`: ``keys`` and
``values`` are ``[B, H_kv, n, D]``, padding included. When the prompt ends and the policy
drops something, it turns *ragged*: the kept entries move to flat storage of their own
(`RaggedKV`), padding goes too, and the dense tensors are released. On CUDA that storage has
room to grow (`KVArena`), and layers that keep everything move there as well.

Lengths are logical everywhere outside: positions, masks and `get_seq_length` count all
tokens ever seen, so that rotary positions stay true whatever is evicted.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from refreekv.core.autocast import without_autocast
from refreekv.core.key_codes import KeyCodes
from refreekv.core.quantisation import Ladder, centre_of
from refreekv.engines.transformers.handout import ADVICE, hand_out
from refreekv.engines.transformers.prompt import PromptState
from refreekv.engines.transformers.reading import LEAST_CHUNK, Reading
from refreekv.policies.joint import JointPolicy
from refreekv.pruning.calls import AttentionCall, Entries, Queries
from refreekv.pruning.decide import Decision, KeptRow, decide
from refreekv.pruning.masks import leading_run, mask_for_columns, seen_columns, visible_columns
from refreekv.pruning.queries import HeldQueries
from refreekv.pruning.records import RowRecord, after_crop, after_pruning
from refreekv.storage import trial
from refreekv.storage.base import KVStorage
from refreekv.storage.columns import Columns, lasting
from refreekv.storage.compaction import compacted, takes_arena
from refreekv.storage.unfinished import UnfinishedKV

_PRUNED = (
    "keys", "values", "ragged", "records", "holds_hidden", "kept_columns", "_pruned_length", "_padding", "_coded",
)  # fmt: skip
"""Attributes of a layer that carrying out a decision sets."""

_log = logging.getLogger("refreekv")


class ReFreeKVLayer(DynamicLayer):
    """One full-attention layer's keys and values, pruned when the prompt ends.

    Attributes
    ----------
    index : int
        Index of the layer in the model.
    ordinal : int
        Index among the layers that may be pruned.
    ragged : KVStorage or None
        The storage once something was evicted; ``keys`` and ``values`` are then its flat
        tensors.
    ladder : Ladder or None
        The number formats that what is kept is stored in; None: in the precision it came in.
    records : list of RowRecord
        Outcome of the last pruning, one a row; empty before the first.
    kept_columns : list of Columns
        Logical columns of what the last pruning kept, a row each. The entries after it have the
        columns from the logical length it was made at on, without a gap.
    reading : Reading or None
        Of a prompt whose chunks go on and are coded as they come; ``keys`` and ``values`` are None between its calls,
        or those of what was there before.
    is_decoded_for_call : bool
        Whether the present call reads a copy of what is coded otherwise.
    holds_hidden : bool
        Whether the mask of the last prompt hid some of what is stored: then masks are to be looked at
        while decoding, too.
    """

    def __init__(self, index: int, ordinal: int, state: PromptState, ladder: Ladder | None = None):
        super().__init__()
        self.ladder = ladder
        self.index = index
        self.ordinal = ordinal
        self.state = state
        self._clear()

    def _clear(self) -> None:
        self.ragged: KVStorage | None = None
        self.reading: Reading | None = None
        # The prompt as it was coded while it was read, until what is kept was moved.
        self._read: UnfinishedKV | None = None
        self.is_decoded_for_call = False
        self.records: list[RowRecord] = []
        self._length = 0
        self._appended = 0
        self._queries = HeldQueries()
        self._unverified: AttentionCall | None = None
        self._undecided = False
        self.kept_columns: list[Columns] = []
        self._pruned_length = 0
        # Logical length at the end of the last prompt: what is left of it there may be asked to stay.
        self._earlier_length = 0
        # Number formats, the means that are taken out and the model's codes, of what is coded at the prompt's end.
        self._coded: tuple[Ladder, tuple[Tensor, Tensor], KeyCodes | None] | None = None
        self.holds_hidden = False
        # [B, columns]: padding that is still stored. None: there is none.
        self._padding: Tensor | None = None
        # Of a prompt whose chunks go on: logical length where it began, and what its queries saw; None: everything.
        self._turn_start: int | None = None
        self._seen: Tensor | None = None

    # -- what the model calls -------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the geometry of the first entries."""
        super().lazy_initialization(key_states, value_states)
        if self.values is not None:  # older transformers give them the keys' type
            self.values = self.values.to(value_states.dtype)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new entries ``[B, H_kv, q, D]`` and return what attention is to read.

        Dense: all keys and values. Ragged: the new ones only, as the rest has no common
        shape; the attention function reads the storage itself.

        Raises
        ------
        ValueError
            No new tokens, or another batch size or geometry than what is stored.
        RuntimeError
            Gradients, or attention that bypasses refreekv.
        """
        if key_states.shape[-2] == 0:
            raise ValueError("empty prompt: the model was called with no new tokens, so there is nothing to cache")
        if key_states.requires_grad or value_states.requires_grad:
            raise RuntimeError(
                "refreekv prunes the cache at inference only, and these keys and values carry gradients: "
                "call the model under torch.no_grad() or torch.inference_mode()"
            )
        self.state.check_reported(self.index)
        if self.state.verification is not None:
            self.state.verification.check_done(self)
        if self._undecided:
            self.state.finish()
        self._check_geometry(key_states, value_states)
        self._appended = key_states.shape[-2]
        self._length += self._appended
        with without_autocast(key_states.device):
            self.is_decoded_for_call = self._is_read_on(key_states, value_states)
            if self.is_decoded_for_call:
                key_states, value_states = self._read_on(key_states, value_states)
            elif self.ragged is None:
                key_states, value_states = super().update(key_states, value_states)
            else:
                self._store(self.ragged.append(key_states, value_states))
        self.state.awaiting = hand_out(self, key_states, value_states, self.index)
        return key_states, value_states

    def _is_read_on(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these belong to a prompt that is coded as it is read, of which they may be the first chunk."""
        if self.reading is None and self.state.continues(self._length) and self._is_worth_coding():
            number = Reading.form_for(self.state.prompt_dtype, (keys, values))
            if number is not None and not Reading.codes_anyway(self.ragged, number):
                if not self.is_initialized:
                    self.lazy_initialization(keys, values)
                start, end = self._length - self._appended, self.state.end
                assert end is not None
                earlier = self.ragged or (self.dense if start else None)
                codes = self.state.codes_of(self.ordinal)
                self.reading = Reading(number, start, end, earlier, (keys, values), codes)
        return self.reading is not None

    def _is_worth_coding(self) -> bool:
        """Whether the present chunk is long enough, where nobody has asked: each decodes all that was read before."""
        return not isinstance(self.state.prompt_dtype, str) or self._appended >= LEAST_CHUNK

    def _read_on(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a chunk; what attention is to read, as in `update`."""
        assert self.reading is not None
        # A policy that looks at all layers before it decides leaves this one's prompt coded until then.
        joint = isinstance(self.state.policy, JointPolicy) and not self.state.policy.freezes(self.ordinal)
        last = not joint and not self.state.continues(self._length)
        self._take_over(self.reading.whole_with(keys, values, last=last))
        if last:
            self._read, self.reading = self._lines_of(self.reading), None
        return (keys, values) if self.ragged is not None else self.dense

    def _take_over(self, held: KVStorage | tuple[Tensor, Tensor]) -> None:
        if isinstance(held, tuple):
            self.keys, self.values = held
        else:
            self._store(held)

    def _put_away(self, *, code: bool = True) -> None:
        """Code what was read, after its attention, and let go of copies in full precision."""
        assert self.reading is not None
        storage = self.reading.put_away(self._real_since(self.reading.start), code=code)
        if storage is None:
            self.keys = self.values = None
        else:
            self._store(storage)

    def _real_since(self, start: int) -> Tensor | None:
        """Boolean ``[B, columns]`` of an unfinished prompt from ``start`` on, False at what is padding as yet."""
        if self._seen is None or self._turn_start is None:
            return None
        run = leading_run(~self._seen[:, self._turn_start :], turn=self._turn_start > 0)
        return ~run[:, start - self._turn_start :]

    def _finish_reading(self) -> None:
        """Hold an unfinished prompt in full precision, as if it had not been coded."""
        reading, self.reading = self.reading, None
        if reading is not None:
            self._take_over(reading.whole())

    def _lines_of(self, reading: Reading) -> UnfinishedKV | None:
        """The prompt as it was coded while it was read, if what is kept of it may be stored in those very lines."""
        prompt = reading.prompt
        if self.ladder is None or self.ragged is not None or reading.earlier is not None or not prompt.coded:
            return None
        forms = self.ladder.forms(prompt.sizes, sorted_keys=self.state.codes_of(self.ordinal) is not None)
        return prompt if prompt.form in forms else None

    def _check_geometry(self, keys: Tensor, values: Tensor) -> None:
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"layer {self.index} brings keys {list(keys.shape)} and values {list(values.shape)}: one value belongs "
                "to each key, in each row and KV head"
            )
        if self._length == 0:
            sizes = keys.shape[3], values.shape[3]
            if self.ladder is not None and not (self.state.codes_optional and any(size % 16 for size in sizes)):
                self.ladder.forms(sizes)
                self._try_codes(keys, values)
            else:
                self.ladder = None
            return
        stored = (self.batch, self.kv_heads, *self.sizes)
        brought = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])
        if brought != stored:
            raise ValueError(
                f"layer {self.index} of this cache holds (batch, KV heads, key size, value size) = {stored} and the "
                f"model brings {brought}: the cache belongs to another batch or another model"
            )

    def _try_codes(self, keys: Tensor, values: Tensor) -> None:
        """Go without codes, or refuse, if a GPU's kernels for them are wrong."""
        assert self.ladder is not None
        if not trial.due(keys):
            return
        sizes, codes = (keys.shape[3], values.shape[3]), self.state.codes_of(0)
        if codes is not None and codes.order.shape != (keys.shape[1], keys.shape[3]):
            codes = self.state.codes_of(self.ordinal)
        # One trial serves all layers that are alike.
        dtype = torch.promote_types(keys.dtype, values.dtype)
        wrong = trial.fault(keys.device, dtype, keys.shape[1], sizes, self.ladder, codes)
        if wrong is None:
            return
        said = f"K/V cannot be coded on {keys.device}: {wrong}"
        if not self.state.codes_optional:
            raise RuntimeError(f"{said}; leave kv_dtype out, or pass kv_dtype=None")
        if self.ordinal == 0:
            _log.warning("%s; they stay in the model's precision", said)
        self.ladder = None

    def get_seq_length(self) -> int:
        """Logical length: all tokens seen, padding included, evicted or not."""
        return self._length

    def reserve(self, tokens: int) -> None:
        """Make sure that a captured forward has room for more entries in the arena."""
        assert self.ragged is not None
        if self.ragged.reserve(tokens):
            self._store(self.ragged)

    def code_older(self) -> None:
        """Code generated entries that are no longer among the newest, where entries are coded."""
        assert self.ragged is not None
        if self.ragged.code_older():
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

    # -- what the attention function calls --------------------------------------------------

    def columns(self, row: int) -> Columns:
        """Logical columns of the stored entries of ``row``; only when ragged."""
        return self.kept_columns[row].extended(self._pruned_length, self._length)

    def row_mask(self, mask: Tensor, row: int, heads: int) -> Tensor:
        """The part of a mask over logical columns that concerns the stored entries of ``row``."""
        return mask_for_columns(mask, row, self.columns(row).padded(mask.device), heads)

    @torch.no_grad()
    def after_attention(self, call: AttentionCall) -> None:
        """Prune if the prompt ended in this call; remember its last queries if it goes on."""
        self.state.awaiting = None
        if call.query.shape[2] != self._appended:
            raise RuntimeError(
                f"layer {self.index} of the model stored {self._appended} new entries and attends to them with "
                f"{call.query.shape[2]} queries: it is no self-attention, or leaves queries out. {ADVICE}"
            )
        with without_autocast(call.query.device):
            self._look_at(call)

    def _look_at(self, call: AttentionCall) -> None:
        before = self._length - call.query.shape[2]
        after = self.state.tokens_after_prompt(before, self._length)
        if after is not None:
            self._note_seen(call, before, self._length - after)
            self._note_padding()
            self._prune(call, after)
            self._earlier_length = self._length - after
        elif self.state.continues(self._length):
            self._note_seen(call, before, self._length)
            if not self.state.policy.freezes(self.ordinal):
                plan = self.state.policy.probe_plan(self._length)
                self._queries = self._queries.with_chunk(call, before, self._length, plan)
            if self.reading is not None:
                self._put_away()
        elif self.state.decode_interval is not None:
            self._queries = self._queries.with_generated(call.query)
            # Of several tokens some may be drafts: those that stay are known when the next call begins.
            self._unverified = call if call.query.shape[2] > 1 else None
            if self._unverified is None:
                self._prune_generated(call)

    @torch.no_grad()
    def prune_verified(self) -> None:
        """Look again at what was generated, if the last call may have had drafts in it: what is left is verified."""
        call, self._unverified = self._unverified, None
        if call is not None:
            self._prune_generated(call)

    def _prune_generated(self, call: AttentionCall) -> None:
        interval = self.state.decode_interval
        if interval is not None and self._queries.generated_tokens >= interval:
            # Their queries are the probes.
            self._prune(replace(call, query=torch.cat(self._queries.generated, dim=2)), after=0)

    def _note_seen(self, call: AttentionCall, before: int, end: int) -> None:
        """Take down which columns the queries of a prompt's chunk, from logical length ``before`` on, see."""
        if self._turn_start is None:
            self._turn_start = before
        if call.mask is None and self._seen is None:
            return
        seen = seen_columns(call.mask, end - before, call.query.shape[0], end)
        earlier = self._seen
        if seen is None:
            seen = torch.ones(call.query.shape[0], end, dtype=torch.bool, device=call.query.device)
        if earlier is None:  # chunks without a mask saw everything
            earlier = torch.ones_like(seen[:, : before if before > self._turn_start else 0])
        self._seen = torch.cat([seen[:, : earlier.shape[1]] | earlier, seen[:, earlier.shape[1] :]], 1)

    def _note_padding(self) -> None:
        """At the end of a prompt: what of it is padding is what no query saw of its beginning."""
        start, seen = self._turn_start or 0, self._seen
        self._turn_start = self._seen = None
        if seen is not None:
            run = leading_run(~seen[:, start:], turn=start > 0)
            self._padding = torch.cat([self._padding_until(start, seen[:, :start]), run], 1)

    # -- pruning --------------------------------------------------------------------------

    def _prune(self, call: AttentionCall, after: int) -> None:
        """Let the policy decide; compact at once, or on a GPU as soon as nobody has to wait for it."""
        self.state.check_scores(self._length)
        policy, parts = self.state.policy, self._entries(call, after)
        self._queries = HeldQueries()
        self._unverified = None
        self.state.changed = True
        if self.ragged is None and self.ladder is not None:
            self._coded = self.ladder, _centres(*parts), self.state.codes_of(self.ordinal)
        if self.state.verification is not None:
            self.state.verification.hold(self, call, parts, after)
            return
        if isinstance(policy, JointPolicy):

            def carry_out_decided(decided: Sequence[Decision]) -> None:
                self._carry_out(decided, after)

            self.state.joint.add(policy, call, parts, self.ordinal, self.state.layers, carry_out_decided)
            if self.reading is not None:
                self._put_away(code=False)
            return
        scores = self.state.scores_of(self.ordinal)
        codes = self.state.codes_of(self.ordinal)
        decisions = [
            decide(policy, call, part, self.ordinal, self.state.layers, scores, self.ladder, codes) for part in parts
        ]
        for decision in decisions:
            if self._read is not None and decision.surrogates is not None:
                self._read.forget_lines(decision.surrogates.columns, decision.surrogates.real)

        def carry_out() -> None:
            self._carry_out(decisions, after)

        if call.query.is_cuda:
            self._undecided = True
            self.state.later(carry_out)
        else:
            carry_out()

    def _entries(self, call: AttentionCall, after: int) -> list[Entries]:
        """Take the prompt's entries, the whole batch at once when dense, row by row when ragged.

        The last ``after`` entries follow the prompt; the policy does not see them, and all stay.
        """
        end = self._length - after
        new = call.query.shape[2] - after
        visible = visible_columns(call.mask, -1 - after, call.query.shape[0], end)
        padding = None if visible is None else self._padding_until(end, visible)
        held = self._queries.prompt
        queries = Queries.of_call(call.query[:, :, :new], end - new, visible, held).after(held)
        if self.ragged is None:
            keys, values = (entries[:, :, :end] for entries in self.dense)
            return [Entries.of_dense(keys, values, visible, padding, queries, self._earlier_length)]
        columns = [self.columns(row) for row in range(self.batch)]
        return Entries.of_ragged(self.ragged, columns, after, visible, padding, queries, self._earlier_length)

    def _padding_until(self, end: int, like: Tensor) -> Tensor:
        """Boolean ``[B, end]`` like another: the padding that is still stored."""
        if self._padding is None:
            return torch.zeros_like(like)
        return torch.nn.functional.pad(self._padding, (0, end - self._padding.shape[1]))

    def _carry_out(self, decisions: Sequence[Decision], after: int) -> None:
        """Record the decisions and, if anything goes, move what is kept to storage of its own."""
        self._undecided = False
        with without_autocast(self.device):
            if self.reading is not None:
                self._read = self._lines_of(self.reading)
                self._finish_reading()
            self._compact(decisions, after)

    def _compact(self, decisions: Sequence[Decision], after: int) -> None:
        chosen = [row for decision in decisions for row in decision.rows()]
        self.records = after_pruning(self.records, chosen)
        self.holds_hidden = any(row.hides for row in chosen)
        if self._in_place(chosen, after):
            if self.ragged is not None:
                self.ragged.code_older(after, all_due=True)
                self._store(self.ragged)
            return
        device = (self.dense if self.ragged is None else (self.ragged.keys,))[0].device
        columns = [
            kept.columns if self.ragged is None else self.columns(row).take(kept.columns, device)
            for row, kept in enumerate(chosen)
        ]
        given = [row.levels for row in chosen if row.levels is not None]
        levels = given if len(given) == len(chosen) else None
        if self.ragged is None:
            storage = compacted(self.dense, columns, after, self.state.arena, self._coded, levels, self._read)
        else:
            storage = self.ragged.keep([kept.columns for kept in chosen], after, levels)
        self._coded = self._read = None
        self._pruned_length = self._length - after
        self.kept_columns = lasting(columns, self._pruned_length)
        self._padding = None
        self._store(storage)

    def _in_place(self, chosen: Sequence[KeptRow], after: int) -> bool:
        """Whether all entries stay, and where they are is where they belong."""
        if self.ragged is not None and self.ragged.tables:
            # Padding has to go, too: what decodes from an arena looks at no mask.
            stored = [tuple(n - after for n in lengths) for lengths in self.ragged.lengths]
            if any(row.levels is not None for row in chosen):
                return False
            return all(row.columns.for_heads(len(n)) == n for row, n in zip(chosen, stored, strict=True))
        if self.ragged is None and (self.ladder is not None or takes_arena(self.state.arena, *self.dense)):
            return False
        return all(set(row.columns.counts) == set(row.entries) and len(set(row.entries)) == 1 for row in chosen)

    def state_before_pruning(self) -> dict[str, Any]:
        """Attributes that pruning changes, by name, for who may have to take it back."""
        return {name: getattr(self, name) for name in _PRUNED}

    def code_nothing(self) -> None:
        """Store what is held as it is, unless it is coded already."""
        if self.ragged is None:
            self.ladder = self._coded = None

    def _store(self, ragged: KVStorage) -> None:
        self.ragged = ragged
        self.keys, self.values = ragged.keys, ragged.values

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
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        remove = min(-tokens_to_remove, self._length)
        if remove == 0:
            return
        length = self._length - remove
        if length == 0:
            self.reset()
            return
        self._finish_reading()
        if self.state.verification is not None:
            self.state.verification.cropped(length)
        self._queries = self._queries.cropped(remove)
        self._turn_start = self._seen = None
        if self._padding is not None:
            self._padding = self._padding[:, :length].clone()
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
            self.records = after_crop(self.records, self.kept_columns, self._pruned_length - length)
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
        self._finish_reading()
        if self.state.verification is not None:
            self.state.verification.rows_moved()
        if self.ragged is None:
            keys, values = self.dense
            index = torch.tensor(indices, device=keys.device)
            self.keys, self.values = keys.index_select(0, index), values.index_select(0, index)
        else:
            self.kept_columns = [self.kept_columns[row] for row in indices]
            self._store(self.ragged.select_rows(indices))
        if self.records:
            self.records = [self.records[row] for row in indices]
        if self._padding is not None:
            self._padding = self._padding[list(indices)]
        if self._seen is not None:
            self._seen = self._seen[list(indices)]
        self._queries = self._queries.of_rows(indices)
        self._unverified = None  # of other rows; the next token's call serves as well

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

    # -- files --------------------------------------------------------------------------------

    def check_between_calls(self) -> None:
        """Raise ValueError in the middle of a prompt, of which more is held than can be told of."""
        if self._turn_start is not None or self._queries.prompt is not None or self.reading is not None:
            raise ValueError("the cache is in the middle of a prompt that comes in chunks: save it after the last one")

    @property
    def marks(self) -> dict[str, int]:
        """Logical lengths: now, at the last pruning that moved entries, and at the end of the last prompt."""
        return {"length": self._length, "pruned": self._pruned_length, "settled": self._earlier_length}

    @property
    def padding(self) -> Tensor | None:
        """Boolean ``[B, columns]``: padding that is still stored; None: there is none."""
        return self._padding

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
        records: Sequence[RowRecord],
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
        self.kept_columns, self.records, self.holds_hidden = list(columns), list(records), hides
        self._padding, self._queries = padding, HeldQueries(generated=tuple(generated))

    # -- what is stored ---------------------------------------------------------------------

    @property
    def dense(self) -> tuple[Tensor, Tensor]:
        """``keys`` and ``values`` ``[B, H_kv, n, D]``; only while nothing was evicted, and a copy where coded."""
        assert self.ragged is None
        if self.reading is not None and self.keys is None:
            held = self.reading.whole()
            assert isinstance(held, tuple)
            return held
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    @property
    def generated_since(self) -> int:
        """Generated tokens since the last pruning, where these are pruned, too."""
        return self._queries.generated_tokens

    @property
    def padding_bytes(self) -> int:
        """Bytes of what says which of the stored entries are padding."""
        return 0 if self._padding is None else self._padding.nbytes

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
        if self.reading is not None and self.keys is None:
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


def _centres(prompt: Entries) -> tuple[Tensor, Tensor]:
    """The prompt's mean key and mean value ``[B, H_kv, D]``, of all entries, whatever a policy keeps."""
    real = None if prompt.valid is None else prompt.valid[:, None]
    return centre_of(prompt.keys, real), centre_of(prompt.values, real)
