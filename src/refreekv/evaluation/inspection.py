"""What a policy keeps of one prompt, as one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from refreekv.evaluation.page import encode_positions, write_page
from refreekv.report import CompressionReport, format_bytes

HeadRanges = Sequence[Sequence[Sequence[int]]]
"""Half-open ranges of positions, by KV head (one entry where all heads keep the same)."""


@dataclass(frozen=True)
class Inspection:
    """One prompt, what was kept of it, and the answers with and without pruning.

    Attributes
    ----------
    model, policy : str
        What to call the model; the policy with its parameters.
    tokens : sequence of str
        The text of each prompt token.
    kept : sequence of HeadRanges
        Kept positions of each full-attention layer, in the order of ``report.prunable``.
        Positions behind the prompt are not shown.
    report : CompressionReport
        The state of the cache at the end of the pruned answer.
    full, compressed : str
        The answers with the full cache and with the policy.
    first_difference : int or None
        Index of the first new token that differs; None if all are the same.
    new_tokens : int
        Tokens of the longer answer.
    facts : dict
        What else is known of the run (dtype, machine, command, …), shown as it is.
    date : str
        When it was made; by default now.

    Raises
    ------
    ValueError
        If positions and report speak of different layers, or there is no token.
    """

    model: str
    policy: str
    tokens: Sequence[str]
    kept: Sequence[HeadRanges]
    report: CompressionReport
    full: str
    compressed: str
    first_difference: int | None
    new_tokens: int
    facts: dict[str, str] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("nothing to inspect: the prompt has no tokens")
        if len(self.kept) != len(self.report.prunable):
            raise ValueError(
                f"kept positions of {len(self.kept)} layers and a report of {len(self.report.prunable)} "
                "full-attention layers do not belong together"
            )

    @property
    def heads(self) -> int:
        """KV heads that keep positions of their own; 1 where all of a layer keep the same."""
        return max(len(heads) for heads in self.kept)

    def by_head(self, layer: int) -> HeadRanges:
        """Kept positions of a layer for each of `heads`, also where its heads are alike."""
        kept = self.kept[layer]
        return kept if len(kept) == self.heads else [kept[0]] * self.heads

    def share(self, layer: int, head: int) -> float:
        """Kept share of the prompt in one head of one layer."""
        length = len(self.tokens)
        return sum(max(0, min(stop, length) - start) for start, stop in self.by_head(layer)[head]) / length

    @property
    def verdict(self) -> str:
        """Whether the answers are the same, in words."""
        if self.first_difference is None:
            return f"All {self.new_tokens} new tokens are the same."
        return f"The answers differ from token {self.first_difference + 1} of {self.new_tokens} on."

    def write_html(self, path: Path) -> None:
        """Write the page: self-contained, and readable offline.

        Raises
        ------
        ImportError
            If Jinja2 is not installed.
        """
        length, report = len(self.tokens), self.report
        layers = []
        for at, layer in enumerate(report.prunable):
            row = layer.rows[0]
            kept = self.by_head(at)
            layers.append(
                {
                    "index": layer.index,
                    # One set where the heads are alike, so that nothing is stored twice.
                    "kept": [encode_positions(ranges, length) for ranges in (kept[:1] if _alike(kept) else kept)],
                    "shares": [self.share(at, head) for head in range(self.heads)],
                    "cut": row.cut,
                    "metric": row.metric,
                    "reasons": dict(row.reasons),
                    "bytes_before": layer.bytes_before,
                    "bytes_after": layer.bytes_after,
                }
            )
        write_page(
            path,
            "inspect.html.j2",
            scripts=("dom.js", "heads.js", "tokens.js", "answers.js", "inspect.js"),
            styles=("report.css", "inspect.css"),
            data={
                "tokens": list(self.tokens),
                "heads": self.heads,
                "layers": layers,
                "full": self.full,
                "compressed": self.compressed,
                "reasons": report.reasons,
            },
            filters={"size": format_bytes},
            inspection=self,
            layers=layers,
            others=_other_layers(report),
        )


def _alike(kept: HeadRanges) -> bool:
    return all(list(map(tuple, head)) == list(map(tuple, kept[0])) for head in kept)


def _other_layers(report: CompressionReport) -> dict[str, Any]:
    """Layers that are never pruned: how many, of what kinds, and what they hold."""
    others = [layer for layer in report.layers if not layer.rows]
    return {
        "count": len(others),
        "kinds": ", ".join(sorted({layer.kind.replace("_", " ") for layer in others})),
        "bytes": sum(layer.bytes_after for layer in others),
    }
