"""The results page: tables and figures from results files of ``benchmarks/fidelity.py``.

    python benchmarks/results.py smollm2.jsonl.gz gemma.jsonl.gz --page lab/results.md --figures lab/figures

The page is written by hand but for what stands between a pair of marks such as
``<!-- begin MODEL:peers -->`` and ``<!-- end -->``; that is made here anew. ``MODEL`` is the
results file's name up to its first dot. Figures are ``MODEL-frontier.svg`` and ``MODEL-length.svg``;
those that the page shows are drawn.
``--compact DIR`` writes the runs without what the page does not need, small enough to be kept.
Needs matplotlib (the extra ``report``).
"""

import argparse
import gzip
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refreekv.core import spelling
from refreekv.evaluation import results as store
from refreekv.evaluation import sweeps, tables
from refreekv.evaluation.records import FidelityRecord
from refreekv.evaluation.sweeps import FULL

LENGTHS = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Bounds of the prompt lengths that are told apart, in tokens."""

SHORT = (
    *(
        FULL,
        "adaptive",
        "adaptive:constant=0.0004",
        "adaptive:constant=0.0016",
        "cake:ratio=0.75",
        "cake:ratio=0.9",
        "snapkv:ratio=0.5",
        "snapkv:ratio=0.75",
    ),
    *("h2o:ratio=0.5", "refreekv", "refreekv:probe_rows=32,probe_reduce=max"),
)
"""Policies of the short table."""

LONG = 4096
"""Tokens from which on a prompt is long there."""

DEVELOPMENT = [
    "2wikimqa-e",
    "few-shot-arithmetic",
    "gsm8k",
    "hotpotqa:after",
    "instructions",
    "kv-retrieval-75",
    "long-code",
    "multi-key-retrieval",
    "pg19",
    "qasper-e",
    "qmsum-meetings",
    "question-after",
    "ruler-niah-multikey-2",
    "ruler-vt",
    "system-prompt",
]
"""Families that `adaptive` was chosen on (lab/experiments.md)."""

MARK = re.compile(r"(<!-- begin ([\w.-]+):([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Run:
    """One results file.

    Parameters
    ----------
    path : Path
        A results file, may be gzipped.
    """

    def __init__(self, path: Path):
        self.name = path.name.partition(".")[0]
        results = store.read(path)
        self.setup = results.setup
        self.records: list[FidelityRecord] = [one for one in results.records if isinstance(one, FidelityRecord)]
        if not self.records:
            raise SystemExit(f"{path} holds no fidelity records")
        self.tables = tables.fidelity(self.records)
        self.rows = by_policy(self.tables.overall)

    def of(self, policy: str) -> list[FidelityRecord]:
        """A policy's records."""
        return [record for record in self.records if record.policy == policy]

    @property
    def adaptive(self) -> list[str]:
        """Policies that find their budget themselves."""
        fixed = ("size=", "ratio=")
        return [name for name in self.rows if name != FULL and not any(word in name for word in fixed)]


def compact(path: Path, folder: Path) -> None:
    """A results file without the shares of heads, gzipped; the same for the same content."""
    lines = []
    for line in store.contents(path).decode().splitlines():
        data = json.loads(line)
        data.pop("kept_heads", None)
        lines.append(json.dumps(data, ensure_ascii=False) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{path.name.partition('.')[0]}.jsonl.gz"
    target.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


# -- tables -------------------------------------------------------------------------------


def by_policy(table: Any) -> dict[str, Any]:
    """The rows of one of a run's tables."""
    return {row.policy: row for row in table.itertuples()}


def _policies(run: Run, names: Sequence[str]) -> str:
    rows = [run.rows[name] for name in (FULL, *names) if name in run.rows]
    return tables.markdown_table(tables.HEADINGS, [tables.cells(row) for row in rows])


def setup(run: Run) -> str:
    """What was measured, where and when."""
    samples = {(record.family, record.sample): record.prompt_tokens for record in run.records}
    families = {family for family, _ in samples}
    environment = run.setup.get("environment", {})
    lengths = sorted(samples.values())
    return "\n".join(
        [
            f"- Model: {run.setup['model']}, {run.setup['dtype']}, attention {run.setup['attention']}",
            f"- Samples: {len(samples)} of {len(families)} families, prompts of {lengths[0]:,} to {lengths[-1]:,} "
            f"tokens (median {lengths[len(lengths) // 2]:,}), {run.setup['continuation']} tokens compared at most",
            f"- Policies: {len(run.rows) - 1} and the full cache again",
            f"- Where: {', '.join(f'{key} {value}' for key, value in environment.items())}",
        ]
    )


def peers(run: Run) -> str:
    """Every policy over its grid of budgets, by name and then by budget."""
    ablations = set(sweeps.choose(suites=["paper-ablations"])) - set(sweeps.choose(suites=["peers"]))
    names = [name for name in run.rows if name not in ablations and name != FULL]
    return _policies(run, sorted(names, key=lambda name: (name.partition(":")[0], run.rows[name].budget)))


def short(run: Run) -> str:
    """The default and what it is most often compared with, few columns."""
    rows = []
    for name in (name for name in SHORT if name in run.rows):
        row = run.rows[name]
        long = [one.budget for one in run.of(name) if one.prompt_tokens >= LONG]
        rows.append(
            [
                "full cache, run twice" if name == FULL else f"`{name}`",
                f"{row.budget:.0%}",
                f"{sum(long) / len(long):.0%}" if long else "–",
                tables.nats(row.kl),
                f"{tables.nats(row.worst_kl)} {row.worst_family}",
                f"{row.same_path:.0%}",
            ]
        )
    count = sum(one.prompt_tokens >= LONG for one in run.of(FULL))
    headings = ["policy", "kept", f"kept of {LONG:,}+ tokens (n={count})", "mean KL", "worst family", "same path"]
    return tables.markdown_table(headings, rows)


def validation(run: Run) -> str:
    """Policies at about three quarters, and adaptive ones, over the families that served no choice."""
    rows = by_policy(tables.fidelity(one for one in run.records if one.family not in DEVELOPMENT).overall)
    on_grid = [name for name in run.adaptive if _on_grid(name)]
    shown = [FULL, *on_grid, *(name for name in rows if name.endswith(":ratio=0.75") and _on_grid(name))]
    found = sorted((rows[name] for name in shown if name in rows), key=lambda row: (row.policy != FULL, row.kl))
    return tables.markdown_table(tables.HEADINGS, [tables.cells(row) for row in found])


def ablations(run: Run) -> str:
    """The paper's ablations."""
    return _policies(run, list(sweeps.choose(suites=["paper-ablations"])))


def families(run: Run) -> str:
    """Budget and KL of some policies by family."""
    shown = [name for name in ("refreekv", "adaptive", "snapkv:ratio=0.5", "h2o:ratio=0.5") if name in run.rows]
    rows = []
    for family, found in run.tables.families.items():
        by_name = by_policy(found)
        tokens = [record.prompt_tokens for record in run.of(FULL) if record.family == family]
        cells = [family, str(len(tokens)), f"{sum(tokens) / len(tokens):,.0f}", tables.nats(by_name[FULL].kl)]
        for name in shown:
            row = by_name.get(name)
            cells.append("–" if row is None else f"{row.budget:.0%} / {tables.nats(row.kl)}")
        rows.append(cells)
    headings = ["family", "n", "tokens", "noise floor KL", *(f"{name}: budget / KL" for name in shown)]
    return tables.markdown_table(headings, rows)


def lengths(run: Run) -> str:
    """Budget and KL of adaptive policies by prompt length."""
    tokens = [record.prompt_tokens for record in run.of(FULL)]
    bounds = [(low, high) for low, high in itertools.pairwise(LENGTHS) if any(low <= n < high for n in tokens)]
    wanted = set(sweeps.choose(suites=["peers"]))
    rows = []
    for name in (name for name in run.adaptive if name in wanted):
        cells = [name]
        for low, high in bounds:
            some = [record for record in run.of(name) if low <= record.prompt_tokens < high]
            if some:
                budget, kl = (sum(getattr(one, field) for one in some) / len(some) for field in ("budget", "kl_mean"))
                cells.append(f"{budget:.0%} / {tables.nats(kl)}")
            else:
                cells.append("–")
        rows.append(cells)
    counts = [sum(low <= n < high for n in tokens) for low, high in bounds]
    headings = [f"{low:,}–{high - 1:,} tokens, n={n}" for (low, high), n in zip(bounds, counts, strict=True)]
    return tables.markdown_table(["policy: budget / mean KL", *headings], rows)


def paths(run: Run) -> str:
    """Unchanged paths against the noise floor's, sample by sample."""
    floor = {(record.family, record.sample): record.same_path for record in run.of(FULL)}
    rows = []
    for name, row in sorted(run.rows.items(), key=lambda item: -item[1].budget):
        differences: dict[str, list[float]] = {}
        for record in run.of(name):
            change = 100.0 * (record.same_path - floor[record.family, record.sample])
            differences.setdefault(record.family, []).append(change)
        means = {family: sum(values) / len(values) for family, values in differences.items()}
        interval = tables.bootstrap_families(differences) or (0.0, 0.0)
        worst = min(means, key=means.__getitem__)
        change = "–", "–"
        if name != FULL:
            mean = sum(means.values()) / len(means)
            change = f"{mean:+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}]", f"{means[worst]:+.0f} {worst}"
        shown = "full cache, run twice" if name == FULL else f"`{name}`"
        kl = f"{tables.nats(row.kl)}", f"{tables.nats(row.worst_kl)} {row.worst_family}"
        rows.append([shown, f"{row.budget:.0%}", *kl, f"{row.same_path:.1%}", *change])
    headings = [
        "policy",
        "kept",
        "mean KL",
        "worst family",
        "same path",
        "points to the floor [95%]",
        "its worst family",
    ]
    return tables.markdown_table(headings, rows)


TABLES: dict[str, Callable[[Run], str]] = {
    "setup": setup,
    "short": short,
    "peers": peers,
    "validation": validation,
    "ablations": ablations,
    "families": families,
    "lengths": lengths,
    "paths": paths,
}


def fill(page: str, runs: Sequence[Run]) -> str:
    """The page with all marked parts made anew.

    Raises
    ------
    SystemExit
        A mark names a table or a run that there is not.
    """
    by_name = {run.name: run for run in runs}

    def made(match: re.Match[str]) -> str:
        begin, name, what, end = match.groups()
        if what not in TABLES or name not in by_name:
            there = f"runs: {', '.join(by_name)}; tables: {', '.join(TABLES)}"
            raise SystemExit(f"the page asks for {name}:{what}; {there}")
        return f"{begin}\n{TABLES[what](by_name[name])}\n\n{end}"

    return MARK.sub(made, page)


# -- figures ------------------------------------------------------------------------------


def _axes(title: str) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.hashsalt": "refreekv", "svg.fonttype": "none"}  # the same file for the same numbers
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _on_grid(name: str) -> bool:
    """Whether a policy differs from its defaults in nothing but what moves its budget."""
    base, items = spelling.parts(name)
    moved = sweeps.GRIDS.get(base, "ratio").partition("=")[0]
    return all(key == moved for key, _ in items)


def frontier(run: Run, path: Path) -> None:
    """Budget against KL, a line for each policy."""
    import matplotlib as mpl

    figure, axes = _axes(f"{run.setup['model']}: what is kept, and what that costs (n={run.rows[FULL].n})")
    groups: dict[str, list[Any]] = {}
    for name, row in run.rows.items():
        if name != FULL and _on_grid(name):
            groups.setdefault(name.partition(":")[0], []).append(row)
    colours, markers = mpl.colormaps["tab20"].colors, "osD^v<>P*Xhp"
    ours = ("refreekv", "adaptive")
    for index, (name, rows) in enumerate(sorted(groups.items())):
        rows = sorted(rows, key=lambda row: row.budget)
        axes.plot(
            [100 * row.budget for row in rows],
            [max(row.kl, 1e-6) for row in rows],
            label=name,
            color="black" if name == "adaptive" else colours[index % 20],
            marker=markers[index % len(markers)],
            markersize=6,
            linewidth=2.5 if name in ours else 1.2,
            zorder=3 if name in ours else 2,
        )
    axes.axhline(run.rows[FULL].kl, color="grey", linestyle="--", linewidth=1, label="noise floor")
    axes.set_yscale("log")
    axes.set_xlabel("K/V kept, % of all layers, KV heads and positions (mean of families)")
    axes.set_ylabel("KL(full‖pruned), nats a token (mean of families)")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, metadata={"Date": None})


def budget_by_length(run: Run, path: Path) -> None:
    """What adaptive policies keep of shorter and longer prompts."""
    import matplotlib as mpl

    figure, axes = _axes(f"{run.setup['model']}: what is kept, by prompt length")
    bounds = list(itertools.pairwise(LENGTHS))
    wanted = set(sweeps.choose(suites=["peers"]))
    # Where little was lost, or the one with its defaults.
    names = [name for name in run.adaptive if name in wanted and (":" not in name or run.rows[name].kl < 0.25)]
    for index, name in enumerate(names):
        points = []
        for low, high in bounds:
            some = [record for record in run.of(name) if low <= record.prompt_tokens < high]
            if some:
                points.append([sum(getattr(one, f) for one in some) / len(some) for f in ("prompt_tokens", "budget")])
        axes.plot(
            [point[0] for point in points],
            [100 * point[1] for point in points],
            marker="o",
            label=name,
            color=mpl.colormaps["tab20"].colors[index % 20],
        )
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 102)
    axes.set_xlabel("tokens of the prompt (mean of each length class)")
    axes.set_ylabel("K/V kept, %")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse the arguments, fill the page, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="results files")
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--compact", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.compact is not None:
        for path in arguments.runs:
            compact(path, arguments.compact)
    runs = [Run(path) for path in arguments.runs]
    arguments.page.write_text(fill(arguments.page.read_text(encoding="utf-8"), runs), encoding="utf-8")
    arguments.figures.mkdir(parents=True, exist_ok=True)
    page = arguments.page.read_text(encoding="utf-8")
    for run in runs:
        for kind, draw in (("frontier", frontier), ("length", budget_by_length)):
            path = arguments.figures / f"{run.name}-{kind}.svg"
            if path.name in page:
                draw(run, path)


if __name__ == "__main__":
    main()
