"""Storages as plain values and tensors, to be written to a file and read from one.

What is read may be damaged, or not be ours at all: everything that sizes, addresses or indices follow
from is checked before a storage is made of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refreekv.core.coded_lines import Coding, line_bytes
from refreekv.core.quantisation import Codes, KVDtype
from refreekv.core.quantisation import line_bytes as code_bytes
from refreekv.storage.arena import KVArena
from refreekv.storage.coded_arena import CodedArena
from refreekv.storage.quantised import QuantisedKV
from refreekv.storage.ragged import RaggedKV

TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Types of entries by the names they have in files."""


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


def written(storage: RaggedKV) -> Written:
    """What says all about a storage, less room to grow: an arena is written as the exact storage of its entries."""
    if isinstance(storage, CodedArena):
        coding = storage.coding
        lines = _exact(storage.lines)
        numbers = {
            "sizes": list(coding.sizes),
            "groups": list(coding.groups),
            "halves": [_name(kind) for kind in coding.halves],
            "types": [_name(kind) for kind in coding.types],
        }
        return Written({"kind": "lines", "coding": numbers, **lines.plain}, lines.tensors)
    if isinstance(storage, QuantisedKV):
        return _quantised(storage)
    plain, tensors = _exact(storage)
    return Written({"kind": "exact", **plain}, tensors)


def read(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RaggedKV:
    """The storage that was written, with the entries in tensors of their own; never an arena but for lines.

    Raises
    ------
    ValueError
        What was read contradicts itself.
    """
    kind = plain["kind"]
    if kind == "exact":
        return _read_exact(plain, tensors)
    if kind == "lines":
        return _read_lines(plain, tensors)
    if kind == "quantised":
        return _read_quantised(plain, tensors)
    raise ValueError(f"unknown storage {kind!r}")


def _exact(storage: RaggedKV, prefix: str = "") -> Written:
    if isinstance(storage, KVArena):
        rows = [storage.segments(row) for row in range(len(storage.lengths))]
        storage = RaggedKV.from_pieces([[keys] for keys, _ in rows], [[values] for _, values in rows])
    lengths = [list(row) for row in storage.lengths]
    return Written({f"{prefix}lengths": lengths}, {f"{prefix}keys": storage.keys, f"{prefix}values": storage.values})


def _read_exact(
    plain: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    types: Sequence[torch.dtype] | None = None,
) -> RaggedKV:
    lengths = read_lengths(plain[f"{prefix}lengths"])
    keys, values = tensors[f"{prefix}keys"], tensors[f"{prefix}values"]
    for flat in (keys, values):
        _check(flat.dim() == 2 and len(flat) == sum(map(sum, lengths)), "entries and lengths do not agree")
        _check(flat.shape[1] > 0 and flat.dtype in (types or TYPES.values()), "entries are of no type that is stored")
    return RaggedKV(keys, values, lengths)


def read_lengths(given: Any) -> list[tuple[int, ...]]:
    """Numbers of entries ``[rows][KV heads]``; ValueError if that is not what they are."""
    _check(isinstance(given, list) and len(given) > 0, "no rows")
    lengths = [tuple(row) for row in given]
    _check(all(isinstance(n, int) and n >= 0 for row in lengths for n in row), "lengths are no numbers of entries")
    _check(len({len(row) for row in lengths}) == 1 and len(lengths[0]) > 0, "rows have different numbers of KV heads")
    return lengths


def _read_lines(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CodedArena:
    numbers: Mapping[str, Any] = plain["coding"]
    sizes, groups = (_pair(numbers[name], int) for name in ("sizes", "groups"))
    halves, types = ([TYPES[name] for name in _pair(numbers[kind], str)] for kind in ("halves", "types"))
    _check(all(half.itemsize == 2 for half in halves), "scales are of no type of 16 bits")
    _check(
        all(size > 0 and group > 0 and size % group == 0 for size, group in zip(sizes, groups, strict=True)),
        "groups do not divide heads",
    )
    coding = Coding((sizes[0], sizes[1]), (groups[0], groups[1]), (halves[0], halves[1]), (types[0], types[1]))
    lines = _read_exact(plain, tensors, types=[torch.uint8])
    for flat, size, group in zip((lines.keys, lines.values), sizes, groups, strict=True):
        _check(flat.shape[1] == line_bytes(size, group), "lines are of another length than their format")
    empty = CodedArena.like(*coding.no_lines(lines.keys.device), lines.lengths, coding=coding)
    return empty.of_lines(lines)


def _quantised(storage: QuantisedKV) -> Written:
    parts = storage.parts
    plain: dict[str, Any] = {
        "kind": "quantised",
        "format": str(storage.kind),
        "coded": [list(row) for row in storage.coded],
        "code_types": [_name(codes.dtype) for codes in parts.codes],
    }
    tensors: dict[str, Tensor] = {}
    for name, exact in (("sinks_", parts.sinks), ("recent_", parts.recent)):
        own = _exact(exact, name)
        plain |= own.plain
        tensors |= own.tensors
    for side, codes, centres in zip(("key", "value"), parts.codes, parts.centres, strict=True):
        tensors |= {f"{side}_codes": codes.payload, f"{side}_scales": codes.scale, f"{side}_centres": centres}
    return Written(plain, tensors)


def _read_quantised(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantisedKV:
    kind = KVDtype.parse(str(plain["format"]))
    assert kind is not None
    coded = read_lengths(plain["coded"])
    sinks, recent = (_read_exact(plain, tensors, name) for name in ("sinks_", "recent_"))
    shape = (len(coded), len(coded[0]))
    for lengths in (sinks.lengths, recent.lengths):
        _check((len(lengths), len(lengths[0])) == shape, "parts have different rows or KV heads")
    _check(sinks.sizes == recent.sizes, "parts have different head sizes")
    codes, centres = [], []
    sides = zip(("key", "value"), recent.sizes, kind.widths, _pair(plain["code_types"], str), strict=True)
    for side, size, bits, name in sides:
        payload, scale, centre = (tensors[f"{side}_{what}"] for what in ("codes", "scales", "centres"))
        _check(payload.dtype == torch.uint8 and payload.shape == (sum(map(sum, coded)), code_bytes(size, bits) - 2),
               "codes and lengths do not agree")  # fmt: skip
        _check(scale.shape == payload.shape[:1] and scale.dtype in TYPES.values(), "codes have no scale each")
        _check(centre.shape == (*shape, size) and centre.is_floating_point(), "KV heads have no mean each")
        codes.append(Codes(payload, scale, bits, size, TYPES[name]))
        centres.append(centre)
    return QuantisedKV(kind, sinks, (codes[0], codes[1]), coded, recent, (centres[0], centres[1]))


def _pair(given: Any, kind: type) -> list[Any]:
    _check(isinstance(given, list) and len(given) == 2 and all(type(x) is kind for x in given), "a pair is none")
    return list(given)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
