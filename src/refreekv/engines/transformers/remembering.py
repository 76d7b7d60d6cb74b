"""A layer's entries that are kept beside it, complete, and come back when the next turn begins.

At a prompt's end, before anything is evicted, all entries go to the cache's `Past`, with the queries that the policy
asked through and what is padding. When a next turn begins they come back in the place of what was kept, with what was
generated since behind them; so that a turn is one more chunk of the same prompt, and its end decides over everything.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import KVDtype, Ladder
from refreekv.engines.transformers.intake import IntakeLayer
from refreekv.engines.transformers.reading import Reading
from refreekv.pruning.calls import Queries
from refreekv.pruning.padding import Padding
from refreekv.pruning.queries import HeldQueries
from refreekv.storage import trial
from refreekv.storage.coding import Pair
from refreekv.storage.past import Past, PastLayer, extras_left
from refreekv.storage.unfinished import UnfinishedKV

PROBED_LENGTH = 8192
"""A policy may ask for no queries of a prompt that is short; of one of so many tokens it asks for what it ever does."""

SHARED = "columns", "ordinals", "real"
"""What is kept of the queries that layers may have in common."""


class RememberingLayer(IntakeLayer):
    """A layer whose cache may have a `Past`."""

    def _clear(self) -> None:
        super()._clear()
        # Whether exact entries of this turn's beginning are those that are kept elsewhere.
        self._came_back = False

    def _come_back(self, past: Past, keys: Tensor, values: Tensor) -> None:
        """Put all that earlier turns held in the place of what was kept, if a next turn begins with these entries."""
        before = self._length - keys.shape[2]
        if not before and self.ordinal == 0:
            past.expect(self._bytes_to_keep(past.number, keys, values), keys.device)
        if not before or self.reading is not None or self._padding.start is not None:
            return
        if not self.state.begins_prompt(before, self._length):
            return
        if self.ragged is None:
            # All is here; what the policy asked through is not.
            if past.begins(before):
                self._take_up(past.extras(self.ordinal, keys.device), past.layer(self.ordinal), padding=False)
            self._earlier_length = 0
            return
        if any(self.ragged.freed):
            past.drop("rows of the batch were freed")
        if not past.begins(before):
            if not past.lost:
                past.drop("its first turns were read without keep_evicted")
            return
        layer = past.layer(self.ordinal)
        end = layer.length
        generated = self._newest(before - end)
        self.ragged = self.keys = self.values = None
        self.kept_columns, self.reports, self.holds_hidden = [], [], False
        self._pruned_length = self._earlier_length = 0
        held, extras = past.take(self.ordinal, keys.device, max(self.state.end or 0, self._length))
        self._take_up(extras, layer)
        if not isinstance(held, UnfinishedKV):
            parts = [torch.cat([old, new.to(old.dtype)], 2) for old, new in zip(held, generated, strict=True)]
            self.keys, self.values = parts
            self._came_back = True
            return
        if before > end:
            keys, values = (part.to(kind) for part, kind in zip(generated, held.types, strict=True))
            held.append(keys, values, self._real(before))
        else:
            held.code_due(self._real(before))
        self.reading = Reading.of(held)

    def _newest(self, count: int) -> Pair:
        """The last entries ``[B, H_kv, count, D]`` of a layer that is ragged, in full precision."""
        assert self.ragged is not None
        if count == 0:
            sides = zip(self.ragged.sizes, self.ragged.types, strict=True)
            empty = (
                torch.empty(self.batch, self.kv_heads, 0, size, dtype=kind, device=self.ragged.keys.device)
                for size, kind in sides
            )
            return next(empty), next(empty)
        # Shorter heads are padded on the left: behind, all have the same columns.
        sides_of_rows = zip(*self.ragged.rows(), strict=True)
        keys, values = (torch.stack([part[:, part.shape[1] - count :] for part in side]) for side in sides_of_rows)
        return keys, values

    def _bytes_to_keep(self, wanted: KVDtype | str | None, keys: Tensor, values: Tensor) -> int:
        """About what all layers' entries of this prompt will take where they are kept."""
        number = Reading.form_for(wanted, (keys, values))
        sizes = keys.shape[3], values.shape[3]
        entry = sum(sizes) * keys.element_size() if number is None else number.entry_bytes(sizes)
        tokens = max(self.state.end or 0, self._length)
        return keys.shape[0] * keys.shape[1] * tokens * entry * self.state.layers

    def _take_up(self, extras: Mapping[str, Tensor], layer: PastLayer, *, padding: bool = True) -> None:
        """Go on with the queries and the padding that were kept with a layer's entries."""
        if layer.cropped:
            extras = extras_left(extras, layer.length)
        if padding:
            self._padding = Padding(extras.get("padding"))
        if "states" not in extras:
            return
        states, columns, ordinals, real = (extras.get(name) for name in ("states", "columns", "ordinals", "real"))
        assert states is not None and columns is not None and ordinals is not None  # noqa: PT018
        if real is None:  # the same in all rows; those of a batch of one were repeated with it
            columns, ordinals = columns[:1], ordinals[:1]
        if columns.shape[1]:
            self._queries = HeldQueries(Queries(states, columns, real, ordinals))

    def _keep_all(self, past: Past, queries: Queries, end: int, maps: PackedMaps | None = None) -> None:
        """At a prompt's end, keep all entries up to logical length ``end`` with those of ``queries`` that are asked.

        ``maps`` are those that take the means of these entries out, if they are known.
        """
        reading, came_back = self._whole, self._came_back
        self._whole, self._came_back = None, False
        if past.lost:
            return
        if self.ragged is not None:
            past.drop("its first turns were read without keep_evicted")
            return
        if self.reading is not None:  # a policy that decides about all layers together
            reading = self.reading
            self._put_away(code=False)
        extras = self._extras(queries, end)
        if reading is not None and reading.start == 0:
            prompt = reading.prompt
            prompt.end()
            if reading.is_whole:
                prompt.code_due(self._real(end))
            elif prompt.length < end:
                keys, values = (part[:, :, prompt.length : end] for part in self.dense)
                prompt.append(keys, values, self._real(end))
            past.put(self.ordinal, prompt, extras, length=end, continues=reading.comes_back, shared=SHARED)
            return
        keys, values = (part[:, :, :end] for part in self.dense)
        number = Reading.form_for(past.number, (keys, values))
        if number is not None and not self._codes_right(number, keys, values):
            number = None
        if number is None:
            past.put(self.ordinal, (keys, values), extras, length=end, continues=came_back, shared=SHARED)
        else:
            codes = self.state.codes_of(self.ordinal)
            whole = UnfinishedKV.of(number, keys, values, self._real(end), codes, maps)
            past.put(self.ordinal, whole, extras, length=end, continues=False, shared=SHARED)

    def _codes_right(self, number: KVDtype, keys: Tensor, values: Tensor) -> bool:
        """Whether entries that are coded so come out as they are to, on their device."""
        if not trial.due(keys.device):
            return True
        # What the cache itself stores in was tried when its first entries came.
        tried = () if self.ladder is None else self.ladder.rungs
        known = any(number.widths == rung.widths for rung in tried)
        return known or self._fault(keys, values, Ladder((number,)), attends=False) is None

    def _real(self, end: int) -> Tensor | None:
        """Boolean ``[B, end]``, False at padding; None: there is none."""
        stored = self._padding.stored
        return None if stored is None else ~self._padding.until(end, stored)

    def _extras(self, queries: Queries, end: int) -> dict[str, Tensor]:
        """What a next turn has to know beside the entries, by name."""
        parts: dict[str, Tensor | None] = {"padding": self._padding.stored}
        policy = self.state.policy
        plan = policy.probe_plan(max(end, PROBED_LENGTH))
        if plan.count and not policy.freezes(self.ordinal):
            asked = queries.planned(plan)
            states = asked.states.bfloat16() if asked.states.dtype == torch.float32 else asked.states
            parts |= {
                "states": states,
                "columns": asked.columns,
                "ordinals": asked.ordinals,
                "real": asked.real,
            }
        return {name: part for name, part in parts.items() if part is not None}
