"""Pruning under a policy that decides about all layers together: held back until the last one was seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from refreekv.core.selection import Selection
from refreekv.policies import LayerScores
from refreekv.policies.joint import JointPolicy
from refreekv.pruning.calls import AttentionCall, Entries
from refreekv.pruning.decide import Decision, layer_view

CarryOut = Callable[[Sequence[Decision]], None]
"""Takes what was decided about a layer's entries."""


@dataclass
class _Held:
    """A layer that waits: its entries, what the policy noted of each row, and who takes the answer."""

    parts: list[Entries]
    rows: list[LayerScores]
    carry_out: CarryOut


@dataclass
class JointPruning:
    """The layers of a prompt whose last one was not seen yet."""

    _waiting: list[_Held] = field(default_factory=list)

    def add(
        self,
        policy: JointPolicy,
        call: AttentionCall,
        parts: list[Entries],
        layer: int,
        layers: int,
        carry_out: CarryOut,
    ) -> None:
        """Note what a policy needs of a layer; after the last one, let it decide about all."""
        if layer == 0:  # what an interrupted call left
            self._waiting.clear()
        if policy.freezes(layer):
            carry_out([Decision(part, None) for part in parts])
        else:
            rows: list[LayerScores] = []
            for part in parts:
                plan = policy.probe_plan(part.keys.shape[2])
                rows += policy.examine(layer_view(plan, call, part, layer, layers)).rows()
            # Nothing is asked about the entries themselves any more: neither they nor a prompt's queries may stay for
            # the other layers' sake.
            self._waiting.append(_Held([_without_entries(part) for part in parts], rows, carry_out))
        if layer == layers - 1:
            self._decide(policy)

    def _decide(self, policy: JointPolicy) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        # By row of the batch, then by layer.
        chosen = [policy.allot(layers) for layers in zip(*(held.rows for held in waiting), strict=True)]
        for held, selections in zip(waiting, zip(*chosen, strict=True), strict=True):
            left, decisions = list(selections), []
            for part in held.parts:
                batch = part.keys.shape[0]
                decisions.append(Decision(part, _joined(left[:batch])))
                del left[:batch]
            held.carry_out(decisions)

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()


def _without_entries(part: Entries) -> Entries:
    """The same of shapes alone."""
    nothing = part.keys.new_empty(1)
    keys, values = (nothing.expand(whole.shape) for whole in (part.keys, part.values))
    return replace(part, keys=keys, values=values, queries=part.queries.none())


def _joined(rows: Sequence[Selection]) -> Selection:
    return Selection(torch.cat([row.keep for row in rows]))
