"""Reading the attention masks that transformers builds over logical columns."""

import torch
from torch import Tensor


def valid_columns(mask: Tensor | None, query: int, batch: int, columns: int) -> Tensor | None:
    """Which columns hold real tokens, read off the mask row of one query.

    Parameters
    ----------
    mask : Tensor or None
        As given to the attention function: None (nothing masked beyond causality),
        ``[B, columns]`` (flash attention), or ``[B | 1, 1 | H, q, columns]`` boolean
        (True = attend) or additive.
    query : int
        Index into ``q`` of a query that sees all real columns of interest.
    batch, columns : int
        Shape of the result; a longer mask is cut.

    Returns
    -------
    Tensor or None
        Boolean ``[batch, columns]``; None if no column is masked.
    """
    if mask is None:
        return None
    if mask.dim() == 4:
        mask = mask[:, :, query]
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        allowed = allowed.any(1)
    else:
        allowed = mask.bool()
    return allowed[:, :columns].expand(batch, columns)


def mask_for_columns(mask: Tensor, row: int, columns: Tensor, heads: int) -> Tensor:
    """The mask of one batch row over the columns that are physically there.

    Parameters
    ----------
    mask : Tensor
        As in `valid_columns`, not None.
    row : int
        Batch row.
    columns : Tensor
        Integer ``[G, L]``: the logical column of each stored entry, per group of heads.
    heads : int
        Query heads; a multiple of ``G``.

    Returns
    -------
    Tensor
        ``[1, 1 | heads, q, L]``, or ``[1, L]`` for a two-dimensional mask.
    """
    part = mask[row : row + 1] if mask.shape[0] > 1 else mask
    columns = columns.to(part.device)
    if part.dim() == 2:
        return part.index_select(1, columns[0])
    if columns.shape[0] == 1:
        return part.index_select(3, columns[0])
    index = columns.long().repeat_interleave(heads // columns.shape[0], 0)[None, :, None]
    part = part.expand(-1, heads, -1, -1)
    return part.gather(3, index.expand(-1, -1, part.shape[2], -1))


def causal_mask(queries: int, entries: int, device: torch.device) -> Tensor:
    """Boolean ``[1, 1, queries, entries]``: the last ``queries`` entries are the queries' own."""
    return torch.ones(1, 1, queries, entries, dtype=torch.bool, device=device).tril(entries - queries)


def hide_padding(mask: Tensor | None, visible: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """An additive mask that hides, beside what ``mask`` hides, the padding of uneven KV heads.

    Parameters
    ----------
    mask : Tensor or None
        ``[1, 1 | heads, q, L]``, boolean or additive.
    visible : Tensor
        Boolean ``[H_kv, L]``.
    heads : int
        Query heads; a multiple of ``H_kv``.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    Tensor
        ``[1, heads, q, L]``.
    """
    lowest = torch.finfo(dtype).min
    if mask is None:
        mask = torch.zeros(1, 1, 1, visible.shape[1], dtype=dtype, device=visible.device)
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
    shown = visible.repeat_interleave(heads // visible.shape[0], 0)[None, :, None]
    return mask.expand(-1, heads, -1, -1).masked_fill(~shown, lowest)
