"""Shared memory: what a block of threads may have of it, from 99 KiB on consumer GPUs to 227 KiB on an H100."""

import functools

import torch
from triton.runtime import driver

SPARE = 8_192
"""Bytes that Triton takes beyond a kernel's tiles: 4,160 at most were seen (3.9)."""


@functools.cache
def bytes_of(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; in the interpreter as on an H100."""
    if device.type != "cuda":
        return 232_448
    # The number that Triton itself compares with; PyTorch does not give it in all versions.
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def for_tiles(device: torch.device) -> int:
    """Bytes of them that a kernel's tiles may take."""
    return bytes_of(device) - SPARE
