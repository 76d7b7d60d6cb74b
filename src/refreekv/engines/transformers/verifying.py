"""Per request: a part of it is read again over what was kept, and more is kept where that differs.

At a prompt's end nothing is evicted yet. The policy is asked, what it would keep is moved to storage of its own, and
some tokens are read again over that storage: the last of the prompt, or the first of the answer, which were then
generated over everything. What they predict is compared with what the same tokens predict over everything. Where that
differs by more than is allowed, the storage goes and the policy is asked again at a stricter constant; the last step
keeps everything. So the full keys and values of all layers stay until a step has passed, beside one compressed copy.

Both readings go through the same code, the one over everything included: numbers, sliding windows that have forgotten
their beginnings, and inputs that are embedded by something else than tokens are then the same on both sides, and what
is compared is the cache alone.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from refreekv.core.selection import CutSelection, Selection
from refreekv.engines.transformers.naming import cache_argument, logits_argument
from refreekv.engines.transformers.read_again import ANSWER, PROMPT, Recheck, divergence, reading_cache
from refreekv.policies import JointPolicy, LayerView, Policy, create
from refreekv.policies.constants import at_factors, dial
from refreekv.pruning.calls import AttentionCall, Entries
from refreekv.pruning.decide import Decision, select, stored_view, with_surrogates
from refreekv.report import Verified

if TYPE_CHECKING:
    from refreekv.engines.transformers.cache import PrunedCache
    from refreekv.engines.transformers.layer import ReFreeKVLayer
    from refreekv.engines.transformers.stored_layer import StoredLayer

AXES = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1}
"""Inputs of a model that are fed again, and along which dimension tokens lie."""

FACTORS = (1 / 4, 1 / 16)
"""Constants of the steps between the first and the last, in units of the policy's own."""


def steps_of(policy: Policy) -> list[Policy]:
    """What is tried, one after the other: the policy, the same at stricter constants if it has one, everything.

    Raises
    ------
    ValueError
        A policy that decides about all layers together.
    """
    if isinstance(policy, JointPolicy):
        raise ValueError(
            f"verify=True asks a policy again layer by layer, and {policy.name!r} decides about all layers together: "
            "leave verify out, or take another policy"
        )
    stricter = at_factors(policy, FACTORS) if dial(policy) is not None else []
    # A dial at 0 keeps everything at any factor.
    return [*dict.fromkeys([policy, *stricter]), create("full")]


Shown = TypeVar("Shown", Entries, LayerView)


@dataclass
class _Held:
    """One layer at its prompt's end, before anything was done about it; without its entries, which the layer has."""

    layer: "ReFreeKVLayer"
    parts: list[Entries]
    views: list[LayerView]
    end: int  # logical length at the prompt's end
    stored: list[int]  # entries of each part
    before: dict[str, Any] = field(default_factory=dict)  # the layer's state, once something is done about it
    overwritten: list[Callable[[], None]] = field(default_factory=list)  # put back what surrogates were written over

    @classmethod
    def of(cls, layer: "ReFreeKVLayer", parts: Sequence[Entries], views: Sequence[LayerView], end: int) -> "_Held":
        """Take down what is known of the entries, and let go of them: the layer may grow meanwhile."""
        return cls(
            layer,
            [replace(_without_entries(part), queries=part.queries.none()) for part in parts],
            [_without_entries(view) for view in views],
            end,
            [part.keys.shape[2] for part in parts],
        )

    @property
    def after(self) -> int:
        """Entries behind the prompt."""
        return self.layer.get_seq_length() - self.end

    def begin(self) -> None:
        """Look at the layer's entries again, as they are now."""
        layer = self.layer
        self.before = layer.state_before_pruning()
        if layer.ragged is None:
            held = [layer.dense]
        else:
            held = [(keys[None], values[None]) for keys, values in layer.ragged.rows()]
        for at, ((keys, values), stored) in enumerate(zip(held, self.stored, strict=True)):
            keys, values = keys[:, :, :stored], values[:, :, :stored]
            self.parts[at] = replace(self.parts[at], keys=keys, values=values)
        self.views = [
            replace(view, keys=part.keys, values=part.values)
            for view, part in zip(self.views, self.parts, strict=False)
        ]

    def take_rows(self, indices: Sequence[int]) -> None:
        """Go on with these rows, of which policies cannot be asked any more."""
        self.views = []
        if self.layer.ragged is not None:
            self.parts, self.stored = [self.parts[row] for row in indices], [self.stored[row] for row in indices]
            return
        (part,) = self.parts
        valid, hidden = (None if told is None else told[list(indices)] for told in (part.valid, part.hidden))
        self.parts = [replace(part, valid=valid, hidden=hidden)]

    def select(self, policy: Policy) -> list[Selection | CutSelection | None]:
        """What a policy would keep of each part."""
        if policy.freezes(self.layer.ordinal):
            return [None] * len(self.parts)
        return [select(policy, view) for view in self.views]

    def carry_out(self, selections: Sequence[Selection | CutSelection | None]) -> None:
        """Compact the layer; `restore` takes it back."""
        decisions, ladder = [], self.layer.ladder
        for part, selection in zip(self.parts, selections, strict=True):
            if isinstance(selection, Selection) and selection.surrogates is not None and part.in_place:
                self.overwritten.append(_saved(part, selection.surrogates.columns))
            decisions.append(Decision(part, with_surrogates(part, selection, ladder), ladder))
        ragged = self.layer.ragged
        if ragged is not None and ragged.coding is not None:
            # Codes are written in place where all entries stay.
            self.layer._store(copy.deepcopy(ragged))
        self.layer._carry_out(decisions, self.after)

    def restore(self) -> None:
        """Put the layer back to where everything is there."""
        while self.overwritten:
            self.overwritten.pop()()
        for name, value in self.before.items():
            setattr(self.layer, name, value)


def _without_entries(of: Shown) -> Shown:
    """The same without keys and values, which it would keep alive while the layer grows."""
    return replace(of, keys=of.keys.new_empty(0), values=of.values.new_empty(0))


def _saved(entries: Entries, columns: Tensor) -> Callable[[], None]:
    """Remember entries ``[B, H_kv, m]`` of a dense layer; calling what is returned puts them back."""
    kept = []
    for states in (entries.keys, entries.values):
        index = columns.long()[..., None].expand(-1, -1, -1, states.shape[-1])
        kept.append((states, index, states.gather(2, index)))

    def put_back() -> None:
        for states, index, old in kept:
            states.scatter_(2, index, old)

    return put_back


class Verification:
    """What a cache under ``verify`` does about each prompt.

    Parameters
    ----------
    policy : Policy
        That of the cache: the first step.
    reading : Recheck
        What is read again, and what it may differ by.

    Attributes
    ----------
    steps : list of Policy
        What is tried, from loose to strict; the last keeps everything.
    outcome : Verified or None
        What came out about the last prompt that was verified.

    Raises
    ------
    ValueError
        A policy that cannot be asked again.
    """

    def __init__(self, policy: Policy, reading: Recheck):
        self.steps = steps_of(policy)
        self.reading = reading
        self.outcome: Verified | None = None
        self._held: list[_Held] = []
        self._inputs: dict[str, Tensor] = {}  # the tokens to read again, as far as they are known
        self._real: Tensor | None = None  # boolean [B, n] of the prompt, False at padding
        self._refused = ""

    @property
    def pending(self) -> bool:
        """Whether layers wait for tokens to be read again."""
        return bool(self._held)

    # -- while tokens come by ---------------------------------------------------------------

    def begins(self, given: Mapping[str, Any], before: int, end: int | None) -> bool:
        """Whether a call brings more prompt while layers wait for the answer to the one before; as `note`."""
        fed = _fed(given)
        if not self._held or fed is None:
            return False
        return before < end if end is not None else fed[1].shape[1] > 1

    def note(self, given: Mapping[str, Any], before: int, end: int | None) -> None:
        """Take down tokens of a call that are to be read again.

        Parameters
        ----------
        given : mapping
            Arguments of the model's forward.
        before : int
            Logical length before it.
        end : int or None
            Logical length at which the prompt ends, if somebody said so.
        """
        fed = _fed(given)
        if fed is None:
            return
        name, states = fed
        count = states.shape[1]
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(before, before + count, device=states.device)[None].expand(len(states), -1)
        inputs = {name: states, "position_ids": positions}
        if self._held:
            # Of drafts only those that stayed are behind the prompt when the next call begins.
            known = before - self._held[0].end
            self._inputs = {one: _first(part, known, AXES[one]) for one, part in self._inputs.items() if known > 0}
            self._keep(inputs, 0, count)
            return
        if end is not None and before >= end:
            return  # what is decoded
        take = count if end is None else min(count, end - before)
        if self.reading.where == PROMPT:
            self._keep(inputs, 0, take)
        elif take < count:  # drafts behind the prompt
            self._inputs = {}
            self._keep(inputs, take, count)
        mask = given.get("attention_mask")
        self._refused = "" if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2) else "a mask of one's own"
        self._real = mask[:, : before + take].bool() if isinstance(mask, Tensor) and not self._refused else None

    def _keep(self, inputs: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Add tokens from ``start`` to ``stop``: the last ones of a prompt stay, or the first ones of an answer."""
        for name, new in inputs.items():
            old, axis = self._inputs.get(name), AXES[name]
            new = new.narrow(axis, start, stop - start)
            if old is not None and old.shape[0] == new.shape[0]:
                new = torch.cat([old, new], dim=axis)
            if self.reading.where == PROMPT:
                new = _last(new, self.reading.tokens, axis)
            # A copy: a view would keep all of the prompt's embeddings alive.
            self._inputs[name] = new.clone()

    def hold(self, layer: "ReFreeKVLayer", call: AttentionCall, parts: Sequence[Entries], after: int) -> None:
        """Keep a layer as it is at its prompt's end, with what policies are to be shown of it."""
        state, views = layer.state, []
        for part in parts:
            plan = self.steps[0].probe_plan(part.keys.shape[2])
            scores, codes = state.scores_of(layer.ordinal), state.codes_of(layer.ordinal)
            views.append(stored_view(plan, call, part, layer.ordinal, state.layers, scores, layer.ladder, codes))
        self._held.append(_Held.of(layer, parts, views, layer.get_seq_length() - after))

    def check_done(self, layer: "StoredLayer") -> None:
        """Raise RuntimeError if a layer gets new tokens before its last prompt was verified."""
        if self.reading.where == PROMPT and any(held.layer is layer for held in self._held):
            raise RuntimeError(
                "verify=True reads the end of each prompt again when the model that the cache was made for has read "
                "it, and a module inside of the model was called in its place: call the model itself, or leave verify "
                "out"
            )

    def take_rows(self, layer: "StoredLayer", indices: Sequence[int]) -> None:
        """Note that these rows of a layer are in the place of those that the policy was shown."""
        for held in self._held:
            if held.layer is layer:
                held.take_rows(indices)
                self._refused = "rows of the batch were moved meanwhile, as beam search does"

    def cropped(self, length: int) -> None:
        """Note that only so many tokens are left: of a prompt that was cropped, what is left stays as it is."""
        if self._held and length < self._held[0].end:
            self.outcome = self._outcome(len(self.steps) - 1, [], 0, "the prompt was cropped meanwhile")
            self.clear()

    def clear(self) -> None:
        """Forget what is under way; layers stay as they are."""
        self._held.clear()
        self._inputs.clear()
        self._real = None
        self._refused = ""

    # -- when enough has come by --------------------------------------------------------------

    @torch.no_grad()
    def carry_out(self, cache: "PrunedCache", model: nn.Module, *, at_once: bool = False) -> None:
        """Prune the layers that are held, by the first step that passes.

        Nothing where no prompt has ended, and where more of an answer is to come, unless it is to be ``at_once``.
        """
        if not self._held:
            return
        if self.reading.where == ANSWER and not at_once and self._held[0].after < self.reading.tokens:
            return
        try:
            for held in self._held:
                held.begin()
            self.outcome = self._first_that_passes(cache, model)
        except BaseException:
            for held in self._held:  # as if there were no policy: everything is there
                held.restore()
            raise
        finally:
            self.clear()
            cache.state.changed = True

    def _first_that_passes(self, cache: "PrunedCache", model: nn.Module) -> Verified:
        end = self._held[0].end
        known = self._inputs["position_ids"].shape[-1] if self._inputs else 0
        if self.reading.where == PROMPT:
            tokens = min(known, end - 1)
            start = end - tokens
        else:
            tokens, start = min(known, self._held[0].after, self.reading.tokens), end
        coded = any(held.layer.ladder is not None for held in self._held)
        tried: list[float] = []
        reference: Tensor | None = None
        refused = self._refused or ("" if tokens > 0 else "there are no tokens to read again")
        for number, policy in enumerate(self.steps[:-1]):
            if not all(held.views for held in self._held):  # rows were moved
                break
            selections = [held.select(policy) for held in self._held]
            if not coded and all(one is None for parts in selections for one in parts):
                self._carry_out(selections)
                return self._outcome(number, [*tried, 0.0], tokens)
            if refused:
                break
            if reference is None:
                reference = self._read(cache, model, start, tokens)
            self._carry_out(selections)
            if any(held.layer.holds_hidden for held in self._held):
                refused = "tokens that a mask hides"
            else:
                found = self._read(cache, model, start, tokens)
                tried.append(self._difference(reference, found, self._counted(model, start, tokens)))
                if tried[-1] <= self.reading.allowed:
                    return self._outcome(number, tried, tokens)
            for held in self._held:
                held.restore()
            if refused:
                break
        del reference
        cache.store_exactly()
        self._carry_out([[None] * len(held.parts) for held in self._held])
        return self._outcome(len(self.steps) - 1, tried, tokens, refused)

    def _carry_out(self, selections: Sequence[Sequence[Selection | CutSelection | None]]) -> None:
        for held, chosen in zip(self._held, selections, strict=True):
            held.carry_out(chosen)

    def _outcome(self, number: int, tried: Sequence[float], tokens: int, refused: str = "") -> Verified:
        return Verified(
            step=number,
            steps=len(self.steps),
            policy=self.steps[number].spec,
            allowed=self.reading.allowed,
            tried=tuple(tried),
            tokens=tokens,
            where=self.reading.where,
            reason=refused,
        )

    def _difference(self, reference: Tensor, logits: Tensor, counted: Tensor | None) -> float:
        """Mean divergence over the tokens of each row ``[B, q, V]`` that count; of the worst row."""
        kl = divergence(reference, logits)
        if counted is None:
            return float(kl.mean(1).max())
        return float(((kl * counted).sum(1) / counted.sum(1).clamp_min(1)).max())

    def _counted(self, model: nn.Module, start: int, tokens: int) -> Tensor | None:
        """Boolean ``[B, q]``, False at padding, in front of a prompt or behind an answer; None: none is."""
        if self.reading.where == PROMPT:
            return None if self._real is None else self._real[:, start : start + tokens]
        ids, end = self._inputs.get("input_ids"), _end_tokens(model)
        if ids is None or not end:
            return None
        ended = torch.isin(ids[:, :tokens], torch.tensor(end, device=ids.device))
        return ended.cumsum(1) - ended.long() == 0  # the end token is the last that counts

    def _read(self, cache: "PrunedCache", model: nn.Module, start: int, tokens: int) -> Tensor:
        """Logits ``[B, q, V]`` of the tokens from logical length ``start`` on, over what the cache holds before."""
        prompt = self.reading.where == PROMPT
        real = None if self._real is None or not prompt else self._real[:, start : start + tokens]
        reading = reading_cache(cache, start, tokens, real, self._real)
        named = inspect.signature(model.forward).parameters
        some = _last if prompt else _first
        inputs = {name: some(part, tokens, AXES[name]) for name, part in self._inputs.items() if name in named}
        more = cache_argument(model.forward, reading) | logits_argument(model.forward, tokens)
        logits: Tensor = model(**inputs, use_cache=True, **more).logits
        return logits[:, -tokens:]


def _fed(given: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """The argument that holds a call's tokens or their embeddings."""
    return next(((name, given[name]) for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)


def _end_tokens(model: nn.Module) -> list[int]:
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return list(end) if isinstance(end, list | tuple) else [] if end is None else [end]


def _first(part: Tensor, tokens: int, axis: int) -> Tensor:
    """The first tokens of an input, as many as there are at most."""
    return part.narrow(axis, 0, min(tokens, part.shape[axis]))


def _last(part: Tensor, tokens: int, axis: int) -> Tensor:
    """The last tokens of an input, as many as there are at most."""
    count = min(tokens, part.shape[axis])
    return part.narrow(axis, part.shape[axis] - count, count)
