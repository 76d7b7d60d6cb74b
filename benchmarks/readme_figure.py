"""The README's figure: K/V bytes held against the worst family's KL, from committed runs.

    python benchmarks/readme_figure.py --out docs/bytes-against-kl.svg

One panel a model, one line a policy, from ``benchmarks/runs``. Needs matplotlib (the extra ``report``).
"""

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

RUNS = Path(__file__).parent / "runs"
MODELS = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-1.5B", "gemma": "Gemma-3-270M"}
"""Files in ``benchmarks/runs`` to their panels' titles."""

POLICIES = {
    "adaptive": ("adaptive (default)", "#2f81f7", "constant"),
    "refreekv": ("refreekv (the paper)", "#d29922", "threshold"),
    "cake": ("cake", "#3fb950", "ratio"),
    "snapkv": ("snapkv", "#db6d28", "ratio"),
    "h2o": ("h2o", "#a371f7", "ratio"),
}
"""Lines: label, colour, and the parameter that moves the budget; all others are at their defaults."""

NEUTRAL = "#808a94"
"""Text and axes: to be read on white and on black."""


class Point(NamedTuple):
    """A policy at one setting: bytes held, percent of the full cache's, and the largest of its families' mean KLs."""

    held: float
    worst: float
    default: bool


def records(path: Path) -> list[dict[str, Any]]:
    """The samples of one results file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [one for one in map(json.loads, lines) if "kl_mean" in one]


def point(samples: Iterable[dict[str, Any]], default: bool) -> Point:
    """All samples of one policy together."""
    kept = full = 0
    families = defaultdict(list)
    for one in samples:
        kept, full = kept + one["bytes_kept"], full + one["bytes_full"]
        families[one["family"]].append(one["kl_mean"])
    return Point(100 * kept / full, max(sum(kl) / len(kl) for kl in families.values()), default)


def lines(run: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """For each policy of `POLICIES`, and ``full``, its settings from few bytes to many."""
    settings = defaultdict(list)
    for one in run:
        settings[one["policy"]].append(one)
    found = defaultdict(list)
    for setting, samples in settings.items():
        name, _, parameters = setting.partition(":")
        _, _, moved = POLICIES.get(name, (None, None, None))
        alone = not parameters or (parameters.startswith(f"{moved}=") and "," not in parameters)
        if name == "full" or (moved and alone):
            found[name].append(point(samples, default=not parameters))
    return {name: sorted(points) for name, points in found.items()}


def draw(runs: dict[str, list[dict[str, Any]]], dark: str | None = None) -> Any:
    """The figure; ``dark`` is a background to look at it on, None is transparent."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    # The same file for the same numbers; text stays text, in the reader's font.
    mpl.rcParams |= {"svg.hashsalt": "refreekv", "svg.fonttype": "none", "font.size": 11}
    mpl.rcParams |= {"font.family": "sans-serif", "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"]}
    figure = Figure(figsize=(11, 4.1), layout="constrained", facecolor=dark or "none")
    figure.get_layout_engine().set(wspace=0.05)
    panels = figure.subplots(1, len(runs), sharey=True)
    for axes, (title, run) in zip(panels, runs.items(), strict=True):
        found = lines(run)
        count = len({(one["family"], one["sample"]) for one in run})
        axes.set_title(f"{title}  (n = {count})", color=NEUTRAL, fontsize=12, loc="left")
        axes.set_facecolor("none")
        axes.set_yscale("log")
        axes.set_xlim(15, 103)
        axes.set_ylim(3e-4, 6)
        axes.grid(color=NEUTRAL, alpha=0.2, linewidth=0.7)
        axes.tick_params(colors=NEUTRAL, which="both", length=0)
        axes.set_xticks([20, 40, 60, 80, 100])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}%"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        for side in axes.spines.values():
            side.set_visible(False)
        (floor,) = found.pop("full")
        axes.axhline(floor.worst, color=NEUTRAL, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(16, floor.worst * 0.86, "full cache, run twice", color=NEUTRAL, fontsize=9, va="top")
        for name, (label, colour, _) in POLICIES.items():
            x, y, default = zip(*found[name], strict=True)
            ours = name == "adaptive"
            axes.plot(x, y, color=colour, marker="o", markersize=6 if ours else 4, linewidth=2.8 if ours else 1.6,
                      label=label, zorder=3 if ours else 2)  # fmt: skip
            if ours:
                at = default.index(True)
                axes.plot(x[at], y[at], "o", color=colour, markersize=13, fillstyle="none", markeredgewidth=1.8)
    panels[0].set_ylabel("KL of the worst family, nats a token", color=NEUTRAL)
    figure.supxlabel("K/V bytes held, of the full cache's", color=NEUTRAL, fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    for text, (_, colour, _) in zip(legend.get_texts(), POLICIES.values(), strict=True):
        text.set_color(colour)
    return figure


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help=".svg, or .png to look at")
    parser.add_argument("--background", help="a colour; transparent if left out")
    given = parser.parse_args()
    runs = {title: records(RUNS / f"{name}.jsonl.gz") for name, title in MODELS.items()}
    draw(runs, given.background).savefig(
        given.out, metadata={"Date": None} if given.out.suffix == ".svg" else None, dpi=110
    )


if __name__ == "__main__":
    main()
