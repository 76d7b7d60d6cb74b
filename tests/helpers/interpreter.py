"""Triton's interpreter in a quarter of the time; what it computes and checks stays as it is.

Nearly all of its time goes into bookkeeping, done anew for each operation on blocks of a few numbers.
"""

import functools
import math

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

OWN = []
"""What was replaced: where, its name, and Triton's own."""


def hasten():
    """For this process; with what a release of Triton does not have left as it is."""
    # Works out in 64 bits whether integers overflow, for an assertion that only debugging makes.
    if not interpreter.interpreter_builder.options.debug:
        _replace(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda own: lambda *arguments: None)
    _replace(interpreter, "_patch_lang", _once)
    _replace(interpreter, "_get_np_dtype", _by_name)
    _replace(core.tensor, "__init__", lambda own: _make_tensor)
    _replace(core.block_type, "__init__", _by_shape)
    _replace(TritonSemantic, "broadcast_impl_value", _where_shapes_differ)


def _replace(where, name, by):
    if (own := getattr(where, name, None)) is not None:
        OWN.append((where, name, own))
        setattr(where, name, by(own))


def _once(patch):
    """Every call of every function in a kernel puts the interpreter's operations in place again: they may stay."""

    @functools.cache
    def call(fn):
        patch(fn)
        return interpreter._LangPatchScope()

    return call


def _by_name(function):
    """A function of a type, looked up by the type's name, which says all of it."""
    known = {}

    def call(dtype):
        if (name := dtype.name) not in known:
            known[name] = function(dtype)
        return known[name]

    return call


def _make_tensor(self, handle, type):
    """As Triton does, but the constants of a shape are made once."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _constants(*type.shape) if type.is_block() else _constants()


@functools.cache
def _constants(*shape):
    return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])


def _by_shape(make):
    """Types of blocks are looked into once: those that are alike share all they have, which nothing changes."""
    known = {}

    def init(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in known:
            make(self, element_ty, shape)
            known[key] = vars(self)
        self.__dict__ = known[key]

    return init


def _where_shapes_differ(broadcast):
    def call(self, left, right):
        mine, other = left.type, right.type
        if mine.is_block() and other.is_block() and mine.shape is other.shape:
            return left, right
        return broadcast(self, left, right)

    return call
