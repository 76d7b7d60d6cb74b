"""Budgets and ranking: from scores to kept entries, for the policies with a fixed budget.

Everything here works on heads that hold different numbers of entries, and on padding
anywhere in a row. Budgets are tensors: no function waits for the device.
"""

import torch
from torch import Tensor
from torch.nn import functional


def budgets(real: Tensor, size: int | None, ratio: float | None, at_least: int = 1) -> Tensor:
    """How many entries each head may keep.

    Parameters
    ----------
    real : Tensor
        Boolean ``[B, G, n]``, False at padding.
    size : int or None
        Entries to keep.
    ratio : float or None
        Where ``size`` is None: share of the head's real entries to keep, rounded down.
    at_least : int
        What a ratio does not go under.

    Returns
    -------
    Tensor
        Integer ``[B, G]``; never more than the head has.
    """
    held = real.sum(-1)
    if size is not None:
        return held.clamp_max(size)
    assert ratio is not None
    # The small term undoes binary fractions such as 0.29 * 100 = 28.999…
    return (held.double() * ratio + 1e-6).floor().long().clamp_min(at_least).minimum(held)


def newest(real: Tensor, count: int | Tensor) -> Tensor:
    """The last ``count`` real entries (``[B, G]`` if not one number for all); boolean like ``real`` ``[B, G, n]``."""
    limit = count[..., None] if isinstance(count, Tensor) else count
    return real & (real.flip(-1).cumsum(-1).flip(-1) <= limit)


def keep_best(scores: Tensor, budget: Tensor, real: Tensor, first: Tensor | None = None) -> Tensor:
    """The entries with the largest scores, as many as the budget says.

    Parameters
    ----------
    scores : Tensor
        ``[B, G, n]``, finite at real entries.
    budget : Tensor
        Integer ``[B, G]``.
    real : Tensor
        Boolean ``[B, G, n]``, False at padding, which is never kept.
    first : Tensor, optional
        Boolean ``[B, G, n]``: entries that rank before all others, whatever their scores.
        Where the budget does not even hold these, the newest of them are kept.

    Returns
    -------
    Tensor
        Boolean ``[B, G, n]``. Among equals the newer entry ranks first.
    """
    length = scores.shape[-1]
    key = scores.float()
    if first is not None:
        key = key.masked_fill(first, float("inf"))
    key = key.masked_fill(~real, float("-inf"))
    # A stable descending sort of the flipped scores puts newer entries first among equals.
    order = length - 1 - torch.sort(key.flip(-1), dim=-1, descending=True, stable=True).indices
    within = torch.arange(length, device=scores.device) < budget[..., None]
    return torch.zeros_like(real).scatter(-1, order, within) & real


def keep_best_of_layer(scores: Tensor, budget: Tensor, real: Tensor, first: Tensor, safeguard: float) -> Tensor:
    """The entries with the largest scores among all heads of a layer together.

    The allocation of Ada-KV (arXiv 2407.11550, algorithm 1): heads compete for the sum of
    their budgets, and each is sure of a share of its own.

    Parameters
    ----------
    scores, budget, real, first
        As in `keep_best`; ``budget`` is what each head would have alone.
    safeguard : float
        Share of its own budget, in [0, 1], that a head keeps in any case, by its own ranking.

    Returns
    -------
    Tensor
        Boolean ``[B, G, n]``, heads with different numbers of entries.
    """
    own = (budget.double() * safeguard + 1e-6).floor().long()
    # Never more than the budget's worth of these, or the sum could not hold them all.
    sure = keep_best(scores, budget, real, first) & first
    sure = sure | keep_best(scores, own, real, first)
    kept = keep_best(
        scores.flatten(1)[:, None], budget.sum(1, keepdim=True), real.flatten(1)[:, None], sure.flatten(1)[:, None]
    )
    return kept.view(real.shape)


def smallest_mass(weights: Tensor, mass: float, real: Tensor) -> Tensor:
    """The fewest entries of each head that hold a share of its weight: nucleus, or top-p, selection.

    Parameters
    ----------
    weights : Tensor
        ``[B, G, n]``, non-negative.
    mass : float
        Share of each head's total, in (0, 1].
    real : Tensor
        Boolean ``[B, G, n]``, False at padding.

    Returns
    -------
    Tensor
        Boolean ``[B, G, n]``; a head without any weight keeps everything.
    """
    length = weights.shape[-1]
    key = weights.double().masked_fill(~real, 0.0)
    ranked = torch.sort(key.flip(-1), dim=-1, descending=True, stable=True)
    running = ranked.values.cumsum(-1)
    total = running[..., -1:]
    # An entry is needed as long as those before it do not hold the mass. A rounding below:
    # sums in another order may end just under what they should reach.
    within = (running - ranked.values < total * (mass * (1.0 - 1e-12))) | ~(total > 0)
    return torch.zeros_like(real).scatter(-1, length - 1 - ranked.indices, within) & real


def pyramid(budget: Tensor, held: Tensor, layer: int | Tensor, layers: int, window: int, beta: float) -> Tensor:
    """Budgets that fall from the first layer to the last, in equal steps.

    PyramidKV (arXiv 2406.02069, section 3.2): the last layer gets ``budget / beta``, the first as
    much more than the budget as the last gets less, but no more than all before the window.
    Where such a pyramid would leave a layer less than the window, all get the same.

    Parameters
    ----------
    budget : Tensor
        ``[B, G]``, floating point: mean number of entries to keep a layer.
    held : Tensor
        Integer ``[B, G]``: entries that there are.
    layer : int or Tensor
        Index of the layer, or ``[B, 1]``.
    layers : int
        Number of layers.
    window : int
        Newest entries, which every layer keeps.
    beta : float
        Steepness, at least 1.

    Returns
    -------
    Tensor
        Integer ``[B, G]``, rounded to the nearest (halves to even).
    """
    budget, held = budget.double(), held.double()
    low = budget / beta
    high = 2 * budget - low
    capped = high >= held - window
    high = torch.where(capped, held - window, high)
    low = torch.where(capped, 2 * budget - high, low)
    slope = (high - low) / max(layers - 1, 1)
    fits = (held >= high) & (high >= low) & (low >= window)
    return torch.where(fits & (layers > 1), high - layer * slope, budget).round().minimum(held).long()


def fill_evenly(wanted: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Share out whole numbers that add up to ``total``: what is wanted, capped, and the rest in equal parts on top.

    Parameters
    ----------
    wanted : Tensor
        Integer ``[L]``, non-negative, adding up to no more than ``total``.
    most : Tensor
        Integer ``[L]``: the most each can take.
    total : Tensor
        Integer, scalar. More than all can take fills everything.

    Returns
    -------
    Tensor
        Integer ``[L]``: ``min(wanted + t, most)`` for the largest ``t`` that the total allows, and one more
        for as many of the first that can take more as there is left.
    """
    base = wanted.minimum(most)
    gaps = (most - base).sort().values
    rest = (total - base.sum()).minimum(gaps.sum())
    # If the i smallest gaps are full, the rest is shared by what is left of them.
    smaller = gaps.cumsum(0) - gaps
    others = torch.arange(len(gaps), 0, -1, device=gaps.device)
    full = (smaller + gaps * others <= rest).sum().clamp_max(len(gaps) - 1)
    level = ((rest - smaller) // others).gather(0, full[None])
    filled = (base + level).minimum(most)
    open_ = filled < most
    return filled + (open_ & (open_.cumsum(0) <= rest - (filled - base).sum())).long()


def pool(scores: Tensor, real: Tensor, kernel: int, kind: str) -> Tensor:
    """Smooth scores along the entries: each gets the mean, or the largest, of its neighbourhood.

    Parameters
    ----------
    scores : Tensor
        ``[B, H, n]``, non-negative. There are zeros beyond both ends.
    real : Tensor
        Boolean ``[B, H, n]``, False at padding, which may lie between two turns: neighbours are
        the entries next to each other without it.
    kernel : int
        Entries of a neighbourhood; odd.
    kind : str
        ``"avg"`` or ``"max"``.

    Returns
    -------
    Tensor
        ``[B, H, n]``.
    """
    order = real.to(torch.uint8).argsort(dim=-1, stable=True)
    close = scores.masked_fill(~real, 0.0).gather(-1, order)
    if kind == "avg":
        pooled = functional.avg_pool1d(close, kernel, stride=1, padding=kernel // 2)
    else:
        pooled = functional.max_pool1d(close, kernel, stride=1, padding=kernel // 2)
    return torch.empty_like(pooled).scatter_(-1, order, pooled)
