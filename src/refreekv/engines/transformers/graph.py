"""One token a row through a CUDA graph: one capture of the model's own forward serves every length.

Eager decoding is bound by launches, some 1,500 a token, at any context length. The forward of one
token a row is captured with static inputs; where attention would read a cache, it reads the tables
of `kernels.table` instead, through which any cache's arenas are reached. So a graph depends on
the model and the batch size alone: not on lengths, not on the cache.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from refreekv.engines.transformers import fingerprint
from refreekv.engines.transformers.fusion import fused
from refreekv.engines.transformers.naming import cache_argument
from refreekv.engines.transformers.step_tables import Form, Reads, TableCache
from refreekv.storage.arena import KVArena
from refreekv.storage.base import KVStorage
from refreekv.storage.staging import Copies, Lines, Staging, copies_on


class UncapturableError(Exception):
    """Why a model or a call cannot be captured; the text completes "because"."""


class Step:
    """The forward of one token a row at one batch size and storage, with inputs and outputs in fixed places.

    Attributes
    ----------
    reads : list of Reads
        Where each layer's entries are; tables are ``[B * H_kv, 4]``, see `kernels.table`.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        batch: int,
        segments: Sequence[int],
        forms: Sequence[Form],
        copies: Copies | None = None,
    ):
        self.model, self.batch, self._forward = model, batch, forward
        device = next(model.parameters()).device
        with torch.inference_mode(False), torch.no_grad():
            self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
            self.positions = torch.zeros(batch, 1, dtype=torch.long, device=device)
            # No entries and no room, so that running it touches no memory.
            self.reads = [
                Reads.nothing(form, batch, count, device) for form, count in zip(forms, segments, strict=True)
            ]
        self.tables = [table for layer in self.reads for table in layer.tables]
        hosted = [layer.lines for layer in self.reads if layer.form.hosted]
        self._staging = Staging(device, hosted, copies or copies_on(device, captured=True)) if hosted else None
        self.weights = fingerprint.of_addresses(model)
        self.autocast = autocast_type(device.type)
        # Weak: a graph must not keep a finished answer's keys and values alive.
        self._owners: list[weakref.ref[KVArena]] = []
        self._next = -1
        self._left = 0
        self._out: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._capture()
        else:
            # As before a capture: what cannot be done is found before there are entries to write.
            with torch.no_grad():
                self._check_length()

    def _run(self) -> Any:
        out = self._once(TableCache(self.reads, self._staging))
        # The next token's, so that the host need not say them each time.
        self.positions.add_(1)
        return out

    def _once(self, cache: TableCache) -> Any:
        if self._staging is not None:
            self._staging.begin()
        return self._forward(
            input_ids=self.ids,
            position_ids=self.positions,
            **cache_argument(self._forward, cache),
            use_cache=True,
            return_dict=True,
        )

    def _check_length(self) -> None:
        """Raise UncapturableError if more depends on the length of the cache than masks, such as positions."""
        cache = TableCache(self.reads, self._staging)
        out = self._once(cache)
        if cache.length_asked and getattr(out, "logits", None) is not None:
            first, cache.length = out.logits.clone(), 7
            if not torch.equal(first, self._once(cache).logits):
                raise UncapturableError("the model reads positions off the length of its cache")

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.ids.device)
        stream = _capture_stream(self.ids.device)
        capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        stream.wait_stream(current)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            # Autocast drops its copies of weights where its block ends: a graph must not read them.
            torch.autocast(self.ids.device.type, self.autocast, self.autocast is not None, cache_enabled=False),
            fused(self.model, self.ids.shape[0]),
        ):
            try:
                with torch.cuda.stream(stream):
                    self._warm_up()
            finally:
                # If that failed the step is dropped, and what it is made of is free for others: not before the
                # kernels that were launched are done with it.
                current.wait_stream(stream)
            with capture:
                self._out = self._run()
        self._graph = graph
        if not isinstance(self._out, ModelOutput) or getattr(self._out, "logits", None) is None:
            raise UncapturableError("the model returns no logits")

    def _warm_up(self) -> None:
        self._check_length()
        # A capture that fails leaves a mess; what would make it fail is found before.
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        try:
            self._run()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def owned_by(self, storages: Sequence[KVStorage]) -> bool:
        """Whether these are the storages that the step reads and writes."""
        owners, arenas = self._owners, [arena for storage in storages for arena in storage.tables]
        return len(owners) == len(arenas) and all(
            owner() is arena and arena.table is table
            for owner, arena, table in zip(owners, arenas, self.tables, strict=True)
        )

    def can_grow(self, length: int) -> bool:
        """Whether the token at logical length ``length`` has room for sure: it is the next one, and was counted for."""
        return length == self._next and self._left > 0

    def note_capacity(self, storages: Sequence[KVStorage]) -> None:
        """Look how many tokens have room; while the device is busy, as this takes time at each token."""
        self._left = min(storage.tables[0].left for storage in storages)

    def adopt(self, storages: Sequence[KVStorage]) -> None:
        """Read and write these storages from now on; their tables move here."""
        self._take_turn()
        self.release()
        for storage, layer in zip(storages, self.reads, strict=True):
            layer.adopt(storage)
        self._owners = [weakref.ref(arena) for storage in storages for arena in storage.tables]
        self._next = -1
        self.make_room(storages)

    def make_room(self, storages: Sequence[KVStorage]) -> None:
        """Have room on the device for what the storages have in host memory; asked whenever codes were added."""
        if self._staging is not None:
            hosted = [storage.tables[1:] for storage in storages if storage.in_host_memory]
            self._staging.aim([[Lines.of(arena) for arena in arenas] for arenas in hosted])

    def release(self) -> None:
        """Give the tables back to whose they are."""
        for owner, table in zip(self._owners, self.tables, strict=False):
            arena = owner()
            if arena is not None and arena.table is table:
                arena.take_table_back()
        self._owners = []

    def _take_turn(self) -> None:
        """Wait for what another thread had the step do on a stream of its own; it may still be under way."""
        if self.ids.is_cuda:
            stream = torch.cuda.current_stream(self.ids.device)
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream

    def __call__(self, ids: Tensor, positions: Tensor, length: int) -> Any:
        """Logits for one token a row, ``[B, 1]`` each; what is returned is overwritten by the next call.

        ``length`` is the cache's logical length before the token. From one token to the next of the
        same cache positions grow by one: they are copied for the first one only.
        """
        self._take_turn()
        self.ids.copy_(ids)
        if length != self._next:
            self.positions.copy_(positions)
        if self._graph is not None:
            self._graph.replay()
        else:
            with torch.no_grad():
                self._out = self._run()
        self._next = length + 1
        return self._out


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for all captures on a device and what warms them up, as libraries hold workspaces by stream.

    PyTorch keeps one for a process, on the device of its first capture.
    """
    return torch.cuda.Stream(device)


def autocast_type(device: str) -> torch.dtype | None:
    """The type that autocast is on for; None: it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
