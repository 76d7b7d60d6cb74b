"""Statistics of a model's keys, values and queries, taken while copy scores are measured.

Random tokens said twice show each head's keys and queries at work; nothing more is needed to code
every later text (docs/quantisation.md). Rotary positions turn low channels slowly, so that what
a channel's mean and spread are depends on where the text stands: rows of the batch stand at
several offsets, and the statistics are over all of them.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from refreekv.core.model_codes import KeyCodes
from refreekv.core.quantisation import SINKS
from refreekv.core.selection import Selection
from refreekv.policies import LayerView, ProbePlan
from refreekv.pruning.copy_scores import CopyProbe


@dataclass(frozen=True)
class LayerCodes:
    """What codes of one layer's entries go by, all of it the model's.

    Attributes
    ----------
    keys : KeyCodes
        How keys are coded.
    value_centre : Tensor
        ``[H_kv, Dv]``: mean values, which are taken out before these are rotated and coded.
    """

    keys: KeyCodes
    value_centre: Tensor


@dataclass(frozen=True)
class CodeProbe(CopyProbe):
    """Prunes nothing; takes down copy scores and, from the same pass, what `LayerCodes` need.

    Parameters
    ----------
    codes : dict of int to LayerCodes
        Filled by the layer's number among those that may be pruned, as ``found`` is.
    """

    codes: dict[int, LayerCodes] = field(default_factory=dict)

    def probe_plan(self, n: int) -> ProbePlan:
        """The queries of the second saying, and what attention they pay."""
        del n
        return ProbePlan(rows=self.tokens, queries=True)

    def select(self, view: LayerView) -> Selection | None:
        """Take down the layer's statistics; keep everything."""
        super().select(view)
        values = view.values[:, :, SINKS:].transpose(0, 1).flatten(1, 2)
        centre = values.mean(1, dtype=torch.float32)
        self.codes[int(view.layer)] = LayerCodes(KeyCodes.measured(view.keys, view.queries), centre)
        return None
