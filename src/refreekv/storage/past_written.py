"""A layer's past as plain values and tensors, to be written to a file and read from one.

What is read may be damaged, or not be ours at all: everything that sizes, addresses or indices follow from is checked
before anything is made of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.quantisation import SINKS, KVDtype
from refreekv.storage.past import EXACT, EXTRA, PastLayer, of_rows, rest_left
from refreekv.storage.unfinished import LINES
from refreekv.storage.written import CODES, TYPES, Written, check

_REST = "rest."


class ReadPast(NamedTuple):
    """What a file says of a layer's past.

    Attributes
    ----------
    number, codes, length, batch
        As `PastLayer` has them.
    entries : dict
        Lines and factors, or keys and values; empty: all are in the rest.
    rest : dict
        All else.
    """

    number: KVDtype | None
    codes: KeyCodes | None
    entries: dict[str, Tensor]
    rest: dict[str, Tensor]
    length: int
    batch: int

    @property
    def in_pieces(self) -> int:
        """Columns that are not in the rest."""
        return next((part.shape[2] for part in self.entries.values()), 0)


def written(layer: PastLayer, rows: Sequence[int] | None) -> Written:
    """What says all about a layer's past, or about some of its rows."""
    parts: dict[str, list[Tensor]] = {}
    for piece in layer.pieces:
        for name, part in of_rows(piece.stored.on_host(), rows, layer.batch).items():
            parts.setdefault(name, []).append(part[:, :, : piece.stop - piece.start])
    tensors = {name: torch.cat(part, 2) for name, part in parts.items()}
    tail = layer.length - layer.in_pieces
    rest = rest_left(layer, of_rows(layer.rest.on_host(), rows, layer.batch))
    for name, part in rest.items():
        tensors[_REST + name] = part[:, :, :tail].contiguous() if name.startswith("tail_") else part
    if layer.codes is not None:
        # Copies: a file takes no tensor twice, and the cache has the same codes.
        tensors |= {f"code_{part}": getattr(layer.codes, part).clone() for part in CODES}
    batch = layer.batch if rows is None else len(rows)
    plain = {"number": None if layer.number is None else str(layer.number), "length": layer.length, "batch": batch}
    return Written(plain, tensors)


def read(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ReadPast:
    """What was written.

    Raises
    ------
    ValueError
        What was read contradicts itself.
    """
    number, length, batch = KVDtype.parse(plain["number"]), plain["length"], plain["batch"]
    check(type(length) is int and length > 0, "nothing was kept of earlier turns")
    check(type(batch) is int and batch > 0, "nothing was kept of any row")
    rest = {name.removeprefix(_REST): part for name, part in tensors.items() if name.startswith(_REST)}
    codes = None
    if f"code_{CODES[0]}" in tensors:
        codes = KeyCodes.known(*(tensors[f"code_{part}"] for part in CODES))
    if number is None:
        keys, values = (tensors[name] for name in EXACT)
        check(keys.dim() == 4 and values.dim() == 4 and keys.shape[:3] == values.shape[:3], "keys have other values")
        check((len(keys), keys.shape[2]) == (batch, length), "entries and lengths do not agree")
        check(all(part.dtype in TYPES.values() for part in (keys, values)), "entries are of no type that is stored")
        entries = {EXACT[0]: keys, EXACT[1]: values}
        check(not set(rest) - {name for name in rest if name.startswith(EXTRA)}, "exact entries have no rest")
    else:
        entries = _read_coded(number, codes, tensors, rest, length, batch)
    _check_extras(rest, length, batch)
    return ReadPast(number, codes, entries, rest, length, batch)


def _read_coded(
    number: KVDtype,
    codes: KeyCodes | None,
    tensors: Mapping[str, Tensor],
    rest: dict[str, Tensor],
    length: int,
    batch: int,
) -> dict[str, Tensor]:
    keys, values = rest["tail_keys"], rest["tail_values"]
    check(keys.dim() == 4 and values.dim() == 4 and keys.shape[:3] == values.shape[:3], "keys have other values")
    check(len(keys) == batch and all(part.dtype in TYPES.values() for part in (keys, values)), "the newest are none")
    heads, sizes, coded = keys.shape[1], (keys.shape[3], values.shape[3]), length - keys.shape[2]
    check(coded >= 0, "more of the newest were kept than there are")
    if codes is not None:
        check(codes.order.shape == (heads, sizes[0]), "codes of keys are of other heads")
    if not coded:
        check(LINES[0] not in tensors, "there are codes of nothing")
        return {}
    form = number.form(sizes, sorted_keys=codes is not None)
    lines, factors = (tensors[name] for name in LINES)
    check(
        lines.dtype == torch.uint8 and lines.shape == (batch, heads, coded, form.line_bytes),
        "codes and lengths do not agree",
    )
    check(factors.dtype == torch.float16 and factors.shape == (batch, heads, coded, 2), "codes have no scales")
    for name, size in zip(("key_mean", "value_mean"), sizes, strict=True):
        mean = rest[name]
        check(mean.shape == (batch, heads, size) and mean.dtype == torch.float32, "KV heads have no mean each")
    if "sink_keys" in rest:
        for part, tail in zip((rest["sink_keys"], rest["sink_values"]), (keys, values), strict=True):
            check(part.dim() == 4 and part.shape[:2] == (batch, heads) and part.shape[2] <= SINKS, "sinks are none")
            check(part.shape[3] == tail.shape[3] and part.dtype == tail.dtype, "sinks are of another type")
    if "sink_columns" in rest:
        at = rest["sink_columns"]
        check(at.shape == (batch, SINKS) and at.dtype == torch.int64, "sinks have no place")
        check(rest["sink_keys"].shape[2] == SINKS and int(at.max()) < length, "sinks have no place")
    if "real_coded" in rest:
        check(rest["real_coded"].shape == (batch,), "rows have no numbers of entries")
    return {LINES[0]: lines, LINES[1]: factors}


def _check_extras(rest: Mapping[str, Tensor], length: int, batch: int) -> None:
    extras = {name.removeprefix(EXTRA): part for name, part in rest.items() if name.startswith(EXTRA)}
    padding = extras.get("padding")
    if padding is not None:
        fits = padding.dtype == torch.bool and padding.dim() == 2 and len(padding) == batch
        check(fits and padding.shape[1] <= length, "padding is none")
    if "states" not in extras:
        return
    states, columns, ordinals = extras["states"], extras["columns"], extras["ordinals"]
    check(states.dim() == 4 and len(states) == batch and states.dtype in TYPES.values(), "queries are none")
    for numbers in (columns, ordinals, *([extras["real"]] if "real" in extras else [])):
        fits = numbers.dim() == 2 and len(numbers) in (1, batch) and numbers.shape[1] == states.shape[2]
        check(fits, "queries have no place")
    for numbers in (columns, ordinals):
        fits = numbers.dtype == torch.int64 and (not numbers.numel() or int(columns.min()) >= 0)
        check(fits and (not numbers.numel() or int(columns.max()) < length), "queries have no place")
