"""From prompt queries that pass by to a policy's selection, layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from refreekv.core.probes import attention_rows
from refreekv.core.reductions import probe_reductions
from refreekv.core.selection import CutSelection, Selection
from refreekv.policies import LayerView, Policy, ProbePlan
from refreekv.policies.base import spread_step

Gather = Callable[[Tensor, int], Tensor]
"""Joins the heads of all tensor-parallel ranks along a dimension."""


def probed_positions(plan: ProbePlan, prompt: int) -> Tensor:
    """The positions a plan probes in a prompt of ``n`` tokens, ascending (see `ProbePlan`)."""
    positions = torch.arange(prompt)
    wanted = positions >= prompt - plan.rows
    if plan.spread:
        wanted |= (positions + 1) % spread_step(plan.spread, prompt) == 0
    return positions[wanted][-plan.count :] if plan.count else positions[:0]


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

    @classmethod
    def for_prompt(cls, policy: Policy, prompt: int) -> "Probes":
        """Probes of a prompt that starts."""
        plan = policy.probe_plan(prompt)
        return cls(plan, probed_positions(plan, prompt))

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
    """

    index: int
    layers: int
    scale: float
    softcap: float | None
    sinks: Tensor | None
    copy_scores: Tensor | None = None

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

    Returns
    -------
    Selection, CutSelection or None
        Batch size 1; None keeps everything.
    """
    if policy.freezes(layer.index):
        return None
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    plan, shown = probes.plan, {}
    heads = 0
    if plan.count:
        queries = torch.cat(probes.queries[layer.index]).transpose(0, 1)[None]
        positions = probes.positions.to(keys.device)
        assert queries.shape[2] == len(positions), "not all planned queries of the prompt were computed"
        shown = (_reduced if plan.reduced else _rows)(plan, queries, positions, keys, layer, gather)
        heads = queries.shape[1]
    whole_keys, whole_values = gather(keys, 1), gather(values, 1)
    heads *= whole_keys.shape[1] // keys.shape[1]
    scores = None if layer.copy_scores is None else layer.copy_scores[None]
    view = LayerView(whole_keys, whole_values, None, None, layer.index, layer.layers, heads=heads, copy_scores=scores)
    return policy.select(replace(view, **shown))


def _rows(
    plan: ProbePlan, queries: Tensor, positions: Tensor, keys: Tensor, layer: LayerFacts, gather: Gather
) -> dict[str, Any]:
    """Attention rows of the probed queries, what each sees, and the queries if the plan asks for them."""
    visible = (torch.arange(keys.shape[2], device=keys.device) <= positions[:, None])[None]
    rows = attention_rows(
        queries, keys, scaling=layer.scale, visible=visible, softcap=layer.softcap, sink_logits=layer.sinks
    )
    shown = {"rows": gather(rows, 1), "visible": visible}
    if plan.queries:
        shown["queries"] = gather(queries.float() * layer.scale, 1)
    return shown


def _reduced(
    plan: ProbePlan, queries: Tensor, positions: Tensor, keys: Tensor, layer: LayerFacts, gather: Gather
) -> dict[str, Any]:
    """What the last queries, and those spread over the prompt, gave each position."""
    length = keys.shape[2]
    spread = (positions + 1) % spread_step(plan.spread, length) == 0 if plan.spread else positions < 0
    shown = {}
    for name, chosen, distance in (
        ("window", positions >= length - plan.rows, 0),
        ("spread", spread, plan.distance),
    ):
        if not (plan.rows if name == "window" else plan.spread):
            continue
        reductions = probe_reductions(
            queries[:, :, chosen],
            keys,
            query_columns=positions[chosen][None],
            scaling=layer.scale,
            distance=distance,
            softcap=layer.softcap,
            sink_logits=layer.sinks,
        )
        shown[name] = reductions.each(lambda part: gather(part, 1))
    return shown
