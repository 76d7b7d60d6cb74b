"""Full: what compression is compared with."""

from dataclasses import dataclass
from typing import ClassVar

from refreekv.policies.base import LayerView, Policy
from refreekv.policies.registry import register


@register("full")
@dataclass(frozen=True)
class Full(Policy):
    """Keep everything: the full cache, through the same code as every other policy."""

    decides_together: ClassVar[bool] = True

    def select(self, view: LayerView) -> None:
        return None
