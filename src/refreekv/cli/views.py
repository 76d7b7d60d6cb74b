"""What results look like in a terminal."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from refreekv import CompressionReport
from refreekv.cli.comparing import Comparison
from refreekv.cli.loading import Loaded
from refreekv.cli.running import Run, decode
from refreekv.report import bar, format_bytes

PARTING = "▶"
"""Stands before the first token that differs; readable without colours too."""


def header(facts: dict[str, str]) -> Table:
    """What was run, a line each."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts.items():
        grid.add_row(Text(name, style="bold"), Text(value))
    return grid


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    left: Sequence[int] = (0,),
    gap: int = 3,
    **options: Any,
) -> Table:
    """A table without lines; columns to the right but for those at the indices ``left``."""
    made = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold", **options)
    for at, heading in enumerate(headings):
        made.add_column(Text(heading), justify="left" if at in left else "right")
    for row in rows:
        # Text as it is: brackets are none of rich's marks.
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def comparison(width: int, loaded: Loaded, result: Comparison, policy: str) -> RenderableType:
    """Numbers, texts and layers of a comparison, in a terminal of ``width`` columns."""
    note = Text("Times are of one run each; whatever else the machine does shows in them.", style="dim")
    shown = layers(result.report, width)
    return Group(numbers(result, policy), note, "", texts(loaded, result, policy), "", agreement(result), "", shown)


def numbers(result: Comparison, policy: str) -> Table:
    """Tokens, bytes and seconds, one column a run."""
    full, compressed, report = result.full, result.compressed, result.report
    kept = report.budget * result.prompt_tokens
    rows = [
        (
            "Prompt tokens kept, a layer's mean",
            f"{result.prompt_tokens:,}",
            f"{kept:,.0f}",
            _change(kept, result.prompt_tokens),
        ),
        (
            f"K/V memory at {report.tokens:,} tokens",
            format_bytes(report.bytes_before),
            format_bytes(report.bytes_after),
            _change(report.bytes_after, report.bytes_before),
        ),
        (
            "Prefill, to the first new token",
            f"{full.prefill_seconds:.2f} s",
            f"{compressed.prefill_seconds:.2f} s",
            _change(compressed.prefill_seconds, full.prefill_seconds),
        ),
    ]
    if full.token_seconds is not None and compressed.token_seconds is not None:
        rows.append(
            (
                "Decode, median of a token",
                f"{1000 * full.token_seconds:.0f} ms",
                f"{1000 * compressed.token_seconds:.0f} ms",
                _change(compressed.token_seconds, full.token_seconds),
            )
        )
    rows.append(("New tokens", str(len(full.tokens)), str(len(compressed.tokens)), ""))
    return table(("", "full cache", policy, "change"), rows)


def texts(loaded: Loaded, result: Comparison, policy: str) -> Table:
    """Both texts side by side, the point where they part marked in each."""
    at = result.first_difference
    row = _marked(loaded, result.full, at, "green"), _marked(loaded, result.compressed, at, "yellow")
    made = table(("Text with the full cache", f"Text with {policy}"), [row], left=(0, 1), expand=True)
    for column in made.columns:
        column.ratio = 1
    return made


def agreement(result: Comparison) -> Text:
    """Whether the texts are the same, in words."""
    at, count = result.first_difference, max(len(result.full.tokens), len(result.compressed.tokens))
    if at is None:
        return Text(f"The texts are the same: all {count} new tokens are equal.", style="bold green")
    where = f"from the first token on (of {count})" if at == 0 else f"from token {at + 1} of {count} on"
    return Text(
        f"The texts differ {where} ({PARTING}): here the compressed cache did not give the full cache's answer.",
        style="bold yellow",
    )


def layers(report: CompressionReport, width: int) -> RenderableType:
    """A bar per layer of what was kept, in columns where there are many."""
    cells = list(_layer_cells(report, width))
    title = Text.assemble(("Kept per layer", "bold"), f": {report.budget:.1%} on average")
    if report.has_metrics:
        title.append("; on the right the policy's metric")
    columns = 2 if len(cells) > 8 and width >= 70 else 1
    height = -(-len(cells) // columns)
    grid = Table.grid(padding=(0, 4, 0, 0))
    for index in range(height):
        grid.add_row(*(cells[at] for at in range(index, len(cells), height)))
    return Group(title, Padding(grid, (0, 0, 0, 1)))


def _layer_cells(report: CompressionReport, width: int) -> Iterator[Text]:
    size = max(8, min(30, (width - 6) // 2 - (22 if report.has_metrics else 14)))
    for layer in report.prunable:
        metric = layer.rows[0].metric
        shown = "  –" if metric is None else f"  {metric:.4f}"
        yield Text.assemble(
            (f"{layer.index:3d} ", "dim"),
            (bar(layer.budget, size), "cyan"),
            f" {layer.budget:6.1%}",
            (shown if report.has_metrics else "", "dim"),
        )


def _marked(loaded: Loaded, run: Run, at: int | None, style: str) -> Text:
    if at is None:
        return Text(run.text)
    common = decode(loaded, run.tokens[:at]).rstrip("\ufffd")  # a character may be split over tokens
    if not run.text.startswith(common):  # tokenizers that tidy up white space
        common = ""
    rest = run.text[len(common) :]
    space = rest[: len(rest) - len(rest.lstrip())]
    return Text.assemble((common + space, "dim"), (PARTING, f"bold {style}"), (rest.lstrip() or "(ends here)", style))


def _change(after: float, before: float) -> str:
    return f"{after / before - 1:+.0%}" if before else "–"
