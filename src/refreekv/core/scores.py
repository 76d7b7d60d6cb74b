"""From probe rows to one number per position."""

import torch
from torch import Tensor

EXPECTED_CHUNK = 2048
"""Keys that `expected_attention` widens at once, in positions."""


def mean_over_visible_rows(rows: Tensor, visible: Tensor) -> Tensor:
    """Average ``k`` probe rows, each position over the rows that can see it.

    A recent position is hidden from the earlier probes; dividing by ``k`` there would
    make it look unimportant. This is the k > 1 probe of arXiv 2502.16886, section 3.

    Parameters
    ----------
    rows : Tensor
        ``[B, H, k, n]`` attention rows.
    visible : Tensor
        Boolean ``[B | 1, k, n]``, or ``[B, H, k, n]`` where heads see different positions.

    Returns
    -------
    Tensor
        ``[B, H, n]``.
    """
    seen = visible.sum(-2).clamp_min(1)
    return rows.sum(2) / (seen[:, None] if seen.dim() == 2 else seen)


def moments_of_rows(rows: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance of each position's attention over the probe rows.

    Parameters
    ----------
    rows : Tensor
        ``[B, H, k, n]`` attention rows.
    visible : Tensor, optional
        Boolean ``[B | 1, k, n]`` or ``[B, H, k, n]``: a row that sees nothing stands for padding and
        does not count.

    Returns
    -------
    mean, variance : Tensor
        ``[B, H, n]`` each; the variance is the unbiased one, zero over a single row.
    """
    if visible is None:
        asked = torch.ones(1, 1, rows.shape[2], 1, dtype=torch.bool, device=rows.device)
    else:
        asked = (visible if visible.dim() == 4 else visible[:, None]).any(-1, keepdim=True)
    number = asked.sum(2)
    mean = rows.masked_fill(~asked, 0.0).sum(2) / number.clamp_min(1)
    squares = (rows - mean[:, :, None]).masked_fill(~asked, 0.0).square().sum(2)
    return mean, squares / (number - 1).clamp_min(1)


def attention_received(rows: Tensor, kv_heads: int) -> Tensor:
    """Attention that each position receives from the probe rows, summed per KV head.

    The heavy-hitter score of H2O (arXiv 2306.14048), with the query heads of one
    KV head added up, since they share what is kept.

    Parameters
    ----------
    rows : Tensor
        ``[B, H, k, n]`` attention rows.
    kv_heads : int
        Number of KV heads; divides ``H``.

    Returns
    -------
    Tensor
        ``[B, H_kv, n]``.
    """
    batch, heads, _, length = rows.shape
    return rows.sum(2).view(batch, kv_heads, heads // kv_heads, length).sum(2)


def query_distribution(queries: Tensor, asked: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of some queries, and what each is beside it.

    Parameters
    ----------
    queries : Tensor
        ``[B, H, k, D]``.
    asked : Tensor, optional
        Boolean ``[B | 1, k]`` or ``[B, H, k]``: the queries that count; None means all.

    Returns
    -------
    mean : Tensor
        ``[B, H, 1, D]``.
    centred : Tensor
        ``[B, H, k, D]``: the queries less the mean, zeros where they do not count.
    number : Tensor
        Queries that count, at least 1; broadcasts to ``[B, H, 1, 1]``.
    """
    if asked is None:
        asked = torch.ones(1, queries.shape[2], dtype=torch.bool, device=queries.device)
    counts = (asked[:, None] if asked.dim() == 2 else asked)[..., None]
    number = counts.sum(2, keepdim=True).clamp_min(1)
    mean = queries.masked_fill(~counts, 0.0).sum(2, keepdim=True) / number
    return mean, (queries - mean).masked_fill(~counts, 0.0), number


def expected_attention(queries: Tensor, keys: Tensor, *, real: Tensor, asked: Tensor | None = None) -> Tensor:
    """Attention that each key can expect from queries of the same mean and covariance.

    For a normally distributed query ``q`` the logit ``q k`` is normal, too, and
    ``E[exp(q k)] = exp(mean + variance / 2)`` (arXiv 2510.00636, section 3).

    Parameters
    ----------
    queries : Tensor
        ``[B, H, k, D]`` float32, scaled: their products with keys are logits.
    keys : Tensor
        ``[B, H_kv, n, D]``.
    real : Tensor
        Boolean ``[B, H_kv, n]``, False at padding.
    asked : Tensor, optional
        Boolean ``[B | 1, k]`` or ``[B, H, k]``: the queries that count; None means all.

    Returns
    -------
    Tensor
        ``[B, H_kv, n]`` float32: a distribution over the real keys, averaged over the query heads
        that share a KV head.
    """
    batch, heads, _, dim = queries.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    mean, centred, number = query_distribution(queries, asked)
    covariance = centred.transpose(-1, -2) @ centred / number
    shape = (batch, kv_heads, heads // kv_heads)
    mean, covariance = mean.view(*shape, 1, dim), covariance.view(*shape, dim, dim)
    logits = queries.new_empty(*shape, length)
    # A copy of the keys for each query head exists of one chunk only.
    for start in range(0, length, EXPECTED_CHUNK):
        chunk = keys[:, :, None, start : start + EXPECTED_CHUNK].float()
        logits[..., start : start + EXPECTED_CHUNK] = ((mean + chunk @ covariance / 2) * chunk).sum(-1)
    return logits.masked_fill(~real[:, :, None], float("-inf")).softmax(-1).mean(2)
