"""Few numbers that a device tells the host, past all that it copies there meanwhile."""

import functools

import torch
from torch import Tensor


class Told:
    """Numbers on their way from a device to the host, which must stay as they are until they were waited for.

    A GPU may carry out copies to the host one after the other, whatever streams they are of. Among what is computed a
    copy of some bytes would then wait for the megabytes that `storage.host` has begun to copy, and all behind it
    would, too: so that it has a stream of its own, which only the host waits for.
    """

    def __init__(self, numbers: Tensor):
        self._numbers = numbers
        self._event: torch.cuda.Event | None = None
        if not numbers.is_cuda:
            return
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        stream = _stream(numbers.device.index)
        stream.wait_stream(torch.cuda.current_stream(numbers.device))
        with torch.cuda.stream(stream):
            self._numbers.copy_(numbers, non_blocking=True)
        numbers.record_stream(stream)
        self._event = stream.record_event()

    def wait(self) -> Tensor:
        """The numbers on the host, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index, priority=-1)
