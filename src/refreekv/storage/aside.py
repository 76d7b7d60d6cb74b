"""Work that a GPU does beside what it computes: on the stream that copies to host memory."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from refreekv.storage.host import copy_stream


class Aside:
    """Work on what a device computed so far, that nothing it computes from now on waits for.

    What is made within belongs to the copy stream, and what is copied to host memory within is copied in order. On a
    CPU all is done at once.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._event: torch.cuda.Event | None = None

    @contextmanager
    def work(self, lent: Iterable[Tensor]) -> Iterator[None]:
        """Within, work is beside; of what it reads, ``lent`` tensors may be given up at any time.

        All else that it reads has to stay as it is until `finish`.
        """
        if self._device.type != "cuda":
            yield
            return
        stream = copy_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        for part in lent:
            part.record_stream(stream)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self._event = stream.record_event()

    def finish(self) -> None:
        """Let what the device computes from now on wait until the work is done; the host does not."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
            self._event = None
