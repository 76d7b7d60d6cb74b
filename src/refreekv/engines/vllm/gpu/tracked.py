"""What the worker on CUDA remembers of one request."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from refreekv.engines.vllm.gpu.kept import KeptPrompt, LayersKept
from refreekv.engines.vllm.worker_side.scoring import Probes


class HostCopy:
    """Numbers on their way from the device to the host; nobody has to wait for them."""

    def __init__(self, numbers: Tensor):
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.current_stream(numbers.device).record_event()

    @property
    def arrived(self) -> bool:
        """Whether they are there."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The numbers, once they are there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._numbers


@dataclass
class Tracked:
    """One unfinished request.

    Attributes
    ----------
    prompt : int
        Tokens of the prompt that is, or was, pruned. What comes after them, a later turn of a session included, is not.
    slot : int
        Its place in the model runner's tables; -1 while it has none.
    epoch : int
        How often it has been preempted.
    probes : Probes or None
        Queries collected so far, while the prompt is computed for the first time.
    layers : dict
        What layers keep that were decided about together, by the first of them; None keeps everything.
    decided : bool
        Whether the prompt has ended; a preemption does not change that.
    kept : KeptPrompt or None
        What stays; None until the prompt's end, and if that is everything.
    numbers : HostCopy or None
        Of what stays, entries of each layer and head, then the layers' metrics: float64 ``[L * H_kv + L]``.
    announced : bool
        Whether the scheduler has been told since the last preemption.
    private, coded : int
        Private blocks of what is kept, and further ones with coded tokens that came after the prompt.
    """

    prompt: int
    slot: int = -1
    epoch: int = 0
    probes: Probes | None = None
    layers: dict[int, LayersKept | None] = field(default_factory=dict)
    decided: bool = False
    kept: KeptPrompt | None = None
    numbers: HostCopy | None = None
    announced: bool = False
    private: int = 0
    coded: int = 0

    def preempt(self, epoch: int) -> None:
        """All blocks are gone, everything is computed again; what was decided stays."""
        self.epoch, self.announced, self.slot = epoch, False, -1
        self.private = self.coded = 0
        if not self.decided:
            self.probes, self.layers = None, {}
