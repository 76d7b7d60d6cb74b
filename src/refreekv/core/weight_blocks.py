"""Weights as .gguf files have them, in a layout that kernels read: codes of 4 to 8 bits in groups with a scale.

The formats are those of llama.cpp (ggml-common.h, ggml-quants.c). Each of them says that a weight is
``scale * (code - offset)`` or ``scale * code + minimum``, with codes of 4, 5, 6 or 8 bits and a scale for 16 or 32
weights; of K-quants the scale is a product of two. Here codes lie in planes (four bits of two weights in a byte, and
what is above them in a second plane), and a group has its scale, and its minimum, in float16, relative to a power of
two that belongs to the row. So the codes are the file's, and scales are exact but in K-quants, where they are
rounded to 11 bits: less than rounding the weights to bfloat16 does.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockForm:
    """How codes and scales of a matrix are to be read."""

    bits: int  # of a code: 4, 5, 6 or 8
    group: int  # weights of a row that share a scale
    offset: int  # what is taken off each code
    has_minimum: bool  # whether a group has a minimum, too

    @property
    def high_bits(self) -> int:
        """Bits of a code in the second plane."""
        return self.bits - 4 if self.bits in (5, 6) else 0


class WeightBlocks(NamedTuple):
    """A matrix ``[N, K]``.

    Attributes
    ----------
    form : BlockForm
        How the rest is to be read.
    low : Tensor
        uint8 ``[N, K / 2]``: four bits of weight 2j, and above them of 2j + 1. Codes of 8 bits: int8 ``[N, K]``.
    high : Tensor
        uint8 ``[N, K * high_bits / 8]``, the first weight's bits lowest; empty where codes have 4 or 8 bits.
    scales, minima : Tensor
        float16 ``[N, K / group]``, relative to the row's; no minima: empty.
    rows : Tensor
        float32 ``[N]``: what a row's scales and minima are multiplied by, a power of two.
    """

    form: BlockForm
    low: Tensor
    high: Tensor
    scales: Tensor
    minima: Tensor
    rows: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.low.shape[0], self.scales.shape[1] * self.form.group


@dataclass(frozen=True)
class _Stored:
    """A format of the file."""

    form: BlockForm
    weights: int  # of a block
    bytes: int


FORMATS = {
    "Q4_0": _Stored(BlockForm(4, 32, 8, False), 32, 18),
    "Q4_1": _Stored(BlockForm(4, 32, 0, True), 32, 20),
    "Q5_0": _Stored(BlockForm(5, 32, 16, False), 32, 22),
    "Q5_1": _Stored(BlockForm(5, 32, 0, True), 32, 24),
    "Q8_0": _Stored(BlockForm(8, 32, 0, False), 32, 34),
    "Q4_K": _Stored(BlockForm(4, 32, 0, True), 256, 144),
    "Q5_K": _Stored(BlockForm(5, 32, 0, True), 256, 176),
    "Q6_K": _Stored(BlockForm(6, 16, 32, False), 256, 210),
}
"""Formats of .gguf files that are read, by their names."""


def from_file(data: Tensor, name: str) -> WeightBlocks:
    """Read a matrix out of a file's blocks.

    Parameters
    ----------
    data : Tensor
        uint8 ``[N, bytes]``: the rows as they are in the file.
    name : str
        One of `FORMATS`.

    Raises
    ------
    KeyError
        Another format.
    ValueError
        Rows that are no whole number of blocks.
    """
    stored = FORMATS[name]
    if data.shape[1] % stored.bytes:
        raise ValueError(f"a row of {data.shape[1]} bytes is no whole number of {name}'s blocks of {stored.bytes}")
    count = data.shape[0]
    codes, scales, minima = _READ[name](data.reshape(-1, stored.bytes))
    codes = codes.reshape(count, -1)  # [N, K]
    scales = scales.reshape(count, -1)  # [N, K / group]
    # A power of two: no bit of a scale is lost.
    exponents = torch.frexp(scales.abs().amax(1)).exponent
    rows = torch.ldexp(torch.ones(count, device=data.device), exponents - 1)
    scales, minima = ((part.reshape(count, -1) / rows[:, None]).half() for part in (scales, minima))
    return WeightBlocks(stored.form, *_planes(codes, stored.form), scales, minima, rows)


def unpacked(blocks: WeightBlocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix ``[N, K]`` in numbers; `kernels.block_linear` without writing it out."""
    form, low = blocks.form, blocks.low
    if form.bits == 8:
        codes = low.to(torch.float32)
    else:
        codes = torch.stack([low & 15, low >> 4], dim=-1).flatten(1)  # [N, K]
        if form.high_bits:
            shifts = torch.arange(0, 8, form.high_bits, device=low.device, dtype=torch.uint8)
            high = (blocks.high[..., None] >> shifts) & (2**form.high_bits - 1)  # [N, bytes, weights of a byte]
            codes = codes | (high.flatten(1) << 4)
        codes = codes.to(torch.float32) - form.offset
    grouped = codes.unflatten(1, (-1, form.group)) * blocks.scales[..., None].float()
    if form.has_minimum:
        grouped = grouped + blocks.minima[..., None].float()
    numbers: Tensor = grouped.flatten(1) * blocks.rows[:, None]
    return numbers.to(dtype)


def chosen(blocks: WeightBlocks, index: Tensor) -> WeightBlocks:
    """Some rows of a matrix."""
    form, *parts = blocks
    return WeightBlocks(form, *(part.index_select(0, index) if part.numel() else part for part in parts))


def sliced(blocks: WeightBlocks, start: int, stop: int) -> WeightBlocks:
    """Rows ``start`` to ``stop`` of a matrix, in the same memory."""
    form, *parts = blocks
    return WeightBlocks(form, *(part[start:stop] for part in parts))


def _planes(codes: Tensor, form: BlockForm) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` of 4 to 6 bits as two planes; those of 8 bits as they are."""
    none = torch.empty(0, dtype=torch.uint8, device=codes.device)
    if form.bits == 8:
        return codes, none
    low = codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4
    if not form.high_bits:
        return low, none
    each = 8 // form.high_bits
    shifts = torch.arange(0, 8, form.high_bits, device=codes.device, dtype=torch.uint8)
    high = ((codes >> 4).unflatten(1, (-1, each)) << shifts).sum(-1, dtype=torch.uint8)
    return low, high


# -- the file's blocks: codes, scales and minima of each, [blocks, …] -------------------------------


def _half(blocks: Tensor, start: int) -> Tensor:
    """A number in float16 of each block, as float32 ``[blocks, 1]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(part: Tensor) -> Tensor:
    """Lower halves of the bytes, then upper ones."""
    return torch.cat([part & 15, part >> 4], dim=1)


def _bits32(part: Tensor) -> Tensor:
    """32 bits of four bytes, lowest first: ``[blocks, 32]``."""
    shifts = torch.arange(8, device=part.device, dtype=torch.uint8)
    return ((part[..., None] >> shifts) & 1).flatten(1)


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0), blocks.new_empty(0, dtype=torch.float32)


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = _nibbles(blocks[:, 6:]) | _bits32(blocks[:, 2:6]) << 4
    return codes, _half(blocks, 0), blocks.new_empty(0, dtype=torch.float32)


def _q5_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _nibbles(blocks[:, 8:]) | _bits32(blocks[:, 4:8]) << 4, _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = blocks[:, 2:].contiguous().view(torch.int8)
    return codes, _half(blocks, 0), blocks.new_empty(0, dtype=torch.float32)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of eight groups in 12 bytes, ``[blocks, 8]`` each."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, third & 15 | (first >> 6) << 4], dim=1)
    minima = torch.cat([second & 63, third >> 4 | (second >> 6) << 4], dim=1)
    return scales.float(), minima.float()


def _pairs(part: Tensor) -> Tensor:
    """Codes of 128 bytes, in runs of 32 bytes: their lower halves, then their upper ones."""
    runs = part.reshape(-1, 4, 32)
    return torch.stack([runs & 15, runs >> 4], dim=2).flatten(1)  # [blocks, 4, 2, 32] to [blocks, 256]


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, minima = _six_bits(blocks[:, 4:16])
    return _pairs(blocks[:, 16:]), _half(blocks, 0) * scales, -_half(blocks, 2) * minima


def _q5_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, minima = _six_bits(blocks[:, 4:16])
    groups = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    high = (blocks[:, None, 16:48] >> groups[:, None]) & 1  # [blocks, 8, 32]
    return _pairs(blocks[:, 48:]) | high.flatten(1) << 4, _half(blocks, 0) * scales, -_half(blocks, 2) * minima


def _q6_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = blocks[:, :128].reshape(-1, 2, 64)
    low = torch.cat([low & 15, low >> 4], dim=2)  # [blocks, 2, 128]: four runs of 32 in each half
    shifts = torch.arange(0, 8, 2, device=blocks.device, dtype=torch.uint8)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts[:, None]) & 3  # [blocks, 2, 4, 32]
    codes = low.flatten(1) | high.flatten(1) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()  # [blocks, 16]
    return codes, _half(blocks, 208) * scales, blocks.new_empty(0, dtype=torch.float32)


_READ = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
