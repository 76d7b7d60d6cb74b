"""Tables of a run: per family and overall, with intervals, the worst family and the noise floor."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from refreekv.evaluation.bootstrap import DRAWS, interval, resampled_means
from refreekv.evaluation.records import FidelityRecord
from refreekv.evaluation.sweeps import FULL
from refreekv.report import format_bytes


@dataclass(frozen=True)
class Row:
    """One policy over the samples of a family, or over families.

    Over families everything is the mean of the families' means (macro mean), so that a
    family of many samples weighs no more than others; bytes are totals.

    Attributes
    ----------
    policy : str
        Its specification; ``"full"`` is the noise floor.
    n : int
        Samples.
    kl : float
        Mean over samples of the mean KL(full || pruned), in nats.
    kl_interval : (float, float) or None
        95% bootstrap interval of it, samples resampled within families; None where no
        family has two samples.
    kl_p99 : float
        Mean over samples of the 99th percentile over tokens.
    kl_max : float
        Largest over all tokens.
    top1 : float
        Mean share of tokens with the same most likely next token.
    same_path : float
        Share of samples where all have.
    same_path_interval : (float, float) or None
        As for ``kl``.
    answer_nll_change : float or None
        Mean over the samples with a gold answer.
    budget : float
        Mean kept share.
    bytes_full, bytes_kept : int
        Totals.
    worst_family : str or None
        The family with the largest mean KL; None in a family's own table.
    worst_kl : float or None
        Its mean KL.
    """

    policy: str
    n: int
    kl: float
    kl_interval: tuple[float, float] | None
    kl_p99: float
    kl_max: float
    top1: float
    same_path: float
    same_path_interval: tuple[float, float] | None
    answer_nll_change: float | None
    budget: float
    bytes_full: int
    bytes_kept: int
    worst_family: str | None = None
    worst_kl: float | None = None


@dataclass(frozen=True)
class Summary:
    """All tables of a run, the noise floor first in each.

    Attributes
    ----------
    overall : tuple of Row
        Over all families.
    families : dict
        Family names to tables.
    """

    overall: tuple[Row, ...]
    families: Mapping[str, tuple[Row, ...]]

    def to_dict(self) -> dict[str, Any]:
        """As plain types, ready for JSON."""
        return {
            "overall": [asdict(row) for row in self.overall],
            "families": {family: [asdict(row) for row in rows] for family, rows in self.families.items()},
        }


def summarize(records: Iterable[FidelityRecord], *, draws: int = DRAWS, seed: int = 0) -> Summary:
    """Sum up records. Intervals are the same for the same records, in any order, and seed."""
    table: dict[str, dict[str, list[FidelityRecord]]] = {}
    for record in records:
        table.setdefault(record.policy, {}).setdefault(record.family, []).append(record)
    names = sorted(table, key=lambda name: name != FULL)  # stable: the others stay as they came
    families = sorted({family for groups in table.values() for family in groups})
    for groups in table.values():
        for group in groups.values():
            group.sort(key=lambda record: record.sample)
    return Summary(
        overall=tuple(_row(name, table[name], draws, seed, overall=True) for name in names),
        families={
            family: tuple(
                _row(name, {family: table[name][family]}, draws, seed, overall=False)
                for name in names
                if family in table[name]
            )
            for family in families
        },
    )


def bootstrap(
    families: Mapping[str, Sequence[float]], *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float] | None:
    """95% percentile interval of the mean of family means, samples resampled within each family.

    Families of one sample cannot be resampled: they add nothing to the interval's width.
    Policies measured on the same samples are resampled alike.

    Returns
    -------
    (float, float) or None
        None if no family has two samples.
    """
    if not any(len(values) > 1 for values in families.values()):
        return None
    means = [
        resampled_means(torch.tensor(values, dtype=torch.float64)[:, None], name, draws=draws, seed=seed)
        for name, values in families.items()
    ]
    low, high = interval(torch.stack(means).mean(0))
    return low.item(), high.item()


def _row(policy: str, groups: Mapping[str, list[FidelityRecord]], draws: int, seed: int, *, overall: bool) -> Row:
    def values(field: str) -> dict[str, list[float]]:
        return {
            name: [float(value) for record in group if (value := getattr(record, field)) is not None]
            for name, group in groups.items()
        }

    def macro(field: str) -> float | None:
        return _mean([_mean(group) for group in values(field).values() if group])

    kl, path = values("kl_mean"), values("same_path")
    worst = max(kl, key=lambda name: _mean(kl[name]) or 0.0)
    everything = [record for group in groups.values() for record in group]
    return Row(
        policy=policy,
        n=len(everything),
        kl=macro("kl_mean") or 0.0,
        kl_interval=bootstrap(kl, draws=draws, seed=seed),
        kl_p99=macro("kl_p99") or 0.0,
        kl_max=max(record.kl_max for record in everything),
        top1=macro("top1") or 0.0,
        same_path=macro("same_path") or 0.0,
        same_path_interval=bootstrap(path, draws=draws, seed=seed),
        answer_nll_change=macro("answer_nll_change"),
        budget=macro("budget") or 0.0,
        bytes_full=sum(record.bytes_full for record in everything),
        bytes_kept=sum(record.bytes_kept for record in everything),
        worst_family=worst if overall else None,
        worst_kl=_mean(kl[worst]) if overall else None,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


HEADINGS = (
    "policy", "n", "budget", "K/V kept", "KL mean [95%]", "worst family", "KL p99", "top-1", "same path [95%]",
    "answer NLL",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, under `HEADINGS`."""
    worst = "–" if row.worst_family is None else f"{nats(row.worst_kl)} {row.worst_family}"
    path = f"{row.same_path:.1%}"
    if row.same_path_interval is not None:
        path += " [{:.0%}, {:.0%}]".format(*row.same_path_interval)
    kl = nats(row.kl)
    if row.kl_interval is not None:
        kl += f" [{nats(row.kl_interval[0])}, {nats(row.kl_interval[1])}]"
    return (
        f"{row.policy} (noise floor)" if row.policy == FULL else row.policy,
        str(row.n),
        f"{row.budget:.1%}",
        format_bytes(row.bytes_kept),
        kl,
        worst,
        nats(row.kl_p99),
        f"{row.top1:.1%}",
        path,
        "–" if row.answer_nll_change is None else f"{row.answer_nll_change:+.4f}",
    )


def nats(value: float | None) -> str:
    """A divergence as text."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def _tables(summary: Summary) -> list[tuple[str, tuple[Row, ...]]]:
    count = len(summary.families)
    overall = (f"Overall: mean of {count} families' means", summary.overall)
    return [overall, *summary.families.items()] if count != 1 else [*summary.families.items()]


def markdown(summary: Summary, *, setup: Mapping[str, Any] | None = None) -> str:
    """The tables as Markdown, with the settings in front."""
    lines = ["# Fidelity", ""]
    for name, value in (setup or {}).items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {one}" for key, one in value.items())
        lines.append(f"- {name}: {value}")
    if setup:
        lines.append("")
    lines += [NOTE, ""]
    for title, rows in _tables(summary):
        headings = HEADINGS if rows[0].worst_family else tuple(h for h in HEADINGS if h != "worst family")
        keep = [HEADINGS.index(heading) for heading in headings]
        lines += [f"## {title}", "", f"| {' | '.join(headings)} |", "|---" + "|---:" * (len(headings) - 1) + "|"]
        lines += [f"| {' | '.join(cells(row)[at] for at in keep)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


NOTE = (
    "KL(full‖pruned) in nats over the full cache's own greedy continuation; intervals: 95% bootstrap, samples "
    "resampled within families; same path: samples whose every most likely token stays the same; answer NLL: change "
    "of the gold answer's negative log-likelihood, nats a token; full: the full cache a second time, through the same "
    "kernels and the same batch as the policies."
)


def rich_tables(summary: Summary, *, families: bool = True) -> Any:
    """The tables for a terminal; needs the package rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    for title, rows in _tables(summary)[: None if families else 1]:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        keep = [at for at, heading in enumerate(HEADINGS) if heading != "worst family" or rows[0].worst_family]
        for at in keep:
            table.add_column(HEADINGS[at], justify="left" if at == 0 else "right", no_wrap=True)
        for row in rows:
            texts = cells(row)
            table.add_row(*(Text(texts[at]) for at in keep), style="dim" if row.policy == FULL else None)
        shown += [table, ""]
    return Group(*shown, Text(NOTE, style="dim"))
