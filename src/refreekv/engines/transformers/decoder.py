"""Which tokens come from a captured step (`graph`), and which from the model's own forward."""

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from refreekv.engines.transformers import fingerprint
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.graph import Step, UncapturableError, autocast_type
from refreekv.engines.transformers.host_tier import HostTier
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.naming import NAME, NAMES, cache_given
from refreekv.engines.transformers.step_tables import Form
from refreekv.storage.base import KVStorage
from refreekv.storage.leveled import code_older

logger = logging.getLogger("refreekv")

DecodeMode = Literal["graph", "eager"]

_KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep", "cache_position"}
_KNOWN |= NAMES
"""Arguments of a forward that a captured one can do with."""
_OUTPUTS = ("output_hidden_states", "output_router_logits")
"""What a configuration may ask for beside logits."""


def check_mode(mode: str) -> None:
    """Raise ValueError unless ``mode`` is a way to decode."""
    if mode not in (modes := get_args(DecodeMode)):
        raise ValueError(f"decode must be one of {', '.join(map(repr, modes))}, got {mode!r}")


class Decoder:
    """Decides, call by call, whether a captured step can do it. One a model.

    Threads that generate on one model share its steps and take turns.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._lock = threading.Lock()
        self._steps: dict[_Key, Step] = {}
        self._refused: dict[_Key, str] = {}
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
            _, storages = self._layers(cache)
            self._check_model()
        except UncapturableError:
            return False
        return _Key.of(storages) not in self._refused

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
        layers, storages = self._layers(cache)
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

    def _layers(self, cache: PrunedCache) -> tuple[list[ReFreeKVLayer], list[KVStorage]]:
        layers, storages = [], []
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
            storages.append(layer.ragged)
        return layers, storages

    def _step_for(
        self, forward: Callable[..., Any], batch: int, storages: Sequence[KVStorage], host: HostTier | None
    ) -> Step:
        last = self._last
        autocast = autocast_type(storages[0].keys.device.type)
        if last is not None and last.batch == batch and last.autocast == autocast and last.owned_by(storages):
            return last
        key = _Key.of(storages)
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


class _Key(NamedTuple):
    """What a captured step depends on: rows, segments and format of each layer, type of autocast if there is one."""

    batch: int
    segments: tuple[int, ...]
    forms: tuple[Form, ...]
    autocast: torch.dtype | None

    @classmethod
    def of(cls, storages: Sequence[KVStorage]) -> "_Key":
        batch = len(storages[0].tables[0].freed)
        segments, forms = zip(*((batch * storage.kv_heads, Form.of(storage)) for storage in storages), strict=True)
        return cls(batch, segments, forms, autocast_type(storages[0].keys.device.type))
