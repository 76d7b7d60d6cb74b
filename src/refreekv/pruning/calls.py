"""What a layer hands over when its prompt ends: the attention call, the stored entries, the queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.kernels.device_guard import stream_of
from refreekv.policies import ProbePlan
from refreekv.policies.base import spread_step
from refreekv.pruning.once import Once
from refreekv.storage.base import KVStorage
from refreekv.storage.columns import Columns
from refreekv.storage.runs import numbers

_ONCE = Once(16)


@dataclass(frozen=True)
class AttentionCall:
    """What one attention call used, as far as a probe must repeat it.

    Attributes
    ----------
    query : Tensor
        ``[B, H, q, D]``, position-encoded.
    mask : Tensor or None
        The mask over logical columns, in one of the forms of `masks.visible_columns`.
    scaling, softcap, sink_logits
        As in `core.probes.attention_rows`.
    logsumexp : Tensor or None
        ``[B, H, q]`` float32: logarithms of the softmax denominators, as attention itself computed them; None where it
        did not tell.
    """

    query: Tensor
    mask: Tensor | None
    scaling: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    logsumexp: Tensor | None = None


@dataclass(frozen=True)
class Entries:
    """Prompt entries of some rows of a batch, as one layer stores them.

    Attributes
    ----------
    keys, values : Tensor
        ``[B, H_kv, n, D]``.
    valid : Tensor or None
        Boolean ``[B, n]``, False at padding and at hidden entries; ``[B, H_kv, n]`` where heads hold
        different columns, padded to one length where these differ in number; None if there is neither.
    columns : Tensor
        Integer ``[n]``: the logical column of each entry, which says what queries see it.
    gapless : bool
        Whether the columns are ``0 .. n-1``.
    queries : Queries
        The last queries of the prompt.
    earlier : Tensor or None
        Boolean ``[1, 1 | H_kv, n]``: entries that an earlier prompt's end kept; None if there was none.
    in_place : bool
        Whether ``keys`` and ``values`` are the storage itself, in which an entry can be replaced.
    hidden : Tensor or None
        Boolean of the shape of ``valid``: real entries that the last query does not see, and no policy is
        asked about. They stay. None where ``valid`` is.
    origins : Tensor or None
        int32 ``[1, H_kv]``: where each head's entries begin, if ``valid`` says that and no more.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None
    columns: Tensor
    queries: "Queries"
    earlier: Tensor | None = None
    in_place: bool = False
    gapless: bool = False
    hidden: Tensor | None = None
    origins: Tensor | None = None

    @classmethod
    def of_dense(
        cls,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        padding: Tensor | None,
        queries: "Queries",
        earlier_length: int,
    ) -> "Entries":
        """A whole batch's ``[B, H_kv, n, D]``, of which columns before ``earlier_length`` are an earlier prompt's.

        ``visible`` and ``padding`` are boolean ``[B, n]``, both or neither.
        """
        same = queries.whole and queries.columns.shape[1] == keys.shape[2]  # all of them are asked: from column 0 on
        columns = queries.columns[0] if same else numbers(0, keys.shape[2], keys.device)
        earlier = (columns < earlier_length)[None, None] if earlier_length else None
        valid, hidden = _told_apart(visible, padding)
        return cls(keys, values, valid, columns, queries, earlier, in_place=True, gapless=True, hidden=hidden)

    @classmethod
    def of_ragged(
        cls,
        storage: KVStorage,
        rows: Sequence[tuple[Tensor, Tensor]],
        columns: Sequence[Columns],
        after: int,
        visible: Tensor | None,
        padding: Tensor | None,
        queries: "Queries",
        earlier_length: int,
    ) -> "list[Entries]":
        """A batch's row by row, without the last ``after`` entries of each.

        ``rows`` are the storage's, as `KVStorage.rows` gives them, and ``columns`` are those of each row's entries, of
        which the ones before ``earlier_length`` were there at an earlier prompt's end; ``visible`` and ``padding`` as
        in `of_dense`.
        """
        parts = []
        for row, (keys, values) in enumerate(rows):
            stored = keys.shape[1] - after
            # Heads may hold different columns, but only of those before any of these queries.
            held = columns[row].padded(keys.device)[:, :stored]
            valid = hidden = None
            if visible is not None and padding is not None:
                # [G, stored]: of the columns that each head holds
                valid, hidden = _told_apart(visible[row][held.long()], padding[row][held.long()])
            uneven, origins = None, storage.origins(row)
            if origins is not None:
                uneven = numbers(0, stored, keys.device) >= origins[:, None]
                valid = uneven if valid is None else valid & uneven
                hidden = None if hidden is None else hidden & uneven
            if valid is not None and len(valid) > 1:
                # [1, H_kv, stored]; where all heads hold the same it is [1, stored]
                valid, hidden = valid[None], None if hidden is None else hidden[None]
            earlier = (held < earlier_length)[None] if earlier_length else None
            own = queries.row(row)
            entries = keys[None, :, :stored], values[None, :, :stored]
            # Where there is padding, too, heads do not only begin at different places.
            begins = None if origins is None or visible is not None else origins[None]
            parts.append(cls(*entries, valid, held[0], own, earlier, hidden=hidden, origins=begins))
        return parts


def _told_apart(visible: Tensor | None, padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What may be judged, and what is real but hidden."""
    if visible is None or padding is None:
        return None, None
    return visible & ~padding, ~visible & ~padding


@dataclass(frozen=True)
class Queries:
    """Prompt queries of a batch, oldest first.

    A later turn of a padded batch has its padding in the middle, where it may be of any
    length: the last real queries of two rows need not be in the same columns.

    Attributes
    ----------
    states : Tensor
        ``[B, H, r, D]``, position-encoded.
    columns : Tensor
        Integer ``[B | 1, r]``: their logical columns.
    real : Tensor or None
        Boolean ``[B | 1, r]``, False at padding; None if there is none.
    ordinals : Tensor
        Integer ``[B | 1, r]``: how many real queries of the prompt are before each. The last
        one is always right; so is that of every real query.
    start : int or None
        Where these are all queries of a prompt, or a turn, without padding, the column of the first one.
    logsumexp : Tensor or None
        ``[B, H, r]`` float32, as `AttentionCall` has it; None: nobody knows them.
    """

    states: Tensor
    columns: Tensor
    real: Tensor | None
    ordinals: Tensor
    start: int | None = None
    logsumexp: Tensor | None = None

    @classmethod
    def of_call(cls, states: Tensor, first: int, valid: Tensor | None, earlier: "Queries | None" = None) -> "Queries":
        """The queries ``[B, H, q, D]`` of a call whose first column is ``first``; ``valid`` is ``[B, columns]``.

        ``earlier`` are queries of the same prompt before the call.
        """
        stop = first + states.shape[2]
        real = None if valid is None else valid[:, first:stop]
        if real is None and earlier is not None:

            def numbered() -> tuple[Tensor, Tensor]:
                columns, places = numbers(first, stop, states.device), numbers(0, stop - first, states.device)
                return columns[None], places[None] + earlier.ordinals[:, -1:] + 1

            columns, ordinals = _ONCE.of((earlier.ordinals,), (first, stop), numbered)
            return cls(states, columns, None, ordinals)
        columns = numbers(first, stop, states.device)[None]
        ordinals = numbers(0, stop - first, states.device)[None] if real is None else real.cumsum(1) - 1
        if earlier is not None:
            ordinals = ordinals + earlier.ordinals[:, -1:] + 1
        return cls(states, columns, real, ordinals, first if real is None and earlier is None else None)

    def after(self, earlier: "Queries | None") -> "Queries":
        """These, with earlier ones in front."""
        if earlier is None:
            return self
        states = torch.cat([earlier.states, self.states], dim=2)
        both, batch = (earlier, self), states.shape[0]

        def joined() -> tuple[Tensor, Tensor, Tensor | None]:
            rows = 1 if earlier.real is None and self.real is None else batch
            columns = torch.cat([part.columns.expand(rows, -1) for part in both], dim=1)
            ordinals = torch.cat([part.ordinals.expand(rows, -1) for part in both], dim=1)
            if earlier.real is None and self.real is None:
                return columns, ordinals, None
            real = [torch.ones_like(p.columns, dtype=torch.bool) if p.real is None else p.real for p in both]
            return columns, ordinals, torch.cat([part.expand(rows, -1) for part in real], dim=1)

        given = tuple(part for own in both for part in (own.columns, own.ordinals, own.real))
        columns, ordinals, real = _ONCE.of(given, batch, joined)
        return Queries(states, columns, real, ordinals)

    def planned(self, plan: ProbePlan) -> "Queries":
        """The real ones that a plan asks for, with padding in front where a row has fewer."""
        if self.real is None and not plan.spread:
            return self._some(slice(-plan.rows, None))
        if self.whole and not plan.rows:
            # Every step-th of all: views, and no number that is on the device only.
            each = spread_step(plan.spread, self.states.shape[2])
            return self._some(slice(each - 1, None, each))
        batch, heads, _, dim = self.states.shape
        if self.whole:
            assert self.start is not None
            device, stop = self.states.device, self.start + self.states.shape[2]
            index, *asked = _asked_of_all(self.start, stop, plan, device, stream_of(device))
        else:
            index, *asked = _ONCE.of((self.columns, self.ordinals, self.real), plan, lambda: self._asked(plan))
        states = self.states.gather(2, index[:, None, :, None].expand(batch, heads, -1, dim))
        return Queries(states, asked[0], asked[2], asked[1])

    def _asked(self, plan: ProbePlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return kernels.asked(
            self.columns, self.ordinals, self.real, rows=plan.rows, spread=plan.spread, count=plan.count
        )

    def _some(self, some: slice) -> "Queries":
        """Views of some of those of which none is padding."""
        told = None if self.logsumexp is None else self.logsumexp[:, :, some]
        return Queries(self.states[:, :, some], self.columns[:, some], None, self.ordinals[:, some], logsumexp=told)

    def none(self) -> "Queries":
        """None of them, in storage of their own."""
        return Queries(self.states[:, :, :0].clone(), self.columns[:, :0].clone(), None, self.ordinals[:, :0].clone())

    @property
    def whole(self) -> bool:
        """Whether these are all queries of a prompt, or a turn, without padding."""
        return self.start is not None

    def row(self, index: int) -> "Queries":
        """Those of one row."""
        return self.of_rows([index])

    def of_rows(self, indices: Sequence[int]) -> "Queries":
        """Those of some rows, in that order."""

        def of(numbers: Tensor) -> Tensor:
            return numbers if numbers.shape[0] == 1 else _rows(numbers, indices)

        real = None if self.real is None else of(self.real)
        told = None if self.logsumexp is None else _rows(self.logsumexp, indices)
        return Queries(_rows(self.states, indices), of(self.columns), real, of(self.ordinals), logsumexp=told)


@lru_cache(maxsize=4)
def _asked_of_all(first: int, stop: int, plan: ProbePlan, device: torch.device, stream: int) -> tuple[Tensor, ...]:
    """Of all queries of a prompt, or a turn, those that a plan asks for: the same in all of its layers."""
    columns, ordinals = numbers(first, stop, device)[None], numbers(0, stop - first, device)[None]
    with torch.inference_mode(False):
        return kernels.asked(columns, ordinals, None, rows=plan.rows, spread=plan.spread, count=plan.count)


def _rows(numbers: Tensor, indices: Sequence[int]) -> Tensor:
    # A view of one row, as every layer asks for each.
    return numbers[indices[0] : indices[0] + 1] if len(indices) == 1 else numbers[list(indices)]
