"""Residual additions and the normalisations behind them as one kernel each, for the length of a capture.

A decoder layer adds what attention gave and normalises the sum, and again what its MLP gave, which the next layer
normalises. Layers are recognised by their parts, and each is compared with its own code, with attention and MLP that
are stand-ins.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""Children of a layer, all that it has."""


class Norm:
    """A normalisation's forward that also makes the sum it is of."""

    def __init__(self, module: nn.Module, eps: float, one_added: bool):
        (self.weight,) = module.parameters(recurse=False)
        self._module, self._eps, self._one_added = module, eps, one_added

    def __call__(self, x: Tensor) -> Any:
        """``x`` normalised."""
        from refreekv.kernels import fused as kernels

        if x.dtype != self.weight.dtype:  # under autocast: results are of the wider type
            return type(self._module).forward(self._module, x)
        return kernels.rms_norm(x, self.weight, self._eps, self._one_added)

    def added(self, x: Tensor, more: Tensor) -> tuple[Tensor, Any]:
        """``x + more``, and that normalised."""
        from refreekv.kernels import fused as kernels

        if not x.dtype == more.dtype == self.weight.dtype or x.shape != more.shape:
            total = x + more
            return total, self(total)
        return kernels.add_rms_norm(x, more, self.weight, self._eps, self._one_added)


class _Known:
    """The last sum that a layer made, and what the next one's normalisation makes of it."""

    def __init__(self) -> None:
        self.last: tuple[Any, Any] = (None, None)


def stand_ins(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Layers whose normalisations have a `Norm` for their forward by now, and what does for the layers' own."""
    layers = [layer for layer in model.modules() if _has_parts(layer) and _is_standard(layer)]
    known = _Known()
    for index, layer in enumerate(layers):
        yield layer, _forward(layer, layers[index + 1] if index + 1 < len(layers) else None, known)


def _has_parts(layer: nn.Module) -> bool:
    parts = dict(layer.named_children())
    norms = (parts[name].__dict__.get("forward") for name in PARTS if name.endswith("norm") and name in parts)
    return "forward" not in layer.__dict__ and parts.keys() == PARTS and all(isinstance(norm, Norm) for norm in norms)


def _forward(layer: Any, following: Any, known: _Known) -> Callable[..., Any]:
    first, second = (layer._modules[name].forward for name in ("input_layernorm", "post_attention_layernorm"))
    # Of a layer that comes next but is given something else, nothing is used.
    after = None if following is None else following.input_layernorm.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        total, normed = known.last
        if total is not hidden_states:
            normed = first(hidden_states)
        attended, _ = layer._modules["self_attn"](hidden_states=normed, **kwargs)
        total, normed = second.added(hidden_states, attended)
        more = layer._modules["mlp"](normed)
        if after is None:
            return total + more
        # One object, always replaced as a whole and not read again: threads may share the layers.
        known.last = both = after.added(total, more)
        return both[0]

    return forward


class _Attention(nn.Module):
    """Stands for attention, and notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[dict[str, Any]] = []

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        self.heard.append(kwargs)
        return hidden_states.flip(-1), None


class _MLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)


def _is_standard(layer: Any) -> bool:
    """Whether a layer's own code does what `_forward` does, and says the same to attention."""
    weight, attention = layer.input_layernorm.forward.weight, _Attention()
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(2, 1, len(weight), generator=generator, device=weight.device).to(weight.dtype)
    # A copy, as other threads may run the layer.
    probe = copy.copy(layer)
    probe.__dict__["_modules"] = {**layer._modules, "self_attn": attention, "mlp": _MLP()}
    own = type(layer).forward
    parameters = list(inspect.signature(own).parameters.values())[2:]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        names.append("another_argument")
    # Whatever it does with an argument but hand it on, it cannot do with these.
    said = {name: object() for name in names}
    try:
        want, got = own(probe, x, **said), _forward(probe, None, _Known())(x, **said)
    except Exception:  # whatever keeps it from running, the layer's own code still runs
        return False
    told, heard = attention.heard
    same = told.keys() == heard.keys() and all(told[name] is heard[name] for name in told)
    if not same or not isinstance(want, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
        return False
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}.get(want.dtype, 1e-2)
    return bool((got.double() - want.double()).norm() <= tolerance * want.double().norm())
