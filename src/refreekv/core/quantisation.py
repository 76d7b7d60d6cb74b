"""Number formats for stored keys and values: a few bits an element, entry by entry.

An entry is one token's key or value in one KV head. It is coded in three steps, none of which looks at another entry:

1. *Centred*: its head's mean key (or value) is taken out. Models put large constants into few
   channels of the keys (Qwen2's ``k_proj`` has a bias), which would eat the range of every code.
2. *Rotated* (`refreekv.core.rotation`): what is left looks Gaussian in every element.
3. *Coded* (`refreekv.core.packed_lines`): a level of the best uniform grid for a Gaussian for each element,
   and one scale of 16 bits.

The mean, of the prompt, is fixed for each row and KV head when its first entries are coded and serves all later
ones, so that lines are picked, moved and dropped as they are: nothing is ever coded twice.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from refreekv.core import spelling
from refreekv.core.packed_lines import PackedFormat, Side
from refreekv.core.rotation import rotate

CODED_TYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""Of entries that can be coded."""

SINKS = 4
"""First entries of each KV head, which stay as they are: models aim attention at them, and their keys and values
are unlike all others (StreamingLLM, arXiv 2309.17453)."""
FLUSH = 32
"""Generated entries that gather before they are coded together, beyond those that stay as they are."""
MOST_RUNGS = 4
"""Number formats that the entries of a head may have."""
RECENT = 64
"""The newest entries of each KV head that stay as they are, if nobody says otherwise."""
Count = TypeVar("Count", int, float)
LAYOUTS = {
    8: (8, 8, 8, 8), 7: (8, 8, 6, 6), 6: (8, 6, 6, 4), 5: (6, 6, 4, 4),
    4: (6, 4, 4, 2), 3: (4, 4, 2, 2), 2: (2, 2, 2, 2),
}  # fmt: skip
"""Bits of each quarter of a key's channels, so many on average, where the model's own codes sort these."""
_KINDS = re.compile(r"int([8642])|k([2-8])v([8642])")
_GONE = {
    "fp8": "fp8 was taken out: int8 loses less in the same bytes",
    "group": "entries have one scale each, and no groups any more",
}


@dataclass(frozen=True)
class KVDtype:
    """How kept entries are stored.

    Attributes
    ----------
    kind : str
        ``"int8"``, ``"int6"``, ``"int4"``, ``"int2"``, or widths of keys and of values, such as ``"k6v4"``.
    recent : int
        The newest entries of each KV head that stay in the model's own precision, beside the first `SINKS`.

    Raises
    ------
    ValueError
        Unknown kind, or a number out of range.
    """

    kind: str
    recent: int = RECENT

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not _KINDS.fullmatch(self.kind):
            raise ValueError(
                "kv_dtype must be int8, int6, int4 or int2, or such widths of keys and values as in k6v4, "
                f"got {self.kind!r}" + (f": {_GONE[self.kind]}" if self.kind in _GONE else "")
            )
        if not isinstance(self.recent, int) or isinstance(self.recent, bool) or self.recent < 0:
            raise ValueError(f"kv_dtype parameter recent must be a whole number of at least 0, got {self.recent!r}")

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
                why = f": {_GONE[name]}" if name in _GONE else ""
                raise ValueError(f"kv_dtype parameter {written!r} is none of {'=N, '.join(known)}=N{why}")
        return cls(kind, **{name: int(number or 0) for name, number in items})

    def __str__(self) -> str:
        return spelling.spell(self.kind, {} if self.recent == RECENT else {"recent": self.recent})

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of an element of keys and of values."""
        found = _KINDS.fullmatch(self.kind)
        assert found is not None
        both, key, value = found.groups()
        return int(both or key), int(both or value)

    def form(self, sizes: Sequence[int], *, sorted_keys: bool = False) -> PackedFormat:
        """The packed lines of keys and values of ``sizes`` elements.

        Parameters
        ----------
        sizes : sequence of int
            Elements of a key and of a value.
        sorted_keys : bool
            Whether channels of keys are sorted by what their errors cost, as the model's own codes do.

        Raises
        ------
        ValueError
            Head sizes that are no multiple of 16.
        """
        if any(size % 16 for size in sizes):
            raise ValueError(
                f"kv_dtype {self.kind} packs heads of a multiple of 16 elements, and this model's keys have {sizes[0]} "
                f"and its values {sizes[1]}; leave kv_dtype out"
            )
        keys, values = self.widths
        return _lines_of(sizes[0], sizes[1], LAYOUTS[keys] if sorted_keys or keys % 2 else (keys,) * 4, values)

    def entry_bytes(self, sizes: Sequence[int]) -> int:
        """Bytes of one coded entry, a key and a value of ``sizes`` elements, scales included.

        With keys in codes of the model's own, as they are but for models that none can be measured of.
        """
        return self.form(sizes, sorted_keys=True).entry_bytes

    def coded(self, entries: Count) -> Count:
        """How many of a KV head's entries are coded at the end of a prompt."""
        return max(entries - SINKS - self.recent, type(entries)(0))


@functools.lru_cache(maxsize=256)
def _lines_of(key_size: int, value_size: int, keys: tuple[int, int, int, int], values: int) -> PackedFormat:
    return PackedFormat(key_size, value_size, keys, (values,) * 4)


@dataclass(frozen=True)
class Ladder:
    """Number formats from narrow to wide, of which each kept entry is stored in one, its rung.

    Attributes
    ----------
    rungs : tuple of KVDtype
        One to `MOST_RUNGS`, with equally many newest entries that stay as they are.
    generated : int
        The rung of what is generated, and of all else that nobody gives a rung; -1: the widest.

    Raises
    ------
    ValueError
        Too many rungs, or rungs that do not grow; a number that is none of them.
    """

    rungs: tuple[KVDtype, ...]
    generated: int = -1

    def __post_init__(self) -> None:
        if not 1 <= len(self.rungs) <= MOST_RUNGS:
            raise ValueError(f"a ladder has 1 to {MOST_RUNGS} number formats, got {len(self.rungs)}")
        if len({rung.recent for rung in self.rungs}) > 1:
            raise ValueError("all number formats of a ladder leave equally many newest entries as they are")
        bits = [sum(rung.widths) for rung in self.rungs]
        if bits != sorted(set(bits)):
            raise ValueError(f"the number formats of a ladder grow from narrow to wide, got {self}")
        if not -len(self.rungs) <= self.generated < len(self.rungs):
            raise ValueError(f"generated is the number of a rung, 0 to {len(self.rungs) - 1}, got {self.generated}")
        object.__setattr__(self, "generated", self.generated % len(self.rungs))

    @classmethod
    def of(cls, *kinds: str, recent: int = RECENT, generated: int = -1) -> "Ladder":
        """Of the names of its number formats."""
        return cls(tuple(KVDtype(kind, recent) for kind in kinds), generated)

    @classmethod
    def parse(cls, value: "str | KVDtype | Ladder") -> "Ladder":
        """From names with ``+`` between them, such as ``k4v2+k4v4+int8`` or ``k4v2+int8:recent=32,generated=0``.

        A number format is a ladder with one rung.

        Raises
        ------
        ValueError
            Unknown name or parameter, or a value out of range.
        TypeError
            Something else than a string, a `KVDtype` or a `Ladder`.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            number = KVDtype.parse(value)  # type: ignore[arg-type]
            if number is None:
                raise TypeError("expected number formats, got None")
            return cls((number,))
        names, items = spelling.parts(value)
        given = [number or "" for name, number in items if name == "generated"]
        if any(not number.isdecimal() for number in given):
            raise ValueError(f"generated is the number of a rung, got {given[0]!r}")
        rest = {name: number for name, number in items if name != "generated"}
        found = [KVDtype.parse(spelling.spell(name.strip(), rest)) for name in names.split("+")]
        return cls(tuple(number for number in found if number is not None), int(given[0]) if given else -1)

    def __str__(self) -> str:
        extra = {} if self.recent == RECENT else {"recent": self.recent}
        if self.generated % len(self.rungs) != len(self.rungs) - 1:
            extra["generated"] = self.generated
        return spelling.spell("+".join(rung.kind for rung in self.rungs), extra)

    @property
    def recent(self) -> int:
        """The newest entries of each KV head that stay in the model's own precision."""
        return self.rungs[0].recent

    def coded(self, entries: Count) -> Count:
        """How many of a KV head's entries are coded at the end of a prompt, in whatever rung."""
        return self.rungs[0].coded(entries)

    def forms(self, sizes: Sequence[int], *, sorted_keys: bool = False) -> tuple[PackedFormat, ...]:
        """The packed lines of each rung; see `KVDtype.form`."""
        return _forms(self, tuple(sizes), sorted_keys)


@functools.lru_cache(maxsize=64)
def _forms(ladder: Ladder, sizes: tuple[int, ...], sorted_keys: bool) -> tuple[PackedFormat, ...]:
    """`Ladder.forms`: the same objects each time, as they remember what they are asked for."""
    return tuple(rung.form(sizes, sorted_keys=sorted_keys) for rung in ladder.rungs)


PROMPT_DTYPES = KVDtype("int8"), KVDtype("k6v4")
"""How a prompt that comes in chunks is held until its end, if nobody says otherwise: in the first of these in which it
fits. int8 loses less than 16-bit arithmetic does, also where all that is read later is read over it
(docs/how-it-works.md); the other one about what the default loses at the prompt's end (lab/quantisation.md)."""
PROMPT_DTYPE = PROMPT_DTYPES[0]
"""Where there is room, or nobody can tell."""


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
    if real is None:
        behind = entries[..., SINKS:, :] if entries.shape[-2] > SINKS else entries
        return (_total(behind) / behind.shape[-2]).to(entries.dtype)
    counted = real & (real.cumsum(-1) > SINKS)
    counted = torch.where(counted.any(-1, keepdim=True), counted, real)
    return (_total(entries, counted) / counted.sum(-1, keepdim=True).clamp_min(1)).to(entries.dtype)


PIECE, BLOCK = 4096, 64
"""Entries of which a masked copy is made at a time, and those that are added up first."""


def _total(entries: Tensor, counted: Tensor | None = None) -> Tensor:
    """The sum ``[..., D]`` of entries ``[..., n, D]``, of those that are ``counted``; in float32 at least.

    A copy of all of them would be as large as what a prompt is coded for. On CUDA so is the memory that PyTorch takes
    to add up many numbers for few sums; it takes none for many sums of few numbers.
    """
    if counted is None:
        return _sum(entries)
    total = entries.new_zeros(*entries.shape[:-2], entries.shape[-1], dtype=_wide(entries))
    for start in range(0, entries.shape[-2], PIECE):
        # Padding may hold anything, also what is no number.
        part = entries[..., start : start + PIECE, :].masked_fill(~counted[..., start : start + PIECE, None], 0)
        total += _sum(part)
    return total


def _sum(entries: Tensor) -> Tensor:
    """The sum ``[..., D]`` of all entries ``[..., n, D]``, of blocks first: in few launches, and little memory."""
    even, wide = entries.shape[-2] // BLOCK * BLOCK, _wide(entries)
    # [..., n, D] -> [..., n / BLOCK, BLOCK, D]
    total: Tensor = entries[..., :even, :].unflatten(-2, (-1, BLOCK)).sum(-2, dtype=wide).sum(-2)
    return total if even == entries.shape[-2] else total + entries[..., even:, :].sum(-2, dtype=wide)


def _wide(entries: Tensor) -> torch.dtype:
    return torch.promote_types(entries.dtype, torch.float32)


def round_trip(entries: Tensor, bits: int, centre: Tensor) -> Tensor:
    """What coding gives back of entries ``[..., n, D]``, of which ``centre`` ``[..., D]`` is taken out."""
    side = Side(entries.shape[-1], (bits,) * 4)
    mean = centre[..., None, :].float()
    codes, factors = side.encode(rotate(entries.float() - mean))
    coded = side.levels(codes, torch.float32) * factors[..., None]
    return (rotate(coded, back=True) + mean).to(entries.dtype)
