"""What many policies keep of one prompt, decided for many layers at once.

Policies look at a batch row by row, so that the layers of one prompt can be the rows of a
batch: thirty layers cost as many kernel launches as one. Policies with one probe plan share
what they are shown, and the last queries are probed once for all plans.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.selection import CutSelection, Selection
from refreekv.core.surrogates import Surrogates
from refreekv.evaluation.fidelity.formats import StoredPolicy
from refreekv.policies import JointPolicy, LayerScores, LayerView, Policy, ProbePlan
from refreekv.pruning.calls import AttentionCall, Entries, Queries
from refreekv.pruning.decide import layer_view, select

ROWS = {"cuda": 2**28, "cpu": 2**24}
"""Probed attention (float32) that exists at once, by kind of device."""

Asked = Mapping[str, Policy | None]
"""Names to policies; None stands for the full cache."""


@dataclass(frozen=True)
class Captured:
    """What policies need to see of one layer of a single prompt."""

    call: AttentionCall  # its ``query`` and ``mask`` are of no use any more
    # ``[1, H_kv, n, D]``
    keys: Tensor
    values: Tensor
    queries: dict[ProbePlan, Queries]  # probe plans to the queries that they ask for
    copy_scores: Tensor | None = None  # ``[1, H_kv]``
    codes: KeyCodes | None = None  # the model's own for keys


@dataclass
class LayerChoice:
    """What policies keep of one layer."""

    mask: Tensor | None  # boolean ``[P, H_kv, n]``; None if all policies keep everything
    alike: set[str]  # the policies whose KV heads all keep the same positions
    # policies to the entries ``[1, H_kv, m]`` that stand in for what they evict; the mask does not show these
    surrogates: dict[str, Surrogates] = field(default_factory=dict)
    # policies to the rungs ``[1, H_kv, n]`` of their ladders that entries are stored in
    levels: dict[str, Tensor] = field(default_factory=dict)

    def put(self, row: int, name: str, keep: Tensor) -> None:
        """Replace what a policy keeps, in its row of the mask, by ``[1 | H_kv, n]``."""
        assert self.mask is not None
        self.mask[row] = keep
        if len(keep) > 1:
            self.alike.discard(name)


@dataclass(frozen=True)
class Choice:
    """What policies keep of each layer of one prompt, on the device."""

    names: dict[str, int]  # the policies' names to their rows
    length: int  # tokens of the prompt
    layers: list[LayerChoice]

    def keep(self, layer: int, names: Sequence[str]) -> Tensor | None:
        """The mask of one layer for some policies, in their order."""
        mask = self.layers[layer].mask
        if mask is None or list(self.names) == list(names):
            return mask
        return mask[[self.names[name] for name in names]]

    def put(self, name: str, keeps: Sequence[Tensor]) -> None:
        """Replace what a policy keeps by boolean masks ``[H_kv, n]``, one a layer."""
        for layer, keep in zip(self.layers, keeps, strict=True):
            if layer.mask is None:
                layer.mask = torch.ones(len(self.names), *keep.shape, dtype=torch.bool, device=keep.device)
            layer.mask = layer.mask.expand(-1, len(keep), -1).clone()
            layer.put(self.names[name], name, keep)

    def surrogates_of(self, layer: int, names: Sequence[str]) -> Surrogates | None:
        """Surrogates of some policies, in their order, a row each; None if none has any."""
        there = self.layers[layer].surrogates
        like = next((there[name] for name in names if name in there), None)
        if like is None:
            return None
        most = max(one.columns.shape[-1] for one in there.values())
        nothing = Surrogates(*(part.new_zeros(1, part.shape[1], 0, *part.shape[3:]) for part in like))
        rows = [Surrogates(*(_filled(part, most) for part in there.get(name, nothing))) for name in names]
        return Surrogates(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def counts(self, names: Sequence[str]) -> list[list[list[int]]]:
        """Entries kept, by policy, layer and KV head (one number where heads are alike)."""
        masks = [self.keep(layer, names) for layer in range(len(self.layers))]
        # One wait for the device, not one a layer.
        device = next((mask.device for mask in masks if mask is not None), torch.device("cpu"))
        everything = torch.full((len(names), 1), self.length, device=device)
        numbers = [everything if mask is None else mask.sum(-1).to(device) for mask in masks]
        for number, layer in zip(numbers, self.layers, strict=True):
            for row, name in enumerate(names):
                if name in layer.surrogates:
                    number[row] += layer.surrogates[name].real.sum(-1)[0].to(device)
        table = torch.cat(numbers, dim=1).tolist()
        found = []
        for name, row in zip(names, table, strict=True):
            values = iter(row)
            heads = [[next(values) for _ in range(number.shape[1])] for number in numbers]
            found.append([one[:1] if name in at.alike else one for one, at in zip(heads, self.layers, strict=True)])
        return found


def _filled(part: Tensor, count: int) -> Tensor:
    """``[1, H_kv, m, …]`` with zeros up to ``count``."""
    more = part.new_zeros(1, part.shape[1], count - part.shape[2], *part.shape[3:])
    return torch.cat([part, more], dim=2)


def plans_of(asked: Iterable[Policy | None], length: int) -> list[ProbePlan]:
    """The plans that serve all policies on a layer of ``length`` entries: one for all that look at the end only."""
    plans = {policy.probe_plan(length) for policy in asked if policy is not None and policy.frozen_layers != "all"}
    last = [plan for plan in plans if _looks_at_the_end(plan)]
    rows = max((plan.rows for plan in last), default=0)
    others = sorted(plans.difference(last), key=lambda plan: (plan.rows, plan.spread, plan.queries))
    return [ProbePlan(rows=rows, queries=any(plan.queries for plan in last)), *others]


def _looks_at_the_end(plan: ProbePlan) -> bool:
    """Whether what a plan shows is part of what one with more last rows shows."""
    return not plan.spread and not plan.reduced


def capture(
    plans: Sequence[ProbePlan],
    call: AttentionCall,
    entries: Entries,
    copy_scores: Tensor | None = None,
    codes: KeyCodes | None = None,
) -> Captured:
    """What plans need of one layer; nothing in it holds on to the queries of the whole prompt."""
    queries = {}
    for plan in plans:
        if plan.count:
            planned = entries.queries.planned(plan)
            queries[plan] = replace(planned, states=planned.states.clone())
    call = replace(call, query=call.query[:, :, :0], mask=None)
    return Captured(call, entries.keys, entries.values, queries, copy_scores, codes)


def choose(asked: Asked, layers: Sequence[Captured]) -> Choice:
    """Ask policies what they keep of a prompt's layers. Does not wait for the device.

    Raises
    ------
    ValueError
        A selection of the wrong shape.
    """
    found: list[LayerChoice] = []
    noted: dict[str, list[LayerScores]] = {}
    while len(found) < len(layers):
        found += _choose(asked, _group(layers[len(found) :]), len(found), len(layers), noted)
    names = {name: row for row, name in enumerate(asked)}
    for name, scores in noted.items():
        policy = _joint(asked[name])
        assert policy is not None
        for layer, selection in zip(found[len(layers) - len(scores) :], policy.allot(scores), strict=True):
            layer.put(names[name], name, selection.keep[0])
    return Choice(names, layers[0].keys.shape[2], found)


def _joint(policy: Policy | None) -> JointPolicy | None:
    """The policy, or the one that a format stands behind, if it decides about all layers together."""
    inner = policy.policy if isinstance(policy, StoredPolicy) else policy
    return inner if isinstance(inner, JointPolicy) else None


def _group(layers: Sequence[Captured]) -> Sequence[Captured]:
    """The leading layers that are alike, as many as the memory for probes allows."""

    def form(layer: Captured) -> object:
        call = layer.call
        return layer.keys.shape, layer.values.shape, layer.keys.device, call.scaling, call.softcap

    first = layers[0]
    probed = max((one.states.shape[1] * one.states.shape[2] for one in first.queries.values()), default=1)
    device, length = first.keys.device.type, first.keys.shape[2]
    most = max(1, ROWS.get(device, ROWS["cpu"]) // (probed * length))
    different = next((at for at, layer in enumerate(layers) if form(layer) != form(first)), len(layers))
    return layers[: min(different, most)]


def _choose(
    asked: Asked, group: Sequence[Captured], start: int, layers: int, noted: dict[str, list[LayerScores]]
) -> list[LayerChoice]:
    """What is kept of some layers from number ``start`` on.

    Of policies that decide about all layers together, adds what they note, layer by layer, to ``noted``;
    their masks keep everything.
    """
    count, kv_heads, length = len(group), group[0].keys.shape[1], group[0].keys.shape[2]
    chosen: dict[str, Selection | CutSelection | None] = dict.fromkeys(asked)
    plans: dict[ProbePlan, dict[str, Policy]] = {}
    frozen = dict.fromkeys(asked, count)
    for name, policy in asked.items():
        if policy is not None:
            frozen[name] = sum(policy.freezes(start + at) for at in range(count))
            if frozen[name] < count:
                plans.setdefault(policy.probe_plan(length), {})[name] = policy
    for plan, view in _views(list(plans), group, start, layers):
        for name, policy in plans[plan].items():
            if (joint := _joint(policy)) is not None:
                noted.setdefault(name, []).extend(joint.examine(view).rows()[frozen[name] :])
            else:
                chosen[name] = select(policy, view)
    shared = {name for name, one in chosen.items() if not isinstance(one, Selection) or one.keep.shape[1] == 1}
    alike = [shared | {name for name in asked if at < frozen[name]} for at in range(count)]
    if all(one is None for one in chosen.values()) and not noted:
        return [LayerChoice(None, same) for same in alike]
    real = torch.ones(count, length, dtype=torch.bool, device=group[0].keys.device)
    masks = torch.stack([mask.expand(count, kv_heads, length) for mask in _masks(list(chosen.values()), real)])
    for row, name in enumerate(asked):
        if chosen[name] is not None and frozen[name]:
            masks[row, : frozen[name]] = True
    found = [LayerChoice(mask, same) for mask, same in zip(masks.unbind(1), alike, strict=True)]
    for name, one in chosen.items():
        if not isinstance(one, Selection):
            continue
        for at in range(frozen[name], count):
            if one.surrogates is not None:
                found[at].surrogates[name] = Surrogates(*(part[at : at + 1] for part in one.surrogates))
            if one.levels is not None:
                found[at].levels[name] = one.levels.expand(-1, kv_heads, -1)[at : at + 1]
    return found


def _views(
    plans: Sequence[ProbePlan], group: Sequence[Captured], start: int, layers: int
) -> Iterator[tuple[ProbePlan, LayerView]]:
    """Plans and what policies are shown for them, layers as rows."""
    last = [plan for plan in plans if _looks_at_the_end(plan)]
    if last:
        most = next(iter(group[0].queries), ProbePlan())
        whole = _view(most if _looks_at_the_end(most) else ProbePlan(), group, start, layers)
        for plan in last:
            yield plan, whole.last(plan.rows)
    for plan in plans:
        if plan not in last:
            yield plan, _view(plan, group, start, layers)


def _view(plan: ProbePlan, group: Sequence[Captured], start: int, layers: int) -> LayerView:
    first = group[0]
    keys, values = (torch.cat([getattr(one, name) for one in group]) for name in ("keys", "values"))
    columns = torch.arange(keys.shape[2], device=keys.device)
    queries = Queries(first.call.query, columns[None, :0], None, columns[None, :0])
    if plan.count:
        queries = replace(first.queries[plan], states=torch.cat([one.queries[plan].states for one in group]))
    sinks = [one.call.sink_logits for one in group]
    stacked = torch.stack([one for one in sinks if one is not None]) if None not in sinks else None
    index: int | Tensor = start
    if len(group) > 1:
        index = torch.arange(start, start + len(group), device=keys.device)[:, None]
    call = replace(first.call, sink_logits=stacked)
    scores = [one.copy_scores for one in group if one.copy_scores is not None]
    copying = torch.cat(scores) if scores else None
    view = layer_view(plan, call, Entries(keys, values, None, columns, queries), index, layers, copying)
    powers = [one.codes.power_on(keys.device) for one in group if one.codes is not None]
    return replace(view, key_power=torch.stack(powers) if powers else None, damage=None)


def _masks(chosen: Sequence[Selection | CutSelection | None], real: Tensor) -> list[Tensor]:
    """Boolean ``[L, G, n]`` each; cuts with equally many sinks are made together."""
    cuts: dict[int, list[int]] = {}
    masks = [real[:, None] if one is None else one.keep if isinstance(one, Selection) else None for one in chosen]
    for index, one in enumerate(chosen):
        if isinstance(one, CutSelection):
            cuts.setdefault(one.sinks, []).append(index)
    for sinks, indices in cuts.items():
        cut = torch.cat([one.cut for index in indices if isinstance(one := chosen[index], CutSelection)])
        together = CutSelection(cut, sinks).mask(real.repeat(len(indices), 1))
        for index, mask in zip(indices, together.split(len(real)), strict=True):
            masks[index] = mask
    return [mask for mask in masks if mask is not None]
