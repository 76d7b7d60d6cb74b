"""What PyTorch's attention knows of its softmax denominators, for probes that would compute them again.

Fused attention computes each query's denominator and gives out its logarithm, which is dropped on the way to whoever
called it. Half of what a probe of a prompt costs is to find the same numbers once more. So the very operator that
PyTorch chooses is listened to; nothing about the attention changes. What is heard is believed once it was compared with
our own, for each attention module (`proof`).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from refreekv.pruning.calls import AttentionCall

_TELLS = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"}
"""Operators whose second result they are, in any case."""
_ASKED = "_scaled_dot_product_cudnn_attention"
"""One that tells where its fifth argument asks for it, as it does for gradients."""
_CHOOSES = "scaled_dot_product_attention"
"""What calls one of these; inference mode shows it in their place."""


class Listening(TorchDispatchMode):
    """Listens to attention of a whole prompt without padding, within.

    Attributes
    ----------
    logsumexp : Tensor or None
        ``[B, H, q]`` float32, of the call's queries; None: nobody told, or more than one did.
    """

    def __init__(self, call: AttentionCall):
        super().__init__()
        self.logsumexp: Tensor | None = None
        self._shape, self._heard = call.query.shape[:3], 0

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name == _CHOOSES:
            with self:
                return function.decompose(*args, **(kwargs or {}))
        if name == _ASKED and len(args) > 4:
            args = (*args[:4], True, *args[5:])
        elif name not in _TELLS:
            return function(*args, **(kwargs or {}))
        found = function(*args, **(kwargs or {}))
        self._heard += 1
        self.logsumexp = self._fitting(found[1]) if self._heard == 1 else None
        return found

    def _fitting(self, told: Any) -> Tensor | None:
        """What was told, if it is a number for each query."""
        if not isinstance(told, Tensor) or told.dtype != torch.float32 or told.numel() != self._shape.numel():
            return None
        return told.view(self._shape)


def listening(call: AttentionCall, keys: int, *, wanted: bool) -> AbstractContextManager[Listening | None]:
    """Listen to attention within, if ``wanted`` and the call's queries are those of all its keys, without padding."""
    whole = call.query.shape[2] == keys > 1 and call.mask is None
    plain = call.softcap is None and call.sink_logits is None
    if wanted and whole and plain and listens_on(call.query.device) and not torch.compiler.is_compiling():
        return Listening(call)
    return nullcontext()


def listens_on(device: torch.device) -> bool:
    """Whether probes compute denominators apart on a device: on a CPU a softmax is one pass."""
    return device.type == "cuda"
