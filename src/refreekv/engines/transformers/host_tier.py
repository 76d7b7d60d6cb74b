"""Which layers' codes are in host memory: those that do not fit on the device, spread evenly over the model.

While a prompt is read in chunks, the codes of what was read are what takes most; they come to the device layer by layer
for each chunk. Once it is read, what is kept is what counts, and layers that fit go back to the device. Attention of a
token reads all layers alike, so that none is colder than others: spread out, the copies of some are under way while
others are computed.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from refreekv.core.device_memory import free_memory
from refreekv.core.footprint import LayerKV, Reader, chunked_bytes, least_hosted
from refreekv.core.quantisation import KVDtype
from refreekv.core.units import parse_bytes
from refreekv.policies.base import AUTO
from refreekv.storage.base import KVStorage
from refreekv.storage.coding import Pair
from refreekv.storage.host import available_memory
from refreekv.storage.hosted import HostedPrompts
from refreekv.storage.staging import Copies

MARGIN = 2**29
"""Bytes of the device that are left free: generated entries, captured steps, and what allocators cannot use."""

SHARE = 0.8
"""Of the host memory that is free, what is used if nobody says how much."""


class HoldsStorage(Protocol):
    """A layer of a cache."""

    ordinal: int
    ragged: KVStorage | None


class HostTier:
    """Decides which layers of a cache have their codes in host memory.

    Parameters
    ----------
    limit : int or None
        So many bytes of codes go there, as many layers as that holds. None: what does not fit on the device.
    reader : Reader
        What the model takes beside K/V to read a prompt.
    free : callable, optional
        Bytes that are free on a device.
    copies : Copies, optional
        What copies run on; see `storage.staging`.
    """

    def __init__(
        self,
        limit: int | None,
        reader: Reader,
        *,
        free: Callable[[torch.device], int] = free_memory,
        copies: Copies | None = None,
    ):
        self.limit, self.copies = limit, copies
        self._reader, self._free = reader, free
        self._reading: frozenset[int] = frozenset()
        self._prompts: HostedPrompts | None = None

    def begin(self, chunk: Pair, layers: int, prompt: int, number: KVDtype, earlier: int = 0) -> None:
        """Decide for a prompt of so many tokens, behind ``earlier`` ones, that is going to be read in chunks.

        ``chunk`` are the first one's keys and values in the first of the ``layers``, ``[B, H_kv, q, D]``.
        """
        self.clear()
        keys, values = chunk
        device, (rows, heads, tokens) = keys.device, keys.shape[:3]
        itemsize = max(keys.element_size(), values.element_size())
        layer = LayerKV("full", rows * heads, keys.shape[3], values.shape[3], itemsize=itemsize)
        count = self.most(layer, layers, prompt, number, device)
        if self.limit is None:
            # What was there before is in the copy that attention reads, too.
            free, kinds = self._free(device) - MARGIN - layer.bytes(earlier), [layer] * layers

            def fits(hosted: int) -> bool:
                return chunked_bytes(kinds, prompt, rows * tokens, number, 0, self._reader, hosted=hosted) <= free

            count = least_hosted(fits, count)
        self._reading = spread(count, layers)
        self._prompts = HostedPrompts(device, self.copies)

    def most(self, layer: LayerKV, layers: int, prompt: int, number: KVDtype, device: torch.device) -> int:
        """How many layers' codes of a prompt may be in host memory."""
        lines = counted(int(layer.unfinished_lines(prompt, number)), device)
        return min(layers, self._allowed() // lines) if lines else 0

    def place(self, ordinal: int) -> tuple[HostedPrompts, int] | None:
        """Where the lines of a layer's prompt go; None: they stay on the device."""
        if self._prompts is None or ordinal not in self._reading:
            return None
        return self._prompts, ordinal

    def take(self, layer: HoldsStorage) -> None:
        """Move what is kept of a layer to host memory, if its prompt was there: `distribute` comes later."""
        if layer.ordinal in self._reading and layer.ragged is not None and layer.ragged.coding is not None:
            layer.ragged.move_to_host()

    def distribute(self, layers: Sequence[HoldsStorage]) -> None:
        """Decide anew for what is kept of a prompt, and move it."""
        self.clear()
        held = [
            (layer, layer.ragged) for layer in layers if layer.ragged is not None and layer.ragged.coding is not None
        ]
        if not held:
            return
        storages = [storage for _, storage in held]
        chosen = self._chosen(storages)
        # First what leaves the device: others may need its place.
        for number, storage in enumerate(storages):
            if number in chosen:
                storage.move_to_host()
        for number, storage in enumerate(storages):
            if number not in chosen:
                storage.move_to_device()

    def _chosen(self, storages: Sequence[KVStorage]) -> frozenset[int]:
        """Which of some storages belong in host memory."""
        device = storages[0].keys.device
        sizes = [sum(arena.nbytes for arena in storage.tables[1:]) for storage in storages]
        on_host = [counted(size, device) for size in sizes]
        count, own = len(storages), sum(storage.host_nbytes for storage in storages)
        allowed = self._allowed() + own
        most = max(n for n in range(count + 1) if sum(on_host[i] for i in spread(n, count)) <= allowed)
        if self.limit is not None:
            return spread(most, count)
        here = sum(size for size, storage in zip(sizes, storages, strict=True) if not storage.in_host_memory)
        room = self._free(device) + here - MARGIN
        for hosted in range(most):
            some = spread(hosted, count)
            staged = 2 * max((sizes[i] for i in some), default=0)
            if sum(size for i, size in enumerate(sizes) if i not in some) + staged <= room:
                return some
        return spread(most, count)

    def _allowed(self) -> int:
        return int(SHARE * available_memory()) if self.limit is None else self.limit

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostTier":
        """One for a copied cache."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied._prompts = copy.deepcopy(self._prompts, memo)
        return copied

    def clear(self) -> None:
        """Let go of prompts."""
        if self._prompts is not None:
            self._prompts.clear()
        self._prompts, self._reading = None, frozenset()


def spread(count: int, layers: int) -> frozenset[int]:
    """So many of some layers, with others evenly between them."""
    return frozenset((2 * number + 1) * layers // (2 * count) for number in range(count))


def counted(size: int, device: torch.device) -> int:
    """Bytes that pinned memory of a size takes: PyTorch rounds to powers of two."""
    return 1 << (size - 1).bit_length() if device.type == "cuda" and size else size


def parse_host_memory(value: str | int | None) -> int | str | None:
    """What ``host_memory`` says: bytes, "auto", or None.

    Raises
    ------
    ValueError
        No size.
    TypeError
        Something else than a string, a number of bytes or None.
    """
    if value is None or value == AUTO:
        return value
    if isinstance(value, str):
        return parse_bytes(value, "host_memory")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"host_memory is a size such as '8GiB', 'auto' or None, got {value!r}")
    if value < 1:
        raise ValueError(f"host_memory must be more than 0 bytes, got {value}")
    return value
