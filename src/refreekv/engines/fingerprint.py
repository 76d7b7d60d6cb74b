"""Whether a model is still what something was made from: a captured graph, or measured scores.

The two are asked different things. A graph has the addresses of weights in it and reads what is there
now, so that training in place is no news to it, while any tensor that moved is. A measurement is of the
values, wherever they are.
"""

from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor, nn

ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")
"""What PEFT's layers go by when they decide which adapters to run."""


def of_addresses(model: nn.Module) -> Hashable:
    """What changes when parameters or buffers move or are replaced, or when adapters are switched."""
    tensors = [part for own in (model.parameters(), model.buffers()) for tensor in own for part in _parts(tensor)]
    return tuple(_place(part) for part in tensors), _adapters(model)


def of_contents(model: nn.Module) -> Hashable:
    """What changes when parameters are trained, loaded, moved or replaced, or when adapters are switched or merged.

    Not with buffers: rotary frequencies, say, may be computed anew for each long prompt. What autograd
    does not count goes unnoticed, too: changes through ``.data``, and to inference tensors in place.
    """
    parts = [part for tensor in model.parameters() for part in _parts(tensor)]
    return tuple((*_place(part), 0 if part.is_inference() else part._version) for part in parts), _adapters(model)


def _place(tensor: Tensor) -> tuple[int, Any, Any]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


def _parts(tensor: Any) -> Iterator[Tensor]:
    """Tensors with memory of their own: quantised weights may be tensors made of tensors."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    if names:
        for name in names:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def _adapters(model: nn.Module) -> Hashable:
    states = (vars(module) for module in model.modules())
    return tuple(repr([state.get(name) for name in ADAPTERS]) for state in states if ADAPTERS[0] in state)
