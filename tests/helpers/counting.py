"""What a call would launch, copy and wait for on a GPU, counted on a CPU.

Each operator of PyTorch that computes is a launch. What `kernels` offers is its launches there, whatever the plain
version does on a CPU. Operators whose result has a size that the device has to tell make the host wait.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refreekv import kernels
from refreekv.storage import arena, runs

VIEWS = {
    "view", "_unsafe_view", "slice", "select", "expand", "transpose", "permute", "unsqueeze", "squeeze", "t", "alias",
    "as_strided", "detach", "unbind", "split", "split_with_sizes", "_reshape_alias", "diagonal", "lift_fresh",
    "unfold", "narrow", "is_pinned", "_has_compatible_shallow_copy_type", "promote_types",
}  # fmt: skip
MAKES = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "bincount", "equal"}
KERNELS = {
    "append": 1, "gather": 1, "move": 1, "fetch": 1, "ragged_decode": 2, "pack_lines": 1, "pack_rungs": 1,
    "unpack_lines": 1, "recode_lines": 1, "packed_attention": 2, "kept_first": 1, "probe_reductions": 3, "needed": 3,
    "both_reductions": 5,
    "make_surrogates": 5, "leveled": 1, "centres": 2, "mapped_means": 1, "asked": 1,
    "put_surrogates": 2, "uni_metric_cut": 3, "take_out": 1, "code_oldest": 1,
}  # fmt: skip
"""Launches of each front function on CUDA."""


class Counts(TorchDispatchMode):
    """Counts within: ``launches`` by name, ``waits`` by name, ``made`` tensors, ``sent`` lists of numbers."""

    def __init__(self):
        super().__init__()
        self.launches, self.waits, self.made, self.sent, self.paused = Counter(), Counter(), 0, 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.paused:
            self._note(function.overloadpacket.__name__, args)
        return result

    def _note(self, name, args):
        if name in MAKES:
            self.made += 1
        elif name not in VIEWS:
            self.launches[name] += 1
            masked = name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple))
            if name in WAITS or (masked and any(part is not None and part.dtype == torch.bool for part in args[1])):
                self.waits[name] += 1

    @property
    def total(self):
        """All launches."""
        return sum(self.launches.values())

    @contextmanager
    def pause(self):
        """Count nothing within."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


@contextmanager
def counting():
    """The counts of what is done within."""
    counts = Counts()

    def as_kernel(name, launches):
        function = getattr(kernels, name)

        def counted(*args, **kwargs):
            if (
                name == "needed" and kwargs.get("real") is not None and kwargs.get("origins") is None
            ):  # is the plain version on CUDA, too
                return function(*args, **kwargs)
            if not counts.paused:
                # Two kernels find denominators that nobody told.
                told = sum(isinstance(given, kernels.Probes) and given.logsumexp is not None for given in args)
                counts.launches[f"kernels.{name}"] += launches - 2 * told
            with counts.pause():
                return function(*args, **kwargs)

        return function, counted

    def as_copy(function):
        def counted(*args, **kwargs):
            if not counts.paused:
                counts.sent += 1
            with counts.pause():
                return function(*args, **kwargs)

        return function, counted

    def to_list(tensor):
        if not counts.paused:
            counts.waits["tolist"] += 1
        with counts.pause():
            return real_list(tensor)

    real_list = torch.Tensor.tolist
    replaced = dict(
        [
            *(as_kernel(name, launches) for name, launches in KERNELS.items()),
            as_copy(arena.on_device),
            as_copy(runs.spread),
        ]
    )
    with ExitStack() as patches:
        for module in [own for name, own in sys.modules.items() if name.startswith("refreekv")]:
            for name, value in list(vars(module).items()):
                if callable(value) and not isinstance(value, type):
                    try:
                        other = replaced.get(value)
                    except TypeError:
                        continue
                    if other is not None:
                        patches.enter_context(mock.patch.object(module, name, other))
        patches.enter_context(mock.patch.object(torch.Tensor, "tolist", to_list))
        with counts:
            yield counts
