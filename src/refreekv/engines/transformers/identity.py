"""Which model a file was made for: the shape of its keys and values, and a few numbers of a few of its weights.

Small enough to stand in the file, and the same wherever and in whatever precision the model is loaded.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from refreekv.core.configuration import of_layers

SHAPE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "layer_types", "sliding_window", "rope_parameters",
)  # fmt: skip
"""Entries of a configuration that keys and values depend on."""

SAMPLES = 16
"""Numbers that are looked at of each of a few weights."""


def described(model: nn.Module) -> dict[str, Any]:
    """A model's name, shape and samples of its weights, as plain types."""
    name = getattr(model.config, "_name_or_path", None)
    return {"name": name or type(model).__name__, "shape": shape_of(model.config), "weights": _weights(model)}


def shape_of(config: Any) -> dict[str, Any]:
    """What keys and values depend on, as JSON gives it back."""
    text = config.get_text_config(decoder=True)
    found = {name: of_layers(text, name) for name in SHAPE}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def check_shape(made: Mapping[str, Any], config: Any, what: str, kind: str = "model") -> None:
    """Raise ValueError unless a configuration has the shape that was `described`.

    Parameters
    ----------
    made : mapping
        What `described` gave.
    config : PreTrainedConfig
        Of the model at hand.
    what : str
        What was made for the other model, for the message.
    kind : str
        What to call the model at hand.
    """
    own = shape_of(config)
    for key, value in dict(made["shape"]).items():
        if own.get(key) != value:
            raise ValueError(
                f"{what} was made for {made['name']}, with {key} = {value}; this {kind} has {own.get(key)}"
            )


def check_model(made: Mapping[str, Any], model: nn.Module, what: str) -> None:
    """Raise ValueError unless a model is the one that was `described`; as `check_shape`."""
    wanted = {key: torch.tensor(numbers) for key, numbers in made["weights"].items()}
    check_shape(made, model.config, what, type(model).__name__)
    named = dict(model.named_parameters())
    for key, numbers in wanted.items():
        weight = named.get(key)
        if weight is None or not _is_plain(weight):
            continue  # of a model that is wrapped or packed otherwise
        found = torch.tensor(_sample(weight))
        # Half precision and other roundings are the same weights.
        if numbers.shape != found.shape or (numbers - found).norm() > 0.05 * numbers.norm() + 1e-6:
            raise ValueError(
                f"{what} was made for another model of the same shape ({made['name']}): its {key} is another"
            )


def _weights(model: nn.Module) -> dict[str, list[float]]:
    """A few numbers of a few weights: another model of the same shape has others. Packed weights say nothing."""
    chosen = {}
    named = {name: part for name, part in model.named_parameters() if part.dim() == 2 and _is_plain(part)}
    names = list(named)
    for name in {names[len(names) * part // 4] for part in range(4)} if names else ():
        chosen[name] = _sample(named[name])
    return chosen


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and not weight.is_meta


def _sample(weight: Tensor) -> list[float]:
    flat = weight.detach().reshape(-1)
    numbers: list[float] = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float().tolist()
    return numbers
