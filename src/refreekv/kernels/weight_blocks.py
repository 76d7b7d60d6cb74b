"""Products with weights in blocks."""

from torch import Tensor

from refreekv.core import slices
from refreekv.core.weight_blocks import WeightBlocks, sliced, unpacked
from refreekv.kernels import dispatch

UNPACKED = 2**25
"""Weights in blocks that are unpacked at a time."""


def block_linear(x: Tensor, blocks: WeightBlocks, bias: Tensor | None = None) -> Tensor:
    """Multiply with weights in blocks: ``x @ weight.T + bias``.

    Parameters
    ----------
    x : Tensor
        ``[..., K]``.
    blocks : WeightBlocks
        The weights, ``[N, K]``.
    bias : Tensor, optional
        ``[N]``.

    Returns
    -------
    Tensor
        ``[..., N]``, of the type of ``x``. On CUDA a few rows are multiplied with the codes as they are; for more
        of them, and on CPUs, weights are unpacked, some rows of the matrix at a time.
    """
    triton = dispatch.at_once(blocks.low)
    if triton:
        from refreekv.kernels import block_products

        flat = x.reshape(-1, x.shape[-1])  # [M, K]
        if len(flat) <= block_products.MOST_ROWS:
            return block_products.product(flat.contiguous(), blocks, bias).view(*x.shape[:-1], blocks.shape[0])

    rows = block_rows(*blocks.shape)

    def unpack(index: int) -> Tensor:
        some = sliced(blocks, index * rows, (index + 1) * rows)
        return block_products.unpack(some, x.dtype) if triton else unpacked(some, x.dtype)

    return slices.product(x, blocks.shape[0], rows, unpack, None if bias is None else bias.to(x.dtype))


def block_rows(count: int, size: int) -> int:
    """Rows of a matrix ``[N, K]`` in blocks that are unpacked at a time."""
    return min(count, max(1, UNPACKED // size))
