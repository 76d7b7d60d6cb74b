"""Weights of 4 bits as bitsandbytes has NF4 and FP4: a code book of 16 numbers, and a factor for each block of weights.

Factors may be bytes themselves, which a book of 256 numbers, a scale for each 256 of them and an offset give the
meaning of (nested, or double, quantisation; Dettmers et al., QLoRA, 2023, section 3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST_ROWS = 4
"""Rows that our kernels multiply with such weights; with more of them instructions take longer than memory does."""

PIECE = 32
"""Weights that a kernel reads at a time: 16 bytes of one row, of one block."""

NESTED_BLOCK = 256
"""Factors that share a scale."""


class FourBits(NamedTuple):
    """A matrix of codes.

    Attributes
    ----------
    codes : Tensor
        ``[N * K / 2]`` bytes of two codes each, the first one in the upper half; rows one after the other.
    book : Tensor
        ``[16]``, float32: the number of each code.
    factors : Tensor
        ``[N * K / block]``: what each block is multiplied by, in float32; or bytes, if ``nested`` is given.
    nested : tuple of Tensor, optional
        The factors' book ``[256]``, their scales and their offset, in float32.
    block : int
        Weights of a block, a power of two.
    shape : tuple of int
        ``(N, K)``.
    """

    codes: Tensor
    book: Tensor
    factors: Tensor
    nested: tuple[Tensor, Tensor, Tensor] | None
    block: int
    shape: tuple[int, int]


def unpacked(weights: FourBits, dtype: torch.dtype) -> Tensor:
    """The matrix ``[N, K]`` in numbers: what the kernels are compared with."""
    codes = torch.stack((weights.codes >> 4, weights.codes & 15), 1).flatten()
    factors = weights.factors
    if weights.nested is not None:
        book, scales, offset = (part.to(dtype) for part in weights.nested)
        factors = book[factors.int()] * scales.repeat_interleave(NESTED_BLOCK)[: len(factors)] + offset
    numbers = weights.book.to(dtype)[codes.int()].view(-1, weights.block)  # a block a row
    return (numbers * factors.to(dtype)[:, None]).view(weights.shape)


def readable(weights: FourBits) -> bool:
    """Whether the kernels can read a matrix: pieces are of one row and block each, and places fit 32 bits."""
    count, size = weights.shape
    return (
        size % PIECE == 0
        and weights.block % PIECE == 0
        and weights.block.bit_count() == 1
        and count * size % weights.block == 0
        and count * size < 2**31
    )
