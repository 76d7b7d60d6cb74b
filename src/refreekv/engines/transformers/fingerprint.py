"""Whether a model is still what something was made from: a captured graph, or measured scores.

The two are asked different things. A graph has the addresses of weights in it and reads what is there
now, so that training in place is no news to it, while any tensor that moved is. A measurement is of the
values, wherever they are.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

from torch import Tensor, nn

ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")
"""What PEFT's layers go by when they decide which adapters to run."""


def of_addresses(model: nn.Module) -> Hashable:
    """What changes when parameters or buffers move or are replaced, or when adapters are switched."""
    states, held = _walk(model, lambda state: state["_buffers"])
    return tuple(_place(part) for part in held), _adapters(states)


def of_contents(model: nn.Module) -> Hashable:
    """What changes when parameters are trained, loaded, moved or replaced, or when adapters are switched or merged.

    Of buffers those count that checkpoints hold, as quantised weights are; rotary frequencies, say, may be computed
    anew for each long prompt. What autograd does not count goes unnoticed: changes through ``.data``, and to inference
    tensors in place.
    """
    states, held = _walk(model, lasting_buffers)
    places = [(part.data_ptr(), part.dtype, part.shape, 0 if part.is_inference() else part._version) for part in held]
    return tuple(places), _adapters(states)


def _walk(
    model: nn.Module, named: Callable[[dict[str, Any]], Collection[str]]
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Attributes of all modules, each once, and the tensors with memory of their own that they compute with.

    Of buffers those are counted that are ``named``. One loop, as it is asked of each prompt, by a host that has a
    device to keep busy.
    """
    found, states, held = {model}, [vars(model)], list[Tensor]()
    for state in states:
        if state["_modules"]:
            for child in state["_modules"].values():
                if child is not None and child not in found:
                    found.add(child)
                    states.append(vars(child))
        for tensor in state["_parameters"].values():
            if type(tensor) is nn.Parameter:  # as most are
                held.append(tensor)
            else:
                held += parts(tensor)
        if state["_buffers"]:
            wanted = named(state)
            held += [part for name, own in state["_buffers"].items() if name in wanted for part in parts(own)]
        weight = state["_parameters"].get("weight")
        if "state" in state or (weight is not None and "SCB" in vars(weight)):
            held += scales(state)
    return states, held


def _place(tensor: Tensor) -> tuple[int, Any, Any]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


def lasting_buffers(state: dict[str, Any]) -> set[str]:
    """Names of a module's buffers that belong to its checkpoint."""
    return {name for name in state["_buffers"] if name not in state["_non_persistent_buffers_set"]}


def scales(state: dict[str, Any]) -> Sequence[Tensor]:
    """Scales of bitsandbytes' 8-bit weights: they lie with the weight, and after its first use with the module."""
    weight = state["_parameters"].get("weight")
    for holder in (weight, state.get("state")):
        found = getattr(holder, "SCB", None)
        if isinstance(found, Tensor):
            return (found,)
    return ()


def parts(tensor: Any) -> Sequence[Tensor]:
    """Tensors with memory of their own: quantised weights may be tensors made of tensors, or have some beside them."""
    if type(tensor) is nn.Parameter or type(tensor) is Tensor:
        return (tensor,)
    if tensor is None:
        return ()
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    if names:
        return [part for name in names for part in parts(getattr(tensor, name))]
    return (tensor, *_state_parts(getattr(tensor, "quant_state", None)))


def _state_parts(state: Any) -> Sequence[Tensor]:
    """Scales and code book of bitsandbytes' 4-bit weights; scales may be quantised once more."""
    if state is None:
        return ()
    own = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    return [*(part for part in own if isinstance(part, Tensor)), *_state_parts(getattr(state, "state2", None))]


def _adapters(states: list[dict[str, Any]]) -> Hashable:
    return tuple(repr([state.get(name) for name in ADAPTERS]) for state in states if ADAPTERS[0] in state)
