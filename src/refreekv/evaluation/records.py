"""Lines of results files: one policy on one sample."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

Key = tuple[str, str, str]
"""Family, sample, policy."""

CHANCE = "chance"
"""In place of a policy: the full cache's answer to another sample of the task, scored as if it were
to this one. A task where the full cache is no better says nothing about policies."""


@dataclass(frozen=True)
class Record:
    """One line of a results file."""

    sample: str  # unique within its family
    family: str
    policy: str  # a policy's specification, or ``"full"``
    model: str

    @property
    def key(self) -> Key:
        """What makes it one and the same measurement."""
        return self.family, self.sample, self.policy

    def to_dict(self) -> dict[str, Any]:
        """As plain types, fields without a value left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """From what `to_dict` gave; unknown keys are ignored, so that newer files still load."""
        known = {one.name for one in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


@dataclass(frozen=True)
class FidelityRecord(Record):
    """How far one policy's cache takes the model from its own full-cache answer on one sample.

    Both run over the same tokens: the full cache's greedy continuation (teacher forcing). ``"full"`` is
    the full cache run a second time through the same kernels, the noise floor.
    """

    # length of what was compressed, and of what was compared after it
    prompt_tokens: int
    continuation_tokens: int
    budget: float  # kept share of the prompt, over all full-attention layers, frozen ones included
    # K/V bytes of the prompt in a full and in this cache
    bytes_full: int
    bytes_kept: int
    # KL(full || pruned) in nats over the compared tokens
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float  # share of tokens whose most likely next token is the same
    same_path: bool  # whether all of them are
    first_divergence: int | None = None  # index of the first that is not
    # change of the first gold answer's mean negative log-likelihood, in nats per token
    answer_nll_change: float | None = None
    kl_tokens: list[float] | None = None  # KL of each compared token, where it was asked for
    kept_heads: list[list[float]] | None = None  # kept share by layer and KV head (one entry where heads are alike)


@dataclass(frozen=True)
class TaskRecord(Record):
    """One policy's answer to one sample, scored.

    ``sample`` holds a digest of the prompt, so that results of another version of it are not taken for this one's.
    """

    # length of the compressed part, and of what came after it
    prompt_tokens: int
    new_tokens: int
    budget: float  # kept share of the prompt, over all full-attention layers, frozen ones included
    # K/V bytes of the full-attention layers at the end of the answer
    bytes_full: int
    bytes_kept: int
    text: str  # the answer; where likelihoods are compared, the likeliest choice
    # ``"score"``, the number that tables show, and the task's further metrics
    scores: dict[str, float] = field(default_factory=dict)
    same_as_full: bool | None = None  # whether the full cache gave the same text; None for itself
    place: list[float] | None = None  # of a needle: length of its haystack, and depth in it (0: start, 1: end)
