"""Which positions a layer needs: the rules of the adaptive policy in plain torch, padding and shared sets included."""

from typing import NamedTuple

import torch
from torch import Tensor

from refreekv.core.budget import newest
from refreekv.core.neighbours import dilate, following, peak_level_of_share
from refreekv.core.reductions import ProbeReductions
from refreekv.core.selection import sink_mask

REASONS = ("sinks", "recent", "window", "spread", "following", "mass", "copying", "earlier")
"""Why positions stay, in the kernel's order; the last one on later turns only."""


class Rules(NamedTuple):
    """From when on an entry stays.

    Attributes
    ----------
    sinks, recent : int
        First and newest entries that stay.
    unit, spread_unit : float
        Attention from the window, and from the spread queries, from which on an entry and its two neighbours stay.
    hit, follow : float, int
        Attention from the window from which on the entries after an entry stay, and how many of them.
    share : float
        Of its mean attention, what each head keeps at least: entries stay by falling peak until it is held.
    copying : float
        Copy score from which on a head keeps everything.
    min_length : int
        Rows with fewer entries are kept whole.
    together : bool
        Whether all heads keep what any of them keeps.
    copying_weight : float
        How much more than its peak says an entry of a head that copies is worth, where it is about its rung.
    code_unit : float
        What coding may do to an entry, in units.
    copying_peak : float
        Attention that a head with a copy score of 1 is expected to give any entry, where it is about its rung; other
        heads that times their score.
    """

    sinks: int
    recent: int
    unit: float
    spread_unit: float
    hit: float
    follow: int
    share: float
    copying: float
    min_length: int = 0
    together: bool = False
    copying_weight: float = 1.0
    code_unit: float = 1.0
    copying_peak: float = 0.0


class Needs(NamedTuple):
    """What is kept of one layer, and why.

    Attributes
    ----------
    keep : Tensor
        Boolean ``[B, H_kv, n]``.
    lost : Tensor
        ``[B]`` float32: the highest attention that the window gave an entry which is not kept.
    shares : dict
        For each reason the share ``[B]`` of a row's entries that stay for it.
    levels : Tensor or None
        uint8 ``[B, H_kv, n]``: the rung that each entry is worth, kept or not; None: nobody asked.
    """

    keep: Tensor
    lost: Tensor
    shares: dict[str, Tensor]
    levels: Tensor | None = None


class Grading(NamedTuple):
    """Rungs that are wanted beside what is kept; see `levels`.

    Attributes
    ----------
    rules : Rules
        The units that rungs are given by.
    damage : Tensor
        ``[B | 1, H_kv, R]`` float32.
    """

    rules: Rules
    damage: Tensor


def levels(
    window: ProbeReductions,
    spread: ProbeReductions,
    scores: Tensor | None,
    rules: Rules,
    damage: Tensor,
    *,
    real: Tensor | None = None,
) -> Tensor:
    """The rung of a ladder of number formats that each entry is worth.

    Each entry gets the narrowest rung in which its highest attention, in units, times the rung's damage is at most
    ``rules.code_unit``; in heads that copy, ``rules.copying_weight`` times that attention. Peaks count for neighbours,
    too. No entry counts less than ``rules.copying_peak`` times its head's copy score: a later query may fetch any.

    Parameters
    ----------
    window, spread, scores, rules, real
        As in `needs`.
    damage : Tensor
        ``[B | 1, H_kv, R]`` float32, falling from rung to rung: what storing an entry in it does, as a share of
        what evicting it does.

    Returns
    -------
    Tensor
        uint8 ``[B, H_kv, n]``, whatever is kept. A smaller unit never gives an entry a narrower rung.
    """
    peak = torch.maximum(window.peak / rules.unit, spread.peak / rules.spread_unit)
    order = None
    if real is not None:
        # Neighbours are the entries next to each other without padding, as in `needs`.
        order = real.to(torch.uint8).argsort(dim=-1, stable=True)
        peak = peak.masked_fill(~real, 0.0).gather(-1, order)
    around = peak.clone()
    around[..., 1:] = torch.maximum(around[..., 1:], peak[..., :-1])
    around[..., :-1] = torch.maximum(around[..., :-1], peak[..., 1:])
    if scores is not None:
        around = torch.where((scores >= rules.copying)[..., None], around * rules.copying_weight, around)
        around = torch.maximum(around, (scores * (rules.copying_peak / rules.unit))[..., None])
    found = torch.zeros(around.shape, dtype=torch.uint8, device=around.device)
    for rung in range(damage.shape[-1] - 1):
        found += around * damage[..., rung : rung + 1] > rules.code_unit
    if order is not None:
        found = torch.zeros_like(found).scatter(-1, order, found)
    return found


def needs(
    window: ProbeReductions,
    spread: ProbeReductions,
    scores: Tensor | None,
    rules: Rules,
    *,
    real: Tensor | None = None,
    earlier: Tensor | None = None,
) -> Needs:
    """The entries that probed queries look at, their surroundings, and all of the heads that copy.

    Parameters
    ----------
    window, spread : ProbeReductions
        ``[B, H_kv, n]`` float32: what the last queries gave each position, their mean included, and
        what queries spread over the prompt gave it.
    scores : Tensor or None
        ``[B | 1, H_kv]`` copy scores; None where nobody measured them: then no head copies.
    rules : Rules
        From when on an entry stays.
    real : Tensor, optional
        Boolean ``[B, H_kv, n]``, False at padding. None: there is none.
    earlier : Tensor, optional
        Boolean ``[1, 1 | H_kv, n]``: what was kept at an earlier prompt's end, and stays.
    """
    order = None
    if real is None:
        real = torch.ones_like(window.peak, dtype=torch.bool)
    else:
        # Padding may lie between two turns: neighbours are the entries next to each other without it.
        index = order = real.to(torch.uint8).argsort(dim=-1, stable=True)
        real = real.gather(-1, order)
        window, spread = (of.each(lambda part: part.gather(-1, index)) for of in (window, spread))
    assert window.mean is not None
    batch, kv_heads, length = real.shape
    at_mass = peak_level_of_share(window.peak, window.mean.masked_fill(~real, 0.0), rules.share)
    copies = (
        torch.zeros(1, kv_heads, dtype=torch.bool, device=real.device) if scores is None else scores >= rules.copying
    )
    reasons = {
        "sinks": sink_mask(real.flatten(0, 1), rules.sinks).view(real.shape),
        "recent": newest(real, rules.recent),
        "window": dilate(window.peak >= rules.unit, 1),
        "spread": dilate(spread.peak >= rules.spread_unit, 1),
        "following": following(window.peak >= rules.hit, rules.follow),
        "mass": window.peak >= at_mass,
        "copying": copies[..., None].expand(batch, -1, length),
    }
    if earlier is not None:
        before = earlier.expand_as(real)
        reasons["earlier"] = before if order is None else before.gather(-1, order)
    every = torch.stack(list(reasons.values()))  # [reasons, B, H_kv, n]
    short = real.sum(-1, keepdim=True) < rules.min_length
    keep = (every.any(0) | short) & real
    if rules.together:
        keep = keep.any(1, keepdim=True).expand_as(keep) & real
    lost = window.peak.masked_fill(keep, 0.0).amax((1, 2))
    # Counts as float32: their quotient would be of PyTorch's default type, which is the user's.
    shares = (every & real).sum((2, 3)).float() / real.sum((1, 2)).clamp_min(1)
    if order is not None:
        keep = torch.zeros_like(keep).scatter(-1, order, keep)
    return Needs(keep, lost, dict(zip(reasons, shares.unbind(0), strict=True)))
