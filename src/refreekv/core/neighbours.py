"""Neighbours of chosen positions: beside them, after them, and those of the highest peaks that hold a share."""

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 24
"""Powers of two that `peak_level_of_share` goes down to: attention under 6e-8 is nothing."""


def dilate(chosen: Tensor, reach: int) -> Tensor:
    """Chosen positions and those up to ``reach`` beside them; boolean ``[..., n]``."""
    if reach == 0:
        return chosen
    wide = chosen.clone()
    for step in range(1, reach + 1):
        wide[..., step:] |= chosen[..., :-step]
        wide[..., :-step] |= chosen[..., step:]
    return wide


def following(hits: Tensor, count: int) -> Tensor:
    """The ``count`` positions after each hit; boolean ``[..., n]``.

    A hit itself is among them only if it follows another one.
    """
    length = hits.shape[-1]
    before = functional.pad(hits.cumsum(-1, dtype=torch.int32), (1, 0))
    index = torch.arange(length, device=hits.device)
    return before[..., :length] > before[..., (index - count).clamp_min(0)]


def peak_level_of_share(peak: Tensor, mass: Tensor, share: float) -> Tensor:
    """The highest power of two such that the positions which peak there or higher hold a share of the mass.

    Powers of two, and not the exact height, for then no sorting is needed and the answer does not
    hang on a rounding.

    Parameters
    ----------
    peak : Tensor
        ``[..., n]``, in [0, 1].
    mass : Tensor
        ``[..., n]``, non-negative.
    share : float
        Of the sum of ``mass``, in [0, 1].

    Returns
    -------
    Tensor
        ``[..., 1]``: 0 where not even all positions above the lowest level hold it.
    """
    levels = 2.0 ** -torch.arange(LEVELS + 1, dtype=torch.float32, device=peak.device)
    above = peak[..., None, :] >= levels[:, None]
    held = (mass[..., None, :] * above).sum(-1)
    missing = (held < mass.sum(-1, keepdim=True) * share).sum(-1, keepdim=True)
    levels = functional.pad(levels, (0, 1))
    return levels[missing]
