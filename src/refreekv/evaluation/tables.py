"""Tables of results files, on pandas: means, bootstrap intervals, worst families, and their text.

Over families everything is the mean of the families' means (macro mean), so that a family of
many samples weighs no more than others; bytes are totals. Intervals are 95% percentile
intervals of the bootstrap, and the same for the same records in any order.
"""

import functools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

try:
    import numpy as np
    import pandas as pd
except ImportError as error:
    raise ImportError(f"tables need pandas ({error}); run: pip install 'refreekv[eval]'") from error

from refreekv.evaluation.records import CHANCE, FidelityRecord, TaskRecord
from refreekv.evaluation.sweeps import FULL
from refreekv.report import format_bytes

DRAWS = 2000
"""Resamples of a bootstrap."""

# -- the bootstrap ------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


def draws(count: int, generator: torch.Generator) -> np.ndarray:
    """Indices ``[DRAWS, count]`` of ``count`` samples drawn anew, with replacement."""
    return torch.randint(count, (DRAWS, count), generator=generator).numpy()


def interval(means: np.ndarray) -> tuple[float, float]:
    """The central 95% of the draws' means ``[DRAWS]``."""
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean of some samples with its interval."""
    data = np.asarray(values, dtype=float)
    return Estimate(float(data.mean()), *interval(data[_seeded(len(data), seed)].mean(1)))


def bootstrap_families(families: Mapping[str, Sequence[float]], *, seed: int = 0) -> tuple[float, float] | None:
    """Interval of the mean of family means, samples resampled within each family.

    Families of one sample cannot be resampled: they add nothing to the interval's width.
    Families differ in their draws; policies measured on the same samples are drawn alike.

    Returns
    -------
    (float, float) or None
        None if no family has two samples.
    """
    if all(len(values) < 2 for values in families.values()):
        return None
    means = [
        np.asarray(values, dtype=float)[_seeded(len(values), seed + zlib.crc32(name.encode(errors="backslashreplace")))]
        for name, values in families.items()
    ]
    return interval(np.mean([drawn.mean(1) for drawn in means], axis=0))


@functools.lru_cache(maxsize=64)
def _seeded(count: int, seed: int) -> np.ndarray:
    return draws(count, torch.Generator().manual_seed(seed))


# -- fidelity -----------------------------------------------------------------------------


MEANS = ("kl_mean", "kl_p99", "top1", "same_path", "answer_nll_change", "budget")


@dataclass(frozen=True)
class Fidelity:
    """Tables of a fidelity run, the noise floor first in each.

    A row is a policy: ``policy``; ``n`` samples; ``kl``, the mean over samples of the mean
    KL(full || pruned) in nats, with ``kl_interval`` (None where no family has two samples);
    ``kl_p99`` and ``kl_max``, of the tokens; ``top1``, the share of tokens with the same most
    likely next token; ``same_path``, the share of samples where all have, with
    ``same_path_interval``; ``answer_nll_change``, None without gold answers; ``budget``, the kept
    share; ``bytes_full`` and ``bytes_kept``; ``worst_family`` by mean KL and its ``worst_kl``.
    """

    overall: pd.DataFrame  # over all families
    families: Mapping[str, pd.DataFrame]  # family names to tables, in which no family is the worst

    def to_dict(self) -> dict[str, Any]:
        """As plain types, ready for JSON."""
        return {"overall": plain(self.overall), "families": {name: plain(one) for name, one in self.families.items()}}


def fidelity(records: Iterable[FidelityRecord], *, seed: int = 0) -> Fidelity:
    """Sum up a fidelity run."""
    data = pd.DataFrame([vars(record) for record in records])
    data["answer_nll_change"] = data["answer_nll_change"].astype(float)
    policies = sorted(data["policy"].unique(), key=lambda name: name != FULL)  # stable: the others stay as they came
    data["policy"] = pd.Categorical(data["policy"], policies)
    data["family"] = pd.Categorical(data["family"], data["family"].unique())
    data = data.sort_values("sample", kind="stable")
    return Fidelity(
        _fidelity_table(data, seed, overall=True),
        {
            name: _fidelity_table(data[data["family"] == name], seed, overall=False)
            for name in sorted(data["family"].cat.categories)
        },
    )


def _fidelity_table(data: pd.DataFrame, seed: int, *, overall: bool) -> pd.DataFrame:
    rows = []
    for policy, own in data.groupby("policy", observed=True):
        families = own.groupby("family", observed=True)
        means = families[list(MEANS)].mean()
        mean, worst = means.mean(), means["kl_mean"].idxmax()
        kl, path = (
            bootstrap_families(families[name].agg(list).to_dict(), seed=seed) for name in ("kl_mean", "same_path")
        )
        rows.append(
            {
                "policy": policy,
                "n": len(own),
                "kl": mean["kl_mean"],
                "kl_interval": kl,
                "kl_p99": mean["kl_p99"],
                "kl_max": own["kl_max"].max(),
                "top1": mean["top1"],
                "same_path": mean["same_path"],
                "same_path_interval": path,
                "answer_nll_change": mean["answer_nll_change"],
                "budget": mean["budget"],
                "bytes_full": own["bytes_full"].sum(),
                "bytes_kept": own["bytes_kept"].sum(),
                "worst_family": worst if overall else None,
                "worst_kl": means["kl_mean"][worst] if overall else None,
            }
        )
    return _table(rows)


HEADINGS = (
    "policy", "n", "budget", "K/V kept", "KL mean [95%]", "worst family", "KL p99", "top-1", "same path [95%]",
    "answer NLL",
)  # fmt: skip


def cells(row: Any) -> tuple[str, ...]:
    """A row of `Fidelity` as text, under `HEADINGS`."""
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


def texts(tables: Fidelity) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, headings and cells of each table: overall first, unless there is but one family."""
    count, worst = len(tables.families), HEADINGS.index("worst family")
    found: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = []
    if count != 1:
        rows = [cells(row) for row in tables.overall.itertuples()]
        found.append((f"Overall: mean of {count} families' means", HEADINGS, rows))
    for family, table in tables.families.items():
        lines = [HEADINGS, *(cells(row) for row in table.itertuples())]
        headings, *rows = [line[:worst] + line[worst + 1 :] for line in lines]
        found.append((family, headings, rows))
    return found


def markdown(tables: Fidelity, *, setup: Mapping[str, Any] | None = None) -> str:
    """The tables as Markdown, with the settings in front."""
    lines = ["# Fidelity", ""]
    for name, value in (setup or {}).items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {one}" for key, one in value.items())
        lines.append(f"- {name}: {value}")
    if setup:
        lines.append("")
    lines += [NOTE, ""]
    for title, headings, rows in texts(tables):
        lines += [f"## {title}", "", markdown_table(headings, rows), ""]
    return "\n".join(lines)


NOTE = (
    "KL(full‖pruned) in nats over the full cache's own greedy continuation; intervals: 95% bootstrap, samples "
    "resampled within families; same path: samples whose every most likely token stays the same; answer NLL: change "
    "of the gold answer's negative log-likelihood, nats a token; full: the full cache a second time, through the same "
    "kernels and the same batch as the policies."
)


# -- task scores --------------------------------------------------------------------------


def scores(records: Iterable[TaskRecord]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sum up one model's task scores, families and policies in the order in which they occur.

    Returns
    -------
    families : DataFrame
        A row for each ``family`` and ``policy``: ``n`` samples; ``score`` and ``change`` to the full cache
        on the same samples, an `Estimate` each or None; ``same``, the share of answers equal to the
        full cache's; mean ``budget``; ``bytes_full`` and ``bytes_kept``.
    policies : DataFrame
        A row for each ``policy``, each family counting the same: ``score`` and ``change``, None where no
        family has a score; ``worst``, the family that loses most; ``budget``.
    """
    data = pd.DataFrame([{**vars(record), "score": record.scores.get("score")} for record in records])
    if data.empty:
        return pd.DataFrame(), pd.DataFrame()
    data["score"] = data["score"].astype(float)
    data["same"] = data["same_as_full"].map(lambda same: same is not False)
    full = data[data["policy"] == FULL].set_index(["family", "sample"])["score"]
    data["change"] = data["score"] - full.reindex(pd.MultiIndex.from_frame(data[["family", "sample"]])).to_numpy()
    families = _table(
        {
            "family": family,
            "policy": policy,
            "n": len(own),
            "score": _estimate(own["score"]),
            "change": _estimate(own["change"]),
            "same": own["same"].mean(),
            "budget": own["budget"].mean(),
            "bytes_full": own["bytes_full"].sum(),
            "bytes_kept": own["bytes_kept"].sum(),
        }
        for (family, policy), own in data.groupby(["family", "policy"], sort=False)
    )
    rows = []
    for policy, own in families[families["policy"] != CHANCE].groupby("policy", sort=False):
        means = own[["score", "change"]].map(lambda one: one.mean if one else np.nan).astype(float)
        worst = None if policy == FULL or means["change"].isna().all() else own["family"][means["change"].idxmin()]
        rows.append({"policy": policy, **means.mean(), "worst": worst, "budget": own["budget"].mean()})
    return families, _table(rows)


def by_place(records: Iterable[TaskRecord]) -> dict[tuple[str, str], dict[tuple[float, float], float]]:
    """Needles: for each family and policy the mean score by (length, depth), shortest and earliest first."""
    rows = [
        {"key": (one.family, one.policy), "place": tuple(one.place), "score": one.scores["score"]}
        for one in records
        if one.place and "score" in one.scores
    ]
    if not rows:
        return {}
    return {
        key: own.groupby("place")["score"].mean().to_dict()
        for key, own in pd.DataFrame(rows).groupby("key", sort=False)
    }


def _estimate(values: pd.Series) -> Estimate | None:
    known = values.dropna()
    return bootstrap(known.tolist()) if len(known) else None


# -- tables as such -----------------------------------------------------------------------


def _table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table whose cells are Python's own; None for what is missing."""
    table = pd.DataFrame(list(rows)).astype(object)
    return table.where(table.notna(), None)


def plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain types, ready for JSON."""

    def value(cell: Any) -> Any:
        if isinstance(cell, np.generic):
            return cell.item()
        return asdict(cell) if isinstance(cell, Estimate) else cell

    return [{key: value(cell) for key, cell in row.items()} for row in table.to_dict("records")]


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    """A Markdown table; columns to the right but for those at the indices ``left``."""
    rule = "|".join("---" if at in set(left) else "---:" for at in range(len(headings)))
    return "\n".join([_line(headings), f"|{rule}|", *map(_line, rows)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
