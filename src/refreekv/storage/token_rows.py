"""A turn's tokens as rows of their own, so that kernels that decode one token a row read all of them in one launch."""

from functools import lru_cache

import torch
from torch import Tensor

from refreekv.kernels.table import LENGTH


def one_row_each(query: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[1, H, q, D]`` of the newest tokens as those of ``q`` rows ``[q, H, 1, D]``, and a table of these.

    Each row is the segments of ``table``, ``[S, 4]``, up to its own token: ``[q * S, 4]``.
    """
    rows = query[0].transpose(0, 1)[:, :, None]
    return rows, (table + _shortened(len(rows), table.device)).flatten(0, 1)


@lru_cache(maxsize=64)
def _shortened(count: int, device: torch.device) -> Tensor:
    """What makes segments shorter by so many entries less one, less two, and so on to none: ``[count, 1, 4]``."""
    with torch.inference_mode(False):
        made = torch.zeros(count, 1, 4, dtype=torch.int64)
        made[:, 0, LENGTH] = torch.arange(1 - count, 1)
        return made.to(device)
