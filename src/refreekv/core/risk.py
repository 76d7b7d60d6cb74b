"""Conformal risk control (Angelopoulos et al., arXiv 2208.02814): a setting whose expected loss stays under a bound.

Settings are ordered from strict to loose, and the first of them loses nothing. Of ``n`` samples one knows the loss at
each setting, in [0, 1]; where a sample's losses grow from strict to loose, and a next sample is exchangeable with
these, the loosest setting with ``n / (n + 1) * mean + 1 / (n + 1) <= risk`` has an expected loss of at most ``risk`` on
the next one (their theorem 1, with the largest loss B = 1). The expectation is over the samples, too: it is a
statement about the procedure, as that of every conformal method.
"""

import math
from collections.abc import Sequence


def prompts_needed(risk: float) -> int:
    """The fewest samples with which any setting but the strictest can be chosen: ``1 / (n + 1) <= risk``.

    Examples
    --------
    >>> prompts_needed(0.05)
    19
    """
    # 1 / 0.05 is 20 in floating point, 1 / 0.01 a little more than 100 somewhere else: no sample for rounding.
    return max(1, math.ceil(1 / risk - 1 - 1e-9))


def made_monotone(losses: Sequence[float]) -> list[float]:
    """One sample's losses from strict to loose, each raised to the largest before it.

    A sample that a strict setting happens to hurt, and a looser one does not, counts as hurt by the looser one, too:
    what is then bounded is no less than what was asked about. Each sample is changed by itself, so that samples
    stay exchangeable.
    """
    found: list[float] = []
    for loss in losses:
        found.append(max(loss, found[-1]) if found else loss)
    return found


def corrected_risks(losses: Sequence[Sequence[float]]) -> list[float]:
    """What the method compares with the risk asked for, by setting.

    Parameters
    ----------
    losses : sequence of sequence of float
        ``[n, settings]`` in [0, 1], from strict to loose; made monotone here.
    """
    rows = [made_monotone(row) for row in losses]
    count = len(rows)
    return [(math.fsum(column) + 1.0) / (count + 1) for column in zip(*rows, strict=True)]


def loosest(losses: Sequence[Sequence[float]], risk: float) -> int:
    """Index of the loosest setting whose expected loss is at most ``risk``.

    Parameters
    ----------
    losses : sequence of sequence of float
        ``[n, settings]`` in [0, 1], from strict to loose, zero at the first.
    risk : float
        In (0, 1).

    Returns
    -------
    int
        0, the setting that loses nothing, where no other will do.

    Raises
    ------
    ValueError
        A loss at the first setting.
    """
    if any(row[0] != 0 for row in losses):
        raise ValueError("the strictest setting has to lose nothing on any sample, or no risk can be kept")
    # Rounding must not refuse what meets the bound exactly.
    fits = [bound <= risk * (1 + 1e-12) for bound in corrected_risks(losses)]
    return max((index for index, fit in enumerate(fits) if fit), default=0)
