"""Number formats for stored keys and values: a few bits an element, entry by entry.

An entry is one token's key or value in one KV head, a line of a flat tensor. It is coded in three
steps, none of which looks at another entry:

1. *Centred*: its head's mean key (or value) is taken out. Models put large constants into few
   channels of the keys (Qwen2's ``k_proj`` has a bias), which would eat the range of every code.
2. *Rotated* (`refreekv.core.rotation`): what is left looks Gaussian in every element.
3. *Coded* (`refreekv.core.codes`): a level of the best codebook for a Gaussian for each element,
   and one scale of 16 bits.

The mean, of the prompt as a rule, is fixed for each row and KV head when its first entries are coded and
serves all later ones, so that lines are picked, moved and dropped as they are: nothing is ever coded twice.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from refreekv.core import codes, spelling
from refreekv.core.rotation import rotate

SINKS = 4
"""First entries of each KV head, which stay as they are: models aim attention at them, and their keys and values
are unlike all others (StreamingLLM, arXiv 2309.17453)."""
FLUSH = 32
"""Entries that gather before they are coded together, beyond those that stay as they are."""
Count = TypeVar("Count", int, float)
_FP8 = torch.float8_e4m3fn
_KINDS = re.compile(r"fp8|int([2-8])|k([2-8])v([2-8])")
# Elements that share a scale in lines of int8 that are decoded in place, at most.
_GROUP = 64


@dataclass(frozen=True)
class KVDtype:
    """How kept entries are stored.

    Attributes
    ----------
    kind : str
        ``"int8"``, ``"int4"`` (or another width from 2 to 8 bits), ``"k6v4"`` (widths of keys and of
        values), or ``"fp8"`` (e4m3).
    recent : int
        The newest entries of each KV head that stay in the model's own precision, at least, beside the
        first `SINKS`. Left out: none for int8, which storage on CUDA decodes in place, 64 otherwise.
    group : int or None
        Of int8 decoded in place: elements that share a scale, at most; the largest divisor of the head size
        is taken. None: 64.

    Raises
    ------
    ValueError
        Unknown kind, or a number out of range.
    """

    kind: str
    recent: int = None  # type: ignore[assignment]  # until __post_init__, which knows the kind
    group: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not _KINDS.fullmatch(self.kind):
            raise ValueError(
                "kv_dtype must be fp8, int8, int4 (or int2 to int7), or widths of keys and values such as k6v4, "
                f"got {self.kind!r}"
            )
        if self.recent is None:
            object.__setattr__(self, "recent", 0 if self.kind == "int8" else 64)
        for name, least in (("recent", 0), ("group", 1)):
            value = getattr(self, name)
            if value is None and name == "group":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"kv_dtype parameter {name} must be a whole number of at least {least}, got {value!r}")
        if self.kind != "int8" and self.group is not None:
            raise ValueError(f"kv_dtype {self.kind} has one scale for each entry and no groups; leave group out")

    @classmethod
    def parse(cls, value: "str | KVDtype | None") -> "KVDtype | None":
        """From a name, or a name with parameters such as ``int4:recent=128``; None stays None.

        Raises
        ------
        ValueError
            Unknown name or parameter, or a value out of range.
        TypeError
            Something else than a string, a `KVDtype` or None.
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise TypeError(f"kv_dtype must be a name such as 'int4', a KVDtype or None, got {value!r}")
        kind, items = spelling.parts(value)
        known = [field.name for field in fields(cls)][1:]
        for name, number in items:
            if name not in known or not (number or "").isdecimal():
                written = name if number is None else f"{name}={number}"
                raise ValueError(f"kv_dtype parameter {written!r} is none of {'=N, '.join(known)}=N")
        return cls(kind, **{name: int(number or 0) for name, number in items})

    def __str__(self) -> str:
        usual = KVDtype(self.kind)
        values = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return spelling.spell(self.kind, {key: one for key, one in values.items() if one != getattr(usual, key)})

    @property
    def widths(self) -> tuple[int | None, int | None]:
        """Bits of a code in keys and in values; None: e4m3."""
        found = _KINDS.fullmatch(self.kind)
        assert found is not None
        both, key, value = (None if group is None else int(group) for group in found.groups())
        return (both, both) if key is None else (key, value)

    def group_size(self, elements: int) -> int:
        """Elements of an entry of ``elements`` that share a scale in lines that are decoded in place."""
        most = min(self.group or _GROUP, elements)
        return next(size for size in range(most, 0, -1) if elements % size == 0)

    def entry_bytes(self, sizes: Sequence[int]) -> int:
        """Bytes of one coded entry, a key and a value of ``sizes`` elements, scales included."""
        return sum(line_bytes(size, bits) for size, bits in zip(sizes, self.widths, strict=True))

    def coded(self, entries: Count) -> Count:
        """How many entries of a KV head that is stored with so many are coded at once."""
        older = entries - SINKS - self.recent
        return older if older >= FLUSH else type(entries)(0)

    def segment_bytes(self, entries: int, sizes: Sequence[int], itemsize: int) -> int:
        """Bytes of one KV head that holds so many entries: coded, as they are, and the head's mean.

        ``itemsize`` is that of an element in the model's precision.
        """
        coded = self.coded(entries)
        return coded * self.entry_bytes(sizes) + (entries - coded + 1) * sum(sizes) * itemsize


def line_bytes(size: int, bits: int | None) -> int:
    """Bytes of a coded key, or value, of ``size`` elements, with its scale."""
    return (size if bits is None else codes.packed_bytes(size, bits)) + 2


@dataclass(frozen=True)
class Codes:
    """Coded keys, or values, one a line, centred and rotated.

    Attributes
    ----------
    payload : Tensor
        ``[n, bytes]`` uint8: packed codes, or e4m3 numbers.
    scale : Tensor
        ``[n]``, of 16 bits.
    bits : int or None
        Of a code; None: e4m3.
    elements : int
        ``D``.
    dtype : torch.dtype
        Of the entries before and after.
    """

    payload: Tensor
    scale: Tensor
    bits: int | None
    elements: int
    dtype: torch.dtype

    @classmethod
    def of(cls, entries: Tensor, centre: Tensor, bits: int | None) -> "Codes":
        """Code entries ``[n, D]`` of one KV head, of which ``centre`` ``[D]`` is taken out."""
        # A KV head by itself: a product's last bits depend on how many lines it has, and codes must not.
        rotated = rotate(entries.float() - centre.float())
        half = entries.dtype if entries.dtype.itemsize == 2 else torch.float16
        if bits is not None:
            payload, scale = codes.code(rotated, bits, half)
            return cls(payload, scale, bits, entries.shape[-1], entries.dtype)
        largest = torch.finfo(_FP8).max
        # The scale is rounded first, and the codes computed for the rounded one.
        scale = (rotated.abs().amax(-1) / largest).to(half).clamp_min_(torch.finfo(half).tiny)
        payload = (rotated / scale[:, None].float()).clamp_(-largest, largest).to(_FP8)
        return cls(payload.view(torch.uint8), scale, None, entries.shape[-1], entries.dtype)

    def __len__(self) -> int:
        return len(self.payload)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All that is stored."""
        return self.payload, self.scale

    @property
    def nbytes(self) -> int:
        """Bytes that the storages really hold on to."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    def rotated(self) -> Tensor:
        """The entries ``[n, D]`` as they were coded: without their mean and rotated, in float32."""
        if self.bits is None:
            return self.payload.view(_FP8).float() * self.scale[:, None].float()
        return codes.decoded(self.payload, self.scale, self.bits, self.elements)

    def take(self, lines: Tensor) -> "Codes":
        """A copy of some lines, as they are."""
        payload, scale = (tensor.index_select(0, lines) for tensor in self.tensors)
        return Codes(payload, scale, self.bits, self.elements, self.dtype)

    @staticmethod
    def cat(parts: Sequence["Codes"]) -> "Codes":
        """Lines of several, one after the other."""
        payload, scale = (torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True))
        return Codes(payload, scale, parts[0].bits, parts[0].elements, parts[0].dtype)


def centre_of(entries: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean entry of each KV head, sinks left out: what is taken out of the head's entries before they are coded.

    Parameters
    ----------
    entries : Tensor
        ``[..., n, D]``.
    real : Tensor, optional
        Boolean, broadcast to ``[..., n]``: False at padding, which counts nowhere.

    Returns
    -------
    Tensor
        ``[..., D]`` in the precision of the entries. Of a head that has sinks alone, their mean.
    """
    wide = torch.promote_types(entries.dtype, torch.float32)
    if real is None:
        behind = entries[..., SINKS:, :] if entries.shape[-2] > SINKS else entries
        return behind.mean(-2, dtype=wide).to(entries.dtype)
    counted = real & (real.cumsum(-1) > SINKS)
    counted = torch.where(counted.any(-1, keepdim=True), counted, real)
    # Padding may hold anything, also what is no number.
    total = entries.masked_fill(~counted[..., None], 0).sum(-2, dtype=wide)
    return (total / counted.sum(-1, keepdim=True).clamp_min(1)).to(entries.dtype)


def round_trip(entries: Tensor, bits: int | None, centre: Tensor) -> Tensor:
    """What coding gives back of entries ``[..., n, D]``, of which ``centre`` ``[..., D]`` is taken out."""
    flat = entries.flatten(0, -3) if entries.dim() > 2 else entries[None]
    pairs = zip(flat, centre.expand(*entries.shape[:-2], -1).reshape(len(flat), -1), strict=True)
    back = [rotate(Codes.of(head, mean, bits).rotated(), back=True) + mean.float() for head, mean in pairs]
    return torch.stack(back).view_as(entries).to(entries.dtype)
