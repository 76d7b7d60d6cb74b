"""A cache layer that holds what a policy keeps, and nothing else.

When the prompt ends and the policy drops something, the kept entries move to flat storage of their own (`RaggedKV`),
padding goes too, and the dense tensors are released. On CUDA that storage has room to grow (`KVArena`), and layers that
keep everything move there as well.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from refreekv.core.autocast import without_autocast
from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import Ladder, centre_of
from refreekv.engines.transformers.handout import ADVICE
from refreekv.engines.transformers.proof import hides_nothing
from refreekv.engines.transformers.remembering import RememberingLayer
from refreekv.kernels import centres
from refreekv.policies.joint import JointPolicy
from refreekv.pruning.calls import AttentionCall, Entries, Queries
from refreekv.pruning.decide import Decision, KeptRow, decide
from refreekv.pruning.masks import visible_columns
from refreekv.pruning.padding import Padding
from refreekv.pruning.queries import HeldQueries
from refreekv.pruning.records import after_pruning
from refreekv.storage.arena import KVArena
from refreekv.storage.base import KVStorage
from refreekv.storage.coding import maps_of
from refreekv.storage.columns import Columns, lasting
from refreekv.storage.compaction import compacted, takes_arena
from refreekv.storage.leveled import LeveledKV

_PRUNED = (
    "keys", "values", "ragged", "reports", "holds_hidden", "kept_columns", "_pruned_length", "_padding", "_coded",
)  # fmt: skip
"""Attributes of a layer that carrying out a decision sets."""


def is_late(device: torch.device) -> bool:
    """Whether a device is behind the host, which had to wait for what a policy decides on it."""
    return device.type == "cuda"


class ReFreeKVLayer(RememberingLayer):
    """One full-attention layer's keys and values, pruned when the prompt ends."""

    def _clear(self) -> None:
        super()._clear()
        # What attention read of a ragged layer in full precision, for a policy that looks at it right behind.
        self.rows_of_call: list[tuple[Tensor, Tensor]] | None = None
        self._unverified: AttentionCall | None = None
        # Columns of what is stored, between looking at it and compacting it.
        self._columns_now: list[Columns] | None = None
        # Number formats, the maps that take means out and the model's codes, of what is coded at the prompt's end.
        self._coded: tuple[Ladder, PackedMaps, KeyCodes | None] | None = None

    # -- what the attention function calls --------------------------------------------------

    def asks_denominators(self) -> bool:
        """Whether a prompt ends in the present call, and its probe reduces softmax rows."""
        policy, before = self.state.policy, self._length - self._appended
        if policy.freezes(self.ordinal) or self.state.tokens_after_prompt(before, self._length) is None:
            return False
        return policy.probe_plan(self._length).reduced

    @torch.no_grad()
    def after_attention(self, call: AttentionCall) -> None:
        """Prune if the prompt ended in this call; remember its last queries if it goes on."""
        self.state.awaiting = None
        if self.ordinal or self.state.layers == 1:  # behind the first layer the host has nothing to spare yet
            self.state.confirm()
        if call.query.shape[2] != self._appended:
            raise RuntimeError(
                f"layer {self.index} of the model stored {self._appended} new entries and attends to them with "
                f"{call.query.shape[2]} queries: it is no self-attention, or leaves queries out. {ADVICE}"
            )
        with without_autocast(call.query.device):
            self._look_at(call)
        self.rows_of_call = None

    def _look_at(self, call: AttentionCall) -> None:
        before = self._length - call.query.shape[2]
        if self._padding.stored is None and self._padding.seen is None and hides_nothing(call.mask):
            call = replace(call, mask=None)  # nothing is asked of the device to find that nothing is hidden
        after = self.state.tokens_after_prompt(before, self._length)
        if after is not None:
            self._padding = self._padding.with_chunk(call, before, self._length - after).at_end()
            if self._waits(call, after):
                self._queries, self.state.changed = HeldQueries(), True
            else:
                self._prune(call, after)
                self._earlier_length = self._length - after
        elif self.state.continues(self._length):
            self._padding = self._padding.with_chunk(call, before, self._length)
            if not self.state.policy.freezes(self.ordinal):
                # That of the whole prompt: a policy may ask for no queries of what is as short as a first chunk.
                plan = self.state.policy.probe_plan(max(self._length, self.state.end or 0))
                self._queries = self._queries.with_chunk(call, before, self._length, plan)
            if self.reading is not None:
                self._put_away()
        elif self.state.decode_interval is not None:
            self._queries = self._queries.with_generated(call.query)
            # Of several tokens some may be drafts: those that stay are known when the next call begins.
            self._unverified = call if call.query.shape[2] > 1 else None
            if self._unverified is None:
                self._prune_generated(call)

    def _waits(self, call: AttentionCall, after: int) -> bool:
        """Whether all of the turn that ends in this call stays, and nothing is asked or moved for it."""
        state = self.state
        plain = call.mask is None and self.reading is None and state.decode_interval is None
        if self.ragged is None or not plain or state.verification is not None:
            return False
        if isinstance(state.policy, JointPolicy) or (state.past is not None and not state.past.lost):
            return False
        settled = self._earlier_length
        return state.policy.waits(self._length - after - settled, settled)

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

    # -- pruning --------------------------------------------------------------------------

    def _prune(self, call: AttentionCall, after: int) -> None:
        """Let the policy decide; compact at once, or on a GPU as soon as nobody has to wait for it."""
        self.state.check_scores(self._length)
        policy, parts = self.state.policy, self._entries(call, after)
        codes_prompt = self.ragged is None and self.ladder is not None
        codes, maps = self.state.codes_of(self.ordinal), None
        if self._read is not None:
            maps = self._read.maps
        elif codes_prompt and self._whole is not None and self._whole.means_serve(codes, parts[0].keys.shape[2]):
            maps = self._whole.prompt.maps  # those of the conversation, whose means are not taken again in each turn
        elif codes_prompt:
            kind = torch.promote_types(parts[0].keys.dtype, parts[0].values.dtype)
            maps = maps_of(_centres(*parts), kind, codes)
        if self.state.past is not None:  # before surrogates are written over what goes
            known = maps if parts[0].valid is None and self._read is None else None
            self._keep_all(self.state.past, parts[0].queries, self._length - after, known)
        self._queries = HeldQueries()
        self._unverified = None
        self.state.changed = True
        if self.ladder is not None and maps is not None:
            self._coded = self.ladder, maps, codes
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
        decisions = [
            decide(policy, call, part, self.ordinal, self.state.layers, scores, self.ladder, codes) for part in parts
        ]
        for decision in decisions:
            if self._read is not None and decision.surrogates is not None:
                self._read.forget_lines(decision.surrogates.columns, decision.surrogates.real)

        def carry_out() -> None:
            self._carry_out(decisions, after)

        if is_late(call.query.device):
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
        padding = None if visible is None else self._padding.until(end, visible)
        held = self._queries.prompt
        queries = Queries.of_call(call.query[:, :, :new], end - new, visible, held)
        if call.logsumexp is not None and queries.whole:
            queries = replace(queries, logsumexp=call.logsumexp[:, :, :new])
        queries = queries.after(held)
        if self.ragged is None:
            keys, values = (entries[:, :, :end] for entries in self.dense)
            return [Entries.of_dense(keys, values, visible, padding, queries, self._earlier_length)]
        self._columns_now = columns = [self.columns(row) for row in range(self.batch)]
        rows, self.rows_of_call = self.rows_of_call or self.ragged.rows(), None
        return Entries.of_ragged(self.ragged, rows, columns, after, visible, padding, queries, self._earlier_length)

    def _carry_out(self, decisions: Sequence[Decision], after: int) -> None:
        """Record the decisions and, if anything goes, move what is kept to storage of its own."""
        self._undecided = False
        with without_autocast(self.device):
            if self.reading is not None:
                self._read = self._lines_of(self.reading)
                self._finish_reading()
            self._compact(decisions, after)

    def _compact(self, decisions: Sequence[Decision], after: int) -> None:
        held, self._columns_now = self._columns_now, None
        chosen = [row for decision in decisions for row in decision.rows()]
        self.reports = after_pruning(self.reports, chosen)
        self.holds_hidden = any(row.hides for row in chosen)
        if self._in_place(chosen, after):
            if self.ragged is not None:
                self.ragged.code_older(after, all_due=True)
                self._store(self.ragged)
            return
        device = (self.dense if self.ragged is None else (self.ragged.keys,))[0].device
        columns = [row.columns for row in chosen]
        if self.ragged is not None:
            held = held or [self.columns(row) for row in range(self.batch)]
            columns = [own.take(kept, device) for own, kept in zip(held, columns, strict=True)]
        given = [row.levels for row in chosen if row.levels is not None]
        levels = given if len(given) == len(chosen) else None
        if levels is not None and self._read is not None and self._coded is not None:
            # What was read in few bits is not worth more.
            most = (
                self._coded[0].forms(self._read.sizes, sorted_keys=self._read.codes is not None).index(self._read.form)
            )
            levels = [row.at_most(most) for row in levels]
        storage: KVStorage
        if self.ragged is not None:
            storage = self.ragged.keep([kept.columns for kept in chosen], after, levels)
        elif self._coded is not None:
            ladder, maps, codes = self._coded
            storage = LeveledKV.gathered(*self.dense, columns, after, ladder, maps, levels, codes, self._read)
        else:
            storage = compacted(self.dense, columns, after, self.state.arena)
        self._coded = self._read = None
        self._pruned_length = self._length - after
        self.kept_columns = lasting(columns, self._pruned_length)
        self._padding = Padding()
        self._store(storage)
        if self.state.host is not None:
            self.state.host.take(self)

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
        """Store what is held in full precision: what is coded already as what its code stands for."""
        if self.ragged is not None and self.ragged.coding is not None:
            exact = self.ragged.full()
            self._store(KVArena.of(exact) if takes_arena(self.state.arena, exact.keys, exact.values) else exact)
        self.ladder = self._coded = None

    def _take_rows(self, indices: Sequence[int]) -> None:
        super()._take_rows(indices)
        self._unverified = None  # of other rows; the next token's call serves as well
        if self._columns_now is not None:
            self._columns_now = [self._columns_now[row] for row in indices]


def _centres(prompt: Entries) -> tuple[Tensor, Tensor]:
    """The prompt's mean key and mean value ``[B, H_kv, D]``, of all entries, whatever a policy keeps."""
    if prompt.valid is None:
        return centres(prompt.keys, prompt.values)
    real = prompt.valid[:, None]
    return centre_of(prompt.keys, real), centre_of(prompt.values, real)
