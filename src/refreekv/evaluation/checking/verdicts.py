"""What a divergence means: survives, visible, breaks. The thresholds, and what they stand on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refreekv.evaluation.records import FidelityRecord

SURVIVES, VISIBLE, BREAKS = "survives", "visible", "breaks"

MEAN_SURVIVES, WORST_SURVIVES = 0.004, 0.03
"""Nats a token, over all prompts and of the worst one, up to which nobody can tell.

The full cache run a second time in bf16 differs from itself by .0013 on average on SmolLM2-135M, .0002 on
Qwen2.5-Coder-1.5B and .0003 to .0008 on Gemma-3-270M, and by .010, .003 and .002 on its worst prompt (166, 127 and 81
prompts; ``benchmarks/runs``). These are three times the largest of those numbers. Eight bits and the default policy
lie under them on all three models, four bits of everything on none."""

MEAN_BREAKS, WORST_BREAKS = 0.05, 0.3
"""Nats a token above which answers are other answers.

There is a gap here: on these models four bits of everything have a mean of .002 to .016 and a worst prompt of .04 to
.12, while what visibly fails (half of the entries by SnapKV, the paper's rule on SmolLM2, four bits that were not
centred on Qwen2.5) has a mean of .14 to .76, or a worst prompt of .46 to 3.6."""

FLOORS = 3.0
"""What survives may be so many times the noise floor that was measured beside it, where that is more: a model whose
floor is high cannot be judged by the floors of others."""


@dataclass(frozen=True)
class CandidateResult:
    """One candidate over all prompts."""

    name: str  # a policy's specification, with a number format behind ``@`` where there is one
    bytes_share: float  # K/V bytes of the prompts, as a share of the full cache's in the model's own type
    kl_mean: float  # KL(full || candidate) in nats a token, mean over prompts
    kl_worst: float  # the same of the worst prompt
    worst_prompt: str  # which one that is
    changed_tokens: float  # share of tokens with another most likely token
    changed_answers: float  # share of prompts where any token has
    prompts: int
    verdict: str = ""  # one of the three, empty for the noise floor

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types."""
        return asdict(self)


def summed_up(name: str, records: Sequence[FidelityRecord]) -> CandidateResult:
    """Sum up one candidate's records, one a prompt; without a verdict."""
    worst = max(records, key=lambda record: record.kl_mean)
    count = len(records)
    tokens = sum(record.continuation_tokens for record in records)
    return CandidateResult(
        name=name,
        bytes_share=sum(record.bytes_kept for record in records) / sum(record.bytes_full for record in records),
        kl_mean=sum(record.kl_mean for record in records) / count,
        kl_worst=worst.kl_mean,
        worst_prompt=worst.sample,
        changed_tokens=sum((1 - record.top1) * record.continuation_tokens for record in records) / tokens,
        changed_answers=sum(not record.same_path for record in records) / count,
        prompts=count,
    )


def verdict(of: CandidateResult, floor: CandidateResult) -> str:
    """`SURVIVES`, `VISIBLE` or `BREAKS`, given what the full cache itself differs by in a second run."""
    mean_limit = max(MEAN_SURVIVES, FLOORS * floor.kl_mean)
    worst_limit = max(WORST_SURVIVES, FLOORS * floor.kl_worst)
    if of.kl_mean <= mean_limit and of.kl_worst <= worst_limit:
        return SURVIVES
    if of.kl_mean > max(MEAN_BREAKS, mean_limit) or of.kl_worst > max(WORST_BREAKS, worst_limit):
        return BREAKS
    return VISIBLE
