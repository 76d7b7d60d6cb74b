"""Whether Triton computes, or plain torch: by device, and by whether Triton is there."""

import functools
import importlib.util

import torch
from torch import Tensor


@functools.cache
def available() -> bool:
    """Whether Triton is installed and a CUDA device is there to run its kernels: compute capability 8.0 or more."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def on_triton(tensor: Tensor) -> bool:
    """Whether a tensor is where Triton's kernels run."""
    return tensor.is_cuda and available()


def at_once(tensor: Tensor) -> bool:
    """Whether to launch kernels without PyTorch's way to an operator, which costs the host more than the launches.

    What is compiled needs operators.
    """
    return on_triton(tensor) and not torch.compiler.is_compiling()
