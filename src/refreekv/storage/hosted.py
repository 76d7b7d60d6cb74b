"""Entries in host memory that a GPU's kernels read and write where they are.

Pinned memory has addresses that kernels can use, and a table says nothing else about entries than addresses. So all
that works on an arena works on one in host memory, as fast as the bus to it: that is the plain way, which reads right
whatever is in the storage. `storage.staging` brings entries to the device ahead of their use.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from refreekv.storage.arena import KVArena, allocated, capacities_of, growth_for
from refreekv.storage.base import Piece
from refreekv.storage.host import NoRoomError
from refreekv.storage.members import Array, Counts
from refreekv.storage.ragged import RaggedKV
from refreekv.storage.staging import Copies, Lines, Staging


class HostArena(KVArena):
    """An arena whose entries are in pinned host memory, and whose table is on the device that reads them.

    Of a device that is the host itself it is an arena like others.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        lengths: Sequence[tuple[int, ...]],
        growth: Sequence[int],
        device: torch.device,
    ):
        self._device = device
        super().__init__(keys, values, lengths, growth)

    @classmethod
    def moved(cls, arena: KVArena) -> Self:
        """What an arena holds, copied to host memory, with room to grow.

        Raises
        ------
        NoRoomError
            The system gives no more memory.
        """
        growth = growth_for(arena.lengths)
        made = cls._empty(arena, arena.lengths, [-1 if gone else growth for gone in arena.freed])
        with arena.table_in_turn() as table:
            made._take(table)
        return made

    @classmethod
    def _empty(cls, like: KVArena, lengths: Sequence[tuple[int, ...]], growth: Sequence[int]) -> Self:
        capacities = capacities_of(lengths, growth)
        keys, values = (pinned(capacities, part, like.device) for part in (like.keys, like.values))
        return cls(keys, values, lengths, growth, like.device)

    def back(self) -> KVArena:
        """A copy of it on the device."""
        like = [part.new_empty(0, part.shape[-1], device=self._device) for part in (self.keys, self.values)]
        made = KVArena.like(like[0], like[1], self.lengths, growth=0, freed=self.freed)
        with self.table_in_turn() as own:
            made._take(own)
        return made

    @property
    def device(self) -> torch.device:
        """The device whose kernels read and write the entries, where the table is."""
        return self._device

    def full(self) -> RaggedKV:
        """All entries, one beside the other: a copy on the device."""
        return self.back().full()

    def segments(self, row: int) -> tuple[Piece, Piece]:
        """One row's keys and values as parts: a copy on the device."""
        return self.back().segments(row)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All rows as ``[B, kv_heads, L, D]``: a copy on the device; only where `uniform`."""
        return self.full().stacked()

    def _alike(self, lengths: Sequence[tuple[int, ...]], freed: Sequence[bool]) -> Self:
        left = [(0,) * len(row) if gone else row for row, gone in zip(lengths, freed, strict=True)]
        return self._empty(self, left, [-1 if gone else growth_for(left) for gone in freed])

    def _new(self, capacities: Array, like: Tensor) -> Tensor:
        return pinned(capacities, like, self._device)

    def _move_to(self, lengths: Array, capacities: Array) -> None:
        super()._move_to(lengths, capacities)
        # What was moved from is given to whoever asks for pinned memory next, and kernels still read it.
        self._wait()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            with self.table_in_turn():
                torch.cuda.current_stream(self._device).synchronize()

    def __getstate__(self) -> dict[str, Any]:
        self._wait()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._device.type == "cuda":  # copies of tensors are not pinned
            self.keys, self.values = self.keys.pin_memory(), self.values.pin_memory()
        self._ready()


class HostedPrompts:
    """Lines of layers' unfinished prompts that are in host memory, and come to the device layer by layer.

    Parameters
    ----------
    device : device
        Where they are needed.
    copies : Copies, optional
        What they come on; see `storage.staging`.
    """

    def __init__(self, device: torch.device, copies: Copies | None = None):
        self.device = device
        self._copies = copies
        self._lines: dict[int, Lines] = {}
        self._staging: Staging | None = None
        self._last = -1

    def hold(self, layer: int, lines: Lines) -> None:
        """Note where the lines of a layer are; layers' numbers grow in the order of their use."""
        self._lines[layer] = lines
        if self._staging is not None:
            self._staging.rest()
        self._staging = None

    def table(self, layer: int) -> Tensor:
        """A table of a layer's lines on the device, for what is launched until another layer is asked for."""
        order = sorted(self._lines)
        if self._staging is None:
            layers = [[self._lines[number]] for number in order]
            self._staging = Staging(self.device, layers, self._copies)
            self._staging.aim(layers)
            self._last = -1
        place = order.index(layer)
        if place <= self._last or self._last < 0:
            self._staging.begin(place)  # another chunk: more was written meanwhile
        self._last = place
        return self._staging.use(place)[0]

    def clear(self) -> None:
        """Let go of all lines and of the memory on the device."""
        if self._staging is not None:
            self._staging.rest()
        self._lines.clear()
        self._staging = None
        self._last = -1

    def __deepcopy__(self, memo: object) -> "HostedPrompts":
        """One for copies of the prompts, which say themselves where their lines are."""
        return HostedPrompts(self.device, self._copies)


def pinned(capacities: Counts | Array, like: Tensor, device: torch.device) -> Tensor:
    """Host memory for segments of so many entries each, pinned where ``device`` is a GPU.

    Raises
    ------
    NoRoomError
        The system gives no more memory.
    """
    try:
        return allocated(capacities, like, pinned=device.type == "cuda")
    except RuntimeError as error:  # also what CUDA says when nothing can be pinned
        size = int(np.asarray(capacities).sum()) * like.shape[-1] * like.element_size()
        raise NoRoomError(f"the system gives no {size:,} bytes of pinned host memory; ask for less of it") from error
