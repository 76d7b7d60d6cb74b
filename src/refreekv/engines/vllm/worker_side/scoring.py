"""From prompt queries that pass by to a policy's selection, of one layer or of layers that are alike together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.quantisation import Ladder
from refreekv.core.selection import CutSelection, Selection
from refreekv.kernels.paged import upload
from refreekv.policies import LayerView, Policy, ProbePlan
from refreekv.policies.base import spread_step
from refreekv.pruning.calls import AttentionCall, Entries, Queries
from refreekv.pruning.decide import layer_view, stored
from refreekv.pruning.decide import select as select_of

Gather = Callable[[Tensor, int], Tensor]
"""Joins the heads of all tensor-parallel ranks along a dimension."""


def probed_positions(plan: ProbePlan, prompt: int) -> Tensor:
    """The positions a plan probes in a prompt of ``n`` tokens, ascending (see `ProbePlan`)."""
    positions = torch.arange(prompt)
    # The last one in any case: it says how many there were.
    wanted = positions >= prompt - max(plan.rows, 1)
    if plan.spread:
        wanted |= (positions + 1) % spread_step(plan.spread, prompt) == 0
    return positions[wanted] if plan.count else positions[:0]


@dataclass
class Probes:
    """The probed queries of one request, collected over the chunks of its prompt.

    Attributes
    ----------
    plan : ProbePlan
        What the policy wants.
    positions : Tensor
        Integer ``[k]``: the planned positions.
    queries : dict
        For each layer, the collected queries ``[·, H, D]``, oldest first.
    """

    plan: ProbePlan
    positions: Tensor
    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    _there: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def positions_on(self, device: torch.device) -> Tensor:
        """`positions` on a device, copied once for all layers; the host does not wait for what is computed there."""
        if device not in self._there:
            self._there[device] = upload(self.positions, device)
        return self._there[device]

    @classmethod
    def for_prompt(cls, policy: Policy, prompt: int) -> "Probes":
        """Probes of a prompt that starts."""
        plan = policy.probe_plan(prompt)
        return cls(plan, probed_positions(plan, prompt))

    def from_position(self, first: int) -> "Probes":
        """Those of a prompt whose beginning was found in a cache: the queries before ``first`` are not computed."""
        return Probes(self.plan, self.positions[self.positions >= first])

    def collect(self, layer: int, queries: Tensor, start: int) -> None:
        """Keep what the plan wants of a chunk's queries ``[q, H, D]``, whose first position is ``start``."""
        stop = start + len(queries)
        here = self.positions[(self.positions >= start) & (self.positions < stop)]
        if len(here):
            self.queries.setdefault(layer, []).append(queries[(here - start).to(queries.device)])


@dataclass(frozen=True)
class LayerFacts:
    """What scoring must know of an attention layer.

    Attributes
    ----------
    index, layers : int
        Which of how many prunable layers.
    scale : float
        Factor on the logits.
    softcap : float or None
        Cap on the logits, if any.
    sinks : Tensor or None
        Learned sink logits ``[H]``, if any.
    copy_scores : Tensor or None
        ``[H_kv]`` over all ranks, where the policy reads them.
    codes : KeyCodes or None
        The model's own for keys, of all ranks' heads, where entries are stored in them.
    """

    index: int
    layers: int
    scale: float
    softcap: float | None
    sinks: Tensor | None
    copy_scores: Tensor | None = None
    codes: KeyCodes | None = None

    @classmethod
    def of(cls, impl: Any, index: int, layers: int) -> "LayerFacts":
        """Read off vLLM's attention implementation."""
        softcap = getattr(impl, "logits_soft_cap", None) or None
        return cls(index, layers, impl.scale, softcap, getattr(impl, "sinks", None))


def select(
    policy: Policy,
    probes: Probes,
    layer: LayerFacts,
    keys: Tensor,
    values: Tensor,
    gather: Gather,
    surrogates: bool = False,
    ladder: Ladder | None = None,
) -> Selection | CutSelection | None:
    """Let the policy decide on one layer of one prompt.

    Parameters
    ----------
    policy : Policy
        Decides.
    probes : Probes
        With this layer's queries complete.
    layer : LayerFacts
        The layer.
    keys, values : Tensor
        ``[n, H_kv, D]``: this rank's heads.
    gather : callable
        Joins the heads of all tensor-parallel ranks along a dimension, so that every rank sees
        the whole layer and decides the same.
    surrogates : bool
        Whether the engine can store entries that are no token's.
    ladder : Ladder, optional
        Number formats that what is kept will be stored in.

    Returns
    -------
    Selection, CutSelection or None
        Batch size 1; None keeps everything.
    """
    # [n, H_kv, D] to [1, H_kv, n, D]
    entries = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    return select_together(policy, probes, [layer], *entries, gather, surrogates, ladder)


def alike(policy: Policy, layers: Sequence[LayerFacts]) -> list[slice]:
    """Layers next to each other that `select_together` can decide about in one, all of them or alone."""

    def told(layer: LayerFacts) -> tuple[object, ...]:
        sinks = None if layer.sinks is None else layer.index
        facts = layer.scale, layer.softcap, sinks, layer.copy_scores is None, layer.codes is None
        return (policy.freezes(layer.index), *facts)

    found: list[slice] = []
    for at, layer in enumerate(layers):
        if at and policy.decides_together and told(layer) == told(layers[at - 1]):
            found[-1] = slice(found[-1].start, at + 1)
        else:
            found.append(slice(at, at + 1))
    return found


def select_together(
    policy: Policy,
    probes: Probes,
    layers: Sequence[LayerFacts],
    keys: Tensor,
    values: Tensor,
    gather: Gather,
    surrogates: bool = False,
    ladder: Ladder | None = None,
) -> Selection | CutSelection | None:
    """`select` of layers that are `alike`, each a row: in as many launches as one layer takes.

    Parameters
    ----------
    layers : sequence of LayerFacts
        The layers.
    keys, values : Tensor
        ``[layers, H_kv, n, D]``.
    policy, probes, gather, surrogates, ladder
        As in `select`.

    Returns
    -------
    Selection, CutSelection or None
        A row for each layer; None keeps everything.
    """
    first, device = layers[0], keys.device
    if policy.freezes(first.index):
        return None
    # Reduced plans ask for queries for surrogates alone.
    plan = replace(probes.plan, queries=probes.plan.queries and (surrogates or not probes.plan.reduced))
    queries = _collected(probes, layers, keys)
    columns = torch.arange(keys.shape[2], device=device)
    call = AttentionCall(queries.states, None, first.scale, first.softcap, first.sinks)
    scores = [layer.copy_scores[None] for layer in layers if layer.copy_scores is not None]
    entries = Entries(keys, values, None, columns, queries, gapless=True)
    which = first.index if len(layers) == 1 else upload(torch.tensor([[layer.index] for layer in layers]), device)
    view = layer_view(plan, call, entries, which, first.layers, torch.cat(scores) if scores else None)
    view = stored(_of_all_ranks(view, gather), ladder, first.codes)
    codes = [layer.codes for layer in layers if layer.codes is not None]
    if view.key_power is not None and len(codes) > 1:
        view = replace(view, key_power=torch.stack([own.power_on(device) for own in codes]))
    if view.damage is not None and len(codes) > 1:
        view = replace(view, damage=torch.cat([own.damage_on(device, view.forms) for own in codes]))
    return select_of(policy, view)


def _collected(probes: Probes, layers: Sequence[LayerFacts], keys: Tensor) -> Queries:
    """The planned queries of some layers; ``keys`` are ``[layers, H_kv, n, D]``."""
    positions = probes.positions_on(keys.device)[None]
    if not probes.plan.count:
        return Queries(keys[:, :0, :0], positions, None, positions)
    parts = [part for layer in layers for part in probes.queries[layer.index]]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    states = joined.unflatten(0, (len(layers), -1)).transpose(1, 2)  # [layers, k, H, D] to [layers, H, k, D]
    assert states.shape[2] == positions.shape[1], "not all planned queries of the prompt were computed"
    return Queries(states, positions, None, positions)


def _of_all_ranks(view: LayerView, gather: Gather) -> LayerView:
    """A view of this rank's heads with those of all tensor-parallel ranks."""
    keys = gather(view.keys, 1)
    heads: dict[str, Any] = {
        name: gather(part, 1) for name in ("values", "rows", "queries") if (part := getattr(view, name)) is not None
    }
    for name in ("window", "spread"):
        if (reductions := getattr(view, name)) is not None:
            heads[name] = reductions.each(lambda part: gather(part, 1))
    return replace(view, keys=keys, heads=view.heads * (keys.shape[1] // view.keys.shape[1]), **heads)
