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
    """The last sum that a layer made, and what the normalisation of the layer that is to be next makes of it."""

    def __init__(self) -> None:
        self._last: tuple[Any, Any, Any, int] = (None, None, None, 0)

    def note(self, norm: Norm, total: Tensor, normed: Any) -> None:
        """Keep what a normalisation made."""
        # One object, always replaced as a whole: threads may share the layers.
        self._last = norm, total, normed, _version(total)

    def normed(self, norm: Norm, x: Tensor) -> Any:
        """``x`` normalised."""
        by, total, normed, version = self._last
        # The model may run layers in another order than it has them, and may write into what is between them.
        return normed if by is norm and total is x and version == _version(x) >= 0 else norm(x)


def _version(x: Tensor) -> int:
    """How often a tensor was written into; -1 if nobody counts."""
    return -1 if x.is_inference() else x._version


def stand_ins(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Layers whose normalisations have a `Norm` for their forward by now, and what does for the layers' own."""
    layers = [layer for layer in model.modules() if _has_parts(layer) and _is_standard(layer)]
    known = _Known()
    for index, layer in enumerate(layers):
        yield layer, _forward(layer, layers[index + 1] if index + 1 < len(layers) else None, known)


def _has_parts(layer: nn.Module) -> bool:
    parts = dict(layer.named_children())
    norms = (parts[name].__dict__.get("forward") for name in PARTS if name.endswith("norm") and name in parts)
    numbers = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]  # that its own code may use
    untouched = "forward" not in layer.__dict__ and not numbers
    return untouched and parts.keys() == PARTS and all(isinstance(norm, Norm) for norm in norms)


def _forward(layer: Any, following: Any, known: _Known) -> Callable[..., Any]:
    first, second = (layer._modules[name].forward for name in ("input_layernorm", "post_attention_layernorm"))
    # Of a layer that comes next but is given something else, nothing is used.
    after = None if following is None else following.input_layernorm.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        normed = known.normed(first, hidden_states)
        attended, _ = layer._modules["self_attn"](hidden_states=normed, **kwargs)
        total, normed = second.added(hidden_states, attended)
        more = layer._modules["mlp"](normed)
        if after is None:
            return total + more
        total, normed = after.added(total, more)
        known.note(after, total, normed)
        return total

    return forward


def _instead(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A module of the same class, which layers may ask for, that computes something else."""
    made = copy.copy(module)
    made.__dict__["forward"], made.__dict__["_compiled_call_impl"] = forward, None
    return made


def _is_standard(layer: Any) -> bool:
    """Whether a layer's own code does what `_forward` does, and says the same to attention."""
    weight = layer.input_layernorm.forward.weight
    heard: list[dict[str, Any]] = []
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(3, 1, len(weight), generator=generator, device=weight.device).to(weight.dtype)

    def attention(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        heard.append(kwargs)
        return hidden_states.flip(-1), None

    def mlp(x: Tensor) -> Tensor:
        return x.roll(1, -1)

    # A copy, as other threads may run the layer.
    probe = copy.copy(layer)
    stand_ins = {"self_attn": _instead(layer.self_attn, attention), "mlp": _instead(layer.mlp, mlp)}
    probe.__dict__["_modules"] = {**layer._modules, **stand_ins}
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
    if len(heard) != 2:
        return False
    told, mine = heard
    same = told.keys() == mine.keys() and all(told[name] is mine[name] for name in told)
    if not same or not isinstance(want, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
        return False
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}.get(want.dtype, 1e-2)
    return bool((got.double() - want.double()).norm() <= tolerance * want.double().norm())
