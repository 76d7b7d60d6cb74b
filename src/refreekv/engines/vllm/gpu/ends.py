"""What FlashAttention loads of a block behind a sequence's end."""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_TILE = 64
"""Tokens of FlashAttention 3's smallest tile of keys; only of blocks of whole tiles it loads what is behind the end."""


def clear_behind(caches: Sequence[Tensor], table: Tensor, lengths: Tensor) -> None:
    """Write zeros behind each sequence's last token, up to the end of its block.

    FlashAttention 3 loads tiles of keys and values whole where a block is one or several of them and the batch has
    many queries. Tokens behind the end have no weight. But the block may have held somebody's codes before: bytes that
    as numbers may be no numbers, and times no weight these are none, either. vLLM, whose blocks hold numbers of one
    kind, leaves them as they are.

    Parameters
    ----------
    caches : sequence of Tensor
        Of the layers of a KV cache group, ``[blocks, H_kv, N, 2 * D]``; changed in place.
    table : Tensor
        The step's block table, int32 ``[R or more, W]``.
    lengths : Tensor
        int32 ``[R]``: tokens of each row's sequence when the step is done.
    """
    last = (lengths.long() - 1).clamp_min(0)
    size = caches[0].shape[2]
    # [R]
    blocks = table[: len(lengths)].gather(1, (last // size)[:, None])[:, 0]
    # [R, 1, N, 1]
    behind = (torch.arange(size, device=last.device) > (last % size)[:, None])[:, None, :, None]
    for cache in caches:
        cache[blocks] = cache[blocks].masked_fill_(behind, 0)
