"""The adaptive policy: keep what any query of the prompt needed, and let the heads that copy keep all."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.budget import newest
from refreekv.core.neighbours import dilate, following, peak_level_of_share
from refreekv.core.reductions import ProbeReductions
from refreekv.core.selection import Selection, sink_mask
from refreekv.core.surrogates import StandIns
from refreekv.policies.base import LayerView, Policy, ProbePlan, check_count, check_flag, check_frozen_layers
from refreekv.policies.registry import register

STAND_IN_STEP = 4
"""One in so many of the window's queries says what the stand-ins are to be."""

REASONS = ("sinks", "recent", "window", "spread", "following", "mass", "copying", "settled")
"""Why positions stay; the last one on later turns only."""


@register("adaptive")
@dataclass(frozen=True)
class Adaptive(Policy):
    r"""What any probed query needed, its surroundings, and everything in heads that copy; no budget.

    For each KV head a position stays if one of these holds, with ``H`` the number of query heads and
    the unit ``u = constant * sqrt(H)``: what a position that one head gives attention ``u`` adds to the
    layer's output, relative to that output, is about ``constant``, however many heads there are.

    - *window*: its highest attention from the last ``window`` queries, over the query heads of the
      group, is at least ``u``; or it is next to such a position.
    - *spread*: its highest attention from queries spread over the whole prompt, at least ``window``
      positions later, is at least ``spread_factor * u``; or it is next to such a position.
    - *following*: it is one of ``follow`` positions after one with a window peak of ``hit`` or more:
      answers copy on from what they found.
    - *mass*: it peaks as high as is needed for each head to keep ``1 - lost_mass`` of its mean attention.
    - *copying*: the head's copy score is at least ``copying``. These few heads fetch text from anywhere
      and nothing in the prompt says from where next; all others live on what the rules above keep.
      The score is a property of the model, measured once on random tokens (`engines.transformers.copy_scores`).
    - It is a sink, among the newest ``window`` positions, or was kept at an earlier prompt's end.

    What a head evicts all the same gets little attention each, but some together: ``stand_ins`` entries
    take its place (`refreekv.core.surrogates`), at the end of the first prompt of a conversation.

    Prompts of fewer than ``min_length`` tokens are kept whole: they need nearly everything and
    hold little. Without copy scores all heads of a layer keep what any of them needs, by half the unit.

    Parameters
    ----------
    constant : float
        Smallest influence on a layer's output that counts, in shares of that output, in [0, 1). 0
        evicts nothing.
    sinks : int
        Leading tokens that are always kept.
    window : int
        Last queries that are probed, and newest tokens that are always kept.
    spread : int
        Most queries over the whole prompt that are probed.
    spread_factor : float
        How much more these must attend to a position: they are hundreds, and past.
    hit, follow : float, int
        Attention from which on a position was found, and tokens kept after it.
    lost_mass : float
        Share of its mean attention that a head may lose.
    copying : float
        Copy score, in [0, 1], from which on a head keeps everything. Above 1: none does.
    stand_ins : int
        Entries of each head that stand in for all that it evicts. 0: none.
    min_length : int
        Tokens under which a prompt is kept whole.
    shared : bool
        Whether all heads of a layer keep what any of them keeps, for engines with one table a layer.
    frozen_layers : int or "all"
        Leading full-attention layers that are never pruned.
    """

    constant: float = 2e-4
    sinks: int = 4
    window: int = 64
    spread: int = 256
    spread_factor: float = 25.0
    hit: float = 0.05
    follow: int = 40
    lost_mass: float = 0.1
    copying: float = 0.1
    stand_ins: int = 4
    min_length: int = 512
    shared: bool = False
    frozen_layers: int | Literal["all"] = 0

    reads_copy_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, minimum in (
            ("sinks", 0),
            ("window", 1),
            ("spread", 1),
            ("follow", 0),
            ("stand_ins", 0),
            ("min_length", 0),
        ):
            check_count(name, getattr(self, name), minimum=minimum)
        _check_number("constant", self.constant, 1.0, "the influence on a layer's output under which nothing is kept")
        _check_number("hit", self.hit, 1.0, "an attention probability")
        _check_number("lost_mass", self.lost_mass, 1.0, "the share of its attention that a head may lose")
        _check_number("copying", self.copying, float("inf"), "a copy score")
        _check_number("spread_factor", self.spread_factor, float("inf"), "a factor")
        check_flag("shared", self.shared)
        check_frozen_layers(self.frozen_layers)

    def probe_plan(self, n: int) -> ProbePlan:
        if self.constant == 0 or n < self.min_length:
            return ProbePlan()
        return ProbePlan(
            rows=self.window,
            spread=self.spread,
            reduced=True,
            distance=self.window,
            spread_sums=False,
            queries=self.stand_ins > 0,
        )

    def select(self, view: LayerView) -> Selection | None:
        if view.window is None or view.spread is None:
            return None
        by_head = view.copy_scores is not None and not self.shared
        if by_head and view.valid is None and view.keys.is_cuda and kernels.available():
            return self.select_fused(view)
        real, window, spread = view.real_heads, view.window, view.spread
        order = None
        if view.valid is not None:
            # Padding may lie between two turns: neighbours are the entries next to each other without it.
            order = real.to(torch.uint8).argsort(dim=-1, stable=True)
            real = real.gather(-1, order)
            index = order
            window, spread = (of.each(lambda part: part.gather(-1, index)) for of in (window, spread))
        peak = window.peak
        reasons = self._reasons(view, real, window, spread)
        keep = torch.stack(list(reasons.values())).any(0)
        short = real.sum(-1, keepdim=True) < self.min_length
        if view.settled is not None:
            settled = view.settled.expand_as(real)
            reasons["settled"] = settled if order is None else settled.gather(-1, order)
            keep = keep | reasons["settled"]
        keep = (keep | short) & real
        if not by_head:
            keep = keep.any(1, keepdim=True).expand_as(keep) & real
        lost = peak.masked_fill(keep, 0.0).amax((1, 2)) / view.heads**0.5
        shares = (torch.stack(list(reasons.values())) & real).sum((2, 3)) / real.sum((1, 2)).clamp_min(1)
        if order is not None:
            keep = torch.zeros_like(keep).scatter(-1, order, keep)
        if self.shared and (view.valid is None or view.valid.dim() == 2):
            keep = keep[:, :1]
        reason = dict(zip(reasons, shares.unbind(0), strict=True))
        standing = self._stand_ins(view, keep) if by_head else None
        return Selection(keep, metric=lost, reasons=reason, stand_ins=standing)

    def _stand_ins(self, view: LayerView, keep: Tensor) -> StandIns | None:
        if self.stand_ins == 0 or view.queries is None:
            return None
        some = slice(STAND_IN_STEP - 1, None, STAND_IN_STEP)
        return kernels.stand_ins(
            view.queries[:, :, some],
            view.keys,
            view.values,
            keep,
            count=self.stand_ins,
            real=None if view.valid is None else view.real_heads,
            asked=None if view.asked is None else view.asked[:, some],
        )

    def select_fused(self, view: LayerView) -> Selection:
        """`select` in three launches, for prompts without padding whose copy scores are known."""
        from refreekv.kernels.needs import launch_needs

        assert view.window is not None
        assert view.window.mean is not None
        assert view.spread is not None
        assert view.copy_scores is not None
        unit = self.constant * view.heads**0.5
        keep, numbers = launch_needs(
            view.window.peak,
            view.window.mean,
            view.spread.peak,
            view.copy_scores.to(view.keys.device),
            view.settled,
            sinks=self.sinks,
            recent=self.window,
            follow=self.follow,
            unit=unit,
            spread_unit=unit * self.spread_factor,
            hit=self.hit,
            share=1.0 - self.lost_mass,
            copying=self.copying,
        )
        *shares, lost = numbers.unbind(1)
        names = REASONS if view.settled is not None else REASONS[:-1]
        reasons = dict(zip(names, shares, strict=False))
        return Selection(keep, metric=lost / view.heads**0.5, reasons=reasons, stand_ins=self._stand_ins(view, keep))

    def _reasons(
        self, view: LayerView, real: Tensor, window: ProbeReductions, spread: ProbeReductions
    ) -> dict[str, Tensor]:
        """Boolean ``[B, H_kv, n]`` for each reason to keep a position; the columns of padding are of no meaning."""
        unit = self.constant * view.heads**0.5
        if view.copy_scores is None:
            unit /= 2
        batch, kv_heads, length = real.shape
        assert window.mean is not None
        at_mass = peak_level_of_share(window.peak, window.mean.masked_fill(~real, 0.0), 1.0 - self.lost_mass)
        copying = torch.zeros(1, kv_heads, dtype=torch.bool, device=real.device)
        if view.copy_scores is not None:
            copying = view.copy_scores.to(real.device) >= self.copying
        return {
            "sinks": sink_mask(real.flatten(0, 1), self.sinks).view(real.shape),
            "recent": newest(real, self.window),
            "window": dilate(window.peak >= unit, 1),
            "spread": dilate(spread.peak >= unit * self.spread_factor, 1),
            "following": following(window.peak >= self.hit, self.follow),
            "mass": window.peak >= at_mass,
            "copying": copying[..., None].expand(batch, -1, length),
        }


def _check_number(name: str, value: object, below: float, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < below:
        raise ValueError(f"{name} must lie in [0, {below:g}), got {value!r}: it is {meaning}")
