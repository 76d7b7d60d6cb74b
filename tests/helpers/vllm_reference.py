"""transformers with evictions done plainly: keep the rows, drop the others, attend to what is there.

Shares nothing with refreekv's caches or attention, nor with the plugin. Of refreekv it uses the
policies' `select`, on attention rows that this file computes itself; what is kept of a block is
decided here again, in NumPy.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from refreekv import policies
from refreekv.core.reductions import ProbeReductions
from refreekv.core.selection import CutSelection
from refreekv.policies import LayerView
from refreekv.pruning.copy_scores import tokens_said_twice

CHUNK = 256


@dataclass
class Prefill:
    """A prompt's full cache, the next token's logits, and every layer's probe rows on demand."""

    ids: list[int]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    queries: list[torch.Tensor]
    first: int


@dataclass
class Recorder:
    """Where the attention function leaves each layer's queries."""

    queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)


class PlainModel:
    """SmolLM2 in float32 whose layers may hold different numbers of entries."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.recorder: Recorder | None = None
        AttentionInterface.register("plain_reference", self._attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="plain_reference"
        ).eval()
        self._prefills: dict[tuple[int, ...], Prefill] = {}
        self._copy_scores: list[torch.Tensor] = []
        self._answers: dict[object, list[int]] = {}

    def _attend(self, module, query, key, value, attention_mask, scaling, **_):
        """Causal attention of the last ``q`` entries; no mask is needed, whatever a layer holds."""
        if self.recorder is not None:
            self.recorder.queries.setdefault(module.layer_idx, []).append(query[0] * scaling)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        new, held = query.shape[2], key.shape[2]
        logits = query @ key.transpose(-1, -2) * scaling
        hidden = torch.arange(held) > torch.arange(held - new, held)[:, None]
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    def _forward(self, ids, start, cache):
        positions = torch.arange(start, start + len(ids))[None]
        return self.model(torch.tensor([ids]), past_key_values=cache, position_ids=positions).logits[0, -1]

    @torch.inference_mode()
    def prefill(self, ids):
        """The full prompt, computed once."""
        key = tuple(ids)
        if key not in self._prefills:
            self.recorder, cache = Recorder(), DynamicCache()
            for start in range(0, len(ids), CHUNK):
                logits = self._forward(ids[start : start + CHUNK], start, cache)
            layers = range(len(cache.layers))
            self._prefills[key] = Prefill(
                list(ids),
                [cache.layers[i].keys for i in layers],
                [cache.layers[i].values for i in layers],
                [torch.cat(self.recorder.queries[i], dim=1) for i in layers],
                int(logits.argmax()),
            )
            self.recorder = None
        return self._prefills[key]

    @torch.inference_mode()
    def copy_scores(self):
        """By layer, how much each KV head looks from a token's second saying to what followed the first."""
        if not self._copy_scores:
            ids, count = tokens_said_twice(self.model.config)
            full, n = self.prefill(ids), len(ids)
            asked = torch.arange(n - count, n - 1)
            for keys, queries in zip(full.keys, full.queries, strict=True):
                group = queries.shape[0] // keys.shape[1]
                logits = queries[:, asked] @ keys[0].repeat_interleave(group, 0).transpose(-1, -2)
                rows = logits.masked_fill(torch.arange(n) > asked[:, None], float("-inf")).softmax(-1)
                copied = rows[:, torch.arange(count - 1), asked - count + 1].mean(-1)
                self._copy_scores.append(copied.view(-1, group).amax(-1))
        return self._copy_scores

    @torch.inference_mode()
    def selections(self, ids, policy):
        """What the policy selects in each layer, by this file's own attention rows; None keeps all."""
        full, n = self.prefill(ids), len(ids)
        plan, layers = policy.probe_plan(n), len(full.keys)
        wanted = sorted(set(range(max(0, n - plan.rows), n)) | set(_spread(plan.spread, n)))
        found = []
        for index, (keys, values, queries) in enumerate(zip(full.keys, full.values, full.queries, strict=True)):
            if policy.freezes(index):
                found.append(None)
                continue
            rows = visible = probed = window = spread = None
            if plan.reduced:
                last, anywhere = range(max(0, n - plan.rows), n), _spread(plan.spread, n)
                window = _reductions(queries[:, list(last)], keys, last, 0)
                spread = _reductions(queries[:, list(anywhere)], keys, anywhere, plan.distance)
            elif wanted:
                probed = queries[:, wanted]
                group = probed.shape[0] // keys.shape[1]
                logits = probed @ keys[0].repeat_interleave(group, 0).transpose(-1, -2)
                visible = torch.arange(n) <= torch.tensor(wanted)[:, None]
                rows = logits.masked_fill(~visible, float("-inf")).softmax(-1)[None]
                visible, probed = visible[None], probed[None]
            scores = self.copy_scores()[index][None] if policy.reads_copy_scores else None
            view = LayerView(
                keys,
                values,
                None,
                rows,
                index,
                layers,
                visible=visible,
                queries=probed,
                window=window,
                spread=spread,
                heads=queries.shape[0],
                copy_scores=scores,
            )
            found.append(policy.select(view))
        return found

    def kept(self, ids, policy, block=32, layers_per_group=1):
        """For each layer, the prompt positions that blocks of ``block`` tokens keep."""
        found, n = self.selections(ids, policy), len(ids)
        kept = []
        for start in range(0, len(found), layers_per_group):
            group = found[start : start + layers_per_group]
            kept += [_rounded(group, n, block)] * len(group)
        return kept

    @torch.inference_mode()
    def generate(self, ids, policy, tokens=16, block=32, layers_per_group=1):
        """Greedy tokens after the policy's evictions, rounded to blocks."""
        policy = policies.registry.parse(policy) if isinstance(policy, str) else policy
        # Many tests ask for the same answers.
        asked = (tuple(ids), policy, tokens, block, layers_per_group)
        if asked not in self._answers:
            self._answers[asked] = self._generate(ids, policy, tokens, block, layers_per_group)
        return self._answers[asked]

    def _generate(self, ids, policy, tokens, block, layers_per_group):
        full = self.prefill(ids)
        cache = DynamicCache()
        for index, positions in enumerate(self.kept(ids, policy, block, layers_per_group)):
            at = torch.from_numpy(positions)
            cache.update(full.keys[index][:, :, at], full.values[index][:, :, at], index)
        out = [full.first]
        for position in range(len(ids), len(ids) + tokens - 1):
            out.append(int(self._forward(out[-1:], position, cache).argmax()))
        return out


def _reductions(queries, keys, positions, distance):
    """Peak and mean that queries ``[H, k, D]`` gave each position at least ``distance`` before them."""
    group, n = queries.shape[0] // keys.shape[1], keys.shape[2]
    logits = queries @ keys[0].repeat_interleave(group, 0).transpose(-1, -2)
    at = torch.tensor(list(positions))[:, None]
    rows = logits.masked_fill(torch.arange(n) > at, float("-inf")).softmax(-1)
    counts = torch.arange(n) <= at - distance
    rows = (rows * counts).unflatten(0, (-1, group)).flatten(1, 2)
    seen = counts.sum(0) * group
    return ProbeReductions(rows.amax(1)[None], (rows.sum(1) / seen.clamp(min=1))[None])


def _spread(count, n):
    if not count:
        return []
    step = next(2**power for power in range(64) if n // 2**power <= count)
    return range(step - 1, n, step)


def _rounded(group, n, block):
    """Positions that stay when a group of layers gives up whole blocks."""
    everything = np.arange(n)
    if any(selection is None for selection in group):
        return everything
    if all(isinstance(selection, CutSelection) for selection in group):
        first = max(-(-selection.sinks // block) for selection in group) * block
        cut = min(int(selection.cut) for selection in group) // block * block
        return everything if cut <= first else np.concatenate([everything[:first], everything[cut:]])
    keep = np.zeros(n, dtype=bool)
    for selection in group:
        if isinstance(selection, CutSelection):
            keep[: selection.sinks] = True
            keep[int(selection.cut) :] = True
        else:
            keep |= selection.keep[0].any(0).numpy()
    tail = n // block * block
    keep[tail:] = True
    for position in reversed(range(tail)):
        if keep[:tail].sum() % block == 0:
            break
        keep[position] = True
    return np.flatnonzero(keep)
