"""The attention functions that transformers calls while a model is compressed.

Each base implementation (``sdpa``, ``eager``, ``flash_attention_2`` …) gets a twin named
``refreekv_<base>`` in transformers' attention and mask registries. The twin computes what
its base computes, through its base; beyond that it reads ragged layers, and hands each
layer the queries it needs to prune itself. Calls that do not come from a `ReFreeKVCache`
pass through untouched.
"""

import sys
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refreekv.engines.transformers.layer import TAG, ReFreeKVLayer
from refreekv.engines.transformers.ragged_attention import AttentionFunction, in_one_type, ragged_attention
from refreekv.pruning.calls import AttentionCall

PREFIX = "refreekv_"


@runtime_checkable
class OwnAttention(Protocol):
    """A cache layer that computes attention itself: a tagged key leads to it as to a `ReFreeKVLayer`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """Attention output ``[B, q, H, Dv]``; ``key`` and ``value`` are what its ``update`` returned."""


def twin(base: str) -> str:
    """Register (once) and name the refreekv twin of an attention implementation.

    Raises
    ------
    ValueError
        For implementations whose masks or caches refreekv cannot read.
    """
    if base.startswith(PREFIX):
        return base
    if base not in ("eager", "sdpa") and "flash" not in base:
        raise ValueError(
            f"attention implementation {base!r} is not supported; load the model with attn_implementation='sdpa', "
            "'eager' or 'flash_attention_2'"
        )
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _make(base))
        # Without a mask function of its own the name would silently get no mask at all.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
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
        layer: ReFreeKVLayer | OwnAttention | None = getattr(key, TAG, None)
        if layer is None:
            return function(called, query, key, value, attention_mask, **kwargs)
        # The tag is a reference from the layer's own tensor to the layer: drop it at once.
        delattr(key, TAG)
        if kwargs.get("position_bias") is not None:
            raise ValueError("attention with a position bias is not supported: a probe would have to repeat it")
        weights = None
        if isinstance(layer, OwnAttention):
            return layer.attend(query, key, value, **kwargs), None
        function = in_one_type(function, flash=flash)
        if layer.ragged is None:
            output, weights = function(called, query, key, value, attention_mask, **kwargs)
        else:
            output = ragged_attention(layer, function, called, query, attention_mask, flash=flash, **kwargs)
        layer.after_attention(
            AttentionCall(
                query,
                attention_mask,
                scaling=kwargs.get("scaling"),
                softcap=kwargs.get("softcap"),
                sink_logits=kwargs.get("s_aux"),
            )
        )
        return output, weights

    attention.__name__ = PREFIX + base
    return attention


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
