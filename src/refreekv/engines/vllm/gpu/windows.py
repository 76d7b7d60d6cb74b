"""What layers with sliding windows may still load of blocks that they have left, in vLLM before 0.33."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import SlidingWindowSpec


def reach_of(spec: Any) -> int:
    """How many tokens before its first query a KV cache group's layers see; 0: all."""
    one = getattr(spec, "first_spec", spec)
    if not isinstance(one, SlidingWindowSpec):
        return 0
    return int(one.sliding_window) - 1 + int(one.extra_retained_tokens)


def hide_left(tables: Sequence[Tensor], reaches: Sequence[int], sizes: Sequence[int], computed: Tensor) -> None:
    """Name the null block where a window has left a block behind, as vLLM does from 0.33 on.

    Attention loads whole tiles of keys and values; those before the window have no weight. But their blocks may hold
    somebody's codes by now: bytes that as numbers may be no numbers, and times no weight these are none, either.

    Parameters
    ----------
    tables : sequence of Tensor
        Of each KV cache group the step's block tables, int32 ``[R or more, W]``; changed in place.
    reaches, sizes : sequence of int
        Of each group, `reach_of` and tokens of a block.
    computed : Tensor
        int32 ``[R]``: position of each row's first query.
    """
    for table, reach, size in zip(tables, reaches, sizes, strict=True):
        if reach:
            left = (computed - reach).clamp_min(0) // size
            columns = torch.arange(table.shape[1], device=table.device)
            table[: len(computed)].masked_fill_(columns < left[:, None], 0)
