"""Replacements for chains of small operations, for the length of one capture.

A normalisation, a gated activation and a rotary embedding are recognised by what they have, not by
what model they belong to, and each replacement is first compared with the module's own code on random
input. What is not recognised, or does not compute the same, stays as it is.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from refreekv.core.four_bits import MOST_ROWS as MOST_ROWS_OF_4_BITS
from refreekv.engines.transformers import four_bits, residuals

ROTARY = "apply_rotary_pos_emb"
MOST_ROWS = 32
"""Rows up to which our products with weights are known to beat the library's; see lab/performance.md."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}

Forward = Callable[..., Any]
Forwards = dict[nn.Module, Forward]
Maker = Callable[[Any], Forwards]
"""What makes replacements for a module, or for some of its children."""


@contextmanager
def fused(model: nn.Module, rows: int) -> Iterator[int]:
    """Within, modules of the model run fused kernels where these compute the same; yields how many do.

    Only instances are changed, for one token in each of ``rows`` rows, and by whoever captures the
    model: other threads that run it meanwhile get the same numbers.
    """
    swapped: list[nn.Module] = []
    like = _like(model)
    groups: dict[Any, tuple[list[nn.Module], list[Maker]]] = {}
    for module in model.modules():
        if "forward" not in module.__dict__:  # else somebody else's
            for kind, makers in _kinds(module, rows):
                groups.setdefault(kind, ([], makers))[0].append(module)
    try:
        # Whole modules come before their parts, which may be done already when their turn comes.
        for modules, makers in groups.values():
            left = [module for module in modules if "forward" not in module.__dict__]
            make = (
                next((m for m in makers if _same(left[0], m, rows, like)), None) if left and like is not None else None
            )
            if make is None:
                continue
            for module in left:
                for part, forward in make(module).items():
                    part.__dict__["forward"] = forward
                    swapped.append(part)
        # Last, as they need the normalisations'.
        for layer, whole in residuals.stand_ins(model):
            layer.__dict__["forward"] = whole
            swapped.append(layer)
        yield len(swapped)
    finally:
        for module in swapped:
            module.__dict__.pop("forward", None)


def _kinds(module: nn.Module, rows: int) -> Iterator[tuple[Any, list[Maker]]]:
    """What a module is recognised as, and what may stand in for it.

    A kind is what modules share for which one comparison is enough.
    """
    weights = [(tuple(p.shape), p.dtype) for p in module.parameters(recurse=False)]
    forms = {name: _form(part, rows) for name, part in module.named_children()}
    shapes = (type(module), rows, *((name, form) for name, form in forms.items() if form is not None))
    if type(module).__name__.endswith("RMSNorm") and len(weights) == 1 and len(weights[0][0]) == 1:
        yield (type(module), weights[0], _epsilon(module)), [_norm(False), _norm(True)]
    elif hasattr(module, "down_proj") and _linears(module):
        makers: list[Maker] = [_gated(False), _gated(True)]
        if all(forms.get(name) is not None for name in ("gate_proj", "up_proj")):
            makers = [_gated_linear(False), _gated_linear(True), *makers]
        yield shapes, makers
    if all(forms.get(name) is not None for name in PROJECTIONS):
        yield (*shapes, PROJECTIONS), [_linears_of(*PROJECTIONS)]
    elif (form := _form(module, rows)) is not None:
        yield (type(module), form), [_linears_of()]
    if ROTARY in getattr(getattr(_undecorated(type(module).forward)[-1], "__code__", None), "co_names", ()):
        yield (type(module), ROTARY), [_rotary]


def _plain(module: Any) -> bool:
    """Whether a module is a linear layer whose weights the kernels can read.

    Quantised weights are not: they may be in a layer of this very class, as tensors that say another type than
    their memory has.
    """
    weight = getattr(module, "weight", None)
    return (
        type(module) is nn.Linear
        and isinstance(weight, Tensor)
        and type(weight) in (nn.Parameter, Tensor)
        and weight.dtype in (torch.float16, torch.bfloat16)
        and weight.is_contiguous()
    )


def _form(linear: Any, rows: int) -> tuple[Any, ...] | None:
    """What linear layers share for which one comparison is enough; None if our products do not do for them."""
    if _plain(linear):
        return (tuple(linear.weight.shape), linear.weight.dtype, _bias_type(linear)) if rows <= MOST_ROWS else None
    coded = four_bits.held(linear) if rows <= MOST_ROWS_OF_4_BITS else None
    return None if coded is None else (*four_bits.form(coded), _bias_type(linear))


def _bias_type(linear: Any) -> torch.dtype | None:
    """The type of a layer's bias, which one launch for several layers takes to be that of all; None if it has none."""
    return None if linear.bias is None else linear.bias.dtype


def _products(parts: list[Any]) -> tuple[Any, list[Any], Callable[[Tensor], bool]]:
    """Kernels for the products of linear layers with one input, their matrices, and for what input they are."""
    if all(_plain(part) for part in parts):
        from refreekv.kernels import linear

        kind = parts[0].weight.dtype
        return linear, [part.weight for part in parts], lambda x: _few_rows(x, MOST_ROWS) and x.dtype == kind
    from refreekv.kernels import four_bits as kernels

    coded = [matrix for part in parts if (matrix := four_bits.held(part)) is not None]
    if len(coded) < len(parts) or not four_bits.of_one_kind(coded):
        raise AttributeError("matrices of different kinds")
    return kernels, coded, lambda x: _few_rows(x, MOST_ROWS_OF_4_BITS) and x.dtype in (torch.float16, torch.bfloat16)


def _few_rows(x: Tensor, most: int) -> bool:
    """Whether this is one token in each of a few rows."""
    return x.dim() == 3 and x.shape[1] == 1 and x.shape[0] <= most


def _linears(module: nn.Module) -> list[Any]:
    """Children that are linear layers, of whatever class."""
    return [p for p in module.children() if isinstance(getattr(p, "in_features", None), int)]


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _like(module: nn.Module) -> Tensor | None:
    """A tensor of the type that a module computes in: that of its first weights that are plain numbers, if any are.

    Those that are quantised may be stored as bytes.
    """
    plain = (p for p in module.parameters() if type(p) is nn.Parameter and p.is_floating_point())
    return next(plain, None)


def _same(module: nn.Module, make: Maker, rows: int, like: Tensor) -> bool:
    """Whether replacements compute what the modules that they replace compute.

    ``like`` says on what numbers, where a module's own weights do not.
    """
    own = _like(module)
    like = like if own is None else own
    if make is _rotary:
        return _rotary_is_standard(module, like)
    try:
        return all(
            _close(forward(x), part(x)) for part, forward in make(module).items() for x in [_input(part, rows, like)]
        )
    except Exception:  # whatever keeps a replacement from running, the module itself still runs
        return False


def _input(part: nn.Module, rows: int, like: Tensor) -> Tensor:
    """Random input of a module, the same for modules of one input size: joint replacements look at that."""
    if children := _linears(part):
        return _random(like, rows, 1, children[0].in_features)
    if isinstance(size := getattr(part, "in_features", None), int):
        return _random(like, rows, 1, size)
    parameter = next(part.parameters())
    return _random(parameter, rows, 1, parameter.shape[-1])


def _random(like: Tensor, *shape: int) -> Tensor:
    """Normally distributed numbers, of the type of ``like`` and where it is; the user's random state is left alone."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=like.device).to(like.dtype)


def _close(got: Tensor, want: Tensor) -> bool:
    tolerance = _TOLERANCE.get(want.dtype)
    if tolerance is None or got.shape != want.shape or got.dtype != want.dtype:
        return False
    return bool((got.double() - want.double()).norm() <= tolerance * want.double().norm())


def _norm(one_added: bool) -> Maker:
    def make(module: nn.Module) -> Forwards:
        eps = _epsilon(module)
        if eps is None:
            raise AttributeError(f"{type(module).__name__} says no epsilon")
        return {module: residuals.Norm(module, eps, one_added)}

    return make


def _gated(gelu: bool) -> Maker:
    from refreekv.kernels import fused as kernels

    def make(module: Any) -> Forwards:
        def apart(x: Tensor) -> Any:
            return module.down_proj(kernels.gated(module.gate_proj(x), module.up_proj(x), gelu))

        def joint(x: Tensor) -> Any:
            gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
            return module.down_proj(kernels.gated(gate, up, gelu))

        return {module: apart if hasattr(module, "gate_proj") else joint}

    return make


def _gated_linear(gelu: bool) -> Maker:
    """Both products and the activation in one launch."""

    def make(module: Any) -> Forwards:
        gate, up = module.gate_proj, module.up_proj
        kernels, (first, second), fits = _products([gate, up])
        if gate.bias is not None or up.bias is not None or first.shape != second.shape:
            raise AttributeError("gate and up projection have biases or different shapes")

        def forward(x: Tensor) -> Any:
            if not fits(x):
                return type(module).forward(module, x)
            return module.down_proj(kernels.gated_linear(x.contiguous(), first, second, gelu))

        return {module: forward}

    return make


def _linears_of(*names: str) -> Maker:
    """A linear layer, or several children of a module in one launch.

    The first child is asked for; the others' results are there when they are asked for with the
    same input.
    """

    def make(module: Any) -> Forwards:
        parts = [getattr(module, name) for name in names] or [module]
        if len({part.in_features for part in parts}) > 1 or len({_bias_type(part) for part in parts}) > 1:
            raise AttributeError("projections of different kinds")
        kernels, weights, fits = _products(parts)
        # The last input and its results, always replaced together: threads may share the module.
        known: list[tuple[Any, Any]] = [(None, None)]

        def forward_of(index: int) -> Forward:
            part = parts[index]

            def forward(x: Tensor) -> Tensor:
                if not fits(x):
                    own: Tensor = type(part).forward(part, x)
                    return own
                asked, outputs = known[0]
                if asked is not x or index == 0:
                    outputs = kernels.linears(x.contiguous(), weights, [p.bias for p in parts])
                    known[0] = x, outputs
                out: Tensor = outputs[index]
                return out

            return forward

        return {part: forward_of(index) for index, part in enumerate(parts)}

    return make


def _rotary(module: nn.Module) -> Forwards:
    """The module's own forward with its decorators, to which the rotary function of its file is another one."""
    from refreekv.kernels import fused as kernels

    *decorators, own = _undecorated(type(module).forward)
    original = own.__globals__[ROTARY]

    def rotary(*given: Any, **named: Any) -> Any:
        if len(given) != 4 or named or not all(isinstance(part, Tensor) for part in given):
            return original(*given, **named)  # what a model asks for with other arguments is its own affair
        query, key, cos, sin = given
        plain = query.shape[2] == 1 and query.stride(-1) == key.stride(-1) == 1
        plain = plain and query.dtype == key.dtype == cos.dtype == sin.dtype
        if plain and cos.dim() == 3 and cos.shape[-1] == query.shape[-1] == key.shape[-1]:
            return kernels.rotary(query, key, cos.contiguous(), sin.contiguous())
        return original(query, key, cos, sin)

    copied = _copy(own, own.__closure__, {**own.__globals__, ROTARY: rotary})
    inner = own
    for decorator in reversed(decorators):
        cells = (types.CellType(copied) if _holds(cell, inner) else cell for cell in decorator.__closure__)
        copied, inner = _copy(decorator, tuple(cells), decorator.__globals__), decorator
    return {module: types.MethodType(copied, module)}


def _undecorated(function: Any) -> list[Any]:
    """A function and what it decorates, outermost first, as far as decorators hold it in a variable of theirs."""
    inner = getattr(function, "__wrapped__", None)
    if any(_holds(cell, inner) for cell in getattr(function, "__closure__", None) or ()):
        return [function, *_undecorated(inner)]
    return [function]


def _holds(cell: Any, function: Any) -> bool:
    try:
        return isinstance(function, types.FunctionType) and cell.cell_contents is function
    except ValueError:  # an empty cell
        return False


def _copy(function: Any, closure: tuple[Any, ...] | None, names: dict[str, Any]) -> Any:
    """A function with the same code and other variables."""
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _rotary_is_standard(module: nn.Module, like: Tensor) -> bool:
    """Whether the rotary function rotates halves against each other, as the kernel does."""
    from refreekv.kernels import fused as kernels

    original = _undecorated(type(module).forward)[-1].__globals__.get(ROTARY)
    if original is None:
        return False
    query, key = (_random(like, 2, heads, 1, 64) for heads in (4, 2))
    angle = _random(like, 2, 1, 32).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    try:
        got, want = kernels.rotary(query, key, cos, sin), original(query, key, cos, sin)
        return all(_close(mine, other) for mine, other in zip(got, want, strict=True))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
