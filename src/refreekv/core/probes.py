"""Attention rows of a few chosen queries, without ever forming the n x n matrix.

The probe is what every policy looks at: the softmax rows of the last prompt
queries over all cached keys. Memory is O(probes * n); keys are read in chunks so
that the float32 copy of half-precision keys stays small at any prompt length.
"""

import torch
from torch import Tensor

KEY_CHUNK = 8192
"""Keys that are upcast at once, in positions. Bounds the transient float32 copy."""


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    visible: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Softmax attention rows of ``k`` queries over ``n`` keys, in float32.

    Parameters
    ----------
    query : Tensor
        Position-encoded queries, ``[B, H, k, D]``.
    key : Tensor
        Position-encoded keys per KV head, ``[B, H_kv, n, D]`` with ``H % H_kv == 0``.
        Consecutive query heads share a KV head, as in grouped-query attention.
    scaling : float, optional
        Factor on the logits; ``D ** -0.5`` if None.
    visible : Tensor, optional
        Boolean ``[B, k, n]`` or ``[B, H, k, n]``: which keys each query may attend to. None
        means all.
    softcap : float, optional
        Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
    sink_logits : Tensor, optional
        One learned logit per query head, ``[H]`` or ``[B, H]``, that takes part in the softmax's
        denominator and holds no value (GPT-OSS).

    Returns
    -------
    Tensor
        ``[B, H, k, n]``, float32. A row sums to 1 (less what a learned sink takes);
        a query that sees no key gives a row of zeros.

    Raises
    ------
    ValueError
        If the query heads are no multiple of the KV heads.
    """
    batch, heads, probes, _ = query.shape
    length = key.shape[2]
    logits = attention_logits(query, key, scaling=scaling, softcap=softcap)
    if visible is not None:
        if visible.dim() == 3:
            visible = visible[:, None]
        logits = logits.masked_fill_(~visible, float("-inf"))
    if sink_logits is not None:
        sink = sink_logits.to(logits).view(-1, heads, 1, 1).expand(batch, -1, probes, -1)
        logits = torch.cat([logits, sink], dim=-1)
    rows = logits.softmax(-1)[..., :length]
    if visible is None:
        return rows
    # The softmax of a query that sees nothing is not a number.
    return rows.masked_fill_(~visible.any(-1, keepdim=True), 0.0)


def attention_logits(
    query: Tensor, key: Tensor, *, scaling: float | None = None, softcap: float | None = None
) -> Tensor:
    """What the softmax of `attention_rows` is taken of: ``[B, H, k, n]``, float32, of all keys."""
    batch, heads, probes, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    scaling = dim**-0.5 if scaling is None else scaling
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * probes, dim)
    logits = wide_product(grouped, key).view(batch, heads, probes, length).mul_(scaling)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def wide_product(query: Tensor, key: Tensor) -> Tensor:
    """``query @ key^T``, accumulated and returned in float32; ``[B, H_kv, r, n]``."""
    batch, kv_heads, rows, dim = query.shape
    length = key.shape[2]
    if query.is_cuda and query.dtype == key.dtype != torch.float32:
        # The product of half-precision inputs straight into float32: no wide copy at all.
        keys = key.reshape(batch * kv_heads, length, dim)
        flat = torch.bmm(query.flatten(0, 1), keys.transpose(1, 2), out_dtype=torch.float32)
        return flat.view(batch, kv_heads, rows, length)
    out = torch.empty(batch, kv_heads, rows, length, dtype=torch.float32, device=query.device)
    query = query.float()
    for start in range(0, length, KEY_CHUNK):
        chunk = key[:, :, start : start + KEY_CHUNK].float()
        torch.matmul(query, chunk.transpose(-1, -2), out=out[..., start : start + KEY_CHUNK])
    return out


def causal_visibility(valid: Tensor, query_columns: Tensor) -> Tensor:
    """Which keys each probe query sees: real tokens at or before its own column.

    Parameters
    ----------
    valid : Tensor
        Boolean ``[..., n]``, False at padding.
    query_columns : Tensor
        Integer ``[k]``: the column of each probe query among the ``n`` keys.

    Returns
    -------
    Tensor
        Boolean ``[..., k, n]``.
    """
    columns = torch.arange(valid.shape[-1], device=valid.device)
    return valid[..., None, :] & (columns <= query_columns[:, None])
