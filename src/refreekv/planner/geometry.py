"""What a model stores for each token: measured on a model without weights.

A model built on torch's meta device has shapes and no data. It reads two tokens into
transformers' own cache, and what the cache then holds is the geometry: grouped and single
KV heads, head sizes of their own, windows, shared layers, latent vectors and recurrent
states need no rule each.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from refreekv.core.configuration import head_size
from refreekv.core.footprint import PLAIN_BYTES, LayerKind, LayerKV, Mix
from refreekv.core.quantisation import KVDtype
from refreekv.planner.source import Model, ModelError, once_for_each

PROBE_TOKENS = 2


@dataclass(frozen=True)
class Geometry:
    """What all layers store."""

    layers: tuple[LayerKV, ...]

    @property
    def prunable(self) -> tuple[LayerKV, ...]:
        """The layers that may be pruned and quantised."""
        return tuple(layer for layer in self.layers if layer.kind == "full")

    @property
    def bytes_per_token(self) -> int:
        """Bytes that each further token of a long context takes, in the precision of the model."""
        return sum(layer.elements * PLAIN_BYTES for layer in self.layers if layer.kind in ("full", "latent"))

    @property
    def bounded_bytes(self) -> int:
        """Bytes that windows and states come to at most."""
        return sum(
            int(layer.bytes(layer.window or 0)) for layer in self.layers if layer.kind not in ("full", "latent")
        ) + sum(layer.state_bytes for layer in self.layers if layer.kind in ("full", "latent"))

    def stored_per_token(self, number: KVDtype | Mix | None) -> int:
        """`bytes_per_token` with the prunable layers in a number format."""
        if number is None:
            return self.bytes_per_token
        return round(
            sum(
                layer.line_bytes(number) if layer.kind == "full" else layer.elements * PLAIN_BYTES
                for layer in self.layers
                if layer.kind in ("full", "latent")
            )
        )

    def full_bytes(self, tokens: int) -> int:
        """Bytes of a full cache of ``tokens`` tokens."""
        return int(sum(layer.bytes(tokens) for layer in self.layers))

    def kept_bytes(self, prompt: int, output: int, budget: float, number: KVDtype | Mix | None) -> int:
        """Bytes of a request of which the share ``budget`` of the prompt is kept, and all of the output.

        The first and the newest entries stay in the precision of the model, as `refreekv.KVDtype` says.
        """
        total = 0.0
        kept = budget * prompt + output
        for layer, count in self._alike:
            if layer.kind != "full":
                total += count * layer.bytes(prompt + output)
                continue
            total += count * layer.stored_bytes(kept, number)
        return int(total)

    @cached_property
    def _alike(self) -> tuple[tuple[LayerKV, int], ...]:
        """Layers that store the same, and how many there are."""
        return tuple(Counter(self.layers).items())

    def describe(self) -> str:
        """The layers in words, such as ``32 full-attention layers of 8 KV heads × 128``."""
        return "; ".join(_words(layer, count) for layer, count in self._alike)


def _words(layer: LayerKV, count: int) -> str:
    sizes = str(layer.key_size) if layer.key_size == layer.value_size else f"({layer.key_size} + {layer.value_size})"
    match layer.kind:
        case "state":
            return f"{count} × fixed state of {layer.state_bytes:,} bytes"
        case "latent":
            return f"{count} × latent cache (MLA) of {layer.key_size + layer.value_size} elements"
        case "window":
            return f"{count} × window of {layer.window:,} tokens, {layer.heads} KV heads of {sizes}"
    return f"{count} × full attention, {layer.heads} KV heads of {sizes}"


def measure(model: Model) -> Geometry:
    """The geometry of a model, from what it stores when it runs without data.

    Raises
    ------
    ModelError
        A model without attention fields, or whose cache transformers does not build.
    """
    text = model.text
    for name in ("num_hidden_layers", "num_attention_heads"):
        value = getattr(text, name, None)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"the configuration of {model.name} has no usable {name}, so there is no K/V to plan for")
    try:
        layers = _run(text)
    except Exception as error:  # whatever a model's code does without data
        layers = _read(model, error)
    if not any(layer.elements or layer.state_bytes for layer in layers):
        raise ModelError(f"{model.name} stores no keys and values")
    return Geometry(tuple(layers))


def skeleton(config: Any) -> Any:
    """A model without data, of a configuration of a whole model or of its language model."""
    import torch
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM

    # A copy: the caller's may be that of a model which runs, and transformers reads it at each call.
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        for name in getattr(config, "architectures", None) or ():
            architecture = getattr(transformers, name, None)
            if architecture is not None and hasattr(architecture, "_from_config"):
                return architecture._from_config(config, dtype=torch.bfloat16)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        except ValueError:
            return AutoModel.from_config(config, dtype=torch.bfloat16)


@once_for_each
def _run(text: Any) -> list[LayerKV]:
    import torch
    from transformers import DynamicCache

    from refreekv.engines.transformers.naming import cache_argument

    built = skeleton(text).eval()
    cache = DynamicCache(config=text)
    with torch.device("meta"), torch.no_grad():
        built(torch.zeros(1, PROBE_TOKENS, dtype=torch.long), **cache_argument(built.forward, cache), use_cache=True)
    latent = bool(getattr(text, "kv_lora_rank", None))
    found = [_layer(layer, latent) for layer in cache.layers]
    return [layer for layer in found if layer.elements or layer.state_bytes]


def _layer(layer: Any, latent: bool) -> LayerKV:
    states = sum(
        tensor.numel() * tensor.element_size()
        for name in ("conv_states", "recurrent_states")
        for tensor in _tensors(getattr(layer, name, None))
    )
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        return LayerKV("state", state_bytes=states)
    indexer = getattr(layer, "indexer_keys", None)
    extra = indexer.shape[-1] if indexer is not None and indexer.dim() > 2 else 0
    window = getattr(layer, "sliding_window", None)
    kind: LayerKind = "window" if window is not None else "latent" if latent else "full"
    return LayerKV(kind, keys.shape[1], keys.shape[-1] + extra, values.shape[-1], window, states)


def _tensors(states: Any) -> Iterable[Any]:
    import torch

    if isinstance(states, torch.Tensor):
        return [states]
    if isinstance(states, dict):
        return [tensor for tensor in states.values() if isinstance(tensor, torch.Tensor)]
    return [tensor for tensor in states or () if isinstance(tensor, torch.Tensor)]


def _read(model: Model, error: Exception) -> list[LayerKV]:
    """From the configuration's fields, where the model does not run without data."""
    from transformers import DynamicCache

    text = model.text
    try:
        layers = DynamicCache(config=text).layers
        configs = list(text.per_layer_config)
    except Exception:
        raise ModelError(f"transformers builds no cache for {model.name} ({text.model_type}): {error}") from error
    found = []
    for layer, config in zip(layers, configs, strict=True):
        if type(layer).__name__ == "DummyLayer":
            continue
        if not hasattr(layer, "keys"):
            raise ModelError(
                f"{model.name} ({text.model_type}) has layers with a state of their own, and its code does not run "
                f"without data ({error}), so their size is not known"
            )
        if rank := getattr(config, "kv_lora_rank", None):
            found.append(LayerKV("latent", 1, rank, config.qk_rope_head_dim))
            continue
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = head_size(config)
        window = getattr(layer, "sliding_window", None)
        found.append(LayerKV("full" if window is None else "window", heads, size, size, window))
    return found
