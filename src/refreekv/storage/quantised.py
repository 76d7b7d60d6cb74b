"""Ragged K/V of which only the first and the newest entries are kept in full precision."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv.core.quantisation import FLUSH, SINKS, Codes, KVDtype, centre_of
from refreekv.core.rotation import rotate
from refreekv.storage.columns import Columns
from refreekv.storage.ragged import Frame, Piece, RaggedKV

Pair = tuple[Tensor, Tensor]
"""Of keys and of values."""


class Parts(NamedTuple):
    """Entries of segments in the order they have there; ``centres`` are the means that codes are without."""

    sinks: RaggedKV
    codes: tuple[Codes, Codes]
    recent: RaggedKV
    centres: Pair


class QuantisedKV(RaggedKV):
    """Keys and values of one layer, coded but for sinks and recent entries. Never changed in place.

    Each segment is its sinks, its coded entries and its recent ones. A segment that has coded nothing
    yet holds everything as recent. Attention reads a copy in full precision that lives as long as the
    call; where it may, in the coordinates of the codes, so that queries are rotated and entries are not.

    Every segment goes its own way: when entries are coded, and into what, depends on that segment alone.

    Invariant: ``lengths`` counts all three; coded lines lie segment by segment, as in `RaggedKV`.

    Attributes
    ----------
    keys, values : Tensor
        The recent entries ``[entries, D]``, flat.
    coded : list of tuple of int
        Coded entries of each row's KV heads.
    """

    def __init__(
        self,
        kind: KVDtype,
        sinks: RaggedKV,
        codes: tuple[Codes, Codes],
        coded: Sequence[tuple[int, ...]],
        recent: RaggedKV,
        centres: Pair,
    ):
        lengths = [
            tuple(map(sum, zip(*parts, strict=True)))
            for parts in zip(sinks.lengths, coded, recent.lengths, strict=True)
        ]
        super().__init__(recent.keys, recent.values, lengths)
        self.kind = kind
        self.coded = list(coded)
        self._sinks = sinks
        self._codes = codes
        self._recent = recent
        self._centres = centres

    @classmethod
    def of(cls, kind: KVDtype, full: RaggedKV, centres: Pair | None = None, behind: int = 0) -> "QuantisedKV":
        """Code all but the first `SINKS` and the last ``kind.recent`` entries of each segment's prompt.

        ``behind`` entries follow the prompt; what is coded is the same without them.
        ``centres`` are the mean key and mean value ``[B, kv_heads, D]`` that segments which are coded now
        are to take out for good; None, and for segments that are coded later: the mean of what these hold then.
        """
        nothing = [(0,) * full.kv_heads for _ in full.lengths]
        empty = full.truncate(nothing)
        blank = full.keys.new_zeros(full.sizes[0]), full.values.new_zeros(full.sizes[1])
        codes = _coded(empty.keys, blank[0], kind, 0), _coded(empty.values, blank[1], kind, 1)
        shape = len(full.lengths), full.kv_heads, -1
        unknown = blank[0].expand(shape).clone(), blank[1].expand(shape).clone()
        return cls(kind, empty, codes, nothing, full, unknown)._settled(centres, behind)

    @property
    def parts(self) -> "Parts":
        """What the storage is made of."""
        return Parts(self._sinks, self._codes, self._recent, self._centres)

    # -- the interface of RaggedKV ----------------------------------------------------------

    def full(self) -> RaggedKV:
        """All entries in full precision: a copy."""
        keys, values = (
            (rotate(codes.rotated(), back=True) + self._by_line(centres, self.coded)).to(kind)
            for codes, centres, kind in zip(self._codes, self._centres, self.types, strict=True)
        )
        return _joined(self._sinks, RaggedKV(keys, values, self.coded), self._recent)

    def for_attention(self, *, shifts: bool) -> tuple[RaggedKV, Frame | None]:
        """A copy in full precision: centred and rotated, if logits may be shifted by what that leaves out."""
        if not shifts:
            return self.full(), None
        sinks, recent = self._as_coded(self._sinks), self._as_coded(self._recent)
        keys, values = (codes.rotated().to(kind) for codes, kind in zip(self._codes, self.types, strict=True))
        return _joined(sinks, RaggedKV(keys, values, self.coded), recent), _CodedFrame(self._centres[1])

    def _as_coded(self, exact: RaggedKV) -> RaggedKV:
        """Entries in the coordinates of the codes."""
        keys, values = (
            rotate(entries - self._by_line(centres, exact.lengths)).to(kind)
            for entries, centres, kind in zip((exact.keys, exact.values), self._centres, self.types, strict=True)
        )
        return RaggedKV(keys, values, exact.lengths)

    def _by_line(self, centres: Tensor, lengths: Sequence[tuple[int, ...]]) -> Tensor:
        """The mean of each line's segment, in float32: ``[lines, D]``."""
        parts = zip(centres.flatten(0, 1).float(), itertools.chain(*lengths), strict=True)
        return torch.cat([centre.expand(length, -1) for centre, length in parts])

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
        old = self._settled()
        recent = old._recent.append(keys, values)
        return QuantisedKV(self.kind, old._sinks, old._codes, old.coded, recent, old._centres)

    def _settled(self, centres: Pair | None = None, behind: int = 0) -> "QuantisedKV":
        """With entries coded that are no longer recent, segment by segment, once enough of them have gathered."""
        due = [
            [self._due(first, old, new - behind) for first, old, new in zip(*parts, strict=True)]
            for parts in zip(self._sinks.lengths, self.coded, self._recent.lengths, strict=True)
        ]
        if not any(leaving for row in due for _, leaving in row):
            return self
        kept = self._centres[0].clone(), self._centres[1].clone()
        sinks, coded, recent = [], [], []
        lines: tuple[list[Codes], list[Codes]] = [], []
        for row, counts in enumerate(due):
            segments = _heads(self._recent, row)
            for head, (first, leaving) in enumerate(counts):
                if not leaving:
                    continue
                for side, part in enumerate(segments):
                    if not self._sinks.lengths[row][head] + self.coded[row][head]:
                        given = None if centres is None else centres[side][row, head]
                        kept[side][row, head] = centre_of(part[head]) if given is None else given
                    chosen = part[head][first : first + leaving]
                    # In the type of the codes before, where wider entries came later: theirs is that of the scales.
                    chosen = chosen.to(self._codes[side].dtype)
                    lines[side].append(_coded(chosen, kept[side][row, head], self.kind, side))
            sinks.append([[part[head][: counts[head][0]] for head in range(len(counts))] for part in segments])
            recent.append([[part[head][sum(counts[head]) :] for head in range(len(counts))] for part in segments])
            coded.append(tuple(leaving for _, leaving in counts))
        order = _interleaved(self.coded, coded, self.keys.device)
        keys, values = (Codes.cat([old, *new]).take(order) for old, new in zip(self._codes, lines, strict=True))
        return QuantisedKV(
            self.kind,
            _joined(self._sinks, _ragged(sinks)),
            (keys, values),
            [tuple(map(sum, zip(*pair, strict=True))) for pair in zip(self.coded, coded, strict=True)],
            _ragged(recent),
            kept,
        )

    def _due(self, sinks: int, coded: int, recent: int) -> tuple[int, int]:
        """How many of a segment's recent entries become sinks, and how many are coded, now."""
        if sinks + coded:
            # In whole blocks, so that it does not matter how many entries a call brought.
            return 0, max(0, recent - self.kind.recent) // FLUSH * FLUSH
        older = self.kind.coded(recent)
        return (SINKS, older) if older else (0, 0)

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
        return self._gathered_rows(range(len(self.lengths)), wanted)._settled(behind=behind)

    def _gathered_rows(self, rows: Sequence[int], wanted: Sequence[Sequence[Tensor]]) -> "QuantisedKV":
        """Rows ``rows``, of each segment the ascending entries ``wanted``."""
        starts = _starts(self.coded)
        lines, coded, sinks, recent = [], [], [], []
        for row, heads in zip(rows, wanted, strict=True):
            ends = [(first, first + old) for first, old in zip(self._sinks.lengths[row], self.coded[row], strict=True)]
            parts = [
                (head[head < first], head[(head >= first) & (head < last)] - first, head[head >= last] - last)
                for head, (first, last) in zip(heads, ends, strict=True)
            ]
            lines += [middle + start for (_, middle, _), start in zip(parts, starts[row], strict=True)]
            coded.append(tuple(len(middle) for _, middle, _ in parts))
            sinks.append([first for first, _, _ in parts])
            recent.append([last for _, _, last in parts])
        index = torch.cat(lines)
        keys, values = (codes.take(index) for codes in self._codes)
        chosen = torch.tensor(list(rows), device=self.keys.device)
        centres = self._centres[0].index_select(0, chosen), self._centres[1].index_select(0, chosen)
        return QuantisedKV(
            self.kind,
            _gathered(self._sinks, sinks, rows),
            (keys, values),
            coded,
            _gathered(self._recent, recent, rows),
            centres,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the storages really hold on to, scales and means included."""
        centres = sum(part.untyped_storage().nbytes() for part in self._centres)
        return sum(codes.nbytes for codes in self._codes) + self._sinks.nbytes + self._recent.nbytes + centres

    def row_nbytes(self, row: int) -> int:
        """Bytes of one row, scales and means included."""
        exact = self._sinks.row_nbytes(row) + self._recent.row_nbytes(row)
        centres = self.kv_heads * sum(part.shape[-1] * part.element_size() for part in self._centres)
        return self.kind.entry_bytes(self.sizes) * sum(self.coded[row]) + exact + centres


@dataclass(frozen=True)
class _CodedFrame:
    """Coordinates of the codes: rotated, and without the head's means.

    Without the mean key all logits of a query are less by one number, which softmax does not see. Weights
    add up to one, so that the mean value is missing once.
    """

    centres: Tensor
    """Mean values ``[B, kv_heads, Dv]``."""

    def query(self, query: Tensor) -> Tensor:
        return rotate(query).to(query.dtype)

    def output(self, output: Tensor) -> Tensor:
        heads = output.shape[2] // self.centres.shape[1]
        # [B, kv_heads, Dv] -> [B, 1, H, Dv]
        missing = self.centres.float().repeat_interleave(heads, dim=1)[:, None]
        return (rotate(output, back=True) + missing).to(output.dtype)


def _coded(entries: Tensor, centre: Tensor, kind: KVDtype, side: int) -> Codes:
    """Entries ``[n, D]`` of one segment; ``side`` 0: keys, 1: values."""
    return Codes.of(entries, centre, kind.widths[side])


def _heads(storage: RaggedKV, row: int) -> tuple[list[Tensor], list[Tensor]]:
    """One row's keys and values, a view for each KV head."""
    keys, values = storage.segments(row)
    return list(keys), list(values)


def _ragged(rows: Sequence[Sequence[list[Tensor]]]) -> RaggedKV:
    """Storage of rows, each given as its heads' keys and its heads' values."""
    return RaggedKV.from_pieces([[keys] for keys, _ in rows], [[values] for _, values in rows])


def _joined(*storages: RaggedKV) -> RaggedKV:
    """Segments of several storages behind each other."""
    rows = range(len(storages[0].lengths))
    parts = [[storage.segments(row) for storage in storages] for row in rows]
    keys, values = ([[part[side] for part in row] for row in parts] for side in (0, 1))
    return RaggedKV.from_pieces(keys, values)


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
