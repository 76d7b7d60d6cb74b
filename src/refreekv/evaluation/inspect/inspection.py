"""What a policy keeps of one prompt, as one self-contained HTML page.

The page opens offline, loads nothing, and its content security policy forbids everything but
its own script. Texts are untrusted and reach the page escaped: Jinja2's autoescaping, and JSON
whose ``<``, ``>`` and ``&`` are escaped; the script writes text nodes, never markup.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from refreekv.report import CompressionReport, format_bytes

HeadRanges = Sequence[Sequence[Sequence[int]]]
"""Half-open ranges of positions, by KV head (one entry where all heads keep the same)."""


@dataclass(frozen=True)
class Inspection:
    """One prompt, what was kept of it, and the answers with and without pruning.

    Raises
    ------
    ValueError
        If positions and report speak of different layers, or there is no token.
    """

    # what to call the model; the policy with its parameters
    model: str
    policy: str
    tokens: Sequence[str]  # the text of each prompt token
    # kept positions of each full-attention layer, in the order of ``report.prunable``. Positions behind the prompt are
    # not shown.
    kept: Sequence[HeadRanges]
    report: CompressionReport  # the state of the cache at the end of the pruned answer
    # the answers with the full cache and with the policy
    full: str
    compressed: str
    first_difference: int | None  # index of the first new token that differs; None if all are the same
    new_tokens: int  # tokens of the longer answer
    # what else is known of the run (dtype, machine, command, …), shown as it is
    facts: dict[str, str] = field(default_factory=dict)
    # when it was made; by default now
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
    def agreement(self) -> str:
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
        try:
            from jinja2 import Environment, PackageLoader, StrictUndefined
        except ImportError as error:
            raise ImportError("an HTML page needs Jinja2: pip install 'refreekv[report]'") from error
        script = f'(() => {{\n"use strict";\n{_template("inspect.js")}\n}})();'
        data = json.dumps(self._drawn(), separators=(",", ":"), allow_nan=False)
        environment = Environment(
            loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        environment.filters["size"] = format_bytes
        page = environment.get_template("inspect.html.j2").render(
            data=data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
            style=_template("inspect.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            inspection=self,
            others=_other_layers(self.report),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        # Lone surrogates, which broken tokens may hold, have no UTF-8 form.
        path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")

    def _drawn(self) -> dict[str, Any]:
        """What the script draws."""
        layers = []
        for at, layer in enumerate(self.report.prunable):
            kept = self.by_head(at)
            alike = all(list(map(tuple, head)) == list(map(tuple, kept[0])) for head in kept)
            layers.append(
                {
                    "index": layer.index,
                    # One set where the heads are alike, so that nothing is stored twice.
                    "kept": [encode_positions(ranges, len(self.tokens)) for ranges in (kept[:1] if alike else kept)],
                    "shares": [round(self.share(at, head), 6) for head in range(self.heads)],
                    "reasons": dict(layer.rows[0].reasons),
                }
            )
        return {
            "tokens": list(self.tokens),
            "heads": self.heads,
            "layers": layers,
            "full": self.full,
            "compressed": self.compressed,
            "reasons": self.report.reasons,
        }


def encode_positions(ranges: Iterable[Sequence[int]], length: int) -> list[int] | str:
    """Half-open ranges as runs (skip, keep, skip, keep, …) or as a bit set in base64, whichever is shorter.

    ``decode`` of ``templates/inspect.js`` is the way back.
    """
    ranges = list(ranges)
    kept = bytearray(b"0" * length)
    for start, stop in ranges:
        first, last = max(0, start), min(stop, length)
        kept[first:last] = b"1" * max(0, last - first)
    bits = int(kept[::-1] or b"0", 2)
    packed = base64.b64encode(bits.to_bytes((length + 7) // 8, "little")).decode()
    if 4 * len(ranges) > len(packed):
        return packed  # a range takes four characters at least
    runs = [len(list(run)) for _, run in groupby(b"0" + kept)]
    runs[0] -= 1  # the position put in front, so that the first run is one that is not kept
    return runs if len(json.dumps(runs)) <= len(packed) else packed


def _other_layers(report: CompressionReport) -> dict[str, Any]:
    """Layers that are never pruned: how many, of what kinds, and what they hold."""
    others = [layer for layer in report.layers if not layer.rows]
    return {
        "count": len(others),
        "kinds": ", ".join(sorted({layer.kind.replace("_", " ") for layer in others})),
        "bytes": sum(layer.bytes_after for layer in others),
    }


def _template(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")
