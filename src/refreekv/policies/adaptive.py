"""The adaptive policy: keep what any query of the prompt needed, and let the heads that copy keep all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from refreekv import kernels
from refreekv.core.needs import Grading, Rules
from refreekv.core.quantisation import Ladder
from refreekv.core.selection import Selection
from refreekv.core.surrogates import Surrogates
from refreekv.policies.base import LayerView, Policy, ProbePlan, check_count, check_flag, check_frozen_layers
from refreekv.policies.registry import register

LADDER = Ladder.of("k4v2", "k4v4", "k6v4", "k7v6")
"""What entries are stored in: the few that lie on the frontier of bytes and damage."""
WAITS_FOR = 16
"""It looks at later turns when one in so many tokens of the conversation came since it last did."""
STAND_IN_STEP = 4
"""One in so many of the window's queries makes the surrogates."""


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
    take its place, surrogates (`refreekv.core.surrogates`), at the end of the first prompt of a conversation.

    And the same peaks say in how many bits each entry is stored: the fewest that change the output by less than
    ``code_unit * u`` would, given what a rung of `LADDER` does to an entry of this head (`refreekv.core.damage`).
    Nothing in a prompt says what copying heads will fetch, so that an entry counts as getting at least
    ``copying_peak`` times its head's copy score. In prompts of fewer than ``code_length`` tokens coding may do less, in
    proportion: what bits save grows with a prompt, what an error costs does not.
    With formats to choose from evicting may do ``evict_unit * u`` only: next to few bits it saves little, and it is
    what a later question that nothing in the prompt foretells suffers from.

    A later turn is looked at once a 16th of the conversation is new: until then all of it stays, as answers do.

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
        Surrogates of each head, with 16 bits: entries in place of all that it evicts. 0: none.
    min_length : int
        Tokens under which a prompt is kept whole.
    shared : bool
        Whether all heads of a layer keep what any of them keeps, for engines with one table a layer.
    bits : int or "auto"
        ``"auto"``: as many bits for each entry as it is worth. 16: what is kept stays as the model computed it.
    copying_weight : float
        How much more than its peak says an entry of a copying head is worth. 1: no more.
    copying_peak : float
        Attention that any entry of a head with a copy score of 1 counts as getting, at least, where it is about its
        bits; in other heads that times their score. 0: what it got.
    code_unit, evict_unit : float
        What coding may do to an entry, and what evicting it may where there are several formats, in units ``u``.
    code_length : int
        Entries of a head from which on coding may do all of that; with fewer it may do less, in proportion. 0: it may
        always.
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
    bits: int | Literal["auto"] = "auto"
    copying_weight: float = 1.0
    code_unit: float = 3.0
    evict_unit: float = 0.5
    frozen_layers: int | Literal["all"] = 0
    copying_peak: float = 0.015
    code_length: int = 8192

    reads_copy_scores: ClassVar[bool] = True
    decides_together: ClassVar[bool] = True
    before: ClassVar[Mapping[str, object]] = {"copying_peak": 0.0, "code_length": 0}

    def __post_init__(self) -> None:
        for name, minimum in (
            ("sinks", 0),
            ("window", 1),
            ("spread", 1),
            ("follow", 0),
            ("stand_ins", 0),
            ("min_length", 0),
            ("code_length", 0),
        ):
            check_count(name, getattr(self, name), minimum=minimum)
        _check_number("constant", self.constant, 1.0, "the influence on a layer's output under which nothing is kept")
        _check_number("hit", self.hit, 1.0, "an attention probability")
        _check_number("lost_mass", self.lost_mass, 1.0, "the share of its attention that a head may lose")
        _check_number("copying", self.copying, float("inf"), "a copy score")
        _check_number("spread_factor", self.spread_factor, float("inf"), "a factor")
        _check_number("copying_weight", self.copying_weight, float("inf"), "a factor")
        _check_number("copying_peak", self.copying_peak, float("inf"), "an attention")
        _check_number("code_unit", self.code_unit, float("inf"), "a factor")
        _check_number("evict_unit", self.evict_unit, float("inf"), "a factor")
        if self.bits not in ("auto", 16):
            raise ValueError(f"bits must be 'auto' or 16, got {self.bits!r}: other widths are kv_dtype's")
        check_flag("shared", self.shared)
        check_frozen_layers(self.frozen_layers)

    @property
    def default_ladder(self) -> Ladder | None:
        """What entries are stored in if nobody says otherwise; None: as they are."""
        return None if self.bits == 16 or self.shared or self.constant == 0 else LADDER

    @property
    def _replaces(self) -> bool:
        """Whether surrogates take the place of what is evicted: what few bits do to the rest hides what they mend."""
        return self.stand_ins > 0 and self.default_ladder is None

    def probe_plan(self, n: int) -> ProbePlan:
        if self.constant == 0 or n < self.min_length:
            return ProbePlan()
        return ProbePlan(
            rows=self.window,
            spread=self.spread,
            reduced=True,
            distance=self.window,
            spread_sums=False,
            queries=self._replaces,
        )

    def waits(self, new: int, settled: int) -> bool:
        # What was kept stays, whatever it says, and most of a short turn is among the newest.
        return new * WAITS_FOR <= settled

    def select(self, view: LayerView) -> Selection | None:
        if view.window is None or view.spread is None:
            return None
        by_head = view.copy_scores is not None and not self.shared
        unit = self.constant * view.heads**0.5
        if view.copy_scores is None:
            unit /= 2
        code_unit, damage = self._coding(view) if by_head else (self.code_unit, None)
        rules = Rules(
            sinks=self.sinks,
            recent=self.window,
            unit=unit,
            spread_unit=unit * self.spread_factor,
            hit=self.hit,
            follow=self.follow,
            share=1.0 - self.lost_mass,
            copying=self.copying,
            min_length=self.min_length,
            together=not by_head,
            copying_weight=self.copying_weight,
            code_unit=code_unit,
            copying_peak=self.copying_peak,
        )
        scores = None if view.copy_scores is None else view.copy_scores.to(view.keys.device)
        real = None if view.valid is None else view.real_heads
        kept_by = rules
        if damage is not None:
            kept_by = rules._replace(unit=unit * self.evict_unit, spread_unit=rules.spread_unit * self.evict_unit)
        grading = None if damage is None else Grading(rules, damage)
        found = kernels.needed(
            view.window, view.spread, scores, kept_by, real=real, earlier=view.earlier, grading=grading,
            origins=view.origins,
        )  # fmt: skip
        keep = found.keep
        if self.shared and (view.valid is None or view.valid.dim() == 2):
            keep = keep[:, :1]
        found_surrogates = self._surrogates(view, keep) if by_head else None
        metric = found.lost / view.heads**0.5
        return Selection(keep, metric=metric, reasons=found.shares, surrogates=found_surrogates, levels=found.levels)

    def _coding(self, view: LayerView) -> tuple[float, Tensor | None]:
        """What coding may do to an entry, in units, and what rungs do, in which rows of different lengths differ."""
        damage = view.rungs
        if damage is None or self.code_length == 0:
            return self.code_unit, damage
        share = view.lengths / self.code_length
        if isinstance(share, Tensor):
            return self.code_unit, damage / share.clamp_max(1.0)[:, None, None]
        return self.code_unit * min(share, 1.0), damage

    def _surrogates(self, view: LayerView, keep: Tensor) -> Surrogates | None:
        if not self._replaces or view.queries is None:
            return None
        # The last query in any case: short prompts have few.
        some = slice((view.queries.shape[2] - 1) % STAND_IN_STEP, None, STAND_IN_STEP)
        return kernels.make_surrogates(
            view.queries[:, :, some],
            view.keys,
            view.values,
            keep,
            count=self.stand_ins,
            real=None if view.valid is None else view.real_heads,
            asked=None if view.asked is None else view.asked[:, some],
        )


def _check_number(name: str, value: object, below: float, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < below:
        raise ValueError(f"{name} must lie in [0, {below:g}), got {value!r}: it is {meaning}")
