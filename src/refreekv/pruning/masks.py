"""Reading attention masks over logical columns.

Hidden is not padding. A column that the mask hides may be a token of another branch behind the same prefix, or one
that a later call will see: it stays in the cache. Padding is a leading run of columns that no query of the prompt
saw, and nothing else.
"""

import torch
from torch import Tensor

from refreekv.storage.runs import numbers


def visible_columns(mask: Tensor | None, query: int, batch: int, columns: int) -> Tensor | None:
    """Which columns a query sees.

    Parameters
    ----------
    mask : Tensor or None
        As given to the attention function: None (nothing masked beyond causality),
        ``[B, columns]`` (flash attention), or ``[B | 1, 1 | H, q, columns]`` boolean
        (True = attend) or additive.
    query : int
        Index into ``q``.
    batch, columns : int
        Shape of the result; a longer mask is cut.

    Returns
    -------
    Tensor or None
        Boolean ``[batch, columns]``, True where a query head sees the column; None if no column is masked.

    Raises
    ------
    ValueError
        A mask over fewer columns.
    """
    if mask is None:
        return None
    check_columns(mask, columns)
    allowed = _allowed(mask[:, :, query, :columns]).any(1) if mask.dim() == 4 else mask[:, :columns].bool()
    return allowed.expand(batch, columns)


def seen_columns(mask: Tensor | None, queries: int, batch: int, columns: int) -> Tensor | None:
    """Which columns any of the first ``queries`` queries sees: as `visible_columns`, of all of them together."""
    if mask is None or mask.dim() != 4:
        return visible_columns(mask, 0, batch, columns)
    check_columns(mask, columns)
    seen = _allowed(mask[:, :, queries - 1, :columns]).any(1)
    if mask.is_cuda:
        seen = seen | _allowed(mask[:, :, :queries, :columns]).any(2).any(1)
    else:
        # The last query sees nearly all; a look at the others' row for row is for the rest only.
        rest = (~seen).any(0).nonzero().flatten()
        seen[:, rest] |= _allowed(mask[:, :, :queries].index_select(3, rest)).any(2).any(1)
    return seen.expand(batch, columns)


def leading_run(hidden: Tensor, *, turn: bool) -> Tensor:
    """Of columns that nobody saw those that are padding.

    Parameters
    ----------
    hidden : Tensor
        Boolean ``[B, n]``: the columns of a prompt, or of a later turn.
    turn : bool
        Whether it is a later turn. Its first column may be the last token generated, which the cache has not
        seen before; and turns are padded to the length of the longest, so that in a row there is no padding.

    Returns
    -------
    Tensor
        Boolean ``[B, n]``.
    """
    if not turn:
        return hidden.long().cumprod(1).bool()
    first = hidden[:, :1]
    run = torch.cat([torch.ones_like(first), hidden[:, 1:]], 1).long().cumprod(1).bool()
    run = torch.cat([first, run[:, 1:]], 1)
    return run & ~run.any(1).all()


def check_columns(mask: Tensor, columns: int) -> None:
    """Raise ValueError if a mask says nothing of some columns."""
    if mask.shape[-1] < columns:
        raise ValueError(
            f"the attention mask covers {mask.shape[-1]} tokens and the cache has seen {columns}: masks are over all "
            "tokens, evicted ones included (get_seq_length() and those of the call)"
        )


def _allowed(mask: Tensor) -> Tensor:
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()


def mask_for_columns(mask: Tensor, row: int, columns: Tensor, heads: int) -> Tensor:
    """The mask of one batch row over the columns that are physically there.

    Parameters
    ----------
    mask : Tensor
        As in `visible_columns`, not None.
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
    own = numbers(entries - queries, entries, device)
    return (numbers(0, entries, device) <= own[:, None])[None, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a summand of logits: the same if it is one, else 0 where it is true and the lowest number elsewhere."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


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
    shown = visible.repeat_interleave(heads // visible.shape[0], 0)[None, :, None]
    return additive(mask, dtype).expand(-1, heads, -1, -1).masked_fill(~shown, lowest)
