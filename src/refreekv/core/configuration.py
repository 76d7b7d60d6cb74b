"""What a language model's configuration says, also where its layers differ (Gemma 4 has heads of two sizes)."""

from typing import Any


def of_layers(text: Any, name: str) -> Any:
    """What a configuration says under a name: one value if all layers have the same, else a list; None: nothing."""
    if not getattr(text, "is_heterogeneous", False):
        return getattr(text, name, None)
    values = [getattr(layer, name, None) for layer in text.per_layer_config]
    return values[0] if all(value == values[0] for value in values) else values


def largest(text: Any, name: str) -> int | None:
    """The largest number that a configuration says under a name; None if it says none."""
    said = of_layers(text, name)
    return max((int(value) for value in (said if isinstance(said, list | tuple) else [said]) if value), default=None)


def head_size(text: Any) -> int:
    """Elements of a key, of the layer with the largest ones."""
    return largest(text, "head_dim") or int(text.hidden_size) // int(largest(text, "num_attention_heads") or 1)
