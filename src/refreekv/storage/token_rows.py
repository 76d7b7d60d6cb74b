"""A turn's tokens as rows of their own, so that kernels that decode one token a row read all of them in one launch.

Kernels are compiled for a number of rows. So there are always as many, whatever the turn brings: those behind its own
hold nothing.
"""

from functools import lru_cache

import torch
from torch import Tensor

from refreekv.kernels.table import LENGTH

ROWS = 64
"""Tokens of a turn up to which each may read all that is stored by itself: more cost a GPU more than it saves the
host."""
SEGMENTS = 512
"""Segments of all rows, which each program looks through."""


def rows_of(kv_heads: int) -> int:
    """Rows for a turn's tokens, at most, over entries of so many KV heads."""
    return min(ROWS, SEGMENTS // kv_heads)


def one_row_each(query: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[1, H, q, D]`` of the newest tokens as those of `rows_of` rows ``[R, H, 1, D]``, and a table of these.

    A token's row is the segments of ``table``, ``[S, 4]``, up to itself: ``[R * S, 4]``. Other rows ask for anything
    and hold nothing.
    """
    _, heads, count, size = query.shape
    rows = query.new_empty(rows_of(len(table)), heads, 1, size)
    rows[:count] = query[0].transpose(0, 1)[:, :, None]
    there, longer = _numbers(count, len(rows), table.device)
    return rows, torch.addcmul(longer, table, there).flatten(0, 1)


def in_each_row(count: int, table: Tensor) -> Tensor:
    """The segments of ``table`` in each of ``count`` rows, and none in the others of `rows_of`: ``[R * S, 4]``."""
    return (table * _numbers(count, rows_of(len(table)), table.device)[0]).flatten(0, 1)


@lru_cache(maxsize=ROWS)
def _numbers(count: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[R, 1, 1]``, 1 for each token, and ``[R, 1, 4]``: how much longer its segments are than those given."""
    with torch.inference_mode(False):
        there, longer = torch.zeros(rows, 1, 1, dtype=torch.int64), torch.zeros(rows, 1, 4, dtype=torch.int64)
        there[:count] = 1
        longer[:count, 0, LENGTH] = torch.arange(1 - count, 1)
        return there.to(device), longer.to(device)
