"""What the scheduler's side and the workers' side of the plugin tell each other."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass(frozen=True)
class GroupOutcome:
    """What one group of layers gives up of one request, counted in blocks of its table.

    Attributes
    ----------
    start, stop : int
        Entries ``start … stop - 1`` of the block table are no longer needed.
    copies : int
        How many private blocks the kept tokens of entries ``0 … stop - 1`` must first be
        copied into; they take the places ``0 … copies - 1`` (then ``start == copies``).
        0 where whole blocks stay as they are.
    """

    start: int
    stop: int
    copies: int = 0

    @property
    def freed(self) -> int:
        """Blocks that the request holds fewer afterwards."""
        return self.stop - self.start


@dataclass(frozen=True)
class PruningOutcome:
    """A request's prompt has ended and every layer has decided.

    Attributes
    ----------
    request_id : str
        vLLM's id.
    epoch : int
        How often the request had been preempted. Scheduler and workers are steps apart:
        a outcome from before a preemption must not touch the blocks allocated after it.
    prompt : int
        Prompt tokens.
    kept : tuple of int
        For each layer, tokens of the prompt that its blocks still hold.
    selected : tuple of int
        For each layer, tokens that the policy wanted to keep, before rounding to blocks.
    metrics : tuple of (float or None)
        For each layer, the policy's criterion at what is kept.
    groups : tuple of GroupOutcome
        One for each KV cache group.
    altered : bool
        Whether tokens after the prompt see anything else than all of it, as it was computed.
    bytes_share : float or None
        Bytes of what is kept, as it is stored, as a share of the whole prompt's; None: as of its entries.
    coded_tokens : int
        How many tokens that come after the prompt a private block holds coded; 0: they stay as they are.
    recent : int
        The newest of them that stay as they are.
    """

    request_id: str
    epoch: int
    prompt: int
    kept: tuple[int, ...]
    selected: tuple[int, ...]
    metrics: tuple[float | None, ...]
    groups: tuple[GroupOutcome, ...]
    altered: bool
    bytes_share: float | None = None
    coded_tokens: int = 0
    recent: int = 0


@dataclass
class WorkerOutcomes(KVConnectorWorkerMetadata):
    """Worker → scheduler, once a step."""

    outcomes: list[PruningOutcome] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerOutcomes":
        """News of one rank stand for all: tensor-parallel ranks decide on the same gathered rows."""
        assert isinstance(other, WorkerOutcomes)
        return self


@dataclass(frozen=True)
class CopyOrder:
    """Scheduler → worker: move a request's kept tokens of one group into these blocks."""

    request_id: str
    group: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class CodeOrder:
    """Scheduler → worker: code the oldest of a request's tokens that came after its prompt into one block more."""

    request_id: str
    block: int


@dataclass
class StepOrders(KVConnectorMetadata):
    """Scheduler → worker, with every step.

    Attributes
    ----------
    finished : list of str
        Requests that ended since the last step.
    preempted : dict
        Requests preempted since the last step, with how often they now have been.
    copies : list of CopyOrder
        To carry out, in this order, before anything of the step is computed.
    codes : list of CodeOrder
        Likewise, after the copies.
    """

    finished: list[str] = field(default_factory=list)
    preempted: dict[str, int] = field(default_factory=dict)
    copies: list[CopyOrder] = field(default_factory=list)
    codes: list[CodeOrder] = field(default_factory=list)
