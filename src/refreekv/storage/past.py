"""What a conversation's prompts held, complete, in host memory: so that a next turn can be read over all of it.

At a prompt's end a policy evicts and coarsens what is on the device. Beside that, every layer's entries go here as
they are held while a prompt is read in chunks (`UnfinishedKV`), or as the model computed them. A line of codes depends
on its entry alone, so that a later turn adds its own and touches no others. A conversation is here with all its layers
or not at all: what cannot be held any more is dropped as a whole, and the reason is kept.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.quantisation import FLUSH, KVDtype
from refreekv.storage.coding import Pair
from refreekv.storage.files import DamagedError
from refreekv.storage.host import NoRoomError, Parked
from refreekv.storage.host_store import Filed, HostStore, Stored
from refreekv.storage.unfinished import UnfinishedKV

EXACT = ("keys", "values")
"""Names of the two parts of entries that are not coded."""
EXTRA = "extra_"
"""What the names of tensors begin with that the layer adds."""
TOGETHER = 1024
"""Columns of later turns up to which the next turn's are kept with them: each piece costs the host a copy back."""
AHEAD = 2
"""Layers that are on their way to the device while one computes."""

_log = logging.getLogger("refreekv")


@dataclass(frozen=True)
class Piece:
    """Entries of the columns from ``start`` to ``stop``, which are the first ones of what is stored."""

    stored: Stored
    start: int
    stop: int


@dataclass(frozen=True)
class PastLayer:
    """One layer's entries, of all rows and KV heads.

    Attributes
    ----------
    number : KVDtype or None
        The format of what is coded; None: entries are as the model computed them.
    codes : KeyCodes or None
        The model's own for keys, that they were coded by.
    pieces : tuple of Piece
        Lines, or exact entries, by columns without a gap.
    rest : Parked or Filed
        What a later turn replaces: newest entries, sinks, means, and what the layer adds.
    length : int
        Columns.
    batch : int
        Rows.
    device : device
        Where they came from.
    cropped : bool
        Whether there was more, of which the rest still tells.
    shared : dict of str to Tensor
        Of what the layer adds, by name, the tensors that came and that others may have added, too.
    """

    number: KVDtype | None
    codes: KeyCodes | None
    pieces: tuple[Piece, ...]
    rest: Stored
    length: int
    batch: int
    device: torch.device
    cropped: bool = False
    shared: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def in_pieces(self) -> int:
        """Columns in pieces; those behind are in the rest."""
        return self.pieces[-1].stop if self.pieces else 0

    @property
    def stored(self) -> list[Stored]:
        """All that is stored of it."""
        return [*(piece.stored for piece in self.pieces), self.rest]

    def cut(self, length: int) -> "PastLayer":
        """The same without columns from ``length`` on."""
        pieces = tuple(replace(one, stop=min(one.stop, length)) for one in self.pieces if one.start < length)
        return replace(self, pieces=pieces, length=min(self.length, length), cropped=True)

    def moved(self, to: Mapping[int, Stored]) -> "PastLayer":
        """The same, stored elsewhere: by the ``id`` of what it is stored in."""
        pieces = tuple(replace(one, stored=to.get(id(one.stored), one.stored)) for one in self.pieces)
        return replace(self, pieces=pieces, rest=to.get(id(self.rest), self.rest))


class Returning:
    """A layer's entries on their way to a device, where a prompt is going to have ``columns``."""

    def __init__(self, layer: PastLayer, device: torch.device, columns: int):
        self._layer, self._columns, self.device = layer, columns, device
        self._rest = layer.rest.fetch(device)
        self._pieces = [piece.stored.fetch(device) for piece in layer.pieces]

    def arrived(self, rows: Sequence[int] | None) -> tuple[UnfinishedKV | Pair, dict[str, Tensor]]:
        """The entries, of some ``rows`` or of all, and what the layer had added: the device waits for them."""
        layer = self._layer
        lines, rest = (of_rows(part, rows, layer.batch) for part in (self._lines(self._room), self._rest.tensors()))
        extras = _extras(rest)
        if layer.number is None:
            return (lines[EXACT[0]], lines[EXACT[1]]), extras
        tail = layer.length - layer.in_pieces
        rest |= {name: rest[name][:, :, :tail] for name in ("tail_keys", "tail_values")}
        return UnfinishedKV.back(layer.number, layer.codes, self._columns, layer.in_pieces, lines, rest), extras

    @property
    def _room(self) -> int:
        """Columns that are going to be coded behind those that come back."""
        number = self._layer.number
        more = 0 if number is None else self._columns - self._layer.in_pieces - number.recent
        return more if more >= FLUSH else 0

    def _lines(self, room: int) -> dict[str, Tensor]:
        """All pieces together, ``[B, H_kv, c, .]`` each, with ``room`` behind them.

        What is one piece already stays where it is if there is to be none.
        """
        parts: dict[str, list[Tensor]] = {}
        for piece, coming in zip(self._layer.pieces, self._pieces, strict=True):
            for name, part in coming.tensors().items():
                parts.setdefault(name, []).append(part[:, :, : piece.stop - piece.start])
        with torch.inference_mode(False), torch.no_grad():
            for own in parts.values() if room else ():
                # One more piece, of whatever was there: lines are moved once.
                own.append(own[0].new_empty(*own[0].shape[:2], room, own[0].shape[3]))
            return {
                name: own[0] if len(own) == 1 and own[0].is_contiguous() else torch.cat(own, 2)
                for name, own in parts.items()
            }


def of_rows(tensors: Mapping[str, Tensor], rows: Sequence[int] | None, batch: int) -> dict[str, Tensor]:
    """Some rows of tensors whose first dimension is the batch; those that all rows share stay."""
    if rows is None or not tensors:
        return dict(tensors)
    index = torch.tensor(rows, device=next(iter(tensors.values())).device)
    return {name: part.index_select(0, index) if len(part) == batch else part for name, part in tensors.items()}


def extras_left(extras: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """What a layer had added, of its first ``length`` columns: padding, and queries that are all among them."""
    left = dict(extras)
    if "padding" in left:
        left["padding"] = left["padding"][:, :length]
    if "states" in left:
        there = (left["columns"] < length).all(0).nonzero()[:, 0]
        left["states"] = left["states"][:, :, there]
        left |= {name: left[name][:, there] for name in ("columns", "ordinals", "real") if name in left}
    return left


def rest_left(layer: PastLayer, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a later turn replaces of a layer, ``rest``, without what is about columns that were cropped."""
    if not layer.cropped:
        return dict(rest)
    own = {name: part for name, part in rest.items() if not name.startswith(EXTRA)}
    if "sink_columns" in own:
        own["sink_columns"] = own["sink_columns"].where(own["sink_columns"] < layer.length, -1)
    return own | {EXTRA + name: part for name, part in extras_left(_extras(rest), layer.length).items()}


def _extras(rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(EXTRA): part for name, part in rest.items() if name.startswith(EXTRA)}


class Past:
    """All that a conversation's prompts held, by layer.

    Parameters
    ----------
    store : HostStore
        Where it is kept.
    layers : int
        How many layers there are.
    number : KVDtype, str or None
        The format of entries that are not coded yet; "auto": as that of prompts that come in chunks; None: as the model
        computed them.

    Attributes
    ----------
    lost : str
        Why it is gone for good; empty: it is not.
    restored : bool or None
        Whether the latest turn was read over everything; None: there was one turn only.
    busy : bool
        Whether a turn is under way, during which it stays where it is.
    """

    def __init__(self, store: HostStore, layers: int, number: KVDtype | str | None = "auto"):
        self.store, self._count, self.number = store, layers, number
        self.clear()

    def clear(self) -> None:
        """Forget the conversation; another one can begin."""
        self.lost = ""
        self.restored: bool | None = None
        self.busy = False
        self._layers: dict[int, PastLayer] = {}
        self._coming: dict[int, Returning] = {}
        # Of what is shared among layers of the turn under way, what came first: as it was kept, and as it is now.
        self._given: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        self._rows: list[int] | None = None
        # Logical length at which the turn under way began, and whether it is read over all of this.
        self._turn: int | None = None
        self._open = False
        # Why the turn under way cannot be kept.
        self._failed = ""

    # -- what it holds ------------------------------------------------------------------------

    @property
    def length(self) -> int | None:
        """Columns of all layers; None: it does not hold a conversation as a whole."""
        lengths = {layer.length for layer in self._layers.values()}
        whole = not self.lost and len(self._layers) == self._count and len(lengths) == 1
        return lengths.pop() if whole else None

    @property
    def _stored(self) -> list[Stored]:
        parts = {id(part): part for layer in self._layers.values() for part in layer.stored}
        return list(parts.values())

    @property
    def parked_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(part.nbytes for part in self._stored if isinstance(part, Parked))

    @property
    def file_bytes(self) -> int:
        """Bytes in files."""
        return sum(part.nbytes for part in self._stored if isinstance(part, Filed))

    def layer(self, ordinal: int) -> PastLayer:
        """What is kept of a layer; only where there is something as a whole."""
        return self._layers[ordinal]

    @property
    def layers(self) -> dict[int, PastLayer]:
        """What is kept of each layer; none where it does not hold a conversation as a whole."""
        with self.store.lock:
            return dict(self._layers) if self.length is not None else {}

    @property
    def rows(self) -> list[int] | None:
        """Which of the rows that are kept are those of the cache, in its order; None: all."""
        return self._rows

    def __deepcopy__(self, memo: dict[int, Any]) -> "Past":
        """Another conversation that began alike: what is kept does not change and is shared."""
        copied = Past(self.store, self._count, self.number)
        memo[id(self)] = copied
        copied.lost, copied.restored = self.lost, self.restored
        copied._layers = dict(self._layers)
        copied._rows = None if self._rows is None else list(self._rows)
        self.store.used(copied)
        return copied

    def expect(self, size: int, device: torch.device) -> None:
        """Get memory ready for so many bytes, while the first layers compute."""
        if not self.lost:
            self.store.memory(device).prepare(size)

    # -- going and coming back ----------------------------------------------------------------

    def put(
        self,
        ordinal: int,
        entries: UnfinishedKV | Pair,
        extras: Mapping[str, Tensor],
        *,
        length: int,
        continues: bool,
        shared: Sequence[str] = (),
    ) -> None:
        """Keep all entries of a layer at a prompt's end; dropped as a whole where that cannot be.

        Parameters
        ----------
        ordinal : int
            Number of the layer.
        entries : UnfinishedKV or pair of Tensor
            Coded, or ``[B, H_kv, n, D]`` as the model computed them.
        extras : mapping
            Tensors that belong to them, of which the first dimension is the batch or one.
        length : int
            Columns that are kept; of those that are coded, all.
        continues : bool
            Whether they came back from here, with others behind, so that these alone are to be kept.
        shared : sequence of str
            Names of ``extras`` that are the very same objects in layers that have the same: `take` gives these out as
            one, too.
        """
        if self.lost or self._failed:
            self._end_turn(ordinal)
            return
        earlier = self._layers.get(ordinal) if continues and self._rows is None else None
        pieces = earlier.pieces if earlier is not None else ()
        stop = entries.coded if isinstance(entries, UnfinishedKV) else length
        # The first prompt's stays what it is: copies of a conversation share it.
        if len(pieces) > 1 and pieces[-1].stop < stop and pieces[-1].stop - pieces[-1].start < TOGETHER:
            pieces = pieces[:-1]
        start = pieces[-1].stop if pieces else 0
        rest = {EXTRA + name: part for name, part in extras.items()}
        if isinstance(entries, UnfinishedKV):
            new = entries.lines(start)
            rest |= entries.rest()
            number, codes, batch, device = entries.number, entries.codes, entries.shape[0], entries.device
        else:
            new = {name: part[:, :, start:length] for name, part in zip(EXACT, entries, strict=True)}
            number, codes, batch, device = None, None, entries[0].shape[0], entries[0].device
        try:
            if stop > start:
                stored = self.store.put(self, new, device)
                if number is None and isinstance(stored, Parked):
                    stored.until_read(device)  # surrogates may be written over some of them
                pieces = (*pieces, Piece(stored, start, stop))
            kept = self.store.put(self, rest, device)
        except (NoRoomError, OSError) as error:
            # Layers behind this one may have to come back yet: the turn is read over everything to its end.
            self._failed = str(error)
            if not self._open:
                self.drop(self._failed)
                return
        else:
            same = {name: extras[name] for name in shared if name in extras}
            self._layers[ordinal] = PastLayer(number, codes, pieces, kept, length, batch, device, shared=same)
        self._end_turn(ordinal)

    def _end_turn(self, ordinal: int) -> None:
        """Note that a layer has come to its prompt's end; with the last one all have."""
        if ordinal < self._count - 1:
            return
        failed, restored = self._failed, self.restored
        self._coming.clear()
        self._given.clear()
        self.busy, self._turn, self._open, self._rows, self._failed = False, None, False, None, ""
        if failed:
            self.drop(failed)
            self.restored = restored
        self.store.used(self)

    def begins(self, before: int) -> bool:
        """Whether the turn that begins at logical length ``before`` is read over everything: one answer for all layers.

        A file that is damaged is found here.
        """
        if self._turn == before:
            return self._open
        self._turn, self._open = before, False
        self._given.clear()
        if not self._layers or self.lost:
            self.restored = False if self.lost else self.restored
            return False
        with self.store.lock:
            length = self.length
            if length is None or length > before:
                self.drop("a forward pass was interrupted")
                return False
            try:
                for part in self._stored:
                    if isinstance(part, Filed):
                        part.check()
            except (DamagedError, OSError) as error:
                self.drop(str(error))
                return False
            self.busy = True
            self.store.used(self)
        self._open = self.restored = True
        return True

    def take(self, ordinal: int, device: torch.device, columns: int) -> tuple[UnfinishedKV | Pair, dict[str, Tensor]]:
        """A layer's entries, back on the device with room for ``columns``, and what was kept with them.

        Only in a turn that `begins` said yes to. Those of the next layers are sent on their way.
        """
        for number in range(ordinal, min(ordinal + 1 + AHEAD, self._count)):
            target = device if number == ordinal else self._layers[number].device
            known = self._coming.get(number)
            if known is None or known.device != target:
                self._coming[number] = Returning(self._layers[number], target, columns)
        held, extras = self._coming.pop(ordinal).arrived(self._rows)
        return held, self._as_one(ordinal, extras)

    def extras(self, ordinal: int, device: torch.device) -> dict[str, Tensor]:
        """What was kept with a layer's entries, without these; else as `take`."""
        layer = self._layers[ordinal]
        return self._as_one(ordinal, _extras(of_rows(layer.rest.fetch(device).tensors(), self._rows, layer.batch)))

    def _as_one(self, ordinal: int, extras: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a layer had added, with what another one has given out in the place of the same."""
        for name, kept in self._layers[ordinal].shared.items():
            first = self._given.setdefault((name, extras[name].device), (kept, extras[name]))
            if first[0] is kept:
                extras[name] = first[1]
        return extras

    # -- what happens to the cache ------------------------------------------------------------

    def adopt(self, ordinal: int, layer: PastLayer) -> None:
        """Hold what was kept of a layer by another process."""
        self._layers[ordinal] = layer

    def drop(self, reason: str) -> None:
        """Let go of everything, for good: the conversation goes on over what its cache has kept."""
        _log.warning(
            "what a conversation evicted is not kept any more, and its next turns are read over what was kept on the "
            "device: %s", reason,
        )  # fmt: skip
        self.clear()
        self.lost, self.restored = reason, False

    def crop(self, length: int) -> None:
        """Forget columns from ``length`` on."""
        self._turn = None
        if length == 0:
            self.clear()
        elif self.length is not None and length < self.length:
            self._layers = {ordinal: layer.cut(length) for ordinal, layer in self._layers.items()}

    def take_rows(self, indices: Sequence[int]) -> None:
        """Go on with these rows of those that there are now."""
        if self._layers:
            now = self._rows if self._rows is not None else list(range(next(iter(self._layers.values())).batch))
            self._rows = [now[index] for index in indices]
            if self._rows == list(range(next(iter(self._layers.values())).batch)):
                self._rows = None

    def to_files(self, folder: Path) -> None:
        """Move everything to files; dropped where that cannot be."""
        moved: dict[int, Stored] = {}
        try:
            for part in self._stored:
                if isinstance(part, Parked):
                    moved[id(part)] = Filed(folder, part.on_host())
        except OSError as error:
            self.drop(str(error))
            return
        self._layers = {ordinal: layer.moved(moved) for ordinal, layer in self._layers.items()}
