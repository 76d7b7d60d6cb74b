"""What codes of the model's own are made from, taken down while random tokens are read; see `core.key_codes`."""

from dataclasses import dataclass, field

from refreekv.core.key_codes import KeyCodes, Moments
from refreekv.core.selection import Selection
from refreekv.policies import LayerView, ProbePlan
from refreekv.pruning.copy_scores import CopyProbe

SHARES = (1 / 64, 1 / 16, 1 / 4)
"""Of the longest context: where rows of tokens begin beside the one that begins at 0. Rotary positions turn slow
channels far only, so that codes measured at the start alone are worse at 16,000 tokens."""
TOKENS = 64
"""Distinct random tokens that such a row says twice."""


@dataclass(frozen=True)
class CodeProbe(CopyProbe):
    """Prunes nothing; takes down copy scores and, from the same pass, the moments of keys and queries.

    Parameters
    ----------
    moments : dict of int to Moments
        Filled by the layer's number among those that may be pruned, as ``found`` is.
    """

    moments: dict[int, Moments] = field(default_factory=dict)

    def probe_plan(self, n: int) -> ProbePlan:
        """The queries of the second saying, and what attention they pay."""
        return ProbePlan(rows=self.tokens, queries=True)

    def select(self, view: LayerView) -> Selection | None:
        """Take down the layer's scores and moments; keep everything."""
        super().select(view)
        assert view.queries is not None
        self.moments[int(view.layer)] = Moments.of(view.keys, view.queries)
        return None


def offsets(longest: int, length: int) -> list[int]:
    """Positions at which rows of ``length`` tokens begin beside the one at 0, in contexts of ``longest`` tokens."""
    found = {min(int(share * longest), longest - length) for share in SHARES}
    return sorted(offset for offset in found if offset > 0)


def codes_of(first: CodeProbe, others: CodeProbe | None, rows: int, layers: int) -> list[KeyCodes]:
    """Codes of each layer, from the row at position 0 and ``rows`` others, which count as much each."""
    found = []
    for layer in range(layers):
        moments = first.moments[layer]
        if others is not None:
            more = others.moments[layer]
            moments = moments.plus(more.scaled(rows * moments.keys / more.keys, rows * moments.queries / more.queries))
        found.append(moments.codes())
    return found
