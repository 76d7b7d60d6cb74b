"""Block tables with holes to dense ones, for all groups and requests in one vectorised step."""

import torch
from torch import Tensor


def compact_tables(tables: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Close the holes of block tables.

    Parameters
    ----------
    tables : Tensor
        Integer ``[G, R, W]``: one row for each group and request.
    starts, lengths : Tensor
        Integer ``[G, R]``: where each row's hole begins, and how many entries it has.

    Returns
    -------
    Tensor
        ``[G, R, W]``: each row without its hole, what follows moved up. Entries behind a
        row's end are arbitrary entries of the row.
    """
    width = tables.shape[-1]
    columns = torch.arange(width, device=tables.device, dtype=torch.int64)
    moved = columns + lengths[..., None] * (columns >= starts[..., None])
    return tables.gather(-1, moved.clamp_(max=width - 1))
