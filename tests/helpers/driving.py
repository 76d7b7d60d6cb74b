"""What the tests of the cache and of attaching share: policies, ways to feed a model, accounts of memory."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch

from helpers.models import prompts
from refreekv.core.key_codes import KeyCodes
from refreekv.core.selection import Selection
from refreekv.policies import LayerView, Policy, ProbePlan
from refreekv.policies.heavy_hitter import ReFreeKVHeavyHitter

PARAMETERS: dict[str, Any] = {"threshold": 0.2, "frozen_layers": 1}
PRUNING: dict[str, Any] = {"policy": "refreekv", **PARAMETERS}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "refreekv": ("refreekv", PARAMETERS),
    "heavy-hitter": ("refreekv-heavy-hitter", {"threshold": 0.1, "frozen_layers": 0}),
    "window": ("streaming-llm", {"size": 20}),
    "joint": ("cake", {"ratio": 0.4, "window": 4}),
}
RAGGED = (52, 40, 29, 47)


@dataclass(frozen=True)
class Uneven(Policy):
    """The 6 newest entries of each KV head, and of the others more in each head than in the one before.

    Of a ladder of number formats neighbours have different ones.
    """

    name = "uneven"
    frozen_layers: int | Literal["all"] = 0

    def select(self, view: LayerView) -> Selection:
        real = view.real_heads
        newest = real.flip(-1).cumsum(-1).flip(-1)
        heads = torch.arange(real.shape[1], device=real.device)[:, None]
        keep = real & ((newest <= 6) | (newest * 7 % 5 < 1 + heads))
        return Selection(keep, levels=((newest + heads) % 4).to(torch.uint8))


@dataclass(frozen=True)
class SpreadHeavyHitter(ReFreeKVHeavyHitter):
    """Heavy hitters of the last queries and of some over the whole prompt."""

    spread: int = 12

    def probe_plan(self, n: int) -> ProbePlan:
        return ProbePlan(rows=self.probe_rows, spread=self.spread)


@torch.no_grad()
def prefill(model, cache, lengths=RAGGED, seed=3):
    ids, mask = prompts(lengths, seed=seed)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
    return logits, mask


@torch.no_grad()
def feed(model, cache, ids, mask):
    """Feed tokens ``[B, q]``; their logits and the longer mask."""
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    positions = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits, mask


def tensors_of(layer):
    """All tensors that can be reached from a cache layer."""
    seen, found, todo = set(), [], [vars(layer)]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
        elif type(item).__module__.startswith("refreekv") and not isinstance(item, KeyCodes):  # those are the model's
            todo.append(getattr(item, "__dict__", None))
    return found


def storage_bytes(tensors):
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def kv_bytes(cache):
    """Bytes of all floating-point storages reachable from the layers: keys, values and anything hidden."""
    return storage_bytes([t for layer in cache.layers for t in tensors_of(layer) if t.is_floating_point()])


def index_bytes(cache):
    """Bytes of the integer storages of the full-attention layers."""
    layers = [layer for layer in cache.layers if type(layer).__module__.startswith("refreekv")]
    return storage_bytes([t for layer in layers for t in tensors_of(layer) if not t.is_floating_point()])


def check_bytes(cache, report):
    assert report.bytes_after == kv_bytes(cache)
    assert report.index_bytes == index_bytes(cache)
    assert report.bytes_after == sum(layer.bytes_after for layer in report.layers)
    for layer in report.prunable:
        assert layer.bytes_after == sum(row.bytes_after for row in layer.rows)
        assert layer.bytes_before == sum(row.bytes_before for row in layer.rows)


def greedy(model, ids, mask, cache, steps=6, **settings):
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=steps, do_sample=False, **settings
    )


def generate(model, ids, steps=6, **settings):
    """Greedy answers."""
    return model.generate(ids, max_new_tokens=steps, do_sample=False, **settings)


def state_of(model, *, weights=True):
    """Everything that attaching could leave behind, in a form to compare; ``weights`` may be replaced by others."""
    modules = {}
    for name, module in model.named_modules():
        attributes = {}
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers") and not weights:
                continue
            # Hook dictionaries are looked into, everything else must be the very same object.
            attributes[key] = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
        modules[name] = attributes
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}

    def letters(value):  # names of attention functions say that they are equal to others
        return str(value) if isinstance(value, str) else value

    return (
        modules,
        {key: {k: letters(copy.deepcopy(v)) for k, v in vars(config).items()} for key, config in configs.items()},
        model.config.to_dict(),
        model.generation_config.to_dict(),
        [letters(config._attn_implementation) for config in configs.values()],
        type(model).__dict__.get("generate"),
    )
