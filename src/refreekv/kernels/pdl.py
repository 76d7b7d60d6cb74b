"""Launches that begin while the kernel before them still runs: programmatic dependent launch, from Hopper on.

A step of one row is some 400 short kernels, and about a microsecond lies between two of them. Kernels that begin
early are in their places when the one before ends. With more rows this takes more than it gives where a kernel fills
the device: programs that begin early sit where there is room just then, and not spread out. Those of small kernels may.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 1
"""Of a batch whose kernels all begin early."""

MOST_ROWS_OF_SMALL = 32
"""Of a batch whose small kernels do."""


@triton.jit
def in_turn(DEPENDENT: tl.constexpr):
    """What a kernel of a step does first: waits for the one before to be over, and lets the next one begin.

    Every kernel that is launched early has to: so whatever came before is over too, and its memory written.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def options(rows: int, like: Tensor, *, small: bool = False) -> dict[str, Any]:
    """How a kernel of a step of ``rows`` rows is launched, ``DEPENDENT`` among it; ``small``: it fills no device."""
    if rows > (MOST_ROWS_OF_SMALL if small else MOST_ROWS) or not like.is_cuda or not _possible(like.device):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


@functools.cache
def _possible(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and hasattr(tl.extra.cuda, "gdc_wait")
