"""Attention over rows of different length, through whatever function the model uses otherwise."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.proof import hides_nothing
from refreekv.pruning.masks import additive, causal_mask, check_columns, hide_padding
from refreekv.storage.base import KVStorage, Piece
from refreekv.storage.token_rows import MOST
from refreekv.storage.warm_up import MANY, available_cores

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

FEW = 128
"""Queries up to which a mask that is repeated for the heads of a group is less than a KV head's entries would be."""


def ragged_attention(
    layer: ReFreeKVLayer,
    attention: AttentionFunction,
    module: Any,
    query: Tensor,
    mask: Tensor | None,
    *,
    flash: bool,
    **kwargs: Any,
) -> Tensor:
    """Attend over a ragged layer with a function made for rectangular keys and values.

    A token that decodes from an arena goes through one kernel instead, whatever the lengths, and so do the few of a
    turn of one row on a GPU that holds all of it: what is in host memory would come over the bus for each of them.
    Otherwise rows of one length are views of the flat storage and go through in one call, others
    one by one. Only where the KV heads of a row hold different numbers of entries are its
    keys and values copied, padded to the longest head, for the length of the call.

    Parameters
    ----------
    layer : ReFreeKVLayer
        A ragged layer that already holds the entries of these queries.
    attention : callable
        An attention function of transformers, ``(module, query, key, value, mask, **kwargs)``.
    module : Module
        The attention module, which ``attention`` reads its settings off.
    query : Tensor
        ``[B, H, q, D]``.
    mask : Tensor or None
        Over logical columns.
    flash : bool
        Whether ``attention`` is a flash function: these align the causal triangle of several
        queries to the last key by themselves, and know no masks that differ between heads.

    Returns
    -------
    Tensor
        ``[B, q, H, Dv]``, as attention functions return it.
    """
    storage = layer.ragged
    assert storage is not None
    # Functions that add masks to logits, such as eager attention, are given one where sdpa says causal by itself.
    adds = mask is not None and mask.is_floating_point()
    if hides_nothing(mask):
        mask = None
    if storage.tables and _kernel_can(layer, query, mask, kwargs):
        return storage.attend(query, kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux"))
    if storage.tables and not storage.in_host_memory and _kernel_can_each(query, mask, kwargs):
        return storage.attend_each(query, kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux"))
    return _by_row(layer, storage, attention, module, query, mask, adds=adds, flash=flash, **kwargs)


def _by_row(
    layer: ReFreeKVLayer,
    storage: KVStorage,
    attention: AttentionFunction,
    module: Any,
    query: Tensor,
    mask: Tensor | None,
    *,
    adds: bool,
    flash: bool,
    **kwargs: Any,
) -> Tensor:
    """Attention over entries in full precision: in one call where all rows have one length, else row by row."""
    batch, heads, queries, _ = query.shape
    if mask is not None:
        check_columns(mask, layer.get_seq_length())
    needs_causal_mask = queries > 1 and not flash

    def causal(entries: int) -> Tensor:
        made = causal_mask(queries, entries, query.device)
        return additive(made, query.dtype) if adds else made

    if storage.uniform and mask is None:
        if needs_causal_mask:
            mask = causal(storage.lengths[0][0])
        stacked = storage.stacked()
        layer.rows_of_call = list(zip(*stacked, strict=True))
        return attention(module, query, *stacked, mask, **kwargs)[0]
    outputs = []
    layer.rows_of_call = rows = storage.rows()
    for row, (keys, values) in enumerate(rows):
        if not keys.shape[1]:  # a row that was freed: what the model makes of it means nothing
            outputs.append(query.new_zeros(1, queries, heads, storage.sizes[1]))
            continue
        row_kwargs = {name: _row_of(value, name, row, batch) for name, value in kwargs.items()}
        if flash and (not storage.even(row) or (mask is not None and len(layer.kept_columns[row].counts) > 1)):
            own = storage.segments(row)
            outputs.append(_by_head(layer, own, attention, module, query[row : row + 1], mask, row, **row_kwargs))
            continue
        row_mask = None if mask is None else layer.row_mask(mask, row, heads)
        visible = storage.visible(row)
        if row_mask is None and queries > 1 and (visible is not None or needs_causal_mask):
            row_mask = causal(keys.shape[1])
        if visible is not None:
            row_mask = hide_padding(row_mask, visible, heads, query.dtype)
        outputs.append(attention(module, query[row : row + 1], keys[None], values[None], row_mask, **row_kwargs)[0])
    return torch.cat(outputs) if batch > 1 else outputs[0]


def by_group(attention: AttentionFunction) -> AttentionFunction:
    """The same attention function, with the query heads that share a KV head as more queries of one head.

    So a mask keeps sdpa from nothing: no keys and values are copied for each query head, and one call serves all. It
    is what transformers does for a single query.
    """

    def together(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        (batch, heads, count, _), kv_heads = query.shape, key.shape[1]
        group = heads // kv_heads
        if mask is None or mask.dim() != 4 or group == 1 or not 1 < count <= FEW:
            return attention(module, query, key, value, mask, **kwargs)
        if mask.shape[1] == 1:
            mask = mask.expand(-1, group, -1, -1).flatten(1, 2)[:, None]  # [B, 1, q, n] -> [B, 1, group * q, n]
        else:
            mask = mask.reshape(len(mask), kv_heads, group * count, -1)  # [B, H, q, n] -> [B, H_kv, group * q, n]
        own = query.reshape(batch, kv_heads, group * count, -1)  # [B, H, q, D] -> [B, H_kv, group * q, D]
        output = attention(_Ungrouped(module), own, key, value, mask, **kwargs)[0]
        # [B, group * q, H_kv, Dv] -> [B, q, H, Dv]
        output = output.reshape(batch, group, count, kv_heads, -1).permute(0, 2, 3, 1, 4)
        return output.reshape(batch, count, heads, -1), None

    return together


class _Ungrouped:
    """An attention module whose every query head has a KV head of its own, as attention functions see it."""

    num_key_value_groups = 1

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _kernel_can(layer: ReFreeKVLayer, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether this is plain decoding: one token a row that sees every entry."""
    return (
        query.shape[2] == 1
        and (mask is None or (layer.state.decodes(layer.get_seq_length() - 1) and not layer.holds_hidden))
        and kwargs.get("sliding_window") is None
        and not kwargs.get("dropout")
    )


def _kernel_can_each(query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether these are a few tokens of one row behind all that is stored, which a GPU takes for as many rows."""
    batch, _, queries, _ = query.shape
    plain = mask is None and kwargs.get("sliding_window") is None and not kwargs.get("dropout")
    return plain and batch == 1 and 1 < queries <= MOST and reads_many(query.device)


@lru_cache(maxsize=16)
def reads_many(device: torch.device) -> bool:
    """Whether kernels read what is stored once for each of several tokens in no time to speak of, and are there.

    On few cores they would be compiled while the turn waits.
    """
    return device.type == "cuda" and available_cores() >= MANY


def _by_head(
    layer: ReFreeKVLayer,
    segments: tuple[Piece, Piece],
    attention: AttentionFunction,
    module: Any,
    query: Tensor,
    mask: Tensor | None,
    row: int,
    *,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One row's attention, a call for each KV head: flash functions know no masks that differ between heads."""
    keys, values = segments
    columns = layer.columns(row).tensors(query.device)
    group = query.shape[1] // len(keys)
    outputs = []
    for head, (key, value) in enumerate(zip(keys, values, strict=True)):
        part = slice(head * group, (head + 1) * group)
        head_mask = None if mask is None else mask[row : row + 1].index_select(1, columns[head])
        # Learned sinks have one logit for each query head.
        extra = {} if s_aux is None else {"s_aux": s_aux[part]}
        output = attention(module, query[:, part], key[None, None], value[None, None], head_mask, **extra, **kwargs)
        outputs.append(output[0])
    return torch.cat(outputs, dim=2)


def _row_of(value: Any, name: str, row: int, batch: int) -> Any:
    """The row's part of a keyword argument that has one line a row."""
    if name == "position_ids" and isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == batch:
        return value[row : row + 1]
    return value
