"""Fixed orthogonal rotations that spread every channel of a head over all channels.

After such a rotation the elements of a key or value look like draws of one Gaussian, whatever
channel the model put large numbers in, so that one codebook serves all of them. Attention is
blind to it: with orthogonal ``R``, ``q R`` and ``k R`` have the product of ``q`` and ``k``, and an
average of rotated values is rotated back once (QuaRot, arXiv 2404.00456, section 4; QuIP#, arXiv
2402.04396, section 3).
"""

import math
import random
from functools import lru_cache

import torch
from torch import Tensor

from refreekv.core.autocast import without_autocast


@lru_cache(maxsize=64)
def rotation(size: int) -> Tensor:
    """Matrix of the rotation for heads of ``size`` elements: entries ``[n, size]`` times it are rotated.

    Random signs, then the Kronecker product of a Hadamard matrix and a discrete cosine transform:
    ``size = 2^a m`` with odd ``m`` takes Hadamard of ``2^a`` and DCT-II of ``m``, so that 64, 128 and
    256 are plain Hadamard, 80 is 16 x 5 and 96 is 32 x 3. The signs follow from ``size`` alone.

    Returns
    -------
    Tensor
        ``[size, size]``, float64, orthogonal. Shared: not to be changed.
    """
    if size < 1:
        raise ValueError(f"a rotation needs at least one element, got {size}")
    power = size & -size
    signs = random.Random(f"refreekv rotation {size}")
    flips = torch.tensor([1.0 if signs.getrandbits(1) else -1.0 for _ in range(size)], dtype=torch.float64)
    return flips[:, None] * torch.kron(_cosines(size // power), _hadamard(power))


@lru_cache(maxsize=64)
def rotation_like(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`rotation` on a device, in a precision."""
    return rotation(size).to(device=device, dtype=dtype)


def rotate(entries: Tensor, *, back: bool = False) -> Tensor:
    """Entries ``[..., D]`` rotated, or rotated back.

    Returns
    -------
    Tensor
        ``[..., D]`` in float32, or in float64 if the entries are.
    """
    dtype = torch.float64 if entries.dtype == torch.float64 else torch.float32
    matrix = rotation_like(entries.shape[-1], entries.device, dtype)
    with without_autocast(entries.device):
        return entries.to(dtype) @ (matrix.T if back else matrix)


def _hadamard(size: int) -> Tensor:
    """Orthonormal Hadamard matrix (Sylvester's) of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _cosines(size: int) -> Tensor:
    """Orthonormal DCT-II of any size, a basis vector a column."""
    at = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (at[:, None] + 0.5) * at) * math.sqrt(2 / size)
    matrix[:, 0] = 1 / math.sqrt(size)
    return matrix
