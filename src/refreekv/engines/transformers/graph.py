"""Decoding through CUDA graphs: one capture of the model's own forward serves every length.

Eager decoding is bound by launches, some 1,500 a token, at any context length. The forward of one
token a row is captured with static inputs; where attention would read a cache, it reads the tables
of `kernels.table` instead, through which any cache's arenas are reached. So a graph depends on
the model and the batch size alone: not on lengths, not on the cache.
"""

import copy
import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from refreekv.engines.transformers import fingerprint
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.fusion import fused
from refreekv.engines.transformers.host_tier import HostTier
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.naming import NAME, NAMES, cache_argument, cache_given
from refreekv.engines.transformers.step_tables import Form, Reads, TableCache
from refreekv.storage.arena import KVArena
from refreekv.storage.base import KVStorage
from refreekv.storage.leveled import code_older
from refreekv.storage.staging import Copies, Lines, Staging, copies_on

logger = logging.getLogger("refreekv")

DecodeMode = Literal["graph", "eager"]
MODES = ("graph", "eager")

_KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep", "cache_position"}
_KNOWN |= NAMES
"""Arguments of a forward that a captured one can do with."""
_OUTPUTS = ("output_hidden_states", "output_router_logits")
"""What a configuration may ask for beside logits."""


class UncapturableError(Exception):
    """Why a model or a call cannot be captured; the text completes "because"."""


def check_mode(mode: str) -> None:
    """Raise ValueError unless ``mode`` is a way to decode."""
    if mode not in MODES:
        raise ValueError(f"decode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")


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
        self.autocast = _autocast(device.type)
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
            _autocast_without_memory(self.ids.device.type),
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


class Decoder:
    """Decides, call by call, whether a captured step can do it. One a model.

    Threads that generate on one model share its steps and take turns.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._lock = threading.Lock()
        self._steps: dict[Any, Step] = {}
        self._refused: dict[Any, str] = {}
        self._last: Step | None = None
        self._logged: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Decoder":
        """One of its own for the copied model: graphs have the original's addresses in them."""
        return Decoder(copy.deepcopy(self._model, memo))

    def __call__(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The output of ``forward(**kwargs)`` from a captured step; None if it has to run itself."""
        cache, ids = cache_given(kwargs), kwargs.get("input_ids")
        if not isinstance(cache, PrunedCache) or ids is None or ids.shape[1] != 1 or cache.decode == "eager":
            return None
        first = cache.first
        length = first.get_seq_length()
        if not cache.state.decodes(length) or not (ids.is_cuda or cache.state.arena):
            return None
        if cache.state.verification is not None and cache.state.verification.pending:
            return None  # what a step would be captured over goes soon
        try:
            return self._step(forward, cache, kwargs, length)
        except UncapturableError as reason:
            self._log(str(reason))
            return None

    def may_capture(self, cache: PrunedCache) -> bool:
        """Whether tokens that follow the cache's prompt are likely to come from a captured step."""
        if cache.decode == "eager" or cache.state.decode_interval is not None:
            return False
        try:
            storages = _storages(self._layers(cache))
            self._check_model()
        except UncapturableError:
            return False
        return _key(storages) not in self._refused

    def _step(self, forward: Callable[..., Any], cache: PrunedCache, kwargs: dict[str, Any], length: int) -> Any:
        ids: Tensor = kwargs["input_ids"]
        if cache.state.decode_interval is not None:
            raise UncapturableError("generated tokens are pruned, too, and their queries are needed for that")
        extra = [
            name for name, value in kwargs.items() if name not in _KNOWN and value is not None and value is not False
        ]
        if extra:
            raise UncapturableError(f"the model is called with {', '.join(sorted(extra))}")
        positions = kwargs.get("position_ids")
        if positions is None:
            raise UncapturableError("the model is called without positions, which it makes in a way of its own")
        if positions.dim() != 2 or positions.shape[1] != 1:
            raise UncapturableError("positions have more than one number a token")
        layers = self._layers(cache)
        storages = _storages(layers)
        with self._lock:
            coded = code_older(storages)
            step = self._step_for(forward, ids.shape[0], storages, cache.state.host)
            if coded:
                for layer in layers:
                    layer.note_moved()
                step.make_room(storages)
            if not step.can_grow(length):
                for layer in layers:
                    layer.reserve(1)
            out = step(ids, positions, length)
            # The next call overwrites the logits.
            logits = out.logits.clone()
            for layer in layers:
                layer.note_appended(1)
            step.note_capacity(storages)
        return type(out)(logits=logits, **{NAME: cache})

    def _layers(self, cache: PrunedCache) -> list[ReFreeKVLayer]:
        layers: list[ReFreeKVLayer] = []
        for layer in cache.layers:
            if not isinstance(layer, ReFreeKVLayer):
                raise UncapturableError(f"the cache has a {type(layer).__name__}")
            if layer.get_seq_length() == 0:
                raise UncapturableError("the model runs without some of its layers")
            if layer.ragged is None or not layer.ragged.tables:
                raise UncapturableError(f"a layer's entries are in a {type(layer.ragged or layer.keys).__name__}")
            if layer.holds_hidden:
                raise UncapturableError("the attention mask hides tokens that are no padding and stay in the cache")
            layers.append(layer)
        return layers

    def _step_for(
        self, forward: Callable[..., Any], batch: int, storages: Sequence[KVStorage], host: HostTier | None
    ) -> Step:
        last = self._last
        autocast = _autocast(storages[0].keys.device.type)
        if last is not None and last.batch == batch and last.autocast == autocast and last.owned_by(storages):
            return last
        key = _key(storages)
        if key in self._refused:
            raise UncapturableError(self._refused[key])
        step = self._steps.get(key)
        if step is not None and step.owned_by(storages):
            self._last = step
            return step
        self._check_model()
        if step is not None and step.weights != fingerprint.of_addresses(self._model):
            step.release()
            step = self._last = None
        if step is None:
            try:
                copies = None if host is None else host.copies
                step = Step(self._model, forward, batch, key.segments, key.forms, copies)
            except torch.OutOfMemoryError:
                raise
            except UncapturableError as error:
                self._refused[key] = str(error)
                raise
            except Exception as error:  # whatever it is, eager decoding goes on
                logger.debug("a forward could not be captured", exc_info=error)
                self._refused[key] = f"its forward cannot be captured: {_innermost(error)}"
                raise UncapturableError(self._refused[key]) from error
            self._steps[key] = step
        step.adopt(storages)
        self._last = step
        return step

    def _check_model(self) -> None:
        """Raise UncapturableError for what a replay would silently leave out."""
        top: Any = self._model.config
        for config in (top, top.get_text_config(decoder=True)):
            asked = [name for name in _OUTPUTS if getattr(config, name, False)]
            if asked:
                raise UncapturableError(f"the model's configuration asks for {', '.join(asked)}")
        if self._model.training:
            raise UncapturableError("the model is in training mode")
        if len({p.device for p in self._model.parameters()}) > 1:
            raise UncapturableError("the model is spread over several devices")
        for name, module in self._model.named_modules():
            if name and (_hooks(module) or hasattr(module, "_hf_hook")):
                raise UncapturableError(f"{name} has forward hooks, which a captured step would not call")

    def refuse(self, cache: PrunedCache, device: torch.device, reason: str) -> None:
        """Say why there will be no captured steps for a cache, if there would be some otherwise."""
        if cache.decode != "eager" and (device.type == "cuda" or cache.state.arena):
            self._log(reason)

    def _log(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("decoding without a CUDA graph, because %s", reason)

    def close(self) -> None:
        """Free the graphs; caches get their tables back."""
        for step in self._steps.values():
            step.release()
        self._steps.clear()
        self._last = None


def _innermost(error: BaseException) -> str:
    """Type, first and last line of what an error came of: between them a compiler quotes the code."""
    while error.__cause__ is not None:
        error = error.__cause__
    first, *others = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return f"{first} {others[-1]}" if others else first


def _hooks(module: nn.Module) -> list[Any]:
    """Hooks of a module that do something at each call.

    transformers leaves some on each layer once outputs of layers were asked for. They do nothing unless these are
    asked for again, which is no call for a captured step.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__module__", None) != "transformers.utils.output_capturing"]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for all captures on a device and what warms them up, as libraries hold workspaces by stream.

    PyTorch keeps one for a process, on the device of its first capture.
    """
    return torch.cuda.Stream(device)


def _storages(layers: Sequence[ReFreeKVLayer]) -> list[KVStorage]:
    """The storages of layers that `Decoder._layers` let pass."""
    return [layer.ragged for layer in layers if layer.ragged is not None]


class _Key(NamedTuple):
    """What a captured step depends on: rows, segments and format of each layer, type of autocast if there is one."""

    batch: int
    segments: tuple[int, ...]
    forms: tuple[Form, ...]
    autocast: torch.dtype | None


def _key(storages: Sequence[KVStorage]) -> _Key:
    batch = len(storages[0].tables[0].freed)
    segments, forms = zip(*((batch * storage.kv_heads, Form.of(storage)) for storage in storages), strict=True)
    return _Key(batch, segments, forms, _autocast(storages[0].keys.device.type))


def _autocast(device: str) -> torch.dtype | None:
    """The type that autocast is on for; None: it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _autocast_without_memory(device: str) -> torch.autocast:
    """The autocast that is on, if one is, for a capture: else a graph would read copies of weights that it keeps.

    It drops them where its block ends, and the next one makes others.
    """
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, torch.get_autocast_dtype(device), enabled, cache_enabled=False)
