"""Products of a prompt with packed weights, some rows of the matrix unpacked at a time.

Unpacked to 16 bits, a matrix is the largest thing that a model takes beside its weights and a prompt's entries. A few
of its rows do as well: each gives a column of the result.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WEIGHTS = 2**24
"""Weights that are unpacked at a time, unless that would be too few rows: 32 MiB in 16 bits."""
LEAST_ROWS = 1024
"""Rows that are unpacked at a time at least; all slices but the last have a multiple of them."""
MANY_TOKENS = 1024
"""Tokens from which on it is twice as many rows: what they take themselves is more than that, and with fewer columns a
product leaves multiprocessors without a tile."""


def slice_rows(size: int, tokens: int) -> int:
    """Rows of ``size`` weights that are unpacked at a time to be multiplied with so many tokens."""
    least = LEAST_ROWS * (2 if tokens >= MANY_TOKENS else 1)
    return max(WEIGHTS // size // LEAST_ROWS * LEAST_ROWS, least)


def unpacked_weights(shapes: Iterable[tuple[int, int]], tokens: int) -> int:
    """The most weights that are unpacked at a time, of matrices ``[N, K]`` and for so many tokens."""
    return max((min(count, slice_rows(size, tokens)) * size for count, size in shapes), default=0)


def product(x: Tensor, count: int, unpack: Callable[[int, int], Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply with a packed matrix ``[N, K]``: ``x @ weight.T + bias``.

    Parameters
    ----------
    x : Tensor
        ``[..., K]``.
    count : int
        Rows of the matrix, N.
    unpack : callable
        Makes rows from the first to before the second number, ``[n, K]`` in the type of ``x``.
    bias : Tensor, optional
        ``[N]``, in the type of ``x``.

    Returns
    -------
    Tensor
        ``[..., N]``, in the type of ``x``.
    """
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    step = slice_rows(x.shape[-1], len(flat))
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, bias)):
        # Nothing that is written into can be derived.
        columns = [flat @ unpack(start, min(start + step, count)).T for start in range(0, count, step)]
        joined = torch.cat(columns, -1).view(*x.shape[:-1], count)
        return joined if bias is None else joined + bias
    out = flat.new_empty(len(flat), count)
    for start in range(0, count, step):
        stop = min(start + step, count)
        weights, some = unpack(start, stop), out[:, start:stop]
        if bias is None:
            torch.mm(flat, weights.T, out=some)
        else:
            torch.addmm(bias[start:stop], flat, weights.T, out=some)
        del weights  # before the next ones are made
    return out.view(*x.shape[:-1], count)
