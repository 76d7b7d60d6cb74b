"""Storages as plain values and tensors, to be written to a file and read from one.

What is read may be damaged, or not be ours at all: everything that sizes, addresses or indices follow
from is checked before a storage is made of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat, PackedMaps
from refreekv.storage.arena import KVArena
from refreekv.storage.base import KVStorage
from refreekv.storage.leveled import Coding, LeveledKV
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


def _coded(storage: LeveledKV) -> Written:
    exact, lines, coding = _exact(storage.exact), _exact(storage.coded, "coded_"), storage.coding
    plain = {
        "kind": "coded",
        "format": coding.form.numbers,
        "recent": coding.recent,
        "sinks": [list(row) for row in storage.sinks],
        "types": [_name(kind) for kind in storage.types],
    }
    means = {"key_means": coding.maps.key_mean, "value_means": coding.maps.value_mean}
    return Written({**plain, **exact.plain, **lines.plain}, {**exact.tensors, **lines.tensors, **means})


def _read_coded(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LeveledKV:
    exact, types = _read_exact(plain, tensors), [TYPES[name] for name in _pair(plain["types"], str)]
    lengths = read_lengths(plain["coded_lengths"])
    sinks, numbers, recent = read_lengths(plain["sinks"]), plain["format"], plain["recent"]
    shape = (len(lengths), len(lengths[0]))
    for others in (exact.lengths, sinks):
        _check((len(others), len(others[0])) == shape, "parts have different rows or KV heads")
    for firsts, held in zip(sinks, exact.lengths, strict=True):
        _check(all(first <= n for first, n in zip(firsts, held, strict=True)), "there are more sinks than entries")
    _check(type(recent) is int and recent >= 0, "the newest entries are of no number")
    _check(
        isinstance(numbers, list) and len(numbers) == 10 and all(type(n) is int for n in numbers),
        "the format of codes is none",
    )
    form = PackedFormat.from_numbers(numbers)
    _check((form.key_size, form.value_size) == exact.sizes, "exact and coded entries have different head sizes")
    count, lines, factors = sum(map(sum, lengths)), tensors["coded_keys"], tensors["coded_values"]
    _check(lines.dtype == torch.uint8 and lines.shape == (count, form.line_bytes), "codes and lengths do not agree")
    _check(factors.dtype == torch.float16 and factors.shape == (count, 2), "codes have no scales")
    means = tensors["key_means"], tensors["value_means"]
    for mean, size in zip(means, exact.sizes, strict=True):
        _check(mean.shape == (*shape, size) and mean.dtype == torch.float32, "KV heads have no mean each")
    own = torch.promote_types(*exact.types)
    coding = Coding(form, PackedMaps.rotated(*means, own), recent)
    coded = KVArena.of(RaggedKV(lines, factors, lengths))
    return LeveledKV(KVArena.of(exact), coded, sinks, coding, (types[0], types[1]))


def _pair(given: Any, kind: type) -> list[Any]:
    _check(isinstance(given, list) and len(given) == 2 and all(type(x) is kind for x in given), "a pair is none")
    return list(given)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
