"""Ragged K/V of which only the newest entries are kept in full precision."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from refreekv.core.quantisation import Codes, KVDtype
from refreekv.storage.columns import Columns
from refreekv.storage.ragged import Piece, RaggedKV

FLUSH = 32
"""Entries beyond the recent ones that gather before they are quantised together."""


class QuantisedKV(RaggedKV):
    """Keys and values of one layer, older entries quantised. Never changed in place.

    Each segment is its coded entries followed by its recent ones. Attention reads a copy in
    full precision that lives as long as the call.

    Invariant: ``lengths`` counts both; coded lines lie segment by segment, as in `RaggedKV`.

    Attributes
    ----------
    keys, values : Tensor
        The recent entries ``[entries, D]``, flat.
    coded : list of tuple of int
        Quantised entries of each row's KV heads.
    """

    def __init__(
        self, kind: KVDtype, key_codes: Codes, value_codes: Codes, coded: Sequence[tuple[int, ...]], recent: RaggedKV
    ):
        lengths = [
            tuple(old + new for old, new in zip(olds, news, strict=True))
            for olds, news in zip(coded, recent.lengths, strict=True)
        ]
        super().__init__(recent.keys, recent.values, lengths)
        self.kind = kind
        self.coded = list(coded)
        self._codes = (key_codes, value_codes)
        self._recent = recent

    @classmethod
    def of(cls, kind: KVDtype, full: RaggedKV) -> "QuantisedKV":
        """Quantise all but the last ``kind.recent`` entries of each segment."""
        nothing = torch.zeros(0, dtype=torch.long, device=full.keys.device)
        codes = [kind.encode(flat.index_select(0, nothing)) for flat in (full.keys, full.values)]
        empty = [(0,) * len(row) for row in full.lengths]
        return cls(kind, codes[0], codes[1], empty, full).settled()

    # -- the interface of RaggedKV ----------------------------------------------------------

    def full(self) -> RaggedKV:
        """All entries in full precision: a copy."""
        keys, values = (codes.decode() for codes in self._codes)
        old = RaggedKV(keys, values, self.coded)
        parts = [(_segments(old, row), _segments(self._recent, row)) for row in range(len(self.lengths))]
        return RaggedKV.from_pieces([[old[0], new[0]] for old, new in parts], [[old[1], new[1]] for old, new in parts])

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All rows as ``[B, kv_heads, L, D]``, a copy; only where `uniform`."""
        return self.full().stacked()

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Each row as ``[kv_heads, L, D]``, a copy, padded on the left where heads are uneven."""
        return self.full().rows()

    def segments(self, row: int) -> tuple[Piece, Piece]:
        """One row's keys and values as parts, a copy."""
        return self.select_rows([row]).full().segments(0)

    def append(self, keys: Tensor, values: Tensor) -> "QuantisedKV":
        """A new storage with ``[B, kv_heads, q, D]`` new entries at the segments' ends.

        New entries stay in full precision until the next call, so that a prompt's own
        attention, and the policy that looks at it, see what the model computed.
        """
        old = self.settled()
        recent = old._recent.append(keys, values)
        return QuantisedKV(self.kind, *old._codes, old.coded, recent)

    def settled(self) -> "QuantisedKV":
        """With entries quantised that are no longer recent, once enough of them have gathered."""
        surplus = [tuple(max(0, n - self.kind.recent) for n in row) for row in self._recent.lengths]
        most = max(n for row in surplus for n in row)
        if most == 0 or (most < FLUSH and len(self._codes[0])):
            return self
        leaving = self._recent.truncate(surplus)
        coded = [tuple(map(sum, zip(*pair, strict=True))) for pair in zip(self.coded, surplus, strict=True)]
        order = _interleaved(self.coded, surplus, leaving.keys.device)
        codes = [
            Codes.cat([old, self.kind.encode(new)]).take(order)
            for old, new in zip(self._codes, (leaving.keys, leaving.values), strict=True)
        ]
        staying = [
            [torch.arange(gone, n, device=leaving.keys.device) for gone, n in zip(gones, lengths, strict=True)]
            for gones, lengths in zip(surplus, self._recent.lengths, strict=True)
        ]
        return QuantisedKV(self.kind, codes[0], codes[1], coded, _gathered(self._recent, staying))

    def select_rows(self, indices: Sequence[int]) -> "QuantisedKV":
        """A new storage of the rows ``indices``, in that order; rows may repeat."""
        everything = [[torch.arange(n, device=self.keys.device) for n in row] for row in self.lengths]
        return self._gathered_rows(indices, [everything[row] for row in indices])

    def truncate(self, lengths: Sequence[Sequence[int]]) -> "QuantisedKV":
        """A new storage that keeps the first ``lengths[b][h]`` entries of each segment."""
        wanted = [[torch.arange(n, device=self.keys.device) for n in row] for row in lengths]
        return self._gathered_rows(range(len(self.lengths)), wanted)

    # -- beyond it --------------------------------------------------------------------------

    def keep(self, kept: Sequence[Columns], behind: int) -> "QuantisedKV":
        """What a policy keeps of each row, and the last ``behind`` entries; codes stay as they are.

        Columns count the entries of `rows`, where shorter heads are padded on the left.
        """
        device = self.keys.device
        wanted = []
        for columns, lengths in zip(kept, self.lengths, strict=True):
            longest = max(lengths)
            tail = torch.arange(longest - behind, longest, device=device)
            heads = columns.tensors(device)
            wanted.append(
                [torch.cat([heads[h % len(heads)].long(), tail]) - (longest - n) for h, n in enumerate(lengths)]
            )
        return self._gathered_rows(range(len(self.lengths)), wanted).settled()

    def _gathered_rows(self, rows: Sequence[int], wanted: Sequence[Sequence[Tensor]]) -> "QuantisedKV":
        """Rows ``rows``, of each segment the ascending entries ``wanted``."""
        starts = _starts(self.coded)
        lines, coded, recent = [], [], []
        for row, heads in zip(rows, wanted, strict=True):
            olds = [head[head < old] for head, old in zip(heads, self.coded[row], strict=True)]
            lines += [old + start for old, start in zip(olds, starts[row], strict=True)]
            coded.append(tuple(len(old) for old in olds))
            recent.append([h[h >= old] - old for h, old in zip(heads, self.coded[row], strict=True)])
        index = torch.cat(lines)
        codes = [part.take(index) for part in self._codes]
        return QuantisedKV(self.kind, codes[0], codes[1], coded, _gathered(self._recent, recent, rows))

    @property
    def nbytes(self) -> int:
        """Bytes that the storages really hold on to, scales included."""
        return sum(codes.nbytes for codes in self._codes) + self._recent.nbytes

    def row_nbytes(self, row: int) -> int:
        """Bytes of one row, scales included."""
        line = sum(self.kind.line_bytes(codes.elements) for codes in self._codes)
        return line * sum(self.coded[row]) + self._recent.row_nbytes(row)


def _segments(storage: RaggedKV, row: int) -> tuple[list[Tensor], list[Tensor]]:
    """One row's keys and values, a view for each KV head."""
    keys, values = storage.segments(row)
    return list(keys), list(values)


def _starts(lengths: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """First line of each segment."""
    at, starts = 0, []
    for row in lengths:
        starts.append([at + sum(row[:head]) for head in range(len(row))])
        at += sum(row)
    return starts


def _interleaved(first: Sequence[tuple[int, ...]], second: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Order of lines that puts each segment of ``second`` behind that of ``first``, both stored one after the other."""
    at, other_at = 0, sum(map(sum, first))
    parts = []
    for one, other in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        parts += [torch.arange(at, at + one), torch.arange(other_at, other_at + other)]
        at, other_at = at + one, other_at + other
    return torch.cat(parts).to(device)


def _gathered(storage: RaggedKV, wanted: Sequence[Sequence[Tensor]], rows: Sequence[int] | None = None) -> RaggedKV:
    """Entries ``wanted`` of each segment of ``rows`` (all of them if None), in storage of their own."""
    keys: list[list[Piece]] = []
    values: list[list[Piece]] = []
    for row, heads in zip(range(len(storage.lengths)) if rows is None else rows, wanted, strict=True):
        own_keys, own_values = storage.segments(row)
        keys.append([[part.index_select(0, head) for part, head in zip(own_keys, heads, strict=True)]])
        values.append([[part.index_select(0, head) for part, head in zip(own_values, heads, strict=True)]])
    return RaggedKV.from_pieces(keys, values)
