"""Attention of many probe queries, reduced to two numbers a position and never kept as rows.

Probes over a whole prompt are hundreds of queries: their rows would be ``B * H * k * n``
float32. What a policy asks of them is how high a position ever rose and how much it received,
for each KV head. This is the plain version that computes the
rows a few queries at a time; `refreekv.kernels` has the same function for CUDA.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv.core.probes import attention_logits, attention_rows

QUERY_CHUNK = 16
"""Probe queries whose rows exist at once."""


class ProbeReductions(NamedTuple):
    """What probe queries gave each position: ``[B, H_kv, n]`` float32 each.

    The mean is None where nobody asked for it.

    Attributes
    ----------
    peak : Tensor
        The largest attention probability over the queries and the query heads of the KV head.
    mean : Tensor
        The average over those of them that see the position; 0 where none does.
    """

    peak: Tensor
    mean: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "ProbeReductions":
        """The same with every tensor changed."""
        return ProbeReductions(change(self.peak), None if self.mean is None else change(self.mean))


class Probes(NamedTuple):
    """Where probe queries stand, and what of their attention counts.

    Attributes
    ----------
    query_columns : Tensor
        Integer ``[B | 1, k]``: the logical column of each query.
    columns : Tensor, optional
        Integer ``[n]``: the logical column of each key, ascending; ``0 .. n-1`` if None. A query
        sees the keys whose column is not above its own, all of which are among the first
        ``column + 1`` keys.
    valid : Tensor, optional
        Boolean ``[B, n]`` or ``[B, H_kv, n]``, False at padding, which no query sees.
    query_real : Tensor, optional
        Boolean ``[B | 1, k]``, False at padding: such a query sees nothing.
    scaling : float, optional
        Factor on the logits; ``D ** -0.5`` if None.
    distance : int
        Only keys at least this many columns before the query enter the reductions. The softmax
        runs over all that the query sees in any case.
    softcap, sink_logits
        As in `core.probes.attention_rows`.
    sums : bool
        Whether the mean is wanted beside the peak.
    logsumexp : Tensor, optional
        ``[B, H, k]`` float32: the logarithm of each query's softmax denominator, over all that it sees, where
        attention has told it. None: it is computed.
    """

    query_columns: Tensor
    columns: Tensor | None = None
    valid: Tensor | None = None
    query_real: Tensor | None = None
    scaling: float | None = None
    distance: int = 0
    softcap: float | None = None
    sink_logits: Tensor | None = None
    sums: bool = True
    logsumexp: Tensor | None = None


def probe_reductions(query: Tensor, key: Tensor, probes: Probes) -> ProbeReductions:
    """Per-position peak and mean of the probes' attention.

    Parameters
    ----------
    query : Tensor
        ``[B, H, k, D]``, position-encoded; oldest query first is fastest, any order is right.
    key : Tensor
        ``[B, H_kv, n, D]``, position-encoded; ``H % H_kv == 0``.
    probes : Probes
        Where the queries stand, and what counts.

    Raises
    ------
    ValueError
        If the query heads are no multiple of the KV heads.
    """
    batch, heads, count, _ = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    check_heads(heads, kv_heads)
    query_columns, columns, valid, query_real, scaling, distance, softcap, sink_logits, sums, told = probes
    if columns is None:
        columns = torch.arange(length, device=key.device)
    shape = (batch, kv_heads, length)
    peak, total, seen = (torch.zeros(shape, dtype=torch.float32, device=key.device) for _ in range(3))
    group = heads // kv_heads
    for start in range(0, count, QUERY_CHUNK):
        part = slice(start, start + QUERY_CHUNK)
        at = query_columns[:, part, None]
        real = None if query_real is None else query_real[:, part]
        visible = _visible(columns <= at, valid, real, group)
        if told is None:
            rows = attention_rows(
                query[:, :, part], key, scaling=scaling, visible=visible, softcap=softcap, sink_logits=sink_logits
            )
        else:
            logits = attention_logits(query[:, :, part], key, scaling=scaling, softcap=softcap)
            rows = (logits - told[:, :, part, None]).masked_fill_(~visible, float("-inf")).exp_()
        counted = _visible(columns <= at - distance, valid, real, group)
        counted = counted.expand(batch, heads, -1, -1)
        rows = rows.masked_fill_(~counted, 0.0).view(batch, kv_heads, -1, length)
        peak = torch.maximum(peak, rows.amax(2))
        if sums:
            total += rows.sum(2)
            seen += counted.reshape(batch, kv_heads, -1, length).sum(2)
    return ProbeReductions(peak, total / seen.clamp_min(1) if sums else None)


def check_heads(heads: int, kv_heads: int) -> None:
    """Raise ValueError unless ``heads`` query heads can share ``kv_heads`` KV heads evenly."""
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")


def _visible(causal: Tensor, valid: Tensor | None, real: Tensor | None, group: int) -> Tensor:
    """Boolean ``[B | 1, H | 1, k, n]`` from causality ``[B | 1, k, n]`` and what is padding."""
    visible = causal[:, None]
    if valid is not None:
        per_head = valid[:, None] if valid.dim() == 2 else valid.repeat_interleave(group, 1)
        visible = visible & per_head[:, :, None]
    if real is not None:
        visible = visible & real[:, None, :, None]
    return visible
