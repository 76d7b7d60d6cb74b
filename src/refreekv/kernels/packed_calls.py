"""What the kernels over packed lines are called with, and what is checked before any address is followed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.kernels.table import Format, check_query, check_spans, check_table


class Transfer(NamedTuple):
    """Entries, and the packed lines that they go to or come from.

    ``exact`` is what `kernels.pack_lines` calls ``source`` and `kernels.unpack_lines` ``target``; all else is as there.
    """

    keys: Tensor
    values: Tensor
    exact: Tensor | None
    table: Tensor
    form: PackedFormat
    maps: PackedMaps
    spans: Tensor
    end: int
    longest: int
    starts: Tensor | None

    @classmethod
    def of(cls, *flat: Any) -> "Transfer":
        """The same from what operators take."""
        keys, values, exact, table, numbers, tensors, *rest = flat
        return cls(keys, values, exact, table, PackedFormat.from_numbers(numbers), PackedMaps(*tensors), *rest)

    @property
    def flat(self) -> tuple[Any, ...]:
        """The same as operators take it: the format as integers, the maps as tensors."""
        return (*self[:4], self.form.numbers, self.maps.tensors, *self[6:])

    @property
    def kv_heads(self) -> int:
        """KV heads of a row."""
        return self.maps.key_mean.shape[1]

    @property
    def strides(self) -> list[int]:
        """Steps from row to row, from KV head to KV head and from entry to entry, of keys and of values."""
        if self.exact is None:
            return [*self.keys.stride()[:3], *self.values.stride()[:3]]
        return [0, 0, self.keys.shape[-1], 0, 0, self.values.shape[-1]]

    def check(self, *, packs: bool) -> None:
        """Check that all goes together, to pack entries or to unpack lines.

        Raises
        ------
        ValueError
            Shapes or devices that do not go with each other.
        TypeError
            Maps for entries of another type than those that are packed.
        """
        keys, values, exact, table, form, maps, spans, end, _, starts = self
        check_table(table, keys)
        _check_maps(maps, form, table)
        sizes = form.key_size, form.value_size
        if (keys.shape[-1], values.shape[-1]) != sizes or values.device != keys.device:
            raise ValueError(
                f"keys {list(keys.shape)} on {keys.device} and values {list(values.shape)} on {values.device}; "
                f"expected heads of {sizes[0]} and {sizes[1]} elements on one device, as the lines are of"
            )
        if exact is not None:
            check_table(exact, table)
            if exact.shape != table.shape:
                raise ValueError(f"{exact.shape[0]} segments of exact entries for {table.shape[0]} of lines")
            if spans.shape != (table.shape[0], 3) or spans.dtype != torch.int64 or not spans.is_contiguous():
                raise ValueError(
                    f"spans are contiguous int64 [{table.shape[0]}, 3], got {spans.dtype} {list(spans.shape)}"
                )
        elif keys.dim() != 4 or values.shape[:3] != keys.shape[:3] or keys.shape[0] * keys.shape[1] != table.shape[0]:
            raise ValueError(
                f"keys {list(keys.shape)} and values {list(values.shape)}: expected [B, H_kv, n, D] of "
                f"{table.shape[0]} segments in all"
            )
        else:
            check_spans(spans, table, end, keys.shape[2])
        if starts is not None and (starts.shape != table.shape[:1] or starts.dtype != torch.int64):
            raise ValueError(f"starts are int64 [{table.shape[0]}], got {starts.dtype} {list(starts.shape)}")
        if packs and not maps.key_sum.dtype == keys.dtype == values.dtype:
            raise TypeError(
                f"maps are for entries in {maps.key_sum.dtype}, keys are in {keys.dtype} and values in {values.dtype}: "
                "see PackedMaps.of_type"
            )


class Oldest(NamedTuple):
    """Exact entries of a layer to be coded, as `kernels.code_oldest` is given them.

    Attributes
    ----------
    keys, values : Tensor
        The storages that ``exact`` has the addresses of, of one type.
    exact, table : Tensor
        See `kernels.table`: of the exact entries, and of the lines of ``form``.
    form, maps
        As in `kernels.pack_lines`.
    told : Tensor
        int64 ``[3, segments]``, on the host: of each segment the first entry that is coded, how many are, and the lines
        that are there.
    """

    keys: Tensor
    values: Tensor
    exact: Tensor
    table: Tensor
    form: PackedFormat
    maps: PackedMaps
    told: Tensor

    @property
    def kv_heads(self) -> int:
        """KV heads of a row."""
        return self.maps.key_mean.shape[1]

    @property
    def alike(self) -> object:
        """What layers have in common that are coded in one launch."""
        maps = self.maps
        shapes = maps.key_mean.shape, maps.key_matrix.shape, maps.value_matrix.shape
        return self.form, self.keys.dtype, self.exact.device, len(self.exact), shapes

    @property
    def addresses(self) -> list[int]:
        """Of both tables, of what maps take entries to code space with, and 0."""
        maps = self.maps
        parts = maps.key_offset, maps.key_sum, maps.key_worth, maps.value_offset, maps.value_sum
        return [*(part.data_ptr() for part in (self.exact, self.table, *parts)), 0]

    def check(self) -> None:
        """ValueError or TypeError unless shapes, types and devices go together."""
        check_table(self.exact)
        check_table(self.table, self.exact)
        _check_maps(self.maps, self.form, self.table)
        told = self.told
        if self.table.shape != self.exact.shape or told.shape != (3, len(self.exact)) or told.dtype != torch.int64:
            raise ValueError(
                f"{len(self.exact)} segments of exact entries, {len(self.table)} of lines, and {told.dtype} "
                f"{list(told.shape)} that is told of them: expected int64 [3, segments] of as many"
            )
        if not self.maps.key_sum.dtype == self.keys.dtype == self.values.dtype:
            raise TypeError(
                f"maps are for entries in {self.maps.key_sum.dtype}, keys are in {self.keys.dtype} and values in "
                f"{self.values.dtype}: see PackedMaps.of_type"
            )


class Moved(NamedTuple):
    """What is recoded, as `kernels.recode_lines` is given it."""

    table: Tensor
    sources: Tensor
    rungs: Tensor
    at: Tensor
    starts: Tensor
    forms: Sequence[PackedFormat]
    target: int
    maps: PackedMaps
    longest: int

    def check(self) -> None:
        """ValueError unless shapes, types and devices go together."""
        counts = len(self.forms), len(self.rungs), len(self.table)
        wanted = (
            (self.sources, (counts[0], 4), torch.int64), (self.rungs, (counts[1],), torch.uint8),
            (self.at, (counts[1],), torch.int64), (self.starts, (counts[2],), torch.int64),
            (self.table, (counts[2], 4), torch.int64),
        )  # fmt: skip
        for part, shape, kind in wanted:
            if (
                part.shape != shape
                or part.dtype != kind
                or part.device != self.table.device
                or not part.is_contiguous()
            ):
                raise ValueError(
                    f"lines are recoded by contiguous tensors on one device: expected {kind} {list(shape)}, got "
                    f"{part.dtype} {list(part.shape)} on {part.device}"
                )


class PackedKV(NamedTuple):
    """What attention reads: exact entries and packed lines, as `kernels.packed_attention` is given them."""

    exact: Tensor
    tables: Sequence[Tensor]
    forms: Sequence[PackedFormat]
    maps: PackedMaps

    @classmethod
    def of(cls, exact: Tensor, tables: Sequence[Tensor], numbers: Sequence[int], maps: Sequence[Tensor]) -> "PackedKV":
        """The same from what operators take: the integers of all formats, one behind the other, and tensors."""
        forms = [PackedFormat.from_numbers(numbers[at : at + 10]) for at in range(0, len(numbers), 10)]
        return cls(exact, tables, forms, PackedMaps(*maps))

    def check(self, query: Tensor, sinks: Tensor | None) -> None:
        """Check that all goes together and with queries ``[B, H, 1, D]``; ValueError or TypeError."""
        sizes = self.maps.key_mean.shape[-1], self.maps.value_mean.shape[-1]
        check_query(query, self.exact, Format(sizes, query.dtype, query.dtype), sinks)
        if len(self.tables) != len(self.forms):
            raise ValueError(f"{len(self.tables)} tables of levels for {len(self.forms)} formats")
        for table, form in zip(self.tables, self.forms, strict=True):
            check_table(table, self.exact)
            if table.shape != self.exact.shape:
                raise ValueError(f"a level of {table.shape[0]} segments beside {self.exact.shape[0]} of exact entries")
            _check_maps(self.maps, form, self.exact)


def _check_maps(maps: PackedMaps, form: PackedFormat, table: Tensor) -> None:
    kv_heads, sizes = maps.key_mean.shape[1], (maps.key_mean.shape[-1], maps.value_mean.shape[-1])
    if sizes != (form.key_size, form.value_size) or maps.key_mean.device != table.device:
        raise ValueError(
            f"maps of heads of {sizes[0]} and {sizes[1]} elements on {maps.key_mean.device} for lines of "
            f"{form.key_size} and {form.value_size} on {table.device}"
        )
    for rows in (len(maps.key_mean), len(maps.key_matrix)):
        if table.shape[0] % kv_heads or rows not in (1, table.shape[0] // kv_heads):
            raise ValueError(f"maps of {rows} rows of {kv_heads} KV heads for {table.shape[0]} segments")
