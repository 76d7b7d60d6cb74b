"""Launches on the device that the tensors are on: Triton takes the current one, whatever it is given."""

import functools
from collections.abc import Callable
from itertools import chain
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def stream_of(device: torch.device) -> int:
    """The stream in whose order a device does what is launched now: what is shared between launches is of one."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Make the device of the first tensor among the arguments, or in them, the current one for the length of the call.

    A model may be on another GPU than the first, or spread over several, and nobody else changes the
    current device for it.
    """

    @functools.wraps(launch)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        parts = chain.from_iterable(part if isinstance(part, tuple) else (part,) for part in args)
        device = next(part for part in parts if isinstance(part, Tensor)).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(device):
            return launch(*args, **kwargs)

    return guarded
