"""The peer policies written out slowly in NumPy, from their formulas alone, and a masked model around them.

One KV head after another, one position after another, in float64, on entries without
padding: no code and no shortcuts shared with refreekv. Heads may hold different numbers
of entries.
"""

from dataclasses import dataclass

import numpy as np
import torch

from helpers.reference import MaskedReference, softmax_row
from refreekv import policies


@dataclass
class Held:
    """What one row of one layer holds when its prompt ends.

    ``keys[g]`` and ``values[g]`` are ``[n_g, D]``; ``queries[h]`` is ``[k, D]``, scaled, of all queries of
    the prompt; ``seen[g]`` is boolean ``[k, n_g]``.
    """

    keys: list
    values: list
    queries: list
    seen: list
    layer: int = 0
    layers: int = 1
    sink_logits: list | None = None

    def __post_init__(self):
        self.kv_heads = len(self.keys)
        self.group = len(self.queries) // self.kv_heads

    def rows(self, head, chosen):
        """Attention ``[len(chosen), n_g]`` of query head ``head``."""
        g = head // self.group
        out = np.zeros((len(chosen), len(self.keys[g])))
        for i, q in enumerate(chosen):
            seen = self.seen[g][q]
            sink = None if self.sink_logits is None else self.sink_logits[head]
            out[i, seen] = softmax_row(self.keys[g][seen] @ self.queries[head][q], sink)
        return out

    def last(self, count):
        total = len(self.queries[0])
        return list(range(total))[-count:]

    def members(self, g):
        return range(g * self.group, (g + 1) * self.group)


def spread(total, most):
    """Which of ``total`` queries are probed: each ``step``-th."""
    step = 1
    while total // step > most:
        step *= 2
    return [i for i in range(total) if (i + 1) % step == 0]


def budget(n, size=None, ratio=None, at_least=1, **_):
    if size is not None:
        return min(n, size)
    return min(n, max(at_least, int(np.floor(n * ratio + 1e-9))))


def best(scores, count, first=()):
    """Boolean ``[n]``: ``first`` before all others and newest first, then by score, newest first among equals."""
    n = len(scores)
    ranking = sorted(range(n), key=lambda j: (j not in first, 0 if j in first else -scores[j], -j))
    kept = np.zeros(n, bool)
    kept[ranking[:count]] = True
    return kept


def tail(n, count):
    return set(range(max(0, n - count), n))


def snapkv_scores(held, g, window, kernel, pooling):
    n = len(held.keys[g])
    per_head = []
    for head in held.members(g):
        row = held.rows(head, held.last(window)).mean(0)
        row[max(0, n - window) :] = 0
        around = [
            [row[i] if 0 <= i < n else 0.0 for i in range(j - kernel // 2, j + kernel // 2 + 1)] for j in range(n)
        ]
        per_head.append([np.mean(part) if pooling == "avg" else np.max(part) for part in around])
    return np.mean(per_head, axis=0)


def h2o(held, recent_share=0.5, queries=128, **given):
    kept = []
    for g in range(held.kv_heads):
        chosen = spread(len(held.queries[0]), queries)
        scores = sum(held.rows(head, chosen).sum(0) for head in held.members(g))
        count = budget(len(scores), **given)
        kept.append(best(scores, count, tail(len(scores), max(1, int(np.floor(count * recent_share + 1e-9))))))
    return kept


def snapkv(held, window=32, kernel=5, pooling="avg", **given):
    kept = []
    for g in range(held.kv_heads):
        scores = snapkv_scores(held, g, window, kernel, pooling)
        n = len(scores)
        kept.append(best(scores, budget(n, at_least=window, **given), tail(n, window)))
    return kept


def pyramidkv(held, window=32, kernel=5, pooling="avg", beta=20.0, size=None, ratio=None):
    kept = []
    for g in range(held.kv_heads):
        scores = snapkv_scores(held, g, window, kernel, pooling)
        n = len(scores)
        mean = min(n, size) if size is not None else min(n, max(window, n * ratio))
        low = mean / beta
        high = 2 * mean - low
        if high >= n - window:
            high = n - window
            low = 2 * mean - high
        count = mean
        if n >= high >= low >= window and held.layers > 1:
            count = high - held.layer * (high - low) / (held.layers - 1)
        kept.append(best(scores, min(n, round(count)), tail(n, window)))
    return kept


def tova(held, **given):
    rows = [held.rows(head, held.last(1))[0] for head in range(len(held.queries))]
    scores = np.mean(rows, axis=0)
    n = len(scores)
    return [best(scores, budget(n, **given), tail(n, 1))] * held.kv_heads


def knorm(held, recent=1, **given):
    scores = [[-np.sqrt(np.sum(key**2)) for key in keys] for keys in held.keys]
    return [best(s, budget(len(s), **given), tail(len(s), recent)) for s in scores]


def keydiff(held, recent=1, **given):
    kept = []
    for keys in held.keys:
        anchor = np.mean([key / np.linalg.norm(key) for key in keys], axis=0)
        scores = [-(key @ anchor) / np.linalg.norm(key) / np.linalg.norm(anchor) for key in keys]
        kept.append(best(scores, budget(len(keys), **given), tail(len(keys), recent)))
    return kept


def expected_attention(held, window=128, sinks=4, epsilon=0.0, **given):
    kept = []
    for g, (keys, values) in enumerate(zip(held.keys, held.values, strict=True)):
        parts = []
        for head in held.members(g):
            queries = held.queries[head][held.last(window)]
            mean = queries.mean(0)
            covariance = np.cov(queries.T, bias=True).reshape(len(mean), len(mean))
            logits = np.array([mean @ key + key @ covariance @ key / 2 for key in keys])
            parts.append(softmax_row(logits, None))
        scores = (np.mean(parts, axis=0) + epsilon) * np.linalg.norm(values, axis=1)
        n = len(keys)
        count = budget(n, at_least=sinks + 1, **given)
        first = {n - 1} | (set(range(min(sinks, n))) if count > sinks else set())
        kept.append(best(scores, count, first))
    return kept


def ada_kv(held, safeguard=0.2, window=32, kernel=5, pooling="avg", **given):
    """Around SnapKV."""
    sizes = [len(keys) for keys in held.keys]
    counts = [budget(n, at_least=window, **given) for n in sizes]
    scores = [snapkv_scores(held, g, window, kernel, pooling) for g in range(held.kv_heads)]
    kept = []
    for n, count, score in zip(sizes, counts, scores, strict=True):
        sure = best(score, int(np.floor(count * safeguard + 1e-9)), tail(n, window))
        for j in sorted(tail(n, window), reverse=True)[:count]:
            sure[j] = True
        kept.append(sure)
    left = sum(counts) - sum(int(k.sum()) for k in kept)
    others = [(g, j) for g, k in enumerate(kept) for j in np.flatnonzero(~k)]
    for g, j in sorted(others, key=lambda at: (-scores[at[0]][at[1]], -at[0], -at[1]))[:left]:
        kept[g][j] = True
    return kept


def top_p(held, p=0.95, window=32, frozen_layers=0):
    if held.layer < frozen_layers:
        return [np.ones(len(keys), bool) for keys in held.keys]
    kept = []
    for g in range(held.kv_heads):
        weights = sum(held.rows(head, held.last(window)).sum(0) for head in held.members(g))
        n = len(weights)
        ranking = sorted(range(n), key=lambda j: (-weights[j], -j))
        count = 1
        while count < n and sum(weights[ranking[:count]]) < p * sum(weights):
            count += 1
        mask = np.zeros(n, bool)
        mask[ranking[:count]] = True
        mask[list(tail(n, window))] = True
        kept.append(mask)
    return kept


def gvote(held, p=0.95, samples=8, window=128, seed=0):
    """The draws' normal weights are the library's, so that both draw the same queries."""
    weights = torch.randn(samples, window, generator=torch.Generator().manual_seed(seed)).double().numpy()
    kept = []
    for g, keys in enumerate(held.keys):
        n = len(keys)
        mask = np.zeros(n, bool)
        mask[n - 1] = True
        for head in held.members(g):
            row = held.rows(head, held.last(1))[0]
            ranking = sorted(range(n), key=lambda j, row=row: (-row[j], -j))
            count = 1
            while count < n and sum(row[ranking[:count]]) < p * sum(row):
                count += 1
            queries = held.queries[head][held.last(window)]
            mean = queries.mean(0)
            for weight in weights:
                own = weight[window - len(queries) :]
                drawn = mean + sum(w * (q - mean) for w, q in zip(own, queries, strict=True)) / np.sqrt(len(queries))
                mask |= best(keys @ drawn, count)
        kept.append(mask)
    return kept


def cake_notes(held, window=32, kernel=5, pooling="avg", tau1=1.0, tau2=1.0, gamma=200.0, **_):
    """Preference of a layer, and scores of each KV head."""
    spread_out = changing = 0.0
    scores = []
    for g, keys in enumerate(held.keys):
        n = len(keys)
        per_head = []
        for head in held.members(g):
            rows = held.rows(head, held.last(window))
            value = np.zeros(n)
            for j in range(max(0, n - window)):
                column = rows[:, j]
                variance = sum((a - column.mean()) ** 2 for a in column) / max(1, len(column) - 1)
                spread_out -= sum(a * np.log(a) for a in column if a > 0)
                changing += variance
                value[j] = column.mean() + gamma * variance
            around = [
                [value[i] if 0 <= i < n else 0.0 for i in range(j - kernel // 2, j + kernel // 2 + 1)] for j in range(n)
            ]
            per_head.append([np.mean(part) if pooling == "avg" else np.max(part) for part in around])
        scores.append(np.mean(per_head, axis=0))
    return max(spread_out, 0.0) ** (1 / tau1) * changing ** (1 / tau2), scores


def cake(layers, size=None, ratio=None, window=32, **given):
    """What each of a prompt's layers keeps: one list of masks a layer."""
    notes = [cake_notes(held, window=window, **given) for held in layers]
    ns = [len(held.keys[0]) for held in layers]
    means = [min(n, size) if size is not None else min(n, max(window, n * ratio)) for n in ns]
    total = int(np.floor(sum(max(0, mean - min(window, n)) for mean, n in zip(means, ns, strict=True)) + 1e-6))
    whole = sum(preference for preference, _ in notes)
    counts = []
    for (preference, _), n in zip(notes, ns, strict=True):
        share = preference / whole if whole > 0 else 1 / len(layers)
        counts.append(min(int(np.floor(share * total + 1e-6)), max(0, n - window)))
    while sum(counts) < total:
        room = [at for at, n in enumerate(ns) if counts[at] < n - window]
        if not room:
            break
        # One each while there is one for each, and then for the first.
        for at in room[: min(len(room), total - sum(counts))]:
            counts[at] += 1
    kept = []
    for (_, scores), n, count, mean in zip(notes, ns, counts, means, strict=True):
        kept.append([best(score, count + min(n, window, int(mean)), tail(n, window)) for score in scores])
    return kept


JOINT = {"cake": cake}
"""Those that decide about all layers of a prompt together."""

SLOW = {
    "h2o": h2o,
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "tova": tova,
    "knorm": knorm,
    "keydiff": keydiff,
    "expected-attention": expected_attention,
    "ada-kv": ada_kv,
    "top-p": top_p,
    "gvote": gvote,
}

FREE = ("top-p", "gvote")
"""Those that find their budget themselves."""


def make(name, parameters):
    """The library's policy for the same parameters; Ada-KV's beside its own go to its scorer."""
    own = dict(parameters)
    if name == "ada-kv":
        given = {key: own.pop(key) for key in ("window", "kernel", "pooling") if key in own}
        own["scorer"] = policies.create("snapkv", size=1, **given)
    return policies.create(name, **own)


class PeerReference(MaskedReference):
    """The masked full cache under a peer policy; ``kept_counts[layer][row]`` has a number a KV head."""

    def __init__(self, model, name, parameters):
        super().__init__(model, rule=(name, parameters))

    def evict(self, layer, query, key, scaling, softcap, sinks):
        name, parameters = self.rule
        real, columns = self.mask.bool().numpy(), self.mask.shape[1]
        self.kept_counts[layer] = []
        if layer == self.full[0]:
            self.waiting = {}
        for row in range(key.shape[0]):
            held = [np.flatnonzero(real[row] & ~gone) for gone in self.evicted[layer][row]]
            asked = [c for c in range(columns - query.shape[2], columns) if real[row, c]]
            at = [c - columns for c in asked]
            case = Held(
                keys=[key[row, g, own].double().numpy() for g, own in enumerate(held)],
                values=[self.values[row, g, own].double().numpy() for g, own in enumerate(held)],
                queries=list(query[row][:, at].double().numpy() * scaling),
                seen=[own <= np.array(asked)[:, None] for own in held],
                layer=self.full.index(layer),
                layers=len(self.full),
                sink_logits=None if sinks is None else sinks.tolist(),
            )
            if name in JOINT:
                self.waiting.setdefault(row, []).append((layer, held, case))
            else:
                self.drop(layer, row, held, SLOW[name](case, **parameters))
        if name in JOINT and layer == self.full[-1]:
            for row, seen in self.waiting.items():
                for (index, held, _), kept in zip(
                    seen, JOINT[name]([case for *_, case in seen], **parameters), strict=True
                ):
                    self.drop(index, row, held, kept)

    def drop(self, layer, row, held, kept):
        for g, own in enumerate(held):
            self.evicted[layer][row, g, own[~kept[g]]] = True
        self.kept_counts[layer].append(tuple(int(k.sum()) for k in kept))

    def attend(self, module, query, key, value, mask, **kwargs):
        self.values = value
        return super().attend(module, query, key, value, mask, **kwargs)
