"""Stand-ins for chains of small operations, for the length of one capture.

A normalisation, a gated activation and a rotary embedding are recognised by what they have, not by
what model they belong to, and each stand-in is first compared with the module's own code on random
input. What is not recognised, or does not compute the same, stays as it is.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROTARY = "apply_rotary_pos_emb"
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}

Forward = Callable[..., Any]


@contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Within, modules of the model run fused kernels where these compute the same; yields how many do.

    Only instances are changed, for one token a row, and by whoever captures the model: other
    threads that run it meanwhile get the same numbers.
    """
    swapped: list[nn.Module] = []
    known: dict[Any, Callable[[nn.Module], Forward] | None] = {}
    try:
        for module in list(model.modules()):
            if "forward" in module.__dict__:
                continue  # somebody else's: not ours to change
            kind = _kind(module)
            if kind is None:
                continue
            if kind not in known:
                known[kind] = _stand_in(module)
            make = known[kind]
            if make is not None:
                module.__dict__["forward"] = make(module)
                swapped.append(module)
        yield len(swapped)
    finally:
        for module in swapped:
            module.__dict__.pop("forward", None)


def _kind(module: nn.Module) -> Any:
    """What modules share that one comparison is enough for; None for those that nothing stands in for."""
    weights = [(tuple(p.shape), p.dtype) for p in module.parameters(recurse=False)]
    if type(module).__name__.endswith("RMSNorm") and len(weights) == 1 and len(weights[0][0]) == 1:
        return type(module), weights[0], _epsilon(module)
    if hasattr(module, "down_proj") and (hasattr(module, "gate_proj") or hasattr(module, "gate_up_proj")):
        projections = [(type(p), tuple(p.weight.shape)) for p in _linears(module)]
        return (type(module), *projections) if projections else None
    if ROTARY in getattr(getattr(type(module).forward, "__code__", None), "co_names", ()):
        return type(module)
    return None


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [p for p in module.children() if isinstance(p, nn.Linear)]


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _stand_in(module: nn.Module) -> Callable[[nn.Module], Forward] | None:
    """How to make stand-ins for modules like this one, if one computes the same."""
    if type(module).__name__.endswith("RMSNorm"):
        candidates = [_norm(one_added) for one_added in (False, True)]
    elif hasattr(module, "down_proj"):
        candidates = [_gated(gelu) for gelu in (False, True)]
    else:
        return _rotary if _rotary_is_standard(module) else None
    return next((make for make in candidates if _same(module, make(module))), None)


def _same(module: nn.Module, stand_in: Forward) -> bool:
    parameter = next(module.parameters())
    size = parameter.shape[-1] if parameter.dim() == 1 else _linears(module)[0].in_features
    x = _random(parameter, 2, 1, size)
    try:
        return _close(stand_in(x), module(x))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


def _random(like: Tensor, *shape: int) -> Tensor:
    """Normally distributed numbers that leave the user's random state alone."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=like.device).to(like.dtype)


def _close(got: Tensor, want: Tensor) -> bool:
    tolerance = _TOLERANCE.get(want.dtype)
    if tolerance is None or got.shape != want.shape or got.dtype != want.dtype:
        return False
    return bool((got.double() - want.double()).norm() <= tolerance * want.double().norm())


def _norm(one_added: bool) -> Callable[[nn.Module], Forward]:
    from refreekv.kernels import fused as kernels

    def make(module: nn.Module) -> Forward:
        eps = _epsilon(module)
        if eps is None:
            raise AttributeError(f"{type(module).__name__} says no epsilon")
        (weight,) = module.parameters(recurse=False)
        return lambda x: kernels.rms_norm(x, weight, eps, one_added)

    return make


def _gated(gelu: bool) -> Callable[[nn.Module], Forward]:
    from refreekv.kernels import fused as kernels

    def make(module: Any) -> Forward:
        if hasattr(module, "gate_proj"):
            return lambda x: module.down_proj(kernels.gated(module.gate_proj(x), module.up_proj(x), gelu))

        def joint(x: Tensor) -> Any:
            gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
            return module.down_proj(kernels.gated(gate, up, gelu))

        return joint

    return make


def _rotary(module: nn.Module) -> Forward:
    """The module's own forward, to which the rotary function of its file is another one."""
    from refreekv.kernels import fused as kernels

    own: Any = type(module).forward
    original = own.__globals__[ROTARY]

    def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        plain = not rest and not named and query.shape[2] == 1 and query.stride(-1) == key.stride(-1) == 1
        if plain and cos.dim() == 3 and cos.shape[-1] == query.shape[-1] == key.shape[-1]:
            return kernels.rotary(query, key, cos.contiguous(), sin.contiguous())
        return original(query, key, cos, sin, *rest, **named)

    copy = types.FunctionType(
        own.__code__, {**own.__globals__, ROTARY: rotary}, own.__name__, own.__defaults__, own.__closure__
    )
    copy.__kwdefaults__ = own.__kwdefaults__
    return types.MethodType(copy, module)


def _rotary_is_standard(module: nn.Module) -> bool:
    """Whether the rotary function rotates halves against each other, as the kernel does."""
    from refreekv.kernels import fused as kernels

    parameter = next(module.parameters(), None)
    original = type(module).forward.__globals__.get(ROTARY)
    if parameter is None or original is None:
        return False
    query, key = (_random(parameter, 2, heads, 1, 64) for heads in (4, 2))
    angle = _random(parameter, 2, 1, 32).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    try:
        got, want = kernels.rotary(query, key, cos, sin), original(query, key, cos, sin)
        return all(_close(mine, other) for mine, other in zip(got, want, strict=True))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
