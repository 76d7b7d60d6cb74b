"""Few bits for each element of a vector: Lloyd-Max codebooks of the Gaussian, and bytes full of codes.

A vector of ``D`` elements becomes ``D`` codes of ``b`` bits, packed without gaps, and one number of
16 bits. The codebook is the one that loses least, in mean square, of a standard normal variable
(Lloyd, "Least squares quantization in PCM", 1982; Max, "Quantizing for minimum distortion", 1960);
the number is the scale that fits the chosen levels to the vector, by least squares.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from refreekv.core.rotation import rotate

WIDTHS = range(1, 9)
"""Bits of a code."""


@lru_cache(maxsize=len(WIDTHS))
def codebook(bits: int) -> Tensor:
    """Levels of the best ``2^bits``-level quantiser of a standard normal variable, ascending.

    Returns
    -------
    Tensor
        ``[2^bits]``, float64. Shared: not to be changed.

    Raises
    ------
    ValueError
        A width that is not in `WIDTHS`.
    """
    if bits not in WIDTHS:
        raise ValueError(f"codes have {WIDTHS.start} to {WIDTHS.stop - 1} bits, got {bits}")
    count = 2**bits
    # For many levels the best density of levels is that of a normal variable of three times the variance.
    at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = math.sqrt(3) * torch.special.ndtri(at)
    # Lloyd's iteration comes near its fixed point soon and arrives late; Newton's method does the rest.
    for _ in range(100):
        levels = _centroids(levels)[0]
    for _ in range(8):
        centroids, left, right = _centroids(levels)
        slope = torch.diag((left + right) / 2 - 1) + torch.diag(left[1:] / 2, -1) + torch.diag(right[:-1] / 2, 1)
        levels = levels - torch.linalg.solve(slope, centroids - levels)
    symmetric: Tensor = (levels - levels.flip(0)) / 2
    return symmetric


@lru_cache(maxsize=len(WIDTHS) + 1)
def distortion(bits: int) -> float:
    """Mean square error of `codebook` on a standard normal variable: ``D(b)``; of 0 bits 1."""
    if bits == 0:
        return 1.0
    levels = codebook(bits)
    mass = torch.special.ndtr(_edges(levels)).diff()
    # Each level is its cell's mean, so that the variance splits into what levels carry and what is lost.
    return 1.0 - float((mass * levels.square()).sum())


def _edges(levels: Tensor) -> Tensor:
    """Bounds of the cells, infinite ones included: ``[levels + 1]``."""
    infinite = levels.new_tensor([math.inf])
    return torch.cat([-infinite, (levels[1:] + levels[:-1]) / 2, infinite])


def _centroids(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of a standard normal variable in each level's cell, and its slopes in the cell's lower and upper bound."""
    edges = _edges(levels)
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(edges).diff()
    centroids = -density.diff() / mass
    # An infinite bound has no density, and no say.
    finite = edges.nan_to_num(posinf=0.0, neginf=0.0)
    left = density[:-1] * (centroids - finite[:-1]) / mass
    right = density[1:] * (finite[1:] - centroids) / mass
    return centroids, left, right


@lru_cache(maxsize=64)
def _levels(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels and the bounds between them, in float32."""
    levels = codebook(bits)
    return levels.float().to(device), _edges(levels)[1:-1].float().to(device)


def code(vectors: Tensor, bits: int, half: torch.dtype) -> tuple[Tensor, Tensor]:
    """Code vectors ``[n, D]``, each by itself.

    Parameters
    ----------
    vectors : Tensor
        ``[n, D]`` in float32.
    bits : int
        Of a code.
    half : torch.dtype
        Of the scales: 16 bits.

    Returns
    -------
    payload : Tensor
        ``[n, packed_bytes(D, bits)]``, uint8.
    scale : Tensor
        ``[n]`` in ``half``.
    """
    levels, bounds = _levels(bits, vectors.device)
    spread = vectors.square().mean(-1, keepdim=True).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(vectors / spread, bounds, out_int32=True)
    chosen = torch.nn.functional.embedding(codes, levels[:, None])[..., 0]
    # Never zero: one bit and up have no level at zero.
    scale = (vectors * chosen).sum(-1) / chosen.square().sum(-1)
    return pack(codes.to(torch.uint8), bits), scale.to(half)


def nearest(numbers: Tensor, bits: int) -> Tensor:
    """The nearest levels of a codebook, of numbers of any shape in float32; of 0 bits zero."""
    if bits == 0:
        return torch.zeros_like(numbers)
    levels, bounds = _levels(bits, numbers.device)
    at = torch.bucketize(numbers.contiguous(), bounds, out_int32=True)
    return torch.nn.functional.embedding(at, levels[:, None])[..., 0]


def decoded(payload: Tensor, scale: Tensor, bits: int, size: int) -> Tensor:
    """Vectors ``[n, size]`` in float32 that payload ``[n, bytes]`` and scales ``[n]`` stand for."""
    levels, _ = _levels(bits, payload.device)
    each = 8 // bits
    if each * bits == 8:
        # One look-up for all codes of a byte, in a table of what each byte stands for.
        table = levels[unpack(torch.arange(256, dtype=torch.uint8, device=payload.device)[:, None], bits, each).long()]
        vectors = torch.nn.functional.embedding(payload.int(), table).flatten(-2)[..., :size]
    else:
        vectors = torch.nn.functional.embedding(unpack(payload, bits, size).int(), levels[:, None])[..., 0]
    return vectors * scale[:, None].float()


def packed_bytes(size: int, bits: int) -> int:
    """Bytes of ``size`` codes."""
    return -(-size * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[n, D]`` (uint8, under ``2^bits``) as bytes ``[n, packed_bytes(D, bits)]``.

    Code ``i`` has the bits ``i * bits`` and following of the line, the lowest bit of a byte first.
    """
    count, size = codes.shape
    if bits == 8:
        return codes.contiguous()
    codes_in, bytes_in = _period(bits)
    whole = -(-size // codes_in)
    padded = torch.nn.functional.pad(codes, (0, whole * codes_in - size)).view(count, whole, codes_in)
    packed = codes.new_zeros(count, whole, bytes_in)
    for at, byte, shift in _placed(bits):
        packed[..., byte] |= padded[..., at] << shift if shift >= 0 else padded[..., at] >> -shift
    return packed.flatten(1)[:, : packed_bytes(size, bits)].contiguous()


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """Codes ``[n, size]``, uint8, of bytes as `pack` returns them."""
    if bits == 8:
        return packed
    codes_in, bytes_in = _period(bits)
    whole = -(-size // codes_in)
    padded = torch.nn.functional.pad(packed, (0, whole * bytes_in - packed.shape[1])).view(-1, whole, bytes_in)
    codes: Tensor = packed.new_zeros(len(packed), whole, codes_in)
    for at, byte, shift in _placed(bits):
        codes[..., at] |= padded[..., byte] >> shift if shift >= 0 else padded[..., byte] << -shift
    codes &= 2**bits - 1
    return codes.flatten(1)[:, :size]


def _period(bits: int) -> tuple[int, int]:
    """Codes, and bytes, after which codes begin with a byte again."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8


@lru_cache(maxsize=len(WIDTHS))
def _placed(bits: int) -> tuple[tuple[int, int, int], ...]:
    """Code, byte, and places that the code is shifted up by in the byte (negative: down), for one period."""
    found = []
    for at in range(_period(bits)[0]):
        first, last = at * bits // 8, (at * bits + bits - 1) // 8
        found += [(at, byte, at * bits - 8 * byte) for byte in range(first, last + 1)]
    return tuple(found)


def round_trip(entries: Tensor, bits: int, centre: Tensor) -> Tensor:
    """What coding gives back of entries ``[..., n, D]``, centred on ``centre`` ``[..., D]`` and rotated."""
    rotated = rotate(entries.float() - centre.float()[..., None, :])
    half = entries.dtype if entries.dtype.itemsize == 2 else torch.float16
    payload, scale = code(rotated.flatten(0, -2), bits, half)
    back = rotate(decoded(payload, scale, bits, entries.shape[-1]).view_as(rotated), back=True)
    return (back + centre.float()[..., None, :]).to(entries.dtype)


def coded_bytes(size: int, bits: int) -> int:
    """Bytes of a coded key, or value, of ``size`` elements, with its scale."""
    return packed_bytes(size, bits) + 2
