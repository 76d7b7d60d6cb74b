"""A results file as one HTML page: what each policy keeps, and what that costs.

The page is self-contained (`page`). All numbers are computed here; the script only draws.

Means are macro means: over the samples of a family first, then over the families.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median_low
from typing import Any

import torch
from torch import Tensor

from .bootstrap import DRAWS, interval, resampled_means
from .page import encode_positions, write_page
from .records import FidelityRecord

NOISE_FLOOR = "full"
METRICS = {
    # name: whether more is better
    "kl_mean": False,
    "kl_p99": False,
    "same_path": True,
    "top1": True,
    "budget": False,
    "bytes_kept": False,
    "bytes_full": False,
}
SCRIPTS = ("dom.js", "core.js", "frontier.js", "heads.js", "tokens.js", "text.js", "answers.js", "worst.js")
DISPLAY_LIMIT = 3_000_000  # characters of token texts and positions, the one part that could grow without end
ANSWER_LIMIT, PROMPT_LIMIT = 4_000, 1_200  # characters of one answer and one prompt among the worst samples
WORST_SHOWN, WORST_WITH_TEXT = 6, 3
SAMPLE_FIELDS = ("family", "sample", "prompt_tokens", "budget", "kl_mean", "kl_max", "top1", "first_divergence")


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% bootstrap interval (as wide as the value itself where n is 1)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """One policy on one family, or over all of its families (then the last two fields are filled).

    ``first_divergence`` is the median index of the first differing token, None if most samples
    never differ; ``worst`` names by metric the family with the worst mean, with that mean.
    """

    name: str
    n: int
    metrics: dict[str, Estimate]
    first_divergence: int | None
    answer_nll_change: float | None
    worst: dict[str, tuple[str, Estimate]] = field(default_factory=dict)
    families: tuple["Group", ...] = ()


def write_report(records: Iterable[FidelityRecord], path: Path, *, title: str, setup: dict[str, Any]) -> None:
    """Write the report as a single self-contained HTML file.

    Parameters
    ----------
    records : iterable of FidelityRecord
        Any mix of models, policies and families. Where one (model, family, sample, policy)
        comes twice, the later record counts.
    path : Path
        The file to write; its folder is made if it is missing.
    title : str
        The page's heading.
    setup : dict
        What else is known of the run (command, machine, dtype, …), shown as it is. ``"date"``
        is the date of the page, by default now.

    Raises
    ------
    ValueError
        If there is no record.
    ImportError
        If Jinja2 is not installed.
    """
    models: dict[str, dict[tuple[str, str, str], FidelityRecord]] = defaultdict(dict)
    for record in records:
        models[record.model][record.policy, record.family, record.sample] = record
    if not models:
        raise ValueError("no records to report: the results file is empty")
    views = [_model_view(name, list(found.values())) for name, found in models.items()]
    setup = dict(setup)
    date = str(setup.pop("date", "") or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    write_page(
        path,
        "report.html.j2",
        scripts=SCRIPTS,
        styles=("report.css",),
        data={"models": [view["data"] for view in views]},
        filters={"kl": _format_kl, "share": _format_share, "raw": _raw},
        title=title,
        date=date,
        setup={key: _readable(value) for key, value in setup.items()},
        views=views,
        noise_floor=NOISE_FLOOR,
        draws=DRAWS,
    )


def _model_view(model: str, records: list[FidelityRecord]) -> dict[str, Any]:
    """What the template shows of one model, and under ``data`` what the script draws."""
    by_policy: dict[str, list[FidelityRecord]] = defaultdict(list)
    for record in records:
        by_policy[record.policy].append(record)
    labels = short_labels(list(by_policy))
    groups = {policy: summarise(policy, found) for policy, found in by_policy.items()}
    samples = {policy: {(r.family, r.sample) for r in found} for policy, found in by_policy.items()}
    every = set().union(*samples.values())
    texts, left_out = _display_samples(records, list(by_policy))
    bins, budgets = _budget_by_length(by_policy)
    return {
        "name": model,
        "groups": list(groups.values()),
        "floor": groups.get(NOISE_FLOOR),
        "n": len(every),
        "families": sorted({family for family, _ in every}),
        "tokens": (min(r.prompt_tokens for r in records), max(r.prompt_tokens for r in records)),
        "incomplete": [policy for policy, found in samples.items() if found != every],
        "bins": bins,
        "budgets": budgets,
        "has_nll": any(group.answer_nll_change is not None for group in groups.values()),
        "left_out": left_out,
        "data": {
            "name": model,
            "policies": [
                {
                    "spec": policy,
                    "base": policy.partition(":")[0],
                    "label": labels[policy],
                    "floor": policy == NOISE_FLOOR,
                    "n": group.n,
                    "metrics": {name: asdict(estimate) for name, estimate in group.metrics.items()},
                    "worst": {
                        name: {"family": family, **asdict(estimate)} for name, (family, estimate) in group.worst.items()
                    },
                    "heads": _mean_heads(by_policy[policy]),
                    "worst_samples": _worst_samples(by_policy[policy]),
                }
                for policy, group in groups.items()
            ],
            "texts": texts,
        },
    }


def summarise(policy: str, records: Sequence[FidelityRecord]) -> Group:
    """Macro means, worst families and their bootstrap intervals for one policy's records.

    The bootstrap draws samples within each family, so that every draw holds every family.
    They are those of the tables (`refreekv.evaluation.bootstrap`).
    """
    by_family: dict[str, list[FidelityRecord]] = defaultdict(list)
    for record in records:
        by_family[record.family].append(record)
    drawn: list[Tensor] = []
    families: list[Group] = []
    for family in sorted(by_family):
        # By name, so that the order of the file's lines changes nothing.
        found = sorted(by_family[family], key=lambda record: record.sample)
        values = torch.tensor([[float(getattr(r, name)) for name in METRICS] for r in found], dtype=torch.float64)
        drawn.append(resampled_means(values, family))
        families.append(_group(family, found, _estimates(values.mean(0), drawn[-1])))
    means = torch.tensor([[group.metrics[name].value for name in METRICS] for group in families], dtype=torch.float64)
    worst = {}
    for name, more_is_better in METRICS.items():
        sign = -1 if more_is_better else 1
        # What is not a number is worse than any number.
        found_worst = max(families, key=lambda group: _or_inf(sign * group.metrics[name].value))
        worst[name] = (found_worst.name, found_worst.metrics[name])
    macro = _estimates(means.mean(0), torch.stack(drawn).mean(0))
    changes = [group.answer_nll_change for group in families if group.answer_nll_change is not None]
    return replace(
        _group(policy, records, macro),
        answer_nll_change=mean(changes) if changes else None,
        worst=worst,
        families=tuple(families),
    )


def _group(name: str, records: Sequence[FidelityRecord], metrics: dict[str, Estimate]) -> Group:
    middle = median_low(math.inf if r.first_divergence is None else r.first_divergence for r in records)
    changes = [r.answer_nll_change for r in records if r.answer_nll_change is not None]
    return Group(
        name=name,
        n=len(records),
        metrics=metrics,
        first_divergence=None if math.isinf(middle) else int(middle),
        answer_nll_change=mean(changes) if changes else None,
    )


def _estimates(values: Tensor, drawn: Tensor) -> dict[str, Estimate]:
    """``values`` ``[M]`` and the draws ``[DRAWS, M]`` to one estimate a metric."""
    low, high = interval(drawn)
    return {
        name: Estimate(value, *interval)
        for name, value, *interval in zip(METRICS, values.tolist(), low.tolist(), high.tolist(), strict=True)
    }


def short_labels(policies: Sequence[str]) -> dict[str, str]:
    """A short name for each specification: the policy's name and the parameters in which its kin differ.

    ``snapkv:ratio=0.5`` and ``snapkv:ratio=0.7`` become ``snapkv 0.5`` and ``snapkv 0.7``.
    """
    kin: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for policy in policies:
        base, _, rest = policy.partition(":")
        kin[base][policy] = {key: value for key, _, value in (part.partition("=") for part in rest.split(",") if part)}
    labels = {}
    for base, members in kin.items():
        keys = [key for parameters in members.values() for key in parameters]
        differing = [
            key for key in dict.fromkeys(keys) if len({parameters.get(key) for parameters in members.values()}) > 1
        ]
        for policy, parameters in members.items():
            shown = [
                parameters[key] if len(differing) == 1 else f"{key}={parameters[key]}"
                for key in differing
                if key in parameters
            ]
            labels[policy] = " ".join([base, ", ".join(shown)]).strip()
    twice = {label for label, times in Counter(labels.values()).items() if times > 1}
    return {policy: policy if label in twice else label for policy, label in labels.items()}


def _budget_by_length(
    by_policy: dict[str, list[FidelityRecord]],
) -> tuple[list[str], dict[str, list[tuple[float, int] | None]]]:
    """Bins of prompt length (powers of two from 128) and, by policy and bin, mean budget and n."""

    def bin_of(record: FidelityRecord) -> int:
        return max(0, record.prompt_tokens.bit_length() - 7)

    used = sorted({bin_of(record) for found in by_policy.values() for record in found})
    budgets: dict[str, list[tuple[float, int] | None]] = {}
    for policy, found in by_policy.items():
        cells = [[record.budget for record in found if bin_of(record) == index] for index in used]
        budgets[policy] = [(mean(cell), len(cell)) if cell else None for cell in cells]
    names = ["< 128" if index == 0 else f"{_tokens(64 << index)} – {_tokens(128 << index)}" for index in used]
    return names, budgets


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 else str(count)


def _mean_heads(records: Sequence[FidelityRecord]) -> dict[str, Any] | None:
    """Kept share by layer and KV head, mean over the samples that have it; one row where heads are alike."""
    found = [record.kept_heads for record in records if record.kept_heads]
    if not found:
        return None
    layers = Counter(len(kept) for kept in found).most_common(1)[0][0]
    found = [kept for kept in found if len(kept) == layers and all(kept)]
    heads = max((len(layer) for kept in found for layer in kept), default=0)
    # A layer with one entry has it for all heads.
    full = [[layer * heads if len(layer) == 1 else layer for layer in kept] for kept in found]
    full = [kept for kept in full if all(len(layer) == heads for layer in kept)]
    if not full:
        return None
    return {"n": len(full), "kept": torch.tensor(full, dtype=torch.float64).mean(0).tolist()}


def _display_samples(records: Sequence[FidelityRecord], policies: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The samples with kept positions, by policy, until the file would grow too large; how many were left out."""
    texts: dict[tuple[str, str], dict[str, Any]] = {}
    used = left_out = 0
    for record in records:
        if record.positions is None:
            continue
        length = max(record.prompt_tokens, len(record.tokens or ()))
        kept = [encode_positions(ranges, length) for ranges in record.positions]
        text = texts.get((record.family, record.sample))
        size = len(json.dumps(kept)) + (0 if text else len(json.dumps(record.tokens)))
        if texts and used + size > DISPLAY_LIMIT:
            left_out += 1
            continue
        used += size
        if text is None:
            text = {"family": record.family, "sample": record.sample, "tokens": record.tokens, "n": length, "kept": {}}
            texts[record.family, record.sample] = text
        text["kept"][policies.index(record.policy)] = kept
    return list(texts.values()), left_out


def _worst_samples(records: Sequence[FidelityRecord]) -> list[dict[str, Any]]:
    """The samples with the largest KL, and as far as they are not among them, the worst that have texts."""
    ranked = sorted(records, key=lambda record: -_or_inf(record.kl_mean))
    with_text = [rank for rank, record in enumerate(ranked) if record.text is not None and record.text_full is not None]
    picked = sorted({*range(min(WORST_SHOWN, len(ranked))), *with_text[:WORST_WITH_TEXT]})
    return [
        {
            "rank": rank + 1,
            **{name: getattr(ranked[rank], name) for name in SAMPLE_FIELDS},
            "text": _shortened(ranked[rank].text, ANSWER_LIMIT),
            "text_full": _shortened(ranked[rank].text_full, ANSWER_LIMIT),
            # The end of a prompt is where its question tends to be.
            "prompt": _shortened(
                ranked[rank].prompt or "".join(ranked[rank].tokens or ()) or None, PROMPT_LIMIT, from_end=True
            ),
        }
        for rank in picked
    ]


def _shortened(text: str | None, limit: int, *, from_end: bool = False) -> str | None:
    if text is None or len(text) <= limit:
        return text
    return f"[…] {text[-limit:]}" if from_end else f"{text[:limit]} […]"


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(entry)}" for key, entry in value.items())
    return ", ".join(map(_readable, value)) if isinstance(value, list | tuple) else str(value)


def _raw(value: float | None) -> str:
    """For sorting: exact, empty where there is no number."""
    return "" if value is None or not math.isfinite(value) else repr(value)


def _format_kl(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}".replace("e-0", "e-")


def _format_share(value: float, sign: bool = True) -> str:
    return f"{100 * value:.1f}{'%' if sign else ''}"
