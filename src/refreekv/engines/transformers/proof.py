"""Whether a model's attention is what refreekv takes it for: compared once for each attention module.

Probes, kernels and rows of different length compute attention again from queries, keys, values, a
scaling, a soft cap, sinks, and a mask that says what is visible. A function that adds something to
that (a bias in the mask, slopes for distances, a factor for each head) would be repeated without it.
So the first prompt's last query is computed both ways.

Masks that transformers makes from what the caller said (padding, packed sequences) are marked. One
that the model made by itself may leave out other entries at each token, as sparse attention does.
"""

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from refreekv.core.autocast import without_autocast
from refreekv.core.probes import attention_logits, attention_rows
from refreekv.engines.transformers.handout import ADVICE
from refreekv.pruning.calls import AttentionCall
from refreekv.pruning.masks import visible_columns

_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}
"""Largest relative difference of an output, by type; float32 may be computed with fewer bits on a GPU."""
_COARSE = 5e-2
"""That of types of 16 bits."""

_TELLING = 1e-3
"""Largest difference of a logarithm of a softmax denominator that attention told."""

# Modules and the implementations that they were compared under: a model is the same as long as it lives.
_PROVED: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()
_TOLD: "weakref.WeakKeyDictionary[nn.Module, dict[str, bool]]" = weakref.WeakKeyDictionary()


_MARK = "_refreekv_mask"


def marking(mask_function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """A mask function of transformers whose masks can be told from those of models."""

    @functools.wraps(mask_function)
    def marked(*args: Any, **kwargs: Any) -> Tensor | None:
        mask = mask_function(*args, **kwargs)
        if isinstance(mask, Tensor) and mask.dim() == 4:
            setattr(mask, _MARK, _is_plain(mask, kwargs))
        return mask

    return marked


def _is_plain(mask: Tensor, given: dict[str, Any]) -> bool:
    """Whether a mask of several queries, made with these arguments, hides what is to come and nothing else.

    Asked once for all layers of a forward; waits for the device where a mask of tokens was given.
    """
    if mask.shape[2] == 1 or given.get("mask_function") is not causal_mask_function or "attention_mask" not in given:
        return False
    tokens = given["attention_mask"]
    if tokens is None:
        return True
    return not torch.compiler.is_compiling() and tokens.device.type != "meta" and bool(tokens.all())


def hides_nothing(mask: Tensor | None) -> bool:
    """Whether a mask says no more than that queries do not see what comes after them; None says that, too."""
    return mask is None or any(getattr(part, _MARK, False) for part in (mask, mask._base) if part is not None)


def is_own(mask: Tensor | None) -> bool:
    """Whether a mask was made by the model, and not by transformers' mask functions."""
    return mask is not None and mask.dim() == 4 and not hasattr(mask, _MARK) and not hasattr(mask._base, _MARK)


def lacks_proof(module: nn.Module, implementation: str) -> bool:
    """Whether the module's attention was never compared under this implementation."""
    return implementation not in _PROVED.get(module, ())


def tells_denominators(module: nn.Module, implementation: str) -> bool | None:
    """Whether denominators that were heard from the module's attention were right; None: none were heard yet."""
    return _TOLD.get(module, {}).get(implementation)


def check_mask(module: nn.Module, layer: int, mask: Tensor) -> None:
    """Raise RuntimeError if the newest query does not see all entries from some column on.

    ``mask`` is ``[B | 1, 1 | H, q, n]``, and made by the model. Waits for the device.
    """
    allowed = mask[:, :, -1] if mask.dtype == torch.bool else mask[:, :, -1] > torch.finfo(mask.dtype).min / 2
    if bool((~allowed & (allowed.cumsum(-1) > 0)).any()):
        raise RuntimeError(
            f"{type(module).__name__} (layer {layer}) leaves out entries by a mask of its own, other ones for each "
            f"token (sparse or dynamic attention): which are needed later cannot be told from it. {ADVICE}"
        )


@dataclass
class Proof:
    """One module's attention, computed both ways.

    Attributes
    ----------
    module : Module
        The attention module.
    implementation : str
        Name of the attention function.
    layer : int
        Index in the model.
    difference : Tensor
        Relative difference of the two, on the device: a number that nobody waits for.
    tolerance : float
        The largest one that is rounding.
    telling : Tensor or None
        How far the logarithms of the softmax denominators are off that attention told; None: it told none.
    """

    module: nn.Module
    implementation: str
    layer: int
    difference: Tensor
    tolerance: float
    telling: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        module: nn.Module,
        implementation: str,
        layer: int,
        call: AttentionCall,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        *,
        exact: bool = True,
        told: Tensor | None = None,
    ) -> "Proof":
        """Compare the last query of a call's first row; not ``exact``: with chance in it, so that all may differ.

        ``told`` are logarithms of softmax denominators, ``[B, H, q]``, as attention told them.
        ``key`` and ``value`` are ``[B, H_kv, n, D]``, ``output`` is ``[B, q, H, Dv]``.
        """
        query, mask = call.query, call.mask
        with without_autocast(query.device):
            kv_heads, length = key.shape[1:3]
            valid = visible_columns(None if mask is None else mask[:1], -1, 1, length)
            rows = attention_rows(
                query[:1, :, -1:],
                key[:1].to(query.dtype),
                scaling=call.scaling,
                visible=None if valid is None else valid[:, None],
                softcap=call.softcap,
                sink_logits=call.sink_logits,
            )
            # [H, 1, n] as [H_kv, H / H_kv, n], by [H_kv, n, Dv].
            grouped = rows.view(kv_heads, -1, length)
            wanted = torch.matmul(grouped.to(value.dtype), value[0]).flatten(0, 1).float()
            difference = (output[0, -1].float() - wanted).norm() / wanted.norm().clamp_min(1e-30)
            if valid is not None:
                # A row that sees nothing has no output that means something.
                difference = torch.where(valid.any(), difference, 0.0)
            telling = None
            if told is not None:
                # [H, n]
                logits = attention_logits(query[:1, :, -1:], key[:1].to(query.dtype), scaling=call.scaling)[0, :, 0]
                telling = (told[0, :, -1] - logits.logsumexp(-1)).abs().max()
        types = {tensor.dtype for tensor in (query, key, value, output)}
        tolerance = max(_TOLERANCE.get(dtype, _COARSE) for dtype in types) if exact else math.inf
        return cls(module, implementation, layer, difference, tolerance, telling)

    def check(self) -> None:
        """Raise RuntimeError if the two differ; remember the module if not."""
        difference = float(self.difference)
        if not math.isfinite(difference):
            raise RuntimeError(
                f"{type(self.module).__name__} (layer {self.layer}) computes NaN or infinity for the last token of the "
                "prompt: weights are damaged, or numbers overflow the model's type; load the model anew, or in another "
                "type (bfloat16 holds larger numbers than float16)"
            )
        if not difference <= self.tolerance:
            raise RuntimeError(
                f"{type(self.module).__name__} (layer {self.layer}) with attn_implementation={self.implementation!r} "
                "computes something else than softmax(scaling * queries @ keys) @ values over what its mask leaves "
                f"visible (relative difference {difference:.2g}): a bias, slopes for distances, a window or a factor "
                f"of its own, which refreekv's probes and kernels would leave out. {ADVICE}"
            )
        _PROVED.setdefault(self.module, set()).add(self.implementation)
        if self.telling is not None:
            _TOLD.setdefault(self.module, {})[self.implementation] = float(self.telling) <= _TELLING
