"""The attention functions that transformers calls while a model is compressed.

Each base implementation (``sdpa``, ``eager``, ``flash_attention_2`` …) gets a twin named
``refreekv_<base>`` in transformers' attention and mask registries. The twin computes what
its base computes, through its base; beyond that it reads ragged layers, and hands each
layer the queries it needs to prune itself. Calls that do not come from a `ReFreeKVCache`
pass through untouched.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refreekv.engines.transformers.denominators import listening
from refreekv.engines.transformers.handout import ADVICE, receive
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.proof import Proof, check_mask, is_own, lacks_proof, marking, tells_denominators
from refreekv.engines.transformers.ragged_attention import FEW, AttentionFunction, by_group, ragged_attention
from refreekv.engines.transformers.reading_attention import over_what_was_read
from refreekv.pruning.calls import AttentionCall

PREFIX = "refreekv_"

_REPEATED = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "softcap", "s_aux", "is_causal"}
"""Parameters of attention functions that probes and kernels repeat, or that change nothing about one query."""
_REPEATED |= {"sliding_window"}  # `proof` finds out where one is shorter than the prompt


class OwnAttention(Protocol):
    """A cache layer that computes attention itself: what it handed out leads to it as to a `ReFreeKVLayer`."""

    def attend(self, call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
        """Attention output ``[B, q, H, Dv]``; ``key`` and ``value`` are what its ``update`` returned."""


_PARAMETERS: dict[AttentionFunction, tuple[str, ...]] = {}


class TwinName(str):
    """The name of a twin, which is equal to that of its base.

    Some models do one thing or another after what their configuration says (``in ("eager", "sdpa")``):
    they are to do what they do without refreekv. Registries look names up by their hash and keep the two
    apart; and to be unlike is left as it is, for others look a name up only where it is not "eager".
    """

    __slots__ = ()

    @property
    def base(self) -> str:
        """The name of what the twin stands in for."""
        return self.removeprefix(PREFIX)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (type(other) is str and self.base == other)

    def __ne__(self, other: object) -> bool:
        return str.__ne__(self, other) is True

    def __hash__(self) -> int:
        return str.__hash__(self)


def twin(base: str) -> TwinName:
    """Register (once) and name the refreekv twin of an attention implementation.

    Raises
    ------
    ValueError
        For implementations whose masks or caches refreekv cannot read.
    """
    if isinstance(base, TwinName):
        return base
    if base not in ("eager", "sdpa") and "flash" not in base:
        raise ValueError(
            f"attention implementation {base!r} is not supported; load the model with attn_implementation='sdpa', "
            "'eager' or 'flash_attention_2'"
        )
    name = TwinName(PREFIX + base)
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _make(base))
        # Without a mask function of its own the name would silently get no mask at all.
        AttentionMaskInterface.register(name, marking(ALL_MASK_ATTENTION_FUNCTIONS[base]))
    return name


def _make(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    flash = "flash" in base

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        function = _base_function(base, module)
        called = _AsBase(module, base) if flash else module
        layer: ReFreeKVLayer | OwnAttention | None = receive(module, query, key, value)
        if layer is None:
            return function(called, query, key, value, attention_mask, **kwargs)
        named = _parameters(function)
        # What is to be repeated. Functions take more than they heed: sdpa knows no soft cap.
        heeded = kwargs if "softcap" in named else {**kwargs, "softcap": None}
        call = AttentionCall(
            query, attention_mask, kwargs.get("scaling"), heeded.get("softcap"), sink_logits=kwargs.get("s_aux")
        )
        if not isinstance(layer, ReFreeKVLayer):
            return layer.attend(call, key, value), None
        for name in named:
            if name not in _REPEATED and kwargs.get(name) is not None:
                raise ValueError(
                    f"{type(module).__name__} (layer {layer.index}) computes attention with {name}, which refreekv's "
                    f"probes and kernels would have to repeat and do not. {ADVICE}"
                )
        if attention_mask is not None and is_own(attention_mask) and not layer.state.mask_given:
            check_mask(module, layer.index, attention_mask)
        weights = None
        own, function = function, _in_one_type(function, flash=flash)
        if own is sdpa_attention_forward and layer.ragged is not None and query.shape[2] <= FEW:
            function = by_group(function)
        elif base == "sdpa" and attention_mask is not None and layer.is_decoded_for_call:
            function = over_what_was_read(function, own)
        if layer.ragged is None:
            unproved, exact = lacks_proof(module, base), not kwargs.get("dropout")
            right = tells_denominators(module, base)
            # Others' functions may call what cannot be listened to, as flex attention.
            tells = own is sdpa_attention_forward and exact and right is not False
            asks = tells and (unproved or layer.asks_denominators())
            with listening(call, key.shape[2], wanted=asks) as heard:
                output, weights = function(called, query, key, value, attention_mask, **kwargs)
            told = None if heard is None else heard.logsumexp
            if unproved or (told is not None and right is None):
                proof = Proof.of(module, base, layer.index, call, key, value, output, exact=exact, told=told)
                layer.state.proofs.append(proof)
            if right:
                call = replace(call, logsumexp=told)
        else:
            output = ragged_attention(layer, function, called, query, attention_mask, flash=flash, **heeded)
        layer.after_attention(call)
        return output, weights

    attention.__name__ = PREFIX + base
    return attention


def _in_one_type(attention: AttentionFunction, *, flash: bool) -> AttentionFunction:
    """An attention function that takes queries, keys and values of different types, in the widest of them.

    Keys stay as wide as they were stored where the model computes in a narrower type later, as when it was moved
    to bfloat16 between two turns. Under autocast all but flash functions do this by themselves.
    """

    def widened(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if query.dtype == key.dtype == value.dtype or (not flash and torch.is_autocast_enabled(query.device.type)):
            return attention(module, query, key, value, mask, **kwargs)
        widest = functools.reduce(torch.promote_types, (query.dtype, key.dtype, value.dtype))
        if mask is not None and mask.is_floating_point():
            mask = mask.to(widest)
        wide = (part.to(widest) for part in (query, key, value))
        output, weights = attention(module, *wide, mask, **kwargs)
        return output.to(query.dtype), weights

    return widened


def _parameters(function: AttentionFunction) -> tuple[str, ...]:
    """Named parameters of an attention function."""
    if function not in _PARAMETERS:
        named = inspect.signature(function).parameters.values()
        _PARAMETERS[function] = tuple(p.name for p in named if p.kind is not p.VAR_KEYWORD)
    return _PARAMETERS[function]


def _base_function(base: str, module: torch.nn.Module) -> AttentionFunction:
    """The function behind a base name; eager attention lives beside each model."""
    if base != "eager":
        registered: AttentionFunction = ALL_ATTENTION_FUNCTIONS[base]
        return registered
    for cls in type(module).__mro__:
        function: AttentionFunction | None = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(
        f"{type(module).__name__} has no eager_attention_forward beside it; load the model with "
        "attn_implementation='sdpa'"
    )


class _AsBase:
    """A module seen through its base implementation's name, which flash attention reads off the config."""

    def __init__(self, module: torch.nn.Module, base: str):
        self._module = module
        self.config = _ConfigAsBase(module.config, base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _ConfigAsBase:
    def __init__(self, config: Any, base: str):
        self._config = config
        self._attn_implementation = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
