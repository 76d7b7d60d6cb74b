"""The transformers model inside what a user holds: what PEFT, accelerate, DDP and others wrap around it."""

import inspect
from collections.abc import Iterator
from typing import get_args

from torch import nn
from transformers import Cache, PreTrainedModel

from refreekv.engines.transformers.naming import NAMES

COMPILED = (
    "the model is compiled by torch.compile, and refreekv cannot follow keys and values into compiled code: hand it "
    "the model before that (model._orig_mod), or leave torch.compile out. On CUDA refreekv captures decoding in a "
    "graph of its own"
)
"""Why a compiled model is refused."""


def decoder_of(model: object) -> PreTrainedModel:
    """The transformers model that runs when ``model`` is called: itself, or the one that it wraps.

    PEFT's models, those of accelerate and DistributedDataParallel and modules of one's own with one
    transformers model inside are followed. Attaching to what is found serves
    calls of ``model``, too, since these go through it.

    Raises
    ------
    TypeError
        No transformers model, several of them, or a wrapper that does not simply call it.
    ValueError
        `torch.compile`'s wrapper.
    """
    if isinstance(model, PreTrainedModel):
        return model
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a transformers model, got {kind}")
    for wrapper in model.modules():
        _check_wrapper(wrapper)
        if isinstance(wrapper, PreTrainedModel):
            break
    found = list(_outermost(model))
    if len(found) > 1:
        found = [inner for inner in found if inner.can_generate()] or found
    if len(found) == 1:
        return found[0]
    if not found:
        raise TypeError(f"expected a transformers model, got {kind}, which has none inside")
    names = ", ".join(sorted(type(inner).__name__ for inner in found))
    raise TypeError(
        f"{kind} has several transformers models inside ({names}); pass the one whose cache is to be pruned"
    )


def check_can_prune(model: PreTrainedModel) -> None:
    """Raise ValueError if the model takes no cache, or computes attention by itself: as far as one can tell unrun."""
    kind = type(model).__name__
    by_interface = getattr(type(model), "_can_set_attn_implementation", lambda: True)()
    # One that names no cache may hand it on to a model inside that does.
    if not any(_names_cache(part) for part in model.modules() if isinstance(part, PreTrainedModel)):
        raise ValueError(f"{kind} takes no KV cache, so that there is nothing to prune; run it without refreekv")
    if not by_interface:
        raise ValueError(
            f"{kind} computes attention without transformers' attention interface; refreekv cannot prune its cache"
        )


def _names_cache(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return any(name in NAMES and not _is_foreign(one.annotation) for name, one in parameters.items())


def _is_foreign(annotation: object) -> bool:
    """Whether an annotation says that a cache is a class of the model's own that is none of transformers'."""
    classes = [one for one in (get_args(annotation) or (annotation,)) if isinstance(one, type)]
    return any(one.__name__.endswith("Cache") and not issubclass(one, Cache) for one in classes)


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Transformers models in a module that are in no other one."""
    seen: set[int] = set()
    todo = [module]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, PreTrainedModel):
            yield one
        else:
            todo += one.children()


def _check_wrapper(module: nn.Module) -> None:
    """Raise TypeError or ValueError for wrappers that do something else with the model than call it."""
    kind = type(module).__name__
    if hasattr(module, "_orig_mod"):
        raise ValueError(COMPILED)
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        raise TypeError(
            "DataParallel runs copies of the model that a cache cannot follow; pass the model inside (its .module), "
            "or use DistributedDataParallel"
        )
    if kind == "FullyShardedDataParallel":
        raise TypeError(
            "FullyShardedDataParallel has the model's weights only while it runs itself, which generate goes past; "
            "use fully_shard, or gather the weights and pass the model inside (its .module)"
        )
    configs = getattr(module, "peft_config", None)
    if isinstance(configs, dict):
        active = getattr(module, "active_adapter", None)
        config = configs.get(active) if isinstance(active, str) else None
        if getattr(config, "is_prompt_learning", False):
            raise TypeError(
                f"{kind} with {type(config).__name__} puts virtual tokens in front of each prompt, whose end refreekv "
                "then does not know; merge or disable the adapter, or pass the base model"
            )
