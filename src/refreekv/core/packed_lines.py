"""Coded keys and values of entries, packed in planes of 8, 4 and 2 bits: what kernels read in place.

An entry is a line of bytes and two numbers, its factors; it codes alone. Keys and values come here in code space
(centred, rotated, channels sorted so that widths do not increase), where a channel is about a Gaussian times the
entry's factor::

    w[c] ~ factor * step(b) * (code[c] - (2 ** b - 1) / 2)        0 <= code[c] < 2 ** b

with a width ``b`` of 8, 6, 4 or 2 bits for each quarter of the channels. A line holds the planes of the key, then
those of the value, each filled up to a multiple of 4 bytes, and the line to one of 8:

- 8 bits: the channels of width 8, a byte each;
- 4 bits: the channels of width 6 (their upper bits) and 4; of ``m`` bytes, byte ``j`` has channel ``j`` of the plane
  in its lower half and channel ``j + m`` in the upper one;
- 2 bits: the channels of width 6 (their lower bits) and 2; byte ``j`` has the channels ``j``, ``j + m``, ``j + 2 m``
  and ``j + 3 m`` of the plane, from the lowest bits on.

Factors are kept apart from lines, in memory of their own: so lines begin where wide loads can.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = (8, 6, 4, 2)
"""Bits that a channel's code may have."""

FACTOR_BYTES = 4
"""Of an entry's two factors, of its key and of its value: float16 each."""

SIZES = (1.0, 0.8, 1.25, 1.6)
"""Of an entry's root mean square: sizes at which it may be coded in less than 8 bits."""

MOST = 65504.0
"""The largest float16."""


@functools.cache
def step(bits: int) -> float:
    """Distance of the levels of a uniform grid of ``2 ** bits`` levels that codes a unit Gaussian best.

    Least mean square error, found numerically.
    """
    low, high = 1e-3, 2.5
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if grid_error(bits, left) < grid_error(bits, right):
            high = right
        else:
            low = left
    return (low + high) / 2


def grid_error(bits: int, step: float) -> float:
    """Mean square error of a unit Gaussian on a uniform grid of ``2 ** bits`` levels, symmetric around zero."""
    error, start, density_at_start, below_start = 0.0, 0.0, 1 / math.sqrt(2 * math.pi), 0.5
    half = 2 ** (bits - 1)
    for level in range(half):
        last = level == half - 1
        stop = math.inf if last else (level + 1) * step
        density = 0.0 if last else math.exp(-stop * stop / 2) / math.sqrt(2 * math.pi)
        below = 1.0 if last else 0.5 * (1 + math.erf(stop / math.sqrt(2)))
        # Integrals of 1, x and x ** 2 over the cell, with the Gaussian's weight.
        mass, first = below - below_start, density_at_start - density
        second = mass + start * density_at_start - (0.0 if last else stop * density)
        value = (level + 0.5) * step
        error += 2 * (second - 2 * value * first + value * value * mass)
        start, density_at_start, below_start = stop, density, below
    return error


HALF_RANGE = 127.5 * step(8)
"""How far the outer levels of 8 bits are from zero, at factor 1."""


@dataclass(frozen=True)
class Plane:
    """Where the codes of some channels are, so many bits of each.

    Attributes
    ----------
    bits : int
        Of each channel: 8, 4 or 2.
    start : int
        First byte, counted from the first one of the side.
    channels : tuple of (int, int)
        Ranges of channels of the side, in the plane's order.
    shifts : tuple of int
        For each range, how far above the lowest bit of the code this plane's bits begin.
    """

    bits: int
    start: int
    channels: tuple[tuple[int, int], ...]
    shifts: tuple[int, ...]

    @property
    def count(self) -> int:
        """Channels of the plane."""
        return sum(stop - start for start, stop in self.channels)

    @property
    def used(self) -> int:
        """Bytes with codes."""
        return self.count * self.bits // 8

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return -(-self.used // 4) * 4


@dataclass(frozen=True)
class Side:
    """The coded keys, or the coded values, of a head.

    Attributes
    ----------
    size : int
        Channels; a multiple of 16.
    widths : tuple of int
        Bits of a channel of each quarter; they do not increase.
    """

    size: int
    widths: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        if self.size % 16 or self.size <= 0:
            raise ValueError(f"packed lines need heads of a multiple of 16 elements, not {self.size}")
        if len(self.widths) != 4 or any(width not in WIDTHS for width in self.widths):
            raise ValueError(f"widths are four out of {WIDTHS}, a quarter of the channels each, not {self.widths}")
        if list(self.widths) != sorted(self.widths, reverse=True):
            raise ValueError(f"widths must not increase from quarter to quarter: {self.widths}; sort the channels")

    def ends(self) -> tuple[int, int, int]:
        """How many channels have 8 bits, at least 6, and at least 4."""
        quarter = self.size // 4
        eight, six, four = (quarter * sum(width >= least for width in self.widths) for least in (8, 6, 4))
        return eight, six, four

    @functools.cached_property
    def planes(self) -> tuple[Plane, ...]:
        """Those with channels, in the order of a line."""
        eight, six, four = self.ends()
        found: list[Plane] = []
        start = 0
        for bits, ranges in (
            (8, (((0, eight), 0),)),
            (4, (((eight, six), 2), ((six, four), 0))),
            (2, (((eight, six), 0), ((four, self.size), 0))),
        ):
            real = [(span, shift) for span, shift in ranges if span[1] > span[0]]
            if real:
                plane = Plane(bits, start, tuple(span for span, _ in real), tuple(shift for _, shift in real))
                found.append(plane)
                start += plane.bytes
        return tuple(found)

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes of the planes."""
        return sum(plane.bytes for plane in self.planes)

    @property
    def in_bytes(self) -> bool:
        """Whether all codes have 8 bits."""
        return self.widths[-1] == 8

    def by_channel(self, numbers: dict[int, float], like: Tensor) -> Tensor:
        """``[size]``: each channel's number, by its width."""
        quarter = self.size // 4
        values = [numbers[width] for width in self.widths]
        return torch.tensor(values, dtype=like.dtype, device=like.device).repeat_interleave(quarter)

    def levels(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What codes ``[..., size]`` stand for at factor 1."""
        numbers = codes.to(dtype)
        offsets = self.by_channel({width: (2**width - 1) / 2 for width in WIDTHS}, numbers)
        return (numbers - offsets) * self.by_channel({width: step(width) for width in WIDTHS}, numbers)

    def encode(self, entries: Tensor, worth: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Code entries ``[..., size]`` in code space: codes, uint8, and factors ``[...]``, float16.

        The codes are those of the entries divided by one of `SIZES` times their root mean square, whichever loses
        least: few channels may be far out. The factor is what makes the squared error least for them. Computed in
        float32, or the entries' wider type. ``worth``, broadcast to the entries, is what a squared error in each
        channel counts; all count alike if it is left out.

        Where all channels have 8 bits, the outer levels are as far out as the entry's largest element: that is nearer
        than those of any of `SIZES` would be, or loses less than cutting it off, and needs no search.
        """
        w = entries.to(torch.promote_types(entries.dtype, torch.float32))
        if self.in_bytes:
            # Codes are those for the factor as it is stored.
            factors = (w.abs().amax(-1) / HALF_RANGE).clamp(0, MOST).half()
            levels = w / (factors.to(w)[..., None] * step(8)).clamp_min_(torch.finfo(w.dtype).tiny)
            return levels.add_(127.5).round_().clamp_(0, 255).to(torch.uint8), factors
        size = w.square().mean(-1, keepdim=True).sqrt()
        steps = self.by_channel({width: step(width) for width in WIDTHS}, w)
        offsets = self.by_channel({width: (2**width - 1) / 2 for width in WIDTHS}, w)
        most = self.by_channel({width: 2**width - 1.0 for width in WIDTHS}, w)
        counted = w if worth is None else w * worth
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for share in SIZES:
            # In place where it may be: these are the passes over a prompt that count.
            codes = (w / (share * size * steps).clamp_min_(torch.finfo(w.dtype).tiny)).add_(offsets).round_()
            codes = torch.minimum(codes.clamp_min_(0), most, out=codes)
            levels = (codes - offsets).mul_(steps)
            products = torch.linalg.vecdot(counted, levels)
            norms = torch.linalg.vecdot(levels if worth is None else levels * worth, levels)
            # With the best factor, the error is what the entry holds, less this.
            gain, factors = products * products / norms, products / norms
            if found:
                best, chosen, kept = found.pop()
                better = gain > best
                codes = torch.where(better[..., None], codes, chosen)
                gain, factors = torch.where(better, gain, best), torch.where(better, factors, kept)
            found.append((gain, codes, factors))
        _, codes, factors = found[0]
        return codes.to(torch.uint8), factors.clamp(0, MOST).half()

    def pack(self, codes: Tensor) -> Tensor:
        """Codes ``[..., size]`` in planes: ``[..., bytes]``, uint8."""
        parts = []
        for plane in self.planes:
            fields = torch.cat(
                [
                    (codes[..., start:stop] >> shift) & (2**plane.bits - 1)
                    for (start, stop), shift in zip(plane.channels, plane.shifts, strict=True)
                ],
                -1,
            )
            fields = fields.unflatten(-1, (8 // plane.bits, plane.used))  # [..., fields of a byte, bytes]
            packed = fields[..., 0, :].clone()
            for place in range(1, 8 // plane.bits):
                packed |= fields[..., place, :] << (place * plane.bits)
            parts.append(torch.nn.functional.pad(packed, (0, plane.bytes - plane.used)))
        return torch.cat(parts, -1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Codes ``[..., size]``, uint8, of planes ``[..., bytes]``."""
        codes = packed.new_zeros(*packed.shape[:-1], self.size)
        for plane in self.planes:
            part = packed[..., plane.start : plane.start + plane.used]
            fields = [(part >> (place * plane.bits)) & (2**plane.bits - 1) for place in range(8 // plane.bits)]
            field = torch.cat(fields, -1)
            at = 0
            for (start, stop), shift in zip(plane.channels, plane.shifts, strict=True):
                codes[..., start:stop] |= field[..., at : at + stop - start] << shift
                at += stop - start
        return codes


@dataclass(frozen=True)
class PackedFormat:
    """How wide the codes of keys and values of a level are, and with it how long a line is.

    Attributes
    ----------
    key_size, value_size : int
        Elements of a key and of a value, multiples of 16.
    key_widths, value_widths : tuple of int
        Bits of a channel of each quarter, out of 8, 6, 4 and 2; they do not increase.
    """

    key_size: int
    value_size: int
    key_widths: tuple[int, int, int, int]
    value_widths: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        # They say what is wrong.
        assert self.keys
        assert self.values

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> "PackedFormat":
        """The format that `numbers` gave these ten integers."""
        sizes, keys, values = numbers[:2], tuple(numbers[2:6]), tuple(numbers[6:10])
        return cls(sizes[0], sizes[1], keys, values)  # type: ignore[arg-type]

    @property
    def numbers(self) -> list[int]:
        """All of it as ten integers, for operators that take no objects."""
        return [self.key_size, self.value_size, *self.key_widths, *self.value_widths]

    @functools.cached_property
    def keys(self) -> Side:
        """The keys' part."""
        return Side(self.key_size, self.key_widths)

    @functools.cached_property
    def values(self) -> Side:
        """The values' part."""
        return Side(self.value_size, self.value_widths)

    @functools.cached_property
    def line_bytes(self) -> int:
        """Bytes of a line, factors not among them."""
        return -(-(self.keys.bytes + self.values.bytes) // 8) * 8

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry, factors among them."""
        return self.line_bytes + FACTOR_BYTES

    def pack(self, keys: Tensor, values: Tensor, worth: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Code keys ``[..., D]`` and values ``[..., Dv]`` in code space; ``worth`` is the keys', as in `Side.encode`.

        Returns
        -------
        lines, factors : Tensor
            ``[..., line_bytes]``, uint8; and ``[..., 2]``, float16: a key's and a value's.
        """
        key_codes, key_factors = self.keys.encode(keys, worth)
        value_codes, value_factors = self.values.encode(values)
        lines = torch.cat([self.keys.pack(key_codes), self.values.pack(value_codes)], -1)
        lines = torch.nn.functional.pad(lines, (0, self.line_bytes - lines.shape[-1]))
        return lines, torch.stack([key_factors, value_factors], -1)

    def unpack(self, lines: Tensor, factors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in code space, in ``dtype``, that lines and factors stand for."""
        split = self.keys.bytes
        keys = self.keys.levels(self.keys.unpack(lines[..., :split]), dtype)
        values = self.values.unpack(lines[..., split : split + self.values.bytes])
        wide = factors.to(dtype)
        return keys * wide[..., :1], self.values.levels(values, dtype) * wide[..., 1:]
