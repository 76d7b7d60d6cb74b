"""Surrogates: a few entries in place of all that is evicted.

Evicted entries get little attention each, but together they may get a tenth of it, and
without them the others get that tenth. A surrogate is one entry for many: its key makes the
logit that a query gives it the logarithm of the sum of their exponentials, as nearly as one
key can, and its value is the mean of theirs, weighted by the attention they get. So the
attention that is lost is lost no more; only what the evicted entries say apart from each
other is.

Nothing else in the cache has to know: a surrogate takes the place of one of the entries
that it replaces.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv.core.probes import wide_product

TINY = 1e-30
"""Under any sum of exponentials that matters next to their largest term."""

TOO_MUCH = 2.0
"""How many times its part's sum a surrogate may get from a query.

Too little is what eviction does anyway; too much hides what stays.
"""


class Surrogates(NamedTuple):
    """Surrogates of evicted entries; ``m`` for each KV head.

    Attributes
    ----------
    columns : Tensor
        Integer ``[B, H_kv, m]``: evicted entries, whose places they take.
    keys, values : Tensor
        ``[B, H_kv, m, D]``, in the precision of the prompt's.
    real : Tensor
        Boolean ``[B, H_kv, m]``: False where nothing is replaced.
    """

    columns: Tensor
    keys: Tensor
    values: Tensor
    real: Tensor


def make(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    evicted: Tensor,
    *,
    count: int,
    real: Tensor | None = None,
    asked: Tensor | None = None,
) -> Surrogates:
    """Surrogates of evicted entries, as ``queries`` saw these.

    The evicted entries of a head are divided by position into ``count`` parts of equal size, so that
    those of one part are alike in how far away they are. For a part with the sums ``s_q = sum_i exp(q·k_i)``
    and queries weighted by the share of their attention that it gets, the key is ``k̄ + c q̄``: the mean
    key, moved along the mean query as far as brings ``q·k`` closest to ``log s_q`` in the squared mean,
    but no further than to where the first query gives it `TOO_MUCH` times ``s_q``.
    One step along one direction, as later queries share the mean and not the rest.

    Parameters
    ----------
    queries : Tensor
        ``[B, H, r, D]`` float32, position-encoded and scaled: their products with keys are logits.
    keys, values : Tensor
        ``[B, H_kv, n, D]``.
    evicted : Tensor
        Boolean ``[B, H_kv, n]``; at least one real entry of each row stays.
    count : int
        Parts, at least 1.
    real : Tensor, optional
        Boolean ``[B, H_kv, n]``, False at padding.
    asked : Tensor, optional
        Boolean ``[B | 1, r]``, False where a query is padding.
    """
    batch, kv_heads, _, _ = keys.shape
    grouped = queries.reshape(batch, kv_heads, -1, queries.shape[-1])
    logits = wide_product(grouped.to(keys.dtype), keys)
    if real is not None:
        logits.masked_fill_(~real[:, :, None], float("-inf"))
    largest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    number = evicted.cumsum(-1)
    total = number[..., -1:]
    part = (number - 1) * count // total.clamp_min(1)
    members = evicted[..., None] & (part[..., None] == torch.arange(count, device=keys.device))
    member = members.to(exponentials.dtype)

    sums = exponentials @ member  # [B, H_kv, r, m]
    share = sums / exponentials.sum(-1, keepdim=True).clamp_min(TINY)
    if asked is not None:
        group = queries.shape[1] // kv_heads
        share = share * asked.repeat(1, group)[:, None, :, None]
    weight = share / share.sum(2, keepdim=True).clamp_min(TINY)
    # How much each entry gets of what its part gets.
    inside = (weight / sums.clamp_min(TINY)).transpose(2, 3) @ exponentials * member.transpose(2, 3)
    mean_key, mean_value = (_weighted(inside, entries) for entries in (keys, values))
    wanted = sums.clamp_min(TINY).log() + largest
    mean_query = weight.transpose(2, 3) @ grouped
    along = grouped @ mean_query.transpose(2, 3)
    missing = wanted - grouped @ mean_key.transpose(2, 3)
    step = (weight * along * missing).sum(2) / (weight * along.square()).sum(2).clamp_min(TINY)
    furthest = torch.where((weight > 0) & (along > TINY), (missing + math.log(TOO_MUCH)) / along, float("inf"))
    step = torch.minimum(step, furthest.amin(2))
    key = mean_key + step[..., None] * mean_query
    filled = members.any(2)
    columns = torch.where(filled, inside.argmax(-1), keys.shape[2] - 1)
    return Surrogates(columns, key.to(keys.dtype), mean_value.to(values.dtype), filled)


def put(chosen: Surrogates, keys: Tensor, values: Tensor) -> None:
    """Write surrogates over the entries ``[B, H_kv, n, D]`` whose places they take."""
    for stored, new in ((keys, chosen.keys), (values, chosen.values)):
        index = chosen.columns[..., None].expand_as(new)
        # Where nothing is replaced, an entry is written over itself.
        stored.scatter_(2, index, torch.where(chosen.real[..., None], new, stored.gather(2, index)))


def _weighted(weights: Tensor, entries: Tensor) -> Tensor:
    """``weights @ entries`` in float32: ``[B, H_kv, m, n]`` by ``[B, H_kv, n, D]``."""
    return wide_product(weights.to(entries.dtype), entries.transpose(2, 3))
