"""The Uni-Metric written out slowly in NumPy, from the method's description alone.

One prefix after another, in float64, with explicit rankings: a judge for the vectorised
functions in `refreekv.core`, sharing no code and no shortcuts with them.
"""

import numpy as np


def ranked_positions(n, sinks):
    """Positions in the order in which they are kept: sinks, then newest to oldest."""
    head = list(range(min(sinks, n)))
    return head + list(range(n - 1, len(head) - 1, -1))


def loss_of_prefix(rows, ranking, i, sinks, includes_sinks):
    """1 - mean_h ||kept|| / mean_h ||all|| for the first i ranked positions; rows [H, n]."""
    counted = [p for p in ranking if includes_sinks or p >= sinks]
    kept = [p for p in ranking[:i] if includes_sinks or p >= sinks]
    full = np.mean([np.sqrt(np.sum(np.square(row[counted]))) for row in rows])
    part = np.mean([np.sqrt(np.sum(np.square(row[kept]))) for row in rows])
    return 1.0 - part / full if full > 0 else None


def cut(rows, sinks, threshold, includes_sinks):
    """Cut position of one sequence: what stays is the sinks and everything from the cut on."""
    rows = np.asarray(rows, dtype=np.float64)
    n = rows.shape[1]
    first = min(sinks, n)
    if threshold == 0:
        return first
    ranking = ranked_positions(n, sinks)
    for i in range(first, n + 1):
        loss = loss_of_prefix(rows, ranking, i, sinks, includes_sinks)
        if loss is None:
            return first
        if loss <= threshold:
            return n - (i - first)
    return first


def cut_fast(rows, sinks, threshold, includes_sinks):
    """`cut` with running sums, for lengths at which the loop above is too slow."""
    rows = np.asarray(rows, dtype=np.float64)
    n = rows.shape[1]
    first = min(sinks, n)
    if threshold == 0:
        return first
    kept = np.sum(rows[:, :first] ** 2, axis=1) if includes_sinks else np.zeros(len(rows))
    full = np.mean(np.sqrt(np.sum(rows[:, 0 if includes_sinks else first :] ** 2, axis=1)))
    if not full > 0:
        return first
    for position in range(n, first - 1, -1):
        if position < n:
            kept = kept + rows[:, position] ** 2
        if 1.0 - np.mean(np.sqrt(kept)) / full <= threshold:
            return position
    return first


def mean_of_visible_rows(rows):
    """Average of the last k rows [H, k, n], each position over the rows that can see it."""
    rows = np.asarray(rows, dtype=np.float64)
    heads, k, n = rows.shape
    out = np.zeros((heads, n))
    for position in range(n):
        seeing = [r for r in range(k) if position <= n - k + r]
        out[:, position] = sum(rows[:, r, position] for r in seeing) / len(seeing)
    return out


def heavy_hitters(last_row, scores, sinks, recent, threshold, includes_sinks):
    """Kept positions of each KV head: ranked by score, stopped by the last row's norm.

    last_row [H, n]; scores [H_kv, n]; query head h belongs to KV head h // (H / H_kv).
    """
    last_row = np.asarray(last_row, dtype=np.float64)
    heads, n = last_row.shape
    kv_heads = len(scores)
    head = list(range(min(sinks, n)))
    tail = list(range(max(n - recent, len(head)), n))
    rankings = []
    for score in scores:
        middle = [p for p in range(len(head), n) if p not in tail]
        # Falling score; among equals the newer one first.
        middle.sort(key=lambda p: (-score[p], -p))
        rankings.append(head + tail + middle)
    if threshold == 0:
        return [sorted(range(n))] * kv_heads
    for i in range(len(head) + len(tail), n + 1):
        full, part = 0.0, 0.0
        for h in range(heads):
            ranking = rankings[h // (heads // kv_heads)]
            counted = [p for p in ranking if includes_sinks or p >= sinks]
            kept = [p for p in ranking[:i] if includes_sinks or p >= sinks]
            full += np.sqrt(np.sum(last_row[h, counted] ** 2))
            part += np.sqrt(np.sum(last_row[h, kept] ** 2))
        if full > 0 and 1.0 - part / full <= threshold:
            break
    return [sorted(ranking[:i]) for ranking in rankings]


def attention_rows(query, key, scaling, visible=None, softcap=None, sink_logits=None):
    """Softmax rows in float64; query [B, H, k, D], key [B, H_kv, n, D]."""
    query, key = np.asarray(query, dtype=np.float64), np.asarray(key, dtype=np.float64)
    batch, heads, k, _ = query.shape
    n, group = key.shape[2], heads // key.shape[1]
    out = np.zeros((batch, heads, k, n))
    for b in range(batch):
        for h in range(heads):
            for r in range(k):
                logits = key[b, h // group] @ query[b, h, r] * scaling
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                seen = np.ones(n, dtype=bool) if visible is None else np.asarray(visible[b, r])
                if not seen.any():
                    continue
                extra = [] if sink_logits is None else [float(sink_logits[h])]
                top = max([logits[seen].max(), *extra])
                weights = np.where(seen, np.exp(np.minimum(logits - top, 0)), 0.0)
                out[b, h, r] = weights / (weights.sum() + sum(np.exp(e - top) for e in extra))
    return out
