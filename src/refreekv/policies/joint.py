"""Policies that decide about all layers of a prompt together."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from refreekv.core.selection import Selection
from refreekv.policies.base import LayerView, Policy


@dataclass(frozen=True)
class LayerScores:
    """What a joint policy notes of one layer, for each row of a batch.

    Attributes
    ----------
    scores : Tensor
        ``[B, G, n]``: importance, larger is better.
    first : Tensor
        Boolean ``[B, G, n]``: entries that rank before all others.
    real : Tensor
        Boolean ``[B, G, n]``, False at padding.
    preference : Tensor
        ``[B]``, float64: how much the layer needs, compared with others.
    """

    scores: Tensor
    first: Tensor
    real: Tensor
    preference: Tensor

    def rows(self) -> list["LayerScores"]:
        """Each row by itself, ``B = 1``."""
        parts = zip(*(part.split(1) for part in (self.scores, self.first, self.real, self.preference)), strict=True)
        return [LayerScores(*row) for row in parts]


class JointPolicy(Policy):
    """Base of policies that look at each layer as it comes and decide once the last one was seen.

    The cache keeps every layer whole until then. Engines that can only ask one layer at a
    time refuse such policies.
    """

    @abstractmethod
    def examine(self, view: LayerView) -> LayerScores:
        """What to remember of one layer; rows of the batch are different prompts, or layers of one."""

    @abstractmethod
    def allot(self, layers: Sequence[LayerScores]) -> list[Selection]:
        """What each layer of one prompt keeps, ``B = 1``; layers that are frozen are not among them."""

    def select(self, view: LayerView) -> Selection:
        """Refuse: one layer alone cannot be decided on.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(
            f"policy {self.name!r} decides about all layers together, and was asked about layer {view.layer} alone: "
            "this engine cannot use it; choose another policy"
        )
