"""K and V on their way from a cache layer to attention: unchanged, and to one call, or the model is refused.

A pruned layer cannot give a model all of its keys and values, as rows and heads have no common
length. What its ``update`` returns stands for them and is marked; the attention function finds the
layer by the mark and reads the storage itself. So a model that makes something else out of what it
got, attends to it twice, or computes attention by itself would see other entries than the cache
holds. Each of these is found while the first prompt is read, before anything was pruned.
"""

import threading
from typing import Any

from torch import Tensor, nn

MARK = "_refreekv_handout"
"""Attribute of a tensor that was handed to the model."""

ADVICE = "refreekv cannot prune its cache: run this model without refreekv"


class Handout:
    """Keys and values that a layer's ``update`` returned, until attention got them.

    Attributes
    ----------
    index : int
        The layer's index in the model.
    layer : object or None
        The layer; None once attention got what it handed out, so that its own tensors do not refer to it.
    """

    __slots__ = ("index", "layer", "others")

    def __init__(self, layer: Any, index: int):
        self.layer, self.index = layer, index
        self.others = _seen.calls


class _Seen(threading.local):
    """Attention calls of this thread whose keys and values no layer handed out: how many, and the latest."""

    calls = 0
    latest: tuple[str, tuple[int, ...]] = ("", ())


_seen = _Seen()


def hand_out(layer: Any, keys: Tensor, values: Tensor, index: int = -1) -> Handout:
    """Mark what a layer's ``update`` returns; ``index`` is the layer's in the model, for messages."""
    handout = Handout(layer, index)
    setattr(keys, MARK, handout)
    setattr(values, MARK, handout)
    return handout


def receive(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Any:
    """The layer that handed out these keys and values; None if none did.

    Raises
    ------
    RuntimeError
        The model changed one of the two, attends to them twice, or the layer is one of cross-attention.
    """
    handout: Handout | None = getattr(key, MARK, None)
    other: Handout | None = getattr(value, MARK, None)
    if handout is None and other is None:
        _seen.calls += 1
        _seen.latest = type(module).__name__, tuple(key.shape)
        return None
    if handout is not other:
        part, index = ("keys", other) if handout is None else ("values", handout)
        assert index is not None
        raise RuntimeError(
            f"{_name(module)} (layer {index.index}) attends to other {part} than the cache returned: it changes them "
            f"between cache.update and attention, which cannot be done to entries that are pruned. {ADVICE}"
        )
    assert handout is not None
    layer, handout.layer = handout.layer, None
    if layer is None:
        raise RuntimeError(
            f"{_name(module)} (layer {handout.index}) attends more than once to the keys and values of one call: a "
            f"layer is pruned after its first attention. {ADVICE}"
        )
    if getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__:
        raise RuntimeError(
            f"{_name(module)} (layer {handout.index}) is cross-attention, whose states refreekv does not prune, and "
            f"the model's configuration does not say so (cross_attention_layers). {ADVICE}"
        )
    if query.shape[1] % key.shape[1] or query.shape[0] != key.shape[0]:
        raise RuntimeError(
            f"{_name(module)} (layer {handout.index}) has queries of {query.shape[0]} rows and {query.shape[1]} heads "
            f"for keys of {key.shape[0]} rows and {key.shape[1]} heads, which cannot be shared out. {ADVICE}"
        )
    return layer


def missing(handout: Handout) -> str:
    """Why no attention got what was handed out."""
    if _seen.calls > handout.others:
        name, shape = _seen.latest
        return (
            f"layer {handout.index} of the model caches keys of one form and attends to others: attention was called "
            f"({name}, keys {list(shape)}) with keys and values made out of what the cache returned, as multi-head "
            f"latent attention (DeepSeek) and models that repeat their heads do. {ADVICE}"
        )
    return (
        f"layer {handout.index} of the model computes attention by itself, without transformers' attention interface, "
        f"so that entries could be evicted from its cache but not from its attention. {ADVICE}, or load it with "
        "another attn_implementation or implementation of the model"
    )


def _name(module: nn.Module) -> str:
    return type(module).__name__
