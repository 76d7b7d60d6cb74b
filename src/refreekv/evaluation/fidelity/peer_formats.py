"""Number formats of others, to measure ours against in the same run: ``full@kivi4``, ``full@kivi2``, ``full@rht4``.

They are here for the bench alone: no storage of the library has them. Each says what it gives back of a prompt's keys
and values and how many bytes it takes, scales and zero points included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refreekv.core.rotation import rotate
from refreekv.policies import LayerView, Policy

Pair = tuple[Tensor, Tensor]


class PeerFormat(Protocol):
    """How somebody else stores a prompt."""

    def round_trip(self, keys: Tensor, values: Tensor) -> Pair:
        """What it gives back of keys ``[..., n, D]`` and values ``[..., n, Dv]``."""

    def head_bytes(self, n: int, sizes: Sequence[int], itemsize: int) -> int:
        """Bytes of one KV head with ``n`` entries; ``itemsize`` is that of an element that is not coded."""


@dataclass(frozen=True)
class Kivi:
    """KIVI (arXiv 2402.02750): keys in groups along their channels, values along each token.

    Asymmetric uniform codes between the lowest and the highest element of a group, a scale and a zero point of 16 bits
    each. A key's group is one channel of ``group`` tokens, a value's ``group`` channels of one token. The newest
    ``residual`` values stay as they are, and of the keys those that fill no block of so many tokens.
    """

    bits: int
    group: int = 32
    residual: int = 128

    def coded(self, n: int) -> tuple[int, int]:
        """Of ``n`` entries, the keys and the values that are coded, from the first on."""
        return n - n % self.residual, max(0, n - self.residual)

    def round_trip(self, keys: Tensor, values: Tensor) -> Pair:
        """See `PeerFormat`; ValueError where a value's channels do not split into groups."""
        self._check(values.shape[-1])
        n_keys, n_values = self.coded(keys.shape[-2])
        older, newer = keys[..., :n_keys, :], keys[..., n_keys:, :]
        if n_keys:
            # [..., n, D] -> [..., D, groups, group] and back
            split = older.transpose(-1, -2).unflatten(-1, (-1, self.group))
            older = between_extremes(split, self.bits).flatten(-2).transpose(-1, -2)
        old_values = values[..., :n_values, :].unflatten(-1, (-1, self.group))  # [..., n, groups, group]
        old_values = between_extremes(old_values, self.bits).flatten(-2)
        return torch.cat([older, newer], -2), torch.cat([old_values, values[..., n_values:, :]], -2)

    def head_bytes(self, n: int, sizes: Sequence[int], itemsize: int) -> int:
        """See `PeerFormat`."""
        self._check(sizes[1])
        total = 0
        for size, coded in zip(sizes, self.coded(n), strict=True):
            elements = coded * size
            total += elements * self.bits // 8 + elements // self.group * 4 + (n - coded) * size * itemsize
        return total

    def _check(self, size: int) -> None:
        if size % self.group:
            raise ValueError(f"KIVI codes values in groups of {self.group} channels, and this model's have {size}")


@dataclass(frozen=True)
class RotatedInt4:
    """4 bits, a scale a token and head, all of it rotated: as vLLM's ``int4_per_token_head``.

    A randomised Hadamard transform of every key and value, then asymmetric uniform codes between its lowest and
    highest element; the zero point is one of the 16 codes and lies in the lowest bits of a float32 scale. No entry is
    left as it is.
    """

    def round_trip(self, keys: Tensor, values: Tensor) -> Pair:
        """See `PeerFormat`."""
        found = []
        for part in (keys, values):
            turned = rotate(part.float())
            low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
            scale = ((high - low) / 15).clamp_min(1e-6)
            zero = (-low / scale).round().clamp(0, 15)
            codes = (turned / scale + zero).round().clamp(0, 15)
            found.append(rotate((codes - zero) * scale, back=True).to(part.dtype))
        return found[0], found[1]

    def head_bytes(self, n: int, sizes: Sequence[int], itemsize: int) -> int:
        """See `PeerFormat`."""
        return sum(n * (size // 2 + 4) for size in sizes)


FORMATS: dict[str, PeerFormat] = {"kivi4": Kivi(4), "kivi2": Kivi(2), "rht4": RotatedInt4()}
"""By the name that a specification has behind its ``@``."""


def between_extremes(groups: Tensor, bits: int) -> Tensor:
    """What codes of groups ``[..., g]`` between their lowest and highest element give back, scale and zero in 16 bits.

    Of groups whose elements are all alike, those elements, to 16 bits.
    """
    wide = groups.float()
    low = wide.amin(-1, keepdim=True).half().float()
    scale = ((wide.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    codes = ((wide - low) / scale.clamp_min(torch.finfo(torch.float16).tiny)).round().clamp(0, 2**bits - 1)
    given_back: Tensor = codes * scale + low
    return given_back.to(groups.dtype)


@dataclass(frozen=True)
class PeerStored(Policy):
    """Keep everything, stored as somebody else does: under a name of `FORMATS`."""

    kind: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"full@{self.kind}")

    @property
    def form(self) -> PeerFormat:
        """The number format."""
        return FORMATS[self.kind]

    @property
    def spec(self) -> str:
        """The specification."""
        return self.name

    def select(self, view: LayerView) -> None:
        """Nothing is evicted."""

    def __str__(self) -> str:
        return f"full()@{self.kind}"


def form_of(policy: Policy | None) -> PeerFormat | None:
    """The format of somebody else's that a policy comes with."""
    return policy.form if isinstance(policy, PeerStored) else None
