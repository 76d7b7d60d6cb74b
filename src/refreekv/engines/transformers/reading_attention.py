"""Attention of a chunk, or of a later turn, over all that was read before it, decoded for the length of the call."""

from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from refreekv.engines.transformers.proof import hides_nothing
from refreekv.engines.transformers.ragged_attention import AttentionFunction


def over_what_was_read(attention: AttentionFunction, base: AttentionFunction) -> AttentionFunction:
    """The attention function of a call that is given a mask; ``attention`` calls ``base``, sdpa's function.

    Behind a mask sdpa copies keys and values for each query head that shares them, and takes a kernel that reads the
    mask. Where the mask says no more than that nobody looks ahead, a flash kernel does without either.
    """

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if base is sdpa_attention_forward and hides_nothing(mask) and _flash_can(query, key, value):
            return _to_the_last(query, key, value, **kwargs), None
        return by_kv_head(attention)(module, query, key, value, mask, **kwargs)

    return attend


def by_kv_head(attention: AttentionFunction) -> AttentionFunction:
    """The same attention function, called for one KV head after the other.

    What is copied of one KV head at a time is little; of all of them it is more than a prompt that is coded as it is
    read saves.
    """

    def in_turn(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        outputs = []
        for head in range(key.shape[1]):
            own, one = slice(head * group, (head + 1) * group), slice(head, head + 1)
            part = mask if mask is None or mask.shape[1] == 1 else mask[:, own]
            outputs.append(attention(module, query[:, own], key[:, one], value[:, one], part, **kwargs)[0])
        return torch.cat(outputs, dim=2), None

    return in_turn


def _flash_can(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's flash kernel takes several queries of these, the last of which sees the last key."""
    if not query.is_cuda or query.shape[2] == 1:
        return False
    shared = query.shape[1] != key.shape[1]
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, shared))


def _to_the_last(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0, scaling: float | None = None, **_: Any
) -> Tensor:
    """Causal attention ``[B, q, H, D]`` of queries that belong to the last keys."""
    output = scaled_dot_product_attention(
        query, key, value, causal_lower_right(query.shape[2], key.shape[2]), dropout_p=dropout, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2).contiguous()
