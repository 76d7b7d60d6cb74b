"""A masked full-cache reference: nothing is evicted, what would be is made invisible.

Written from the description of the method alone, and sharing no code with refreekv: the
model keeps an ordinary full cache, and an attention function of our own leaves evicted
positions out of the softmax, per layer, row and KV head. What is evicted is computed here
in float64 NumPy, one head and one prefix at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "masked_reference"


@dataclass(frozen=True)
class Rule:
    """What is evicted. ``ranking`` is ``"position"``, ``"attention"``, ``"window"`` or ``"uneven"``."""

    ranking: str
    threshold: float = 0.01
    sinks: int = 4
    probe_rows: int = 1
    frozen_layers: int = 2
    norm_includes_sinks: bool = False
    recent: int = 0
    spread: int = 0
    size: int | None = None
    ratio: float | None = None


@dataclass
class Turn:
    """What one turn gave: greedy tokens ``[B, t]`` and the logits ``[B, t, V]`` behind them."""

    tokens: Tensor
    logits: Tensor


# -- what is kept, of one row and layer ---------------------------------------------------------


def softmax_row(logits: np.ndarray, sink_logit: float | None) -> np.ndarray:
    everything = logits if sink_logit is None else np.append(logits, sink_logit)
    weights = np.exp(everything - everything.max())
    return (weights / weights.sum())[: len(logits)]


def norm_loss(rows: np.ndarray, kept: np.ndarray, counted: np.ndarray) -> float:
    """1 - mean over heads of the kept norm / mean over heads of the full norm; rows ``[H, n]``."""
    part = np.mean([np.sqrt(np.sum(row[kept & counted] ** 2)) for row in rows])
    full = np.mean([np.sqrt(np.sum(row[counted] ** 2)) for row in rows])
    return 1.0 - part / full


def keep_by_position(probe: np.ndarray, seen: np.ndarray, rule: Rule) -> np.ndarray:
    """Boolean ``[n]``. ``probe`` is ``[H, k, n]``, ``seen`` ``[k, n]`` says which probe sees which key."""
    n = probe.shape[-1]
    rows = probe.sum(1) / seen.sum(0)
    m = min(rule.sinks, n)
    ranking = [*range(m), *range(n - 1, m - 1, -1)]
    counted = np.ones(n, bool)
    if not rule.norm_includes_sinks:
        counted[:m] = False
    for count in range(m, n):
        kept = np.zeros(n, bool)
        kept[ranking[:count]] = True
        if norm_loss(rows, kept, counted) <= rule.threshold:
            return kept
    return np.ones(n, bool)


def keep_by_attention(probe: np.ndarray, kv_heads: int, rule: Rule) -> np.ndarray:
    """Boolean ``[kv_heads, n]``: heavy hitters, a ranking per KV head, one count for all.

    Entries of different KV heads may be different tokens: position ``j`` of the rows of a
    group is the ``j``-th entry of its KV head.
    """
    heads, _, n = probe.shape
    group = heads // kv_heads
    m = min(rule.sinks, n)
    last = max(m, n - rule.recent)
    rankings = []
    for g in range(kv_heads):
        received = probe[g * group : (g + 1) * group].sum((0, 1))
        middle = sorted(range(m, last), key=lambda j: (-received[j], -j))
        rankings.append([*range(n - 1, last - 1, -1), *middle])
    rows = probe[:, -1]
    counted = np.ones(n, bool)
    if not rule.norm_includes_sinks:
        counted[:m] = False
    for count in range(n - last, n - m + 1):
        kept = np.zeros((kv_heads, n), bool)
        kept[:, :m] = True
        for g in range(kv_heads):
            kept[g, rankings[g][:count]] = True
        per_query_head = np.repeat(kept, group, axis=0)
        part = np.mean([np.linalg.norm(r[k & counted]) for r, k in zip(rows, per_query_head, strict=True)])
        full = np.mean([np.linalg.norm(r[counted]) for r in rows])
        if full == 0 or 1.0 - part / full <= rule.threshold:
            return kept
    return np.ones((kv_heads, n), bool)


def keep_window(n: int, rule: Rule) -> np.ndarray:
    """Boolean ``[n]``: sinks and the newest entries, of a fixed number together."""
    budget = min(n, rule.size) if rule.size is not None else max(1, int(np.floor(n * rule.ratio + 1e-9)))
    m = min(rule.sinks, budget)
    kept = np.zeros(n, bool)
    kept[:m] = True
    kept[n - (budget - m) :] = budget > m
    return kept


def keep_uneven(n: int, head: int) -> np.ndarray:
    """Boolean ``[n]``: the 6 newest of a KV head, and of the others more in each head than in the one before."""
    newest = np.arange(n, 0, -1)
    return (newest <= 6) | (newest * 7 % 5 < 1 + head)


# -- the model around it ------------------------------------------------------------------------


class MaskedReference:
    """Greedy decoding of a model whose evicted positions are masked, over any number of turns.

    ``evicted[layer]`` is boolean ``[B, kv_heads, columns]``; ``kept_counts[layer]`` has, per
    row and KV head, the entries kept when the last prompt ended.
    """

    def __init__(self, model: PreTrainedModel, rule: Rule | None):
        self.model = model
        self.rule = rule
        self.cache = DynamicCache(config=model.config)
        self.mask: Tensor | None = None  # [B, columns], over all turns
        self.evicted: dict[int, np.ndarray] = {}
        self.kept_counts: dict[int, list[int]] = {}
        self.prompt_ends = False
        config = model.config
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        self._last: Tensor | None = None

    def turn(self, ids: Tensor, mask: Tensor | None, steps: int) -> Turn:
        """Feed a prompt (after what was generated before) and decode ``steps`` tokens greedily."""
        mask = torch.ones_like(ids) if mask is None else mask
        if self._last is not None:
            ids, mask = torch.cat([self._last, ids], 1), torch.cat([torch.ones_like(self._last), mask], 1)
        tokens, logits = [], []
        self.prompt_ends = True
        for _ in range(steps):
            step = self.feed(ids, mask)[:, -1]
            self.prompt_ends = False
            logits.append(step)
            ids = step.argmax(-1, keepdim=True)
            mask = torch.ones_like(ids)
            tokens.append(ids)
        self._last = tokens[-1]
        return Turn(torch.cat(tokens, 1), torch.stack(logits, 1))

    def feed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """One forward pass; logits ``[B, q, V]``."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        positions = positions_of(self.mask)[:, -ids.shape[1] :]
        with _running(self), torch.no_grad():
            output = self.model(ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache)
        return output.logits

    def crop(self, tokens: int) -> None:
        """Take the last tokens back."""
        self.cache.crop(-tokens)
        self.mask = self.mask[:, :-tokens]
        self.evicted = {layer: held[..., :-tokens] for layer, held in self.evicted.items()}

    # -- one attention layer --

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
        layer, groups = module.layer_idx, query.shape[1] // key.shape[1]
        if layer in self.full:
            visible = self.visible(layer, query.shape[2], key.shape[1]).repeat_interleave(groups, 1)
        else:
            visible = (mask == 0).expand(-1, query.shape[1], -1, -1)
        scaling = kwargs["scaling"]
        logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        weights = torch.nan_to_num(torch.softmax(logits, -1))[..., : key.shape[2]]
        output = weights @ value.repeat_interleave(groups, 1)
        if self.prompt_ends and layer in self.full and self.rule is not None:
            self.evict(layer, query, key, scaling, softcap, sinks)
        return output.transpose(1, 2), None

    def visible(self, layer: int, queries: int, kv_heads: int) -> Tensor:
        batch, columns = self.mask.shape
        held = self.evicted.get(layer, np.zeros((batch, kv_heads, 0), bool))
        held = np.pad(held, ((0, 0), (0, 0), (0, columns - held.shape[-1])))
        self.evicted[layer] = held
        causal = torch.arange(columns) <= torch.arange(columns - queries, columns)[:, None]
        return causal & self.mask.bool()[:, None, None] & ~torch.from_numpy(held)[:, :, None]

    # -- one eviction --

    def evict(self, layer: int, query: Tensor, key: Tensor, scaling: float, softcap: float | None, sinks: Any) -> None:
        ordinal = self.full.index(layer)
        batch, kv_heads = key.shape[:2]
        real = self.mask.bool().numpy()
        self.kept_counts[layer] = []
        for row in range(batch):
            held = [np.flatnonzero(real[row] & ~self.evicted[layer][row, g]) for g in range(kv_heads)]
            kept = [np.ones(len(own), bool) for own in held]
            if ordinal >= self.rule.frozen_layers:
                kept = self.select(row, held, query, key, scaling, softcap, sinks)
            for g in range(kv_heads):
                self.evicted[layer][row, g, held[g][~kept[g]]] = True
            self.kept_counts[layer].append(tuple(int(own.sum()) for own in kept))

    def select(self, row: int, held: list[np.ndarray], query: Tensor, key: Tensor, scaling, softcap, sinks):
        rule, kv_heads, n = self.rule, len(held), len(held[0])
        if rule.ranking == "window":
            return np.tile(keep_window(n, rule), (kv_heads, 1))
        if rule.ranking == "uneven":
            return [keep_uneven(len(own), head) for head, own in enumerate(held)]
        columns = self.mask.shape[1]
        asked = range(columns - query.shape[2], columns)
        probes = [c for c in asked if self.mask[row, c]]
        step = 1
        while len(probes) // step > rule.spread > 0:
            step *= 2
        spread = probes[step - 1 :: step] if rule.spread else []
        probes = sorted({*spread, *probes[-rule.probe_rows :]})
        heads = query.shape[1]
        probe = np.zeros((heads, len(probes), n))
        seen = np.zeros((len(probes), n), bool)
        for head in range(heads):
            own = held[head // (heads // kv_heads)]
            keys = key[row, head // (heads // kv_heads), own].double().numpy()
            sink = None if sinks is None else float(sinks[head])
            for k, column in enumerate(probes):
                logits = keys @ query[row, head, column - columns].double().numpy() * scaling
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                probe[head, k, own <= column] = softmax_row(logits[own <= column], sink)
                seen[k] |= own <= column
        if rule.ranking == "position":
            return np.tile(keep_by_position(probe, seen, rule), (kv_heads, 1))
        return keep_by_attention(probe, kv_heads, rule)


def positions_of(mask: Tensor) -> Tensor:
    """Position of each token among the real ones, ``[B, columns]``."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


_ACTIVE: list[MaskedReference] = []


@contextmanager
def _running(reference: MaskedReference) -> Iterator[None]:
    _ACTIVE.append(reference)
    try:
        yield
    finally:
        _ACTIVE.pop()


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    return _ACTIVE[-1].attend(module, query, key, value, mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


def run(model: PreTrainedModel, rule: Rule | None, turns: Sequence[tuple[Tensor, Tensor | None]], steps: int):
    """All turns on one reference; the turns' results and the reference itself."""
    reference = MaskedReference(model, rule)
    return [reference.turn(ids, mask, steps) for ids, mask in turns], reference
