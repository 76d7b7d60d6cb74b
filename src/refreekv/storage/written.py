"""Storages as plain values and tensors, to be written to a file and read from one.

What is read may be damaged, or not be ours at all: everything that sizes, addresses or indices follow
from is checked before a storage is made of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.quantisation import MOST_RUNGS
from refreekv.storage.arena import KVArena
from refreekv.storage.base import KVStorage
from refreekv.storage.coded_lines import CodedLines
from refreekv.storage.coding import Coding, maps_of
from refreekv.storage.leveled import LeveledKV
from refreekv.storage.members import Members
from refreekv.storage.ragged import RaggedKV

TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Types of entries by the names they have in files."""

CODES = ("order", "weight", "spread")
"""Parts of a model's own codes for keys."""


class Written(NamedTuple):
    """A storage in a form that is written down.

    Attributes
    ----------
    plain : dict
        Numbers, texts and lists of these.
    tensors : dict
        Tensors by name, contiguous.
    """

    plain: dict[str, Any]
    tensors: dict[str, Tensor]


def written(storage: KVStorage) -> Written:
    """What says all about a storage: an arena is written as the exact storage of its entries."""
    if isinstance(storage, LeveledKV):
        return _coded(storage)
    plain, tensors = _exact(storage)
    return Written({"kind": "exact", **plain}, tensors)


def read(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> KVStorage:
    """The storage that was written, with the entries in tensors of their own; exact entries never in an arena.

    Raises
    ------
    ValueError
        What was read contradicts itself.
    """
    kind = plain["kind"]
    if kind == "exact":
        return _read_exact(plain, tensors)
    if kind == "coded":
        return _read_coded(plain, tensors)
    raise ValueError(f"unknown storage {kind!r}")


def _exact(storage: KVStorage, prefix: str = "") -> Written:
    entries = storage.full()
    lengths = [list(row) for row in entries.lengths]
    return Written({f"{prefix}lengths": lengths}, {f"{prefix}keys": entries.keys, f"{prefix}values": entries.values})


def _read_exact(
    plain: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    types: Sequence[torch.dtype] | None = None,
) -> RaggedKV:
    lengths = read_lengths(plain[f"{prefix}lengths"])
    keys, values = tensors[f"{prefix}keys"], tensors[f"{prefix}values"]
    for flat in (keys, values):
        check(flat.dim() == 2 and len(flat) == sum(map(sum, lengths)), "entries and lengths do not agree")
        check(flat.shape[1] > 0 and flat.dtype in (types or TYPES.values()), "entries are of no type that is stored")
    return RaggedKV(keys, values, lengths)


def read_lengths(given: Any) -> list[tuple[int, ...]]:
    """Numbers of entries ``[rows][KV heads]``; ValueError if that is not what they are."""
    check(isinstance(given, list) and len(given) > 0, "no rows")
    lengths = [tuple(row) for row in given]
    check(all(isinstance(n, int) and n >= 0 for row in lengths for n in row), "lengths are no numbers of entries")
    check(len({len(row) for row in lengths}) == 1 and len(lengths[0]) > 0, "rows have different numbers of KV heads")
    return lengths


def _coded(storage: LeveledKV) -> Written:
    coding, members = storage.lines.coding, storage.lines.members
    plain = {
        "kind": "coded",
        "formats": [form.numbers for form in coding.forms],
        "recent": coding.recent,
        "generated": coding.generated,
        "sinks": [list(row) for row in storage.sinks],
        "members": [list(row) for row in members.counts],
        "types": [_name(kind) for kind in storage.types],
    }
    tensors = {"members": members.packed, "key_means": coding.maps.key_mean, "value_means": coding.maps.value_mean}
    if coding.codes is not None:
        tensors |= {f"code_{part}": getattr(coding.codes, part) for part in CODES}
    for own in (_exact(storage.exact), *(_exact(arena, f"rung{i}_") for i, arena in enumerate(storage.lines.rungs))):
        plain |= own.plain
        tensors |= own.tensors
    return Written(plain, tensors)


def _read_coded(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LeveledKV:
    exact, types = _read_exact(plain, tensors), [TYPES[name] for name in _pair(plain["types"], str)]
    sinks, recent, generated = read_lengths(plain["sinks"]), plain["recent"], plain["generated"]
    formats = plain["formats"]
    check(isinstance(formats, list) and 1 <= len(formats) <= MOST_RUNGS, "there are no formats of codes")
    shape = (len(exact.lengths), len(exact.lengths[0]))
    check((len(sinks), len(sinks[0])) == shape, "parts have different rows or KV heads")
    for firsts, held in zip(sinks, exact.lengths, strict=True):
        check(all(first <= n for first, n in zip(firsts, held, strict=True)), "there are more sinks than entries")
    check(type(recent) is int and recent >= 0, "the newest entries are of no number")
    check(type(generated) is int and 0 <= generated < len(formats), "generated entries go to no rung")
    means = tensors["key_means"], tensors["value_means"]
    for mean, size in zip(means, exact.sizes, strict=True):
        check(mean.shape == (*shape, size) and mean.dtype == torch.float32, "KV heads have no mean each")
    rungs = [_read_rung(plain, tensors, rung, numbers, exact) for rung, numbers in enumerate(formats)]
    forms, arenas = zip(*rungs, strict=True)
    codes = None
    if f"code_{CODES[0]}" in tensors:
        codes = KeyCodes.known(*(tensors[f"code_{part}"] for part in CODES))
        check(codes.order.shape == (shape[1], exact.sizes[0]), "codes of keys are of other heads")
    maps = maps_of(means, torch.promote_types(*exact.types), codes)
    coding = Coding(forms, maps, recent, generated, codes)
    members = _read_members(plain, tensors, [arena.lengths for arena in arenas], generated)
    return LeveledKV(KVArena.of(exact), CodedLines(arenas, members, coding), sinks, (types[0], types[1]))


def _read_rung(
    plain: Mapping[str, Any], tensors: Mapping[str, Tensor], rung: int, numbers: Any, exact: RaggedKV
) -> tuple[PackedFormat, KVArena]:
    """The format of a rung, and its lines."""
    check(
        isinstance(numbers, list) and len(numbers) == 10 and all(type(n) is int for n in numbers),
        "the format of codes is none",
    )
    form, lengths = PackedFormat.from_numbers(numbers), read_lengths(plain[f"rung{rung}_lengths"])
    shapes = [(len(rows), len(rows[0])) for rows in (lengths, exact.lengths)]
    check(shapes[0] == shapes[1], "parts have different rows or KV heads")
    check((form.key_size, form.value_size) == exact.sizes, "exact and coded entries have different head sizes")
    count, lines, factors = sum(map(sum, lengths)), tensors[f"rung{rung}_keys"], tensors[f"rung{rung}_values"]
    check(lines.dtype == torch.uint8 and lines.shape == (count, form.line_bytes), "codes and lengths do not agree")
    check(factors.dtype == torch.float16 and factors.shape == (count, 2), "codes have no scales")
    return form, KVArena.of(RaggedKV(lines, factors, lengths))


def _read_members(
    plain: Mapping[str, Any], tensors: Mapping[str, Tensor], lengths: Sequence[Sequence[tuple[int, ...]]], rest: int
) -> Members:
    """Which rung coded entries are in, given how many each rung has; what it does not tell of is in ``rest``."""
    counts, packed = read_lengths(plain["members"]), tensors["members"]
    members = Members(packed, counts)
    check(packed.dtype == torch.uint8 and packed.dim() == 1, "nothing says which rung entries are in")
    expected = sum(members.row_nbytes(row) for row in range(len(counts)))
    check((len(counts), len(counts[0])) == (len(lengths[0]), len(lengths[0][0])), "rungs are of other KV heads")
    check(len(packed) == expected, "rungs and entries do not agree")
    if len(lengths) > 1:
        check(not len(packed) or int(members.rungs().max()) < len(lengths), "entries are in rungs that there are not")
        told = members.counted(len(lengths))
        for rung, (own, said) in enumerate(zip(lengths, told, strict=True)):
            for held, found in zip(own, said, strict=True):
                agree = all(a >= b if rung == rest else a == b for a, b in zip(held, found, strict=True))
                check(agree, "rungs and entries do not agree")
    else:
        check(not any(map(any, counts)), "there is one rung only")
    return members


def _pair(given: Any, kind: type) -> list[Any]:
    check(isinstance(given, list) and len(given) == 2 and all(type(x) is kind for x in given), "a pair is none")
    return list(given)


def check(holds: bool, otherwise: str) -> None:
    """Raise ValueError, for this reason, unless what was read holds."""
    if not holds:
        raise ValueError(otherwise)


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
