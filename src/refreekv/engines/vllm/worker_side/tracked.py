"""What a worker remembers of one request."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refreekv.core.selection import CutSelection, Selection
from refreekv.engines.vllm.messages import PruningOutcome
from refreekv.engines.vllm.worker_side.rounding import GroupDecision
from refreekv.engines.vllm.worker_side.scoring import LayerFacts, Probes


@dataclass(frozen=True)
class Layer:
    """A prunable attention layer.

    Attributes
    ----------
    module : Attention
        vLLM's layer.
    group : int
        Its KV cache group.
    facts : LayerFacts
        What scoring must know.
    """

    module: Any
    group: int
    facts: LayerFacts


@dataclass
class Tracked:
    """One unfinished request.

    Attributes
    ----------
    prompt : int
        Prompt tokens.
    holes : ndarray
        int32 ``[2, G]``: first entry and length of the hole in each group's block table.
    epoch : int
        How often it has been preempted.
    probes : Probes or None
        Queries collected so far, while the prompt is computed for the first time.
    selections : dict
        Each layer's selection, as they come in.
    outcome : PruningOutcome or None
        Made once, at the prompt's end; a preemption does not change it.
    decisions : tuple of GroupDecision
        What each group gives up; empty until the outcome.
    expressed : list of bool
        For each group, whether the block table shows the decision by now.
    announced : bool
        Whether the scheduler has been told since the last preemption.
    """

    prompt: int
    holes: np.ndarray[Any, np.dtype[np.int32]]
    epoch: int = 0
    probes: Probes | None = None
    selections: dict[int, Selection | CutSelection | None] = field(default_factory=dict)
    outcome: PruningOutcome | None = None
    decisions: tuple[GroupDecision, ...] = ()
    expressed: list[bool] = field(default_factory=list)
    announced: bool = False

    def preempt(self, epoch: int) -> None:
        """All blocks are gone, everything is computed again; what was decided stays."""
        self.epoch, self.announced, self.probes = epoch, False, None
        self.selections = {}
        self.expressed = [not decision.freed for decision in self.decisions]
        self.holes[:] = 0

    def express(self, group: int) -> None:
        """The block table of a group shows its decision from now on."""
        decision = self.decisions[group]
        self.expressed[group] = True
        self.holes[:, group] = decision.start, decision.freed
