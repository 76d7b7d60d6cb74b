"""What a policy is: what to probe, and what to keep of one layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from refreekv.core.damage import plain_damage, rung_damage
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.probes import causal_visibility
from refreekv.core.quantisation import KVDtype, Ladder
from refreekv.core.reductions import ProbeReductions
from refreekv.core.scores import mean_over_visible_rows
from refreekv.core.selection import CutSelection, Selection

AUTO = "auto"
"""The ``kv_dtype`` that stands for a policy's own number formats."""


def spread_step(spread: int, prompt: int) -> int:
    """The smallest power of two of which ``n`` tokens hold no more than ``spread``."""
    step = 1
    while prompt // step > spread:
        step *= 2
    return step


@dataclass(frozen=True)
class ProbePlan:
    """Which attention rows a policy wants to see.

    Attributes
    ----------
    rows : int
        Number of last prompt queries to probe; 0 if the policy needs no attention.
    spread : int
        Beside these, up to this many queries spread evenly over the prompt: every ``s``-th one
        from its start, ``s`` the smallest power of two that gives no more than ``spread``, so
        more than half as many on a longer prompt. Which they are depends on the number of
        tokens alone, not on padding or on the chunks that a prompt comes in. On a later turn
        they come from that turn's own tokens.
    queries : bool
        Whether the policy wants the probed queries themselves, too.
    reduced : bool
        Whether the policy is content with `ProbeReductions` of both kinds of queries, in place of
        their rows: what hundreds of probes are affordable as.
    distance : int
        Of a reduced plan: the spread queries count for positions at least so far before them only.
        What a token's neighbours see in it says nothing about what is needed later.
    spread_sums : bool
        Of a reduced plan: whether of the spread queries the mean is wanted beside the peak.
    """

    rows: int = 0
    spread: int = 0
    queries: bool = False
    reduced: bool = False
    distance: int = 0
    spread_sums: bool = True

    @property
    def count(self) -> int:
        """Most queries that are probed."""
        return self.rows + self.spread


@dataclass(frozen=True)
class LayerView:
    """One layer's prompt as a policy sees it: everything it may know, nothing it may change.

    Attributes
    ----------
    keys, values : Tensor
        ``[B, H_kv, n, D]``, per KV head.
    valid : Tensor or None
        Boolean ``[B, n]``, False at padding; ``[B, H_kv, n]`` where an earlier turn left
        heads with different numbers of entries; None if there is no padding. Policies read
        `real` or `real_heads` instead.
    rows : Tensor or None
        ``[B, H, k, n]`` float32 attention of the probed queries, oldest query first; None if
        the plan asked for none. ``k`` is smaller than planned on short prompts. Where a row of
        the batch has fewer probes than ``k``, rows of zeros are in their place.
    layer : int or Tensor
        Index among the layers that may be pruned (the full-attention layers). Integer ``[B, 1]``
        where each row is another layer of one prompt: measuring asks for many layers at once.
    layers : int
        Number of such layers.
    visible : Tensor or None
        Boolean ``[B | 1, k, n]`` (or ``[B, H, k, n]``): the keys each probed query sees, none for
        a query at padding; None means all.
    queries : Tensor or None
        ``[B, H, k, D]`` float32: the queries of ``rows`` or ``window``, position-encoded and scaled, so
        that their products with keys are attention logits; None if the plan did not ask for them, or if
        more than a product makes a logit (soft capping).
    asked : Tensor or None
        Boolean ``[B | 1, k]``, False where one of ``queries`` is padding; None means none is.
    window, spread : ProbeReductions or None
        Of a reduced plan, in place of ``rows``: what the last queries and those spread over the
        prompt gave each position.
    heads : int
        Query heads.
    copy_scores : Tensor or None
        ``[B | 1, H_kv]`` float32: how much each KV head copies (`pruning.copy_scores`); None where
        nobody measured it.
    earlier : Tensor or None
        Boolean ``[1, 1 | H_kv, n]``: what earlier prompts of the conversation left; None if this is the first.
    origins : Tensor or None
        int32 ``[B | 1, H_kv]``, where ``valid`` says that each head's entries are those from there on, and no more.
    forms : tuple of PackedFormat
        The rungs of the ladder that what is kept will be stored in, from narrow to wide; empty: there is none.
    key_power : Tensor or None
        ``[B | 1, H_kv, 4]`` float32: how much the model's queries look at each quarter of its keys' channels
        (`core.damage`); None where nobody measured it.
    damage : Tensor or None
        What `rungs` tells, where it is known beforehand; None: it follows from ``forms`` and ``key_power``.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None
    rows: Tensor | None
    layer: int | Tensor
    layers: int
    visible: Tensor | None = None
    queries: Tensor | None = None
    asked: Tensor | None = None
    window: ProbeReductions | None = None
    spread: ProbeReductions | None = None
    heads: int = 0
    copy_scores: Tensor | None = None
    earlier: Tensor | None = None
    origins: Tensor | None = None
    forms: tuple[PackedFormat, ...] = ()
    key_power: Tensor | None = None
    damage: Tensor | None = None
    _shared: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def real(self) -> Tensor:
        """Boolean ``[B, n]``, False at padding."""
        if self.valid is not None:
            return self.valid.any(1) if self.valid.dim() == 3 else self.valid
        batch, _, length, _ = self.keys.shape
        return torch.ones(batch, length, dtype=torch.bool, device=self.keys.device)

    @property
    def real_heads(self) -> Tensor:
        """Boolean ``[B, H_kv, n]``, False where a KV head holds padding."""
        if self.valid is not None and self.valid.dim() == 3:
            return self.valid
        return self.real[:, None].expand(-1, self.keys.shape[1], -1)

    @property
    def lengths(self) -> int | Tensor:
        """Entries of a row's fullest head: a number, or float32 ``[B | 1]`` where rows may differ."""
        batch, _, length, _ = self.keys.shape
        # Columns are as many as the fullest head of all rows needs.
        if self.valid is None or (self.origins is not None and batch == 1):
            return length
        if self.origins is not None:
            return (length - self.origins.amin(1)).clamp_min(1).float()
        return self.real_heads.sum(-1).amax(1).clamp_min(1).float()

    @property
    def probe(self) -> Tensor:
        """``rows``; ValueError if the policy's plan asked for none."""
        if self.rows is None:
            raise ValueError("this policy's probe_plan asks for no attention rows, yet select reads them")
        return self.rows

    @cached_property
    def mean_row(self) -> Tensor:
        """``[B, H, n]``: the probe rows averaged, each position over the rows that see it."""
        rows = self.probe
        probes, length = rows.shape[2:]
        if probes == 1:
            return rows[:, :, 0]
        if self.visible is not None:
            return mean_over_visible_rows(rows, self.visible)
        columns = torch.arange(length - probes, length, device=rows.device)
        return mean_over_visible_rows(rows, causal_visibility(self.real, columns))

    @property
    def rungs(self) -> Tensor | None:
        """What storing an entry in each rung does, as a share of what evicting it does: ``[B | 1, H_kv, R]`` float32.

        None where there are no rungs to choose from.
        """
        if len(self.forms) < 2:
            return None
        if self.damage is not None:
            return self.damage
        if self.key_power is None:
            return plain_damage(self.forms, self.keys.shape[1], self.keys.device)[None]
        return rung_damage(self.key_power, self.forms)

    def last(self, rows: int) -> "LayerView":
        """The same layer with the last ``rows`` probed queries only: what a plan that asks for fewer is shown."""
        if rows == 0:
            return replace(self, rows=None, visible=None, queries=None)
        if self.rows is None or self.rows.shape[2] <= rows:
            return self
        return replace(
            self,
            rows=self.rows[:, :, -rows:],
            visible=None if self.visible is None else self.visible[..., -rows:, :],
            queries=None if self.queries is None else self.queries[:, :, -rows:],
        )

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives, computed for the first one that asks under ``key``.

        For numbers that several policies can share that look at the same layer.
        """
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]


class Policy(ABC):
    """Base of all policies: a frozen dataclass whose fields are its parameters.

    A policy is stateless and knows neither cache nor engine. To add one, write one file
    in ``refreekv/policies`` with a frozen dataclass, `select` and a ``@register("name")``.
    """

    name: ClassVar[str] = ""
    """The registered name."""

    summary: ClassVar[str] = ""
    """One line for listings."""

    frozen_layers: int | Literal["all"] = 0
    """Leading full-attention layers that are never pruned; ``"all"`` prunes nothing."""

    reads_copy_scores: ClassVar[bool] = False
    """Whether `select` reads `LayerView.copy_scores`, which take one short forward pass a model."""

    decides_together: ClassVar[bool] = False
    """Whether `select` may be asked about several layers of a prompt at once, each a row (`LayerView.layer`)."""

    before: ClassVar[Mapping[str, object]] = {}
    """Parameters whose default is not what was done before there were any, with that: for files older than they."""

    def probe_plan(self, n: int) -> ProbePlan:
        """Which attention rows `select` needs for a layer that holds ``n`` entries."""
        return ProbePlan()

    @abstractmethod
    def select(self, view: LayerView) -> Selection | CutSelection | None:
        """What to keep of this layer; None keeps everything."""

    def waits(self, new: int, settled: int) -> bool:
        """Whether a conversation's turn may end without a word of this policy: all of it stays, as answers do.

        Asked where what earlier turns evicted does not come back.

        Parameters
        ----------
        new : int
            Tokens since it was last asked what to keep, those of this turn among them.
        settled : int
            Tokens before them, evicted or not.
        """
        return False

    @property
    def default_ladder(self) -> Ladder | None:
        """Number formats that what is kept is stored in, if nobody says otherwise; None: as the model computed it."""
        return None

    def freezes(self, layer: int) -> bool:
        """Whether the full-attention layer with index ``layer`` is never pruned."""
        return self.frozen_layers == "all" or layer < self.frozen_layers

    @property
    def spec(self) -> str:
        """The policy as the command line takes it: its name, and the parameters that are not the defaults."""
        changed = []
        for one in fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            if value != one.default and value is not None:
                changed.append(f"{one.name}={str(value).lower() if isinstance(value, bool) else value}")
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    def __str__(self) -> str:
        """The name with all parameters, so that results under other defaults are not taken for these."""
        parameters = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))  # type: ignore[arg-type]
        return f"{self.name}({parameters})"


def ladder_for(policy: Policy, kv_dtype: str | KVDtype | Ladder | None) -> Ladder | None:
    """The number formats that ``kv_dtype`` means: those of the policy's own for `AUTO`, none for None.

    Raises
    ------
    ValueError
        Unknown name or parameter, or a value out of range.
    TypeError
        Something else than a string, a `KVDtype`, a `Ladder` or None.
    """
    if isinstance(kv_dtype, str) and kv_dtype == AUTO:
        return policy.default_ladder
    return None if kv_dtype is None else Ladder.parse(kv_dtype)


def check_count(name: str, value: object, minimum: int = 0) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def check_budget(policy: str, size: object, ratio: object) -> None:
    """Raise ValueError unless exactly one of ``size`` (an integer >= 1) and ``ratio`` (in (0, 1]) is given."""
    if (size is None) == (ratio is None):
        raise ValueError(
            f"{policy} needs a budget: give exactly one of size= (tokens) and ratio= (share to keep), "
            f"got size={size!r} and ratio={ratio!r}"
        )
    if size is not None:
        check_count("size", size, minimum=1)
    elif isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio is the share to keep and must lie in (0, 1], got {ratio!r}")


def check_frozen_layers(value: object) -> None:
    """Raise ValueError unless ``value`` is a non-negative integer or ``"all"``."""
    if value != "all":
        check_count("frozen_layers", value)
