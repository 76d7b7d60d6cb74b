"""Bootstrap intervals of means over families: the same draws for tables and pages."""

import zlib

import torch
from torch import Tensor

DRAWS = 2000


def resampled_means(values: Tensor, family: str, *, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Means of samples drawn anew from one family, with replacement.

    Families differ in their draws; whatever was measured on the same samples is drawn alike.

    Parameters
    ----------
    values : Tensor
        ``[n, M]``, float64: samples and what was measured on them.
    family : str
        The family's name.
    draws, seed : int
        How often, and which draws.

    Returns
    -------
    Tensor
        ``[draws, M]``.
    """
    generator = torch.Generator().manual_seed(seed + zlib.crc32(family.encode("utf-8", "backslashreplace")))
    index = torch.randint(len(values), (draws, len(values)), generator=generator)
    times = torch.zeros(draws, len(values), dtype=torch.float64)
    times.scatter_add_(1, index, torch.ones_like(times))
    return times @ values / len(values)


def interval(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The central 95% of draws ``[draws, ...]``: lower and upper end, ``[...]``."""
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype), dim=0)
    return low, high
