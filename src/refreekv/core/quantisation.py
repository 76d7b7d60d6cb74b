"""Number formats for stored keys and values: fp8, int8 and int4, entry by entry.

An entry is one token's key or value in one KV head, a line of a flat tensor. Each line
carries its own scales, so lines are picked, moved and dropped as they are, whatever a
policy keeps: nothing is ever quantised twice.

The formats are plain torch. The cache layers that libraries offer hold rectangles ``[B, H,
n, D]`` and quantise all of a layer again whenever it has grown, which ragged rows and
further turns do not allow; and torchao's public integer formats keep zero exactly, which
keys do not need: the same bits are better spent on a group's true range
(docs/quantisation.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["fp8", "int8", "int4"]
_LEVELS = {"int8": 255, "int4": 15}
_FP8 = torch.float8_e4m3fn
# The newest entries that stay as they are. Of int8 none: it loses too little, and storage that encodes entries
# as they come is decoded in place.
_RECENT = {"fp8": 64, "int8": 0, "int4": 64}
# Elements that share a scale, at most. Four bits are too few for a whole entry.
_GROUP = {"int8": 64, "int4": 32}


@dataclass(frozen=True)
class KVDtype:
    """How kept entries are stored.

    Attributes
    ----------
    kind : str
        ``"fp8"`` (e4m3, one scale for an entry), ``"int8"`` or ``"int4"`` (a scale and a
        lowest value for each group of an entry's elements).
    recent : int
        The newest entries of each KV head that stay in the model's own precision, at least. Left out:
        none for int8, 64 for fp8 and int4.
    group : int or None
        Elements that share a scale, at most; the largest divisor of the head size is taken.
        None: 64 for int8, 32 for int4; fp8 has no groups.

    Raises
    ------
    ValueError
        Unknown kind, or a number out of range.
    """

    kind: Kind
    recent: int = None  # type: ignore[assignment]  # until __post_init__, which knows the kind
    group: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kv_dtype must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.recent is None:
            object.__setattr__(self, "recent", _RECENT[self.kind])
        for name, least in (("recent", 0), ("group", 1)):
            value = getattr(self, name)
            if value is None and name == "group":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"kv_dtype parameter {name} must be a whole number of at least {least}, got {value!r}")
        if self.kind == "fp8" and self.group is not None:
            raise ValueError("kv_dtype fp8 has one scale for each entry and no groups; leave group out")

    @classmethod
    def parse(cls, value: "str | KVDtype | None") -> "KVDtype | None":
        """From a name, or a name with parameters such as ``int4:recent=128,group=64``; None stays None.

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
        kind, _, rest = value.partition(":")
        known = [field.name for field in fields(cls)][1:]
        parameters: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in rest.split(","))):
            name, _, number = (part.strip() for part in item.partition("="))
            if name not in known or not number.isdecimal():
                raise ValueError(f"kv_dtype parameter {item!r} is none of {'=N, '.join(known)}=N")
            parameters[name] = int(number)
        return cls(kind.strip(), **parameters)  # type: ignore[arg-type]

    def __str__(self) -> str:
        usual = KVDtype(self.kind)
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)[1:]
            if getattr(self, field.name) != getattr(usual, field.name)
        ]
        return f"{self.kind}:{','.join(changed)}" if changed else self.kind

    def group_size(self, elements: int) -> int:
        """Elements of an entry of ``elements`` that share a scale."""
        if self.kind == "fp8":
            return elements
        most = min(self.group or _GROUP[self.kind], elements)
        return next(size for size in range(most, 0, -1) if elements % size == 0)

    def line_bytes(self, elements: int) -> int:
        """Bytes of one stored entry of ``elements``, scales included."""
        payload = elements // 2 if self.kind == "int4" else elements
        numbers = 1 if self.kind == "fp8" else 2
        return payload + 2 * numbers * (elements // self.group_size(elements))

    def encode(self, lines: Tensor) -> "Codes":
        """Entries ``[n, D]`` in this format.

        Raises
        ------
        ValueError
            An odd head size, of which two elements do not share each byte.
        """
        count, elements = lines.shape
        if self.kind == "int4" and elements % 2:
            raise ValueError(f"kv_dtype int4 needs an even head size, got {elements}; take int8 or fp8")
        # The scales are rounded first and the codes computed for the rounded ones.
        half = lines.dtype if lines.dtype.itemsize == 2 else torch.float16
        size = self.group_size(elements)
        groups = lines.float().view(count, elements // size, size)
        if self.kind == "fp8":
            largest = torch.finfo(_FP8).max
            scale = _representable(groups.abs().amax(-1, keepdim=True) / largest, half)
            payload = (groups / scale.float()).clamp(-largest, largest).to(_FP8).view(count, elements)
            return Codes(payload, scale[..., 0], None, elements, lines.dtype)
        low = groups.amin(-1, keepdim=True).to(half)
        levels = _LEVELS[self.kind]
        scale = _representable((groups.amax(-1, keepdim=True) - low.float()) / levels, half)
        steps = ((groups - low.float()) / scale.float()).round_().clamp_(0, levels)
        payload = steps.to(torch.uint8).view(count, elements)
        if self.kind == "int4":
            payload = payload[:, ::2] | payload[:, 1::2] << 4
        return Codes(payload.contiguous(), scale[..., 0], low[..., 0], elements, lines.dtype)


def _representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in ``dtype``, none of them zero."""
    return scale.to(dtype).clamp_min(torch.finfo(dtype).tiny)


@dataclass(frozen=True)
class Codes:
    """Quantised entries, one a line.

    Attributes
    ----------
    payload : Tensor
        ``[n, D]`` float8 or uint8, or ``[n, D / 2]`` uint8 with two elements in a byte.
    scale : Tensor
        ``[n, groups]``.
    low : Tensor or None
        ``[n, groups]``: what code 0 stands for; None where codes are numbers themselves.
    elements : int
        ``D``.
    dtype : torch.dtype
        Of the entries before and after.
    """

    payload: Tensor
    scale: Tensor
    low: Tensor | None
    elements: int
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.payload)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored."""
        return (self.payload, self.scale) if self.low is None else (self.payload, self.scale, self.low)

    @property
    def nbytes(self) -> int:
        """Bytes that the storages really hold on to."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    def decode(self) -> Tensor:
        """The entries ``[n, D]``."""
        payload = self.payload
        if self.low is not None and payload.shape[1] != self.elements:
            payload = torch.stack([payload & 15, payload >> 4], dim=-1)
        count = self.scale.shape[1]
        groups = payload.reshape(len(payload), count, self.elements // count).to(torch.float32)
        groups *= self.scale[..., None]
        if self.low is not None:
            groups += self.low[..., None]
        return groups.view(len(payload), self.elements).to(self.dtype)

    def take(self, lines: Tensor) -> "Codes":
        """A copy of some lines, as they are."""
        low = None if self.low is None else self.low.index_select(0, lines)
        payload = self.payload
        if payload.dtype == _FP8:  # which index_select does not know everywhere
            payload = payload.view(torch.uint8).index_select(0, lines).view(_FP8)
        else:
            payload = payload.index_select(0, lines)
        return Codes(payload, self.scale.index_select(0, lines), low, self.elements, self.dtype)

    @staticmethod
    def cat(parts: Sequence["Codes"]) -> "Codes":
        """Lines of several, one after the other."""
        lows = [part.low for part in parts if part.low is not None]
        payload = torch.cat([part.payload.view(torch.uint8) for part in parts]).view(parts[0].payload.dtype)
        low = torch.cat(lows) if lows else None
        return Codes(payload, torch.cat([part.scale for part in parts]), low, parts[0].elements, parts[0].dtype)
