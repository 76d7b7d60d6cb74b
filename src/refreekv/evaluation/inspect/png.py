"""An inspection as one picture, for where no page can be opened.

Drawn with Matplotlib, so that neither a browser nor a display is needed.
"""

import itertools
import textwrap
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refreekv.evaluation.inspect.inspection import Inspection
from refreekv.report import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 1200
"""Columns of the map at most; longer prompts are averaged."""

ANSWER_LINES = 16
WIDTH, HEAD, GAP, LINE = 13.0, 1.4, 0.95, 0.19
"""Inches: of the picture, of its head, between map and answers, of a line of an answer."""

PARTING = "▶"
INK, SOFT, LOW, HIGH, MARK = "#1d2129", "#5b6270", "#eef2f8", "#0b3d85", "#c05a00"
# Asked for in this order, a character at a time; what a machine lacks is passed over.
FONTS = ["DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari"]


def write_png(inspection: Inspection, path: Path) -> None:
    """Write the picture: map of layers and positions, kept share, cut and metric by layer, both answers.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    try:
        from matplotlib import font_manager
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs Matplotlib: pip install 'refreekv[report]'") from error
    import matplotlib

    known = {font.name for font in font_manager.fontManager.ttflist}
    layers = len(inspection.kept)
    tall = min(9.0, max(2.6, 0.16 * layers))
    with matplotlib.rc_context({"font.family": [font for font in FONTS if font in known], "font.size": 9}):
        texts = [_lines(inspection.full, inspection.compressed), _lines(inspection.compressed, inspection.full)]
        below = LINE * max(len(lines) for lines, _ in texts) + 0.2
        height = HEAD + tall + GAP + below
        # No pyplot: it would keep the figure, and choose a display.
        figure = Figure(figsize=(WIDTH, height), dpi=130, facecolor="white")
        FigureCanvasAgg(figure)
        left, right = 0.055, 0.97
        _head(figure, inspection, left, height)
        bottom, tall_share = 1 - (HEAD + tall) / height, tall / height
        _map(figure.add_axes((left, bottom, 0.68, tall_share)), inspection)
        _shares(figure.add_axes((left + 0.71, bottom, right - left - 0.71, tall_share)), inspection)
        titles = ("Answer with the full cache", f"Answer with the pruned cache. {inspection.agreement}")
        for column, (title, (lines, parting)) in enumerate(zip(titles, texts, strict=True)):
            at, top = left + column * (right - left) / 2, below / height
            figure.text(at, top + 0.12 / height, title, weight="bold", color=INK, size=10)
            for number, line in enumerate(lines):
                colour = MARK if parting is not None and number >= parting else INK
                figure.text(at, top - (0.05 + number * LINE) / height, line, va="top", size=9, color=colour)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def _head(figure: Any, inspection: Inspection, left: float, height: float) -> None:
    report = inspection.report
    figure.text(left, 1 - 0.38 / height, "What the cache keeps of one prompt", size=16, weight="bold", color=INK)
    what = textwrap.wrap(_plain(f"{inspection.model} · {inspection.policy}"), 150, max_lines=2, placeholder=" …")
    facts = "\n".join(what) + (
        f"\n{len(inspection.tokens):,} prompt tokens, "
        f"{report.budget:.1%} kept on average · K/V {format_bytes(report.bytes_before)} → "
        f"{format_bytes(report.bytes_after)} at {report.tokens:,} tokens"
    )
    figure.text(left, 1 - 0.5 / height, facts, size=9.5, color=SOFT, va="top", linespacing=1.5)


def _map(axes: "Axes", inspection: Inspection) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    length, layers = len(inspection.tokens), inspection.report.prunable
    axes.imshow(
        kept_shares(inspection).numpy(),
        aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=(0, length, len(layers) - 0.5, -0.5),
        cmap=LinearSegmentedColormap.from_list("kept", [LOW, HIGH]),
    )  # fmt: skip
    step = max(1, -(-len(layers) // 12))
    axes.set_yticks(range(0, len(layers), step), [str(layer.index) for layer in layers][::step])
    axes.set_ylabel("layer", color=SOFT)
    axes.set_xlabel("position in the prompt", color=SOFT)
    heads = " and heads" if inspection.heads > 1 else ""
    axes.set_title(f"Kept positions (the darker, the more positions{heads})", loc="left", size=10, color=INK)
    _quiet(axes)


def kept_shares(inspection: Inspection) -> torch.Tensor:
    """``[layers, columns]``: the share of positions and heads that each layer keeps in each column of the map."""
    length = len(inspection.tokens)
    rows = []
    for layer in range(len(inspection.kept)):
        row = torch.zeros(length, dtype=torch.float64)
        for head in inspection.by_head(layer):
            for start, stop in head:
                row[start:stop] += 1 / inspection.heads
        columns = min(length, COLUMNS)
        at = torch.arange(length) * columns // length
        sums = torch.zeros(columns, dtype=torch.float64).index_add_(0, at, row)
        rows.append(sums / torch.bincount(at, minlength=columns))
    return torch.stack(rows)


def _shares(axes: "Axes", inspection: Inspection) -> None:
    report, layers = inspection.report, inspection.report.prunable
    places = range(len(layers))
    axes.barh(places, [layer.budget for layer in layers], color=HIGH, alpha=0.8, height=0.72)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(0, 1.75)
    axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.set_yticks([])
    for at, layer in enumerate(layers):
        row = layer.rows[0]
        words = [f"{layer.budget:.0%}" if layer.budget >= 0.1 else f"{layer.budget:.1%}"]
        words += [f"cut {row.cut:,}"] if row.cut is not None else []
        words += [f"{row.metric:.3g}"] if row.metric is not None and report.has_metrics else []
        axes.text(layer.budget + 0.03, at, " · ".join(words), va="center", size=8, color=SOFT)
    shown = ["Kept share", *["cut"] * report.has_cuts, *["metric"] * report.has_metrics]
    axes.set_title(" · ".join(shown), loc="left", size=10, color=INK)
    _quiet(axes)


def _lines(mine: str, other: str) -> tuple[list[str], int | None]:
    """An answer as lines that fit, and the line in which it parts from the other one."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, other, strict=False))
    at = len(list(alike)) if mine != other else None
    lines = _wrapped(mine.lstrip("\n") if at is None else f"{mine[:at]}{PARTING}{mine[at:]}") or [""]
    parting = next((number for number, line in enumerate(lines) if PARTING in line), None) if at is not None else None
    if len(lines) > ANSWER_LINES:
        # From a little before the parting, which is what one looks for.
        first = max(0, min((parting or 0) - 3, len(lines) - ANSWER_LINES + 1))
        shown = lines[first : first + ANSWER_LINES - (1 if first == 0 else 2)]
        end = first + len(shown) < len(lines)
        lines = (["[…]"] if first else []) + shown + (["[…]"] if end else [])
        if parting is not None:
            parting += (1 if first else 0) - first
    return lines, parting


def _wrapped(text: str) -> list[str]:
    return [
        part
        for line in _plain(text).splitlines()
        for part in textwrap.wrap(line, 84, replace_whitespace=False, drop_whitespace=False) or [""]
    ]


def _plain(text: str) -> str:
    """Without what Matplotlib would read as mathematics, and without control characters."""
    shown = "".join(c if c == "\n" or not unicodedata.category(c).startswith("C") else "·" for c in text)
    return shown.replace("$", r"\$")


def _quiet(axes: "Axes") -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=SOFT, labelsize=8)
