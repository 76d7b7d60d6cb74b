"""One model of any type, pruned and not: what the sweep over all types asks of each.

The reference is the model with its own full cache. What the pruned cache evicted is hidden from it
layer by layer, in a mask given to the attention function that the model uses anyway: nothing of
refreekv is needed for that, and nothing is assumed about what that function computes.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel


class HidingCache(DynamicCache):
    """A full cache that says which layer was updated last, and which of its columns are hidden."""

    def __init__(self, config: Any, hidden: dict[int, Tensor]):
        super().__init__(config=config)
        self.hidden = hidden
        self.latest: tuple[int, Tensor, Tensor] | None = None
        self.applied = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        before = self.layers[layer_idx].get_seq_length()
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.latest = layer_idx if before else None, keys, values
        return keys, values


def _attention(base: Callable[..., Any] | None, cache: HidingCache) -> Callable[..., Any]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        mask = attention_mask
        if cache.latest is not None and cache.latest[0] in cache.hidden:
            layer, keys, values = cache.latest
            if key is keys or value is values or getattr(module, "layer_idx", None) == layer:
                mask = _hide(mask, cache.hidden[layer], query, key)
                cache.applied += 1
        return (base or _eager_beside(module))(module, query, key, value, mask, **kwargs)

    return attention


def _hide(mask: Tensor | None, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask ``[1, 1 | H, q, n]`` that hides ``hidden`` ``[H_kv, columns]``, too."""
    heads, queries, n = query.shape[1], query.shape[2], key.shape[2]
    full = torch.zeros(hidden.shape[0], n, dtype=torch.bool)
    full[:, : hidden.shape[1]] = hidden
    gone = full.repeat_interleave(heads // len(full), 0)[None, :, None].expand(-1, -1, queries, -1)
    if mask is None:
        mask = torch.ones(1, 1, queries, n, dtype=torch.bool).tril(n - queries)
    if mask.dtype == torch.bool:
        return mask & ~gone
    return mask.expand(-1, heads, -1, -1).masked_fill(gone, torch.finfo(mask.dtype).min)


@contextmanager
def _hiding(cache: HidingCache) -> Iterator[None]:
    """Within, all attention functions hide columns first; no configuration is touched, which models read, too."""
    registered = AttentionInterface._global_mapping
    before = dict(registered)
    try:
        for name in ("eager", "sdpa"):
            registered[name] = _attention(before.get(name), cache)
        yield
    finally:
        registered.clear()
        registered.update(before)


def _eager_beside(module: Any) -> Callable[..., Any]:
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise AssertionError(f"{type(module).__name__} has no eager attention")


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor], steps: int, cache: Any = None) -> Tensor:
    """Greedy logits ``[steps, V]``."""
    given = {} if cache is None else {"past_key_values": cache}
    out = model.generate(
        **inputs, **given, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    return torch.cat(out.logits).float()


def hidden_logits(
    model: PreTrainedModel, inputs: dict[str, Tensor], steps: int, hidden: dict[int, Tensor]
) -> tuple[Tensor, int]:
    """The same from a full cache of which ``hidden`` columns cannot be seen once the prompt was read."""
    cache = HidingCache(model.config, hidden)
    with _hiding(cache):
        return logits_of(model, inputs, steps, cache), cache.applied


def hidden_columns(cache: Any, prompt: int) -> dict[int, Tensor]:
    """What a pruned cache evicted of a prompt: by layer, boolean ``[H_kv, prompt]``."""
    found = {}
    for layer, heads in zip(cache.pruned_layers, cache.kept_ranges(), strict=True):
        gone = torch.ones(len(heads), prompt, dtype=torch.bool)
        for head, ranges in enumerate(heads):
            for start, stop in ranges:
                gone[head, start:stop] = False
        found[layer.index] = gone
    return found
