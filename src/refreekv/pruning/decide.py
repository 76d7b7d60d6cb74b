"""From an attention call to the entries that stay: probe, ask the policy, check its answer.

On a GPU the host must not wait for the answer: the decision is computed on the device, its
few numbers travel to the host in the background, and `Decision.rows` waits for them only
when they are needed, by when they have long arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.probes import attention_rows
from refreekv.core.quantisation import SINKS, Ladder
from refreekv.core.reductions import ProbeReductions, Probes
from refreekv.core.selection import CutSelection, Selection
from refreekv.core.surrogates import Surrogates
from refreekv.kernels import both_reductions, kept_first, leveled, probe_reductions, put_surrogates
from refreekv.policies import LayerView, Policy, ProbePlan
from refreekv.pruning.calls import AttentionCall, Entries
from refreekv.report import RowReport
from refreekv.storage.columns import Columns, Levels
from refreekv.storage.told import Told

REASON = "reason:"
"""What the names of reasons begin with among a decision's numbers."""


@dataclass(frozen=True)
class KeptRow:
    """What is kept of one row's entries.

    Attributes
    ----------
    columns : Columns
        Which entries stay, counted within the row.
    entries : tuple of int
        Real entries the row had, hidden ones included: one number for all KV heads together, or one for each.
    report : RowReport
        What is to be said of it, counted within these entries.
    hides : bool
        Whether some of what stays is hidden from the last query.
    levels : Levels or None
        Which rungs of the ladder the columns go to; None: nobody said, or there is no ladder.
    """

    columns: Columns
    entries: tuple[int, ...]
    report: RowReport
    hides: bool = False
    levels: Levels | None = None


class Decision:
    """A policy's answer for some rows, on its way from the device to the host.

    ``ladder`` are the number formats that entries are stored in; None, or one: no levels are asked for.
    """

    def __init__(self, entries: Entries, selection: Selection | CutSelection | None, ladder: Ladder | None = None):
        self._batch, _, self._length, _ = entries.keys.shape
        self._selection, self._in_place = selection, entries.in_place
        self._order: Tensor | None = None
        self._marks: Tensor | None = None
        self._levels: Tensor | None = None
        self._by_rung: tuple[Tensor, Tensor] | None = None
        self._ladder = ladder
        # Names, and a column ``[B, .]`` for each: few tensors, as each is a launch or two.
        numbers: list[tuple[list[str], Tensor]] = []
        if selection is not None and selection.metric is not None:
            numbers.append((["metric"], selection.metric[:, None]))
        if isinstance(selection, Selection) and selection.reasons:
            numbers += [([REASON + name], share[:, None]) for name, share in selection.reasons.items()]
        if isinstance(selection, CutSelection) and entries.valid is None:
            numbers.append((["cut"], selection.cut[:, None]))
        elif selection is not None or entries.valid is not None:
            numbers += self._general(selection, entries)
        self._names = [name for names, _ in numbers for name in names]
        self._numbers = _ToHost([n for _, n in numbers]) if numbers else None

    @property
    def surrogates(self) -> Surrogates | None:
        """What was written over entries; None: nothing."""
        return self._selection.surrogates if isinstance(self._selection, Selection) and self._in_place else None

    def _general(self, selection: Selection | CutSelection | None, entries: Entries) -> list[tuple[list[str], Tensor]]:
        """Order the kept entries first, whatever the selection and the padding look like."""
        valid, numbers = entries.valid, []
        if valid is None:
            assert isinstance(selection, Selection)
            keep = selection.keep
        else:
            if isinstance(selection, CutSelection):
                keep = selection.mask(valid)
                columns = torch.arange(self._length, device=valid.device)
                cut = (valid & (columns < selection.cut[:, None])).sum(-1, keepdim=True, dtype=torch.int32)
                numbers.append((["cut"], cut))
            hidden = entries.hidden
            if valid.dim() == 2:
                valid, hidden = valid[:, None], None if hidden is None else hidden[:, None]
            if not isinstance(selection, CutSelection):
                keep = valid if selection is None else selection.keep & valid
            ends, any_real = valid[:, :, -1].all(-1), valid.any(2).any(1)
            numbers.append((["ends_real", "any_real"], torch.stack([ends, any_real], 1).int()))
            if hidden is not None:
                keep, valid = keep | hidden, valid | hidden
                numbers.append((["hides"], hidden.any(2).any(1)[:, None].int()))
            numbers.append(_numbered("real", valid.sum(-1, dtype=torch.int32)))
        self._order, kept, self._marks = kept_first(keep)
        numbers.append(_numbered("kept", kept))
        if isinstance(selection, Selection) and selection.levels is not None and self._ladder is not None:
            numbers += self._leveled(selection, keep, selection.levels, self._ladder, kept)
        return numbers

    def _leveled(
        self, selection: Selection, keep: Tensor, levels: Tensor, ladder: Ladder, kept: Tensor
    ) -> list[tuple[list[str], Tensor]]:
        """Order the levels as the kept entries, and count them among those that will be coded."""
        assert self._order is not None
        rungs = len(ladder.rungs)
        if rungs == 1:
            return []
        if keep is not selection.keep:
            # What the policy was not asked about keeps as much as there is.
            levels = levels.where(~keep | selection.keep, rungs - 1)
        self._levels, counts, *lists = leveled(
            self._order, kept, levels, rungs=rungs, first=SINKS, recent=ladder.recent
        )
        self._by_rung = lists[0], lists[1]
        names = [f"rung{rung}.{group}" for rung in range(rungs) for group in range(counts.shape[2])]
        return [(names, counts.flatten(1))]  # [B, rungs, G] -> [B, rungs * G]

    def rows(self) -> list[KeptRow]:
        """The answer, a row each; waits for it if need be.

        Raises
        ------
        ValueError
            Right-padded prompts, and rows without any token.
        """
        columns = zip(*self._numbers.wait(), strict=True) if self._numbers is not None else ()
        table = dict(zip(self._names, columns, strict=True))
        if not all(table.get("any_real", [])):
            raise ValueError(
                f"the attention mask hides every token of row {table['any_real'].index(0)} of the batch: leave out "
                "rows without a prompt"
            )
        if not all(table.get("ends_real", [])):
            raise ValueError(
                f"the attention mask hides the last column of the prompt in row {table['ends_real'].index(0)} of the "
                "batch: refreekv probes the last prompt token, so batches must be left-padded "
                "(tokenizer.padding_side = 'left')"
            )
        return [self._row(row, {name: values[row] for name, values in table.items()}) for row in range(self._batch)]

    def _row(self, row: int, number: dict[str, float]) -> KeptRow:
        kinds = _kinds(tuple(number))
        real = tuple(int(number[name]) for name in kinds["real"])
        cut = int(number["cut"]) if "cut" in number else None
        if self._order is not None:
            kept = [int(number[name]) for name in kinds["kept"]]
            if min(kept) == self._length:
                # Where nothing goes no list has to say what stays.
                columns = Columns.of_ranges((0, self._length))
            else:
                heads = tuple(index[:n] for index, n in zip(self._order[row], kept, strict=True))
                marks = None if self._marks is None else self._marks[row]
                columns = Columns(heads=heads, held=tuple(kept), marks=marks, listed=self._order[row])
        elif isinstance(self._selection, CutSelection):
            assert cut is not None
            sinks = min(self._selection.sinks, cut)
            columns = Columns.of_ranges((0, sinks), (cut, self._length))
        else:
            columns = Columns.of_ranges((0, self._length))
        reasons = {name.removeprefix(REASON): number[name] for name in kinds[REASON]}
        hides = bool(number.get("hides"))
        levels = None
        if self._levels is not None and self._ladder is not None and self._by_rung is not None:
            groups, rungs = self._levels.shape[1], range(len(self._ladder.rungs))
            held = columns.for_heads(groups)
            levels = Levels(
                tuple(own[:n] for own, n in zip(self._levels[row], held, strict=True)),
                tuple(tuple(int(number[f"rung{rung}.{group}"]) for rung in rungs) for group in range(groups)),
                *(tuple(part[row].unbind()) for part in self._by_rung),
            )
        entries = real or (self._length,)
        report = RowReport(entries[0], columns.counts, cut, number.get("metric"), reasons=reasons)
        return KeptRow(columns, entries, report, hides, levels)


def decide(
    policy: Policy,
    call: AttentionCall,
    entries: Entries,
    layer: int,
    layers: int,
    copy_scores: Tensor | None = None,
    ladder: Ladder | None = None,
    codes: KeyCodes | None = None,
) -> Decision:
    """Probe the entries as the policy plans and let it select. Does not wait for the device.

    ``ladder`` are the number formats that what it keeps is stored in, ``codes`` the model's own for keys.

    Raises
    ------
    ValueError
        A selection of the wrong shape.
    """
    if policy.freezes(layer):
        return Decision(entries, None, ladder)
    plan = policy.probe_plan(entries.keys.shape[2])
    view = stored_view(plan, call, entries, layer, layers, copy_scores, ladder, codes)
    return Decision(entries, with_surrogates(entries, select(policy, view), ladder), ladder)


def stored_view(
    plan: ProbePlan,
    call: AttentionCall,
    entries: Entries,
    layer: int,
    layers: int,
    copy_scores: Tensor | None = None,
    ladder: Ladder | None = None,
    codes: KeyCodes | None = None,
) -> LayerView:
    """`layer_view`, with what a policy may know of the number formats that what it keeps is stored in."""
    return stored(layer_view(plan, call, entries, layer, layers, copy_scores), ladder, codes)


def stored(view: LayerView, ladder: Ladder | None, codes: KeyCodes | None) -> LayerView:
    """A view with what a policy may know of the number formats that what it keeps is stored in."""
    if ladder is None:
        return view
    sizes, device = (view.keys.shape[-1], view.values.shape[-1]), view.keys.device
    forms = ladder.forms(sizes, sorted_keys=codes is not None)
    if codes is None:
        return replace(view, forms=forms)
    damage = codes.damage_on(device, forms) if len(forms) > 1 else None
    return replace(view, forms=forms, key_power=codes.power_on(device)[None], damage=damage)


def with_surrogates(
    entries: Entries, selection: Selection | CutSelection | None, ladder: Ladder | None
) -> Selection | CutSelection | None:
    """The selection with its surrogates in place, where entries can be written over."""
    if not isinstance(selection, Selection) or selection.surrogates is None or not entries.in_place:
        return selection
    return replace_entries(entries, selection, selection.surrogates, 0 if ladder is None else len(ladder.rungs) - 1)


def replace_entries(entries: Entries, selection: Selection, chosen: Surrogates, widest: int) -> Selection:
    """Write the surrogates over entries that go, and keep these, in the ``widest`` rung: each stands for many."""
    levels = selection.levels
    if levels is not None:
        # [B, H_kv, m]; those that are not real may name any column
        at = torch.where(chosen.real, widest, levels.gather(-1, chosen.columns)).to(levels.dtype)
        levels = levels.scatter(-1, chosen.columns, at)
    keep = put_surrogates(chosen, entries.keys, entries.values, selection.keep)
    kv_heads = entries.keys.shape[1]
    everything: int | Tensor = entries.keys.shape[2] * kv_heads
    if entries.valid is not None:
        valid = entries.valid if entries.valid.dim() == 3 else entries.valid[:, None].expand(-1, kv_heads, -1)
        everything = valid.sum((1, 2)).clamp_min(1)
    share = chosen.real.sum((1, 2)).float() / everything
    return replace(selection, keep=keep, levels=levels, reasons={**selection.reasons, "stand-ins": share})


def layer_view(
    plan: ProbePlan,
    call: AttentionCall,
    entries: Entries,
    layer: int | Tensor,
    layers: int,
    copy_scores: Tensor | None = None,
) -> LayerView:
    """What a policy with this plan is shown of a layer."""
    view = LayerView(
        entries.keys,
        entries.values,
        entries.valid,
        None,
        layer,
        layers,
        heads=entries.queries.states.shape[1],
        copy_scores=copy_scores,
        earlier=entries.earlier,
        origins=entries.origins,
    )
    if plan.reduced:
        window, spread = _reductions(plan, call, entries)
        view = replace(view, window=window, spread=spread)
        if not plan.queries or not plan.rows or call.softcap is not None:
            return view
        last = entries.queries.planned(ProbePlan(rows=plan.rows))
        return replace(view, queries=_scaled(last.states, call), asked=last.real)
    rows, visible, queries = _probe(plan, call, entries)
    return replace(view, rows=rows, visible=visible, queries=queries)


def _reductions(
    plan: ProbePlan, call: AttentionCall, entries: Entries
) -> tuple[ProbeReductions | None, ProbeReductions | None]:
    """What the window's queries, and those spread, gave each position; their rows never exist together."""
    keys = entries.keys
    of_window = _probes(ProbePlan(rows=plan.rows), call, entries, 0, True)
    of_spread = _probes(ProbePlan(spread=plan.spread), call, entries, plan.distance, plan.spread_sums)
    if of_window is not None and of_spread is not None:
        (window, one), (spread, other) = of_window, of_spread
        return both_reductions(window, spread, keys, one, other)
    alone = [None if own is None else probe_reductions(own[0], keys, own[1]) for own in (of_window, of_spread)]
    return alone[0], alone[1]


def _probes(
    plan: ProbePlan, call: AttentionCall, entries: Entries, distance: int, sums: bool
) -> tuple[Tensor, Probes] | None:
    """The planned queries ``[B, H, k, D]``, and what counts of their attention; None: none are planned."""
    if not plan.count:
        return None
    queries = entries.queries.planned(plan)
    # Attention's own denominators are those of all that these queries see; with padding it looked at a mask.
    told = None if entries.valid is not None or not entries.gapless else queries.logsumexp
    return queries.states, Probes(
        queries.columns,
        columns=None if entries.gapless else entries.columns,
        valid=entries.valid,
        query_real=queries.real,
        scaling=call.scaling,
        distance=distance,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
        sums=sums,
        logsumexp=told,
    )


def select(policy: Policy, view: LayerView) -> Selection | CutSelection | None:
    """The policy's answer; ValueError if it has the wrong shape."""
    selection = policy.select(view)
    if isinstance(selection, Selection):
        _check_shape(policy, selection.keep, view.keys)
        if selection.levels is not None:
            _check_shape(policy, selection.levels, view.keys, torch.uint8)
    return selection


def _probe(
    plan: ProbePlan, call: AttentionCall, entries: Entries
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Attention rows of the planned queries, what each of them sees (None: everything), the queries if asked for."""
    if not plan.count:
        return None, None, None
    queries = entries.queries.planned(plan)
    visible = None
    if plan.count > 1 or entries.valid is not None or queries.real is not None:
        visible = entries.columns <= queries.columns[..., None]
        if queries.real is not None:
            # A query at padding is no probe: it sees nothing.
            visible = visible & queries.real[..., None]
        if entries.valid is not None and entries.valid.dim() == 3:
            group = queries.states.shape[1] // entries.valid.shape[1]
            visible = visible[:, None] & entries.valid.repeat_interleave(group, dim=1)[:, :, None]
        elif entries.valid is not None:
            visible = visible & entries.valid[:, None]
    rows = attention_rows(
        queries.states,
        entries.keys,
        scaling=call.scaling,
        visible=visible,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
    )
    if not plan.queries:
        return rows, visible, None
    return rows, visible, _scaled(queries.states, call)


def _scaled(queries: Tensor, call: AttentionCall) -> Tensor:
    scaling = queries.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    return queries.float() * scaling


def _check_shape(policy: Policy, found: Tensor, keys: Tensor, dtype: torch.dtype = torch.bool) -> None:
    batch, kv_heads, length, _ = keys.shape
    if found.dtype != dtype or found.shape not in [(batch, 1, length), (batch, kv_heads, length)]:
        what, wanted = ("a selection", "boolean") if dtype == torch.bool else ("levels", "uint8")
        raise ValueError(
            f"policy {policy.name!r} returned {what} of shape {tuple(found.shape)} and type {found.dtype}; "
            f"expected {wanted} ({batch}, 1 or {kv_heads}, {length})"
        )


@lru_cache(maxsize=8)
def _kinds(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Names of numbers by what they begin with: they are the same in all layers."""
    return {kind: tuple(name for name in names if name.startswith(kind)) for kind in ("real", "kept", REASON)}


def _numbered(name: str, numbers: Tensor) -> tuple[list[str], Tensor]:
    """A name for each column of ``[B, G]``."""
    return [f"{name}{group}" for group in range(numbers.shape[1])], numbers


class _ToHost:
    """Numbers ``[B, .]`` copied to the host in the background, in one copy.

    Numbers of 32 bits, which most are, travel as they are, those of whole numbers in the bits of float32: to convert
    each of them would be a launch.
    """

    def __init__(self, parts: Sequence[Tensor]):
        as_they_are = all(part.dtype in (torch.float32, torch.int32) for part in parts)
        self._whole = [as_they_are and part.dtype == torch.int32 for part in parts for _ in range(part.shape[1])]
        numbers = torch.cat([part.view(torch.float32) if as_they_are else part.double() for part in parts], 1)
        self._told = Told(numbers)

    def wait(self) -> list[list[float]]:
        """The numbers, once they are there."""
        told = self._told.wait()
        numbers = told.double()
        if any(self._whole):
            numbers = torch.where(torch.tensor(self._whole), told.view(torch.int32), numbers)
        found: list[list[float]] = numbers.tolist()
        return found
