"""The full cache and a policy on the same prompt."""

import itertools
from dataclasses import asdict, dataclass, field
from typing import Any

import refreekv
from refreekv.cli import running
from refreekv.cli.app import refusals
from refreekv.cli.loading import Loaded
from refreekv.cli.progress import counting, stderr_console, waiting
from refreekv.cli.running import Run


@dataclass(frozen=True)
class Comparison:
    """Two greedy generations from one prompt."""

    prompt_tokens: int  # length of the prompt
    # with the full cache, and with the policy
    full: Run
    compressed: Run
    report: refreekv.CompressionReport  # what the policy kept, at the end of its run
    # which positions are then held, as `PrunedCache.kept_ranges` gives them
    kept: list[tuple[tuple[tuple[int, int], ...], ...]] = field(default_factory=list)

    @property
    def first_difference(self) -> int | None:
        """Index of the first new token that differs; None if all are the same."""
        pairs = itertools.zip_longest(self.full.tokens, self.compressed.tokens)
        return next((index for index, (one, other) in enumerate(pairs) if one != other), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain types, ready for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "same_text": self.first_difference is None,
            "first_difference": self.first_difference,
            "full": asdict(self.full),
            "compressed": asdict(self.compressed),
            "report": self.report.to_dict(),
        }


def compare(
    loaded: Loaded,
    inputs: dict[str, Any],
    policy: refreekv.policies.Policy,
    *,
    max_new_tokens: int,
    kv_dtype: str | None = "auto",
) -> Comparison:
    """Generate with the full cache, then with ``policy`` and ``kv_dtype``; what is compared is only the cache.

    A few tokens are run beforehand, so that neither pays for the first use of the model.

    Raises
    ------
    UserError
        If refreekv does not support the model.
    """
    prompt_tokens = inputs["input_ids"].shape[1]
    reading = f"reading {prompt_tokens:,} tokens"
    with refusals():
        refreekv.ReFreeKVCache(loaded.model, policy, kv_dtype=kv_dtype)  # refuse before the long work
    console = stderr_console()
    with waiting(console, "Warming up"):
        running.generate(loaded, {name: value[:, :32] for name, value in inputs.items()}, max_new_tokens=2)
    with counting(console, "Full cache", reading, max_new_tokens) as advance:
        full = running.generate(loaded, inputs, max_new_tokens=max_new_tokens, on_token=advance)
    cache = refreekv.ReFreeKVCache(loaded.model, policy, kv_dtype=kv_dtype)
    with counting(console, policy.name, reading, max_new_tokens) as advance:
        compressed = running.generate(loaded, inputs, max_new_tokens=max_new_tokens, on_token=advance, cache=cache)
    return Comparison(prompt_tokens, full, compressed, cache.report, cache.kept_ranges())
