"""Between entries and code space: means that are taken out, matrices, and the way back for queries and results."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv.core.rotation import rotation


class KeyMaps(NamedTuple):
    """What of `PackedMaps` is about keys, in its terms."""

    mean: Tensor
    matrix: Tensor
    dual: Tensor
    bound: Tensor
    worth: Tensor
    offset: Tensor
    sum: Tensor


@dataclass(frozen=True)
class PackedMaps:
    """What takes keys, values and queries of each KV head to code space, and results back.

    A key ``k`` is coded as ``key_matrix @ (k - key_mean)``, a value likewise; a query asks with
    ``key_dual @ q``, the transposed inverse. All float32; the first dimension is that of the rows, or 1 where all
    rows have the same: of means and offsets, and of all else.

    Attributes
    ----------
    key_mean, key_matrix, key_dual : Tensor
        ``[B, H_kv, D]``, ``[B, H_kv, D, D]`` twice.
    value_mean, value_matrix, value_back : Tensor
        ``[B, H_kv, Dv]``, ``[B, H_kv, Dv, Dv]`` twice; ``value_back`` is the inverse of ``value_matrix``.
    key_bound : Tensor
        ``[B, H_kv]``: no element of ``key_dual @ q`` is larger than this times the norm of ``q``.
    key_offset, value_offset : Tensor
        ``key_matrix @ key_mean``, and the same of values.
    key_worth : Tensor
        ``[B, H_kv, D]``: what a squared error counts in each channel of keys in code space.
    key_sum, value_sum : Tensor
        ``[2, B, H_kv, D, D]``: two matrices of the type of the entries that make ``key_matrix`` together; one where
        that is float32. Products with entries need no other type then.
    """

    key_mean: Tensor
    key_matrix: Tensor
    key_dual: Tensor
    value_mean: Tensor
    value_matrix: Tensor
    value_back: Tensor
    key_bound: Tensor
    key_offset: Tensor
    value_offset: Tensor
    key_worth: Tensor
    key_sum: Tensor
    value_sum: Tensor

    @classmethod
    def of(
        cls, key_mean: Tensor, key_matrix: Tensor, value_mean: Tensor, value_matrix: Tensor, dtype: torch.dtype
    ) -> "PackedMaps":
        """Compute duals, inverses and what else there is, in float64, for entries in ``dtype``.

        All tensors are ``[B or 1, H_kv, ...]``.
        """
        keys, values = key_matrix.double(), value_matrix.double()
        dual, back = torch.linalg.inv(keys).mT, torch.linalg.inv(values)
        offsets = [
            (matrix @ mean.double()[..., None])[..., 0] for matrix, mean in ((keys, key_mean), (values, value_mean))
        ]
        parts = (key_mean, key_matrix, dual, value_mean, value_matrix, back, dual.norm(dim=-1).amax(-1), *offsets)
        sums = [sum_of(matrix, dtype) for matrix in (keys, values)]
        worth = torch.ones(keys.shape[:3], device=keys.device)
        return cls(*[*(part.float().contiguous() for part in parts), worth, *sums])

    @classmethod
    def rotated(cls, key_mean: Tensor, value_mean: Tensor, dtype: torch.dtype) -> "PackedMaps":
        """Take means ``[B, H_kv, D]`` out of entries in ``dtype`` and rotate; all but the means is shared by all."""
        mean, heads, size = key_mean.float().contiguous(), key_mean.shape[1], key_mean.shape[-1]
        key, _, key_sum = _rotations(heads, size, mean.device, dtype)
        # Orthonormal: the dual is the matrix itself, and no element is larger than the norm.
        keys = KeyMaps(mean, key, key, *_ones(heads, size, mean.device), in_code_space(key, mean), key_sum)
        return cls.with_keys(keys, value_mean, dtype)

    @classmethod
    def with_keys(cls, keys: KeyMaps, value_mean: Tensor, dtype: torch.dtype) -> "PackedMaps":
        """Those of keys as given; means ``[B, H_kv, Dv]`` of values in ``dtype`` are taken out and these rotated."""
        mean = value_mean.float().contiguous()
        value, back, value_sum = _rotations(mean.shape[1], mean.shape[-1], mean.device, dtype)
        return cls(
            keys.mean, keys.matrix, keys.dual, mean, value, back, keys.bound, keys.offset, in_code_space(value, mean),
            keys.worth, keys.sum, value_sum,
        )  # fmt: skip

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """What takes keys and what takes values to code space."""
        return self.key_matrix, self.value_matrix

    def of_type(self, dtype: torch.dtype) -> "PackedMaps":
        """The same for entries in ``dtype``."""
        if self.key_sum.dtype == dtype:
            return self
        sums = (sum_of(matrix.double(), dtype) for matrix in (self.key_matrix, self.value_matrix))
        return replace(self, key_sum=next(sums), value_sum=next(sums))

    def of_segment(self, row: int, head: int) -> "PackedMaps":
        """Those of one row and KV head, without the first two dimensions."""
        return PackedMaps(
            *(part[row if len(part) > 1 else 0, head] for part in self.tensors[:10]),
            *(part[:, row if part.shape[1] > 1 else 0, head] for part in self.tensors[10:]),
        )

    def of_rows(self, rows: Sequence[int]) -> "PackedMaps":
        """Those of some rows, in that order."""
        most, index = max(rows, default=0), list(rows)
        means = ("key_mean", "value_mean", "key_offset", "value_offset")
        own = {name: getattr(self, name) for name in means}
        changed = {name: part[index] for name, part in own.items() if len(part) > most}
        if len(self.key_matrix) > 1:
            for name in ("key_matrix", "key_dual", "value_matrix", "value_back", "key_bound", "key_worth"):
                changed[name] = getattr(self, name)[index]
            changed |= {name: getattr(self, name)[:, index] for name in ("key_sum", "value_sum")}
        return replace(self, **changed)

    @classmethod
    def joined(cls, parts: Sequence["PackedMaps"]) -> "PackedMaps":
        """The rows of all of these, one behind the other."""
        tensors = list(zip(*(part.tensors for part in parts), strict=True))
        return cls(*(torch.cat(some) for some in tensors[:10]), *(torch.cat(some, 1) for some in tensors[10:]))

    def around(self, key_mean: Tensor, value_mean: Tensor) -> "PackedMaps":
        """The same with these means ``[B, H_kv, D]`` and ``[B, H_kv, Dv]``, in float32."""
        keys, values = key_mean.contiguous(), value_mean.contiguous()
        return replace(
            self, key_mean=keys, value_mean=values, key_offset=in_code_space(self.key_matrix, keys),
            value_offset=in_code_space(self.value_matrix, values),
        )  # fmt: skip

    def of_span(self, rows: slice) -> "PackedMaps":
        """Those of some rows that follow each other, as views."""
        own = [part[rows] if len(part) > 1 else part for part in self.tensors[:10]]
        return PackedMaps(*own, *(part[:, rows] if part.shape[1] > 1 else part for part in self.tensors[10:]))

    def entries(self, keys: Tensor, values: Tensor, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Entries ``[n, D]`` of a segment whose keys and values in code space these are."""
        own = self.of_segment(row, head)
        # k = A^-1 w + mean, and the dual is the transposed A^-1
        return (
            keys @ own.key_dual.to(keys) + own.key_mean.to(keys),
            values @ own.value_back.to(values).T + own.value_mean.to(values),
        )

    def __deepcopy__(self, memo: dict[int, object]) -> "PackedMaps":
        """Return the same: they never change, and share tensors."""
        return self

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the attributes, for operators that take no objects."""
        return [
            self.key_mean, self.key_matrix, self.key_dual, self.value_mean, self.value_matrix, self.value_back,
            self.key_bound, self.key_offset, self.value_offset, self.key_worth, self.key_sum, self.value_sum,
        ]  # fmt: skip


def sum_of(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices in ``dtype`` that make one together: two, or one in float32."""
    if dtype.itemsize > 2:
        return matrix.float()[None].contiguous()
    high = matrix.to(dtype)
    return torch.stack([high, (matrix - high.to(matrix)).to(dtype)])


def in_code_space(matrix: Tensor, mean: Tensor) -> Tensor:
    """Means ``[B, H_kv, D]`` in code space; not by cuBLAS, which takes 52 microseconds of an H200 for 8 of them."""
    return (matrix * mean[..., None, :]).sum(-1)  # [1, H_kv, D, D] by [B, H_kv, 1, D]


@functools.lru_cache(maxsize=16)
def _ones(heads: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bound and worth of keys that are rotated."""
    with torch.inference_mode(False):
        return torch.ones(1, heads, device=device), torch.ones(1, heads, size, device=device)


@functools.lru_cache(maxsize=16)
def _rotations(heads: int, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix that rotates entries, its inverse, and its sum in ``dtype``: ``[(2,) 1, heads, size, size]``."""
    with torch.inference_mode(False):
        # `rotation` is made for entries to its left.
        matrix = rotation(size).T.to(device).expand(1, heads, -1, -1)
        return matrix.float().contiguous(), matrix.mT.float().contiguous(), sum_of(matrix, dtype).contiguous()
