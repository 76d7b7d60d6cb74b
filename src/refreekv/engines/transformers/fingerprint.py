"""Whether a model is still what something was made from: a captured graph, or measured scores.

The two are asked different things. A graph has the addresses of weights in it and reads what is there
now, so that training in place is no news to it, while any tensor that moved is. A measurement is of the
values, wherever they are.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")
"""What PEFT's layers go by when they decide which adapters to run."""


def of_addresses(model: nn.Module) -> Hashable:
    """What changes when parameters or buffers move or are replaced, or when adapters are switched."""
    states = list(_states(model))
    held = [tensor for state in states for own in ("_parameters", "_buffers") for tensor in state[own].values()]
    return tuple(_place(part) for tensor in held for part in parts(tensor)), _adapters(states)


def of_contents(model: nn.Module) -> Hashable:
    """What changes when parameters are trained, loaded, moved or replaced, or when adapters are switched or merged.

    Not with buffers: rotary frequencies, say, may be computed anew for each long prompt. What autograd
    does not count goes unnoticed, too: changes through ``.data``, and to inference tensors in place.
    """
    states = list(_states(model))
    held = [part for state in states for tensor in state["_parameters"].values() for part in parts(tensor)]
    return tuple((*_place(part), 0 if part.is_inference() else part._version) for part in held), _adapters(states)


def _states(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Attributes of all modules, each once. A walk of its own: asked before each prefill, while the device waits."""
    found, left = set(), [model]
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            state = vars(module)
            left += [child for child in state["_modules"].values() if child is not None]
            yield state


def _place(tensor: Tensor) -> tuple[int, Any, Any]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


def parts(tensor: Any) -> Sequence[Tensor]:
    """Tensors with memory of their own: quantised weights may be tensors made of tensors."""
    if type(tensor) is nn.Parameter or type(tensor) is Tensor:
        return (tensor,)
    if tensor is None:
        return ()
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return [part for name in names for part in parts(getattr(tensor, name))] if names else (tensor,)


def _adapters(states: list[dict[str, Any]]) -> Hashable:
    return tuple(repr([state.get(name) for name in ADAPTERS]) for state in states if ADAPTERS[0] in state)
