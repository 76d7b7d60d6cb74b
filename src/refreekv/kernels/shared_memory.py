"""Shared memory: what a block of threads may have of it, from 99 KiB on consumer GPUs to 227 KiB on an H100."""

import functools

import torch
from triton.runtime import driver

SPARE, SEEN = 8_192, 4_160
"""Bytes that Triton may take beyond a kernel's tiles, and the most that were seen (3.9)."""

RESERVED = 1_024
"""Bytes that a multiprocessor takes for each program; it has as many more than a block may have."""


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


def programs_for(tiles: int, device: torch.device) -> int:
    """Programs with tiles of so many bytes that a multiprocessor has room for."""
    return max(1, (bytes_of(device) + RESERVED) // (tiles + SEEN + RESERVED))
