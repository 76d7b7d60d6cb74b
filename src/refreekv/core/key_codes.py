"""Codes of keys that belong to the model: bits go to the channels that its queries look at.

What matters of a key is its product with queries. A channel that queries hardly use may be wrong, one that they use
much may not, and which these are is the model's own, the same for every text. So each KV head's channels are weighted
with the size of its queries and sorted by what an error in them costs, into four groups, which get the widths of
`refreekv.core.quantisation.LAYOUTS`; each group is rotated by itself, and each rotated channel divided by the spread
it has. All of this is measured once a model, on random tokens.

Unequal bits by channel are reverse water-filling (Cover and Thomas, "Elements of Information Theory", section
10.3.3); queries are weighted as KVQuant (arXiv 2401.18079) weights errors by sensitivity.
"""

import functools
import hashlib
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv.core.damage import rung_damage
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.packed_maps import KeyMaps, PackedMaps, in_code_space, sum_of
from refreekv.core.quantisation import SINKS
from refreekv.core.rotation import rotation

GROUPS = 4
"""Groups of channels with a width each: the quarters of a packed line's side."""
RIDGE = 0.01
"""Of the mean square of a head's queries, added to each channel's: none counts for nothing."""
LEAST = 1e-6
"""Of the largest variance of a head's channels: a channel that never moves is divided by no less."""


@dataclass(frozen=True, eq=False)
class KeyCodes:
    """How the keys of a layer's KV heads are taken to code space; equal ones are one object, see `known`.

    Attributes
    ----------
    order : Tensor
        int64 ``[H_kv, D]``: channels, those first in which an error costs most.
    weight : Tensor
        float32 ``[H_kv, D]``: of the channels in that order, the root mean square of the queries.
    spread : Tensor
        float32 ``[H_kv, D]``: standard deviations of the weighted channels after their groups were rotated.
    """

    order: Tensor
    weight: Tensor
    spread: Tensor

    @staticmethod
    def known(order: Tensor, weight: Tensor, spread: Tensor) -> "KeyCodes":
        """The codes with these numbers: the same object for the same numbers, as captured steps are made for one.

        Raises
        ------
        ValueError
            Shapes or numbers that are no codes.
        """
        order, weight, spread = (
            order.cpu().long().contiguous(),
            *(p.cpu().float().contiguous() for p in (weight, spread)),
        )
        if order.dim() != 2 or order.shape[1] % GROUPS or not order.shape == weight.shape == spread.shape:
            raise ValueError(
                f"codes of keys are [KV heads, channels] of {GROUPS} groups, got {list(order.shape)}, "
                f"{list(weight.shape)} and {list(spread.shape)}"
            )
        whole = torch.arange(order.shape[1]).expand_as(order)
        if not torch.equal(order.sort(-1).values, whole) or not bool(((weight > 0) & (spread > 0)).all()):
            raise ValueError("codes of keys need each channel once, with weights and spreads above zero")
        if not bool((weight.isfinite() & spread.isfinite()).all()):
            raise ValueError("codes of keys have weights and spreads that are no numbers")
        digest = hashlib.blake2b(repr(tuple(order.shape)).encode(), digest_size=16)
        for part in (order, weight, spread):
            digest.update(part.numpy().tobytes())
        return _KNOWN.setdefault(digest.digest(), KeyCodes(order, weight, spread))

    def of_heads(self, heads: slice) -> "KeyCodes":
        """Those of some KV heads."""
        return KeyCodes.known(self.order[heads], self.weight[heads], self.spread[heads])

    @functools.cached_property
    def matrix(self) -> Tensor:
        """float64 ``[H_kv, D, D]``: takes keys less their mean to code space, from their left."""
        size = self.order.shape[1]
        # `rotation` is made for entries to its left.
        blocks = torch.block_diag(*[rotation(size // GROUPS).T] * GROUPS)
        chosen = torch.nn.functional.one_hot(self.order, size).double()  # [H_kv, D sorted, D]
        matrix: Tensor = blocks / self.spread.double()[..., None] @ (chosen * self.weight.double()[..., None])
        return matrix

    @property
    def power(self) -> Tensor:
        """How much queries look at each quarter of the channels in code space: float32 ``[H_kv, 4]``.

        The sum over its channels of the mean square of scaled queries there, where keys have a variance of 1; as if
        queries' channels did not go together.
        """
        squares = self.weight.square()
        # Queries are divided by their size, less what was added to it; rotated, a group's channels share what is left.
        asked = 1 - RIDGE / (1 + RIDGE) * squares.mean(-1, keepdim=True) / squares
        groups = (part.unflatten(-1, (GROUPS, -1)) for part in (asked, self.spread.square()))
        power: Tensor = next(groups).mean(-1) * next(groups).sum(-1)  # [H_kv, 4]
        return power.clamp_min(0)

    def maps(self, key_mean: Tensor, value_mean: Tensor, dtype: torch.dtype) -> PackedMaps:
        """Take means ``[B, H_kv, D]`` out of entries in ``dtype``; sort, weight and rotate keys, rotate values.

        All but the means is shared by all that is made here.
        """
        mean = key_mean.float().contiguous()
        key, dual, bound, worth, key_sum = self._matrices(mean.device, dtype)
        keys = KeyMaps(mean, key, dual, bound, worth, in_code_space(key, mean), key_sum)
        return PackedMaps.with_keys(keys, value_mean, dtype)

    def _matrices(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The matrix, its transposed inverse, its bound, the worth, the sum in ``dtype``, as `PackedMaps` has."""
        if (device, dtype) not in self._made:
            with torch.inference_mode(False):
                dual = torch.linalg.inv(self.matrix).mT
                # Channels were divided by their spread: what an error there counts is its square.
                worth = self.spread.double().square()
                worth = worth / worth.mean(-1, keepdim=True)
                parts = (self.matrix, dual, dual.norm(dim=-1).amax(-1), worth)
                matrix, turned, bound, counts = (part.float().to(device)[None].contiguous() for part in parts)
                total = sum_of(self.matrix.to(device)[None], dtype).contiguous()
            self._made[device, dtype] = matrix, turned, bound, counts, total
        return self._made[device, dtype]

    @functools.cached_property
    def _made(self) -> dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        return {}

    def power_on(self, device: torch.device) -> Tensor:
        """`power` on a device, where it is taken once."""
        if device not in self._powers:
            with torch.inference_mode(False):
                self._powers[device] = self.power.to(device)
        return self._powers[device]

    @functools.cached_property
    def _powers(self) -> dict[torch.device, Tensor]:
        return {}

    def damage_on(self, device: torch.device, forms: tuple[PackedFormat, ...]) -> Tensor:
        """What each rung does to an entry, ``[1, H_kv, R]`` (`core.damage`), on a device, where it is computed once."""
        if (device, forms) not in self._damage:
            with torch.inference_mode(False):
                self._damage[device, forms] = rung_damage(self.power_on(device), forms)[None]
        return self._damage[device, forms]

    @functools.cached_property
    def _damage(self) -> dict[tuple[torch.device, tuple[PackedFormat, ...]], Tensor]:
        return {}

    def __reduce__(self) -> tuple[object, tuple[Tensor, Tensor, Tensor]]:
        return KeyCodes.known, (self.order, self.weight, self.spread)

    def __deepcopy__(self, memo: dict[int, object]) -> "KeyCodes":
        return self


_KNOWN: "weakref.WeakValueDictionary[bytes, KeyCodes]" = weakref.WeakValueDictionary()


class Moments(NamedTuple):
    """What codes are made from: sums over keys and over queries, of any text.

    Attributes
    ----------
    keys, queries : float
        How many of each KV head were added up.
    total : Tensor
        float64 ``[H_kv, D]``: of the keys.
    products : Tensor
        float64 ``[H_kv, D, D]``: of the keys with themselves.
    power : Tensor
        float64 ``[H_kv, D]``: of the queries' squares.
    """

    keys: float
    queries: float
    total: Tensor
    products: Tensor
    power: Tensor

    @classmethod
    def of(cls, keys: Tensor, queries: Tensor) -> "Moments":
        """Of keys ``[B, H_kv, n, D]``, sinks left out, as they are never coded, and queries ``[B, H, r, D]``."""
        heads = keys.shape[1]
        # [B, H_kv, n, D] -> [H_kv, B n, D], and queries to [H_kv, B group r, D]
        entries = keys[:, :, SINKS:].transpose(0, 1).flatten(1, 2).double()
        asked = queries.double().unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)
        power = asked.square().sum(1)
        return cls(entries.shape[1], asked.shape[1], entries.sum(1), entries.mT @ entries, power)

    def plus(self, other: "Moments") -> "Moments":
        """Those of both texts."""
        return Moments(
            self.keys + other.keys, self.queries + other.queries, self.total + other.total,
            self.products + other.products, self.power + other.power,
        )  # fmt: skip

    def scaled(self, keys: float, queries: float) -> "Moments":
        """Those of so many times as many keys and queries."""
        return Moments(
            self.keys * keys, self.queries * queries, self.total * keys, self.products * keys, self.power * queries
        )

    def codes(self) -> KeyCodes:
        """The codes for keys and queries like these.

        Raises
        ------
        ValueError
            A head size that does not split into `GROUPS`, or no numbers.
        """
        size = self.total.shape[1]
        if size % GROUPS:
            raise ValueError(f"keys of {size} elements do not split into {GROUPS} groups of channels")
        mean = self.total / self.keys
        # [H_kv, D, D]: of what is left when means are taken out
        spread = (self.products / self.keys - mean[:, :, None] * mean[:, None]).cpu()
        power = (self.power / self.queries).cpu()
        # A head that nothing asks weighs all channels alike.
        power = power + RIDGE * power.mean(-1, keepdim=True)
        power = torch.where(power > 0, power, 1.0)
        variance = spread.diagonal(dim1=1, dim2=2)
        order = (power * variance).argsort(dim=-1, descending=True, stable=True)
        weight = power.sqrt().gather(-1, order)
        plain = KeyCodes(order, weight, torch.ones_like(weight)).matrix
        turned = (plain @ spread @ plain.mT).diagonal(dim1=1, dim2=2)
        floor = LEAST * turned.amax(-1, keepdim=True)
        turned = torch.where(floor > 0, turned.maximum(floor), 1.0)
        return KeyCodes.known(order, weight, turned.sqrt())
