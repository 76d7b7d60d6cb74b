"""Products of a prompt with packed weights, some rows of the matrix unpacked at a time.

Unpacked to 16 bits, a matrix is the largest thing that a model takes beside its weights and a prompt's entries. A part
of its rows does as well: they give columns of the result.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

PARTS = 4
"""Parts of a matrix, unless `LEAST` or `MOST` say otherwise: each costs the host two launches more."""
LEAST, MOST = 2**24, 2**25
"""Weights that are unpacked at a time: 32 and 64 MiB in 16 bits."""
LEAST_ROWS = 1024
"""Rows at least: with fewer columns a product leaves multiprocessors without a tile."""
TILE = 128
"""Columns of a product's tile: slices are whole tiles."""


def slice_rows(count: int, size: int, tokens: int) -> int:
    """Rows of a matrix ``[N, K]`` that are unpacked at a time to be multiplied with so many tokens; N: all of it.

    A quarter of the matrix within limits, or as many weights as the product's input and result have numbers, if that
    is more. Slices are as even as whole tiles can be.
    """
    weights = max(min(max(count * size // PARTS, LEAST), MOST), LEAST_ROWS * size, tokens * (count + size))
    most = max(weights // size // TILE, 1) * TILE
    if most >= count:
        return count
    parts = -(-count // most)
    return -(-count // (parts * TILE)) * TILE


def unpacked_weights(shapes: Iterable[tuple[int, int]], tokens: int) -> int:
    """The most weights that are unpacked at a time, of matrices ``[N, K]`` and for so many tokens."""
    return max((slice_rows(count, size, tokens) * size for count, size in shapes), default=0)


def product(x: Tensor, count: int, rows: int, unpack: Callable[[int], Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply with a packed matrix ``[N, K]``: ``x @ weight.T + bias``.

    Parameters
    ----------
    x : Tensor
        ``[..., K]``.
    count : int
        Rows of the matrix, N.
    rows : int
        Rows of a slice.
    unpack : callable
        Makes the slice of a number, ``[n, K]`` in the type of ``x``. One is done with when the next is asked for.
    bias : Tensor, optional
        ``[N]``, in the type of ``x``.

    Returns
    -------
    Tensor
        ``[..., N]``, in the type of ``x``.
    """
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, bias)):
        # Nothing that is written into can be derived.
        joined = torch.cat([flat @ unpack(index).T for index in range(-(-count // rows))], -1)
        joined = joined.view(*x.shape[:-1], count)
        return joined if bias is None else joined + bias
    out = flat.new_empty(len(flat), count)
    biases = None if bias is None else bias.split(rows)
    for index, some in enumerate(out.split(rows, 1)):
        weights = unpack(index)
        if biases is None:
            torch.mm(flat, weights.T, out=some)
        else:
            # Written where it belongs, a result would be rounded before the bias is added, and again behind it.
            some.copy_(torch.nn.functional.linear(flat, weights, biases[index]))
        del weights  # before the next ones are made
    return out.view(*x.shape[:-1], count)
