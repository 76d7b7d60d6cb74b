"""Codes of a transformers model's own for its keys, measured once a model file; see `core.key_codes`."""

import inspect
import logging
import weakref
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from refreekv.core.key_codes import KeyCodes
from refreekv.engines.transformers import copy_scores, fingerprint, model_constants
from refreekv.pruning.copy_scores import tokens_said_twice
from refreekv.pruning.key_codes import TOKENS, CodeProbe, codes_of, offsets

KEPT = "key_codes."
"""What the names of codes begin with on disk; then come the index among the full-attention layers and the part."""
PARTS = ("order", "weight", "spread")

_KNOWN: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[object, tuple[KeyCodes, ...] | None]]"
_KNOWN = weakref.WeakKeyDictionary()
_log = logging.getLogger("refreekv")


def are_known(model: PreTrainedModel, weights: object) -> bool:
    """Whether codes of a model of which `fingerprint.of_contents` says ``weights`` are at hand, without any pass."""
    known = _KNOWN.get(model)
    return known is not None and known[0] == weights


def at_hand(model: PreTrainedModel) -> tuple[object, Sequence[KeyCodes] | None] | None:
    """What `fingerprint.of_contents` said when codes were last measured, and these; None: they never were."""
    return _KNOWN.get(model)


def forget(model: PreTrainedModel) -> None:
    """Measure anew when codes are next asked for, or read them from disk."""
    _KNOWN.pop(model, None)


def key_codes(model: PreTrainedModel, weights: object = None) -> Sequence[KeyCodes] | None:
    """Codes for the keys of each full-attention layer, measured at the first call and remembered, also on disk.

    Copy scores are measured on the way. To be called while refreekv is attached to the model. ``weights`` are what
    `fingerprint.of_contents` says of it now; None: it is asked.

    Returns
    -------
    sequence of KeyCodes or None
        None where none can be measured: a layer takes no part in a pass over plain text, or has heads that are no
        multiple of 16.
    """
    weights = fingerprint.of_contents(model) if weights is None else weights
    known = _KNOWN.get(model)
    if known is None or known[0] != weights:
        # A model that changed in this process is not what its file says.
        key = model_constants.key_of(model) if known is None else None
        found = None if key is None else _stored(key)
        if found is None:
            found = _measure(model, key)
        known = (weights, found)
        _KNOWN[model] = known
    return known[1]


def _stored(key: str) -> tuple[KeyCodes, ...] | None:
    """The codes on disk; None if there are none."""
    tensors = model_constants.load(key)
    layers = sum(name.startswith(KEPT) and name.endswith(PARTS[0]) for name in tensors)
    try:
        codes = [KeyCodes.known(*(tensors[f"{KEPT}{layer}.{part}"] for part in PARTS)) for layer in range(layers)]
    except (KeyError, ValueError) as error:
        _log.warning("codes that are kept of the model are ignored and will be measured anew: %s", error)
        return None
    return tuple(codes) or None


@torch.no_grad()
def _measure(model: PreTrainedModel, key: str | None) -> tuple[KeyCodes, ...] | None:
    config = model.config.get_text_config(decoder=True)
    prompt, count = tokens_said_twice(config)
    first, others, starts = CodeProbe(tokens=count), None, list[int]()
    try:
        scores = copy_scores.read(model, first, [prompt])
    except torch.OutOfMemoryError:  # which says nothing about the model, and would be remembered
        raise
    except RuntimeError as error:
        _log.info("keys are coded without codes of the model's own: %s", error)
        return None
    copy_scores.remember(model, scores, key)
    if any(moments.total.shape[1] % 16 for moments in first.moments.values()):
        return None
    if "position_ids" in inspect.signature(model.forward).parameters:
        prompt, count = tokens_said_twice(config, TOKENS)
        starts = offsets(int(getattr(config, "max_position_embeddings", 0) or 0), len(prompt))
    if starts:
        others = CodeProbe(tokens=count)
        copy_scores.read(model, others, [prompt] * len(starts), starts)
    codes = codes_of(first, others, len(starts), len(scores))
    if key is not None:
        tensors = {f"{KEPT}{at}.{part}": getattr(one, part) for at, one in enumerate(codes) for part in PARTS}
        model_constants.store(key, tensors)
    return tuple(codes)
