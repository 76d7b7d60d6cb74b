"""A turn's tokens as rows of their own, so that kernels that decode one token a row read many of them in one launch.

Kernels are compiled for a number of rows. So there are always as many, whatever the turn brings: those behind its own
hold nothing.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from refreekv.kernels.table import LENGTH

MOST = 64
"""Tokens of a turn up to which each may read all that is stored by itself: more cost a GPU more than it saves the
host."""
SEGMENTS = 256
"""Segments of all rows, which each program looks through."""


def rows_of(kv_heads: int) -> int:
    """Rows of a launch over entries of so many KV heads."""
    return max(SEGMENTS // kv_heads, 1)


def in_rows(query: Tensor, tables: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """Queries of the newest tokens ``[1, H, q, D]`` as those of `rows_of` rows ``[R, H, 1, D]``, some at a time.

    With each goes how many tokens it has, and ``tables`` ``[S, 4]`` of these rows: of the first one, which the tokens
    are the last entries of, the segments up to each token; of the others all. Rows behind the tokens' ask for anything
    and hold nothing.
    """
    _, heads, tokens, size = query.shape
    segments, count = len(tables[0]), rows_of(len(tables[0]))
    others = torch.stack(list(tables[1:])) if len(tables) > 1 else None
    for start in range(0, tokens, count):
        stop = min(start + count, tokens)
        rows = query.new_empty(count, heads, 1, size)
        rows[: stop - start] = query[0, :, start:stop].transpose(0, 1)[:, :, None]
        there, longer = _numbers(stop - start, tokens - stop, count, tables[0].device)
        given = [torch.addcmul(longer, tables[0], there).view(count * segments, 4)]
        if others is not None:  # [T, S, 4] by [R, 1, 1] -> [T, R, S, 4]
            given += (others[:, None] * there).view(len(others), count * segments, 4)
        yield stop - start, rows, given


def in_turn(found: Sequence[Tensor]) -> Tensor:
    """The results of a turn's tokens ``[1, q, H, Dv]``, of those of its parts ``[n, 1, H, Dv]``."""
    return (found[0] if len(found) == 1 else torch.cat(list(found))).transpose(0, 1)


@lru_cache(maxsize=2 * MOST)
def _numbers(tokens: int, behind: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[R, 1, 1]``, 1 for each token, and ``[R, 1, 4]``: by how much its segments are longer than those of all tokens.

    ``behind`` are tokens that come after these.
    """
    with torch.inference_mode(False):
        there, longer = torch.zeros(rows, 1, 1, dtype=torch.int64), torch.zeros(rows, 1, 4, dtype=torch.int64)
        there[:tokens] = 1
        longer[:tokens, 0, LENGTH] = torch.arange(1 - tokens, 1) - behind
        return there.to(device), longer.to(device)
