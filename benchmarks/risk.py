"""Whether a calibrated constant keeps its risk on real prompts: many splits in halves. The table of lab/risk.md.

    python benchmarks/fidelity.py MODEL --data-dir DIR --plan benchmarks/plans/risk.toml --out risk-MODEL.jsonl
    python benchmarks/risk.py risk-*.jsonl --risk 0.05 --damage 0.02 --splits 200 --markdown table.md

For each file of results that holds several constants of one policy: half of the prompts, drawn at random, calibrate
(`refreekv.core.risk`, as `refreekv calibrate` does), and on the other half the share is counted that the constant
chosen damages by more than ``--damage``. Over splits that share has to be at most ``--risk`` on average; a single split
may lie above it, as a half of so many prompts has few that are damaged. ``uncorrected`` chooses without the
correction for finite samples.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refreekv import policies
from refreekv.core.risk import loosest, made_monotone, prompts_needed
from refreekv.evaluation import results as store
from refreekv.evaluation import sweeps
from refreekv.evaluation.fidelity.formats import MARK
from refreekv.policies.constants import dial


@dataclass(frozen=True)
class Measured:
    """What a file holds: a ladder from strict to loose, the full cache in front, and every prompt on it."""

    model: str
    rungs: list[str]
    losses: list[list[float]]  # damage in nats by prompt and rung; the full cache's noise is none
    bytes: list[list[tuple[int, int]]]  # of a full cache, and held


def measured(path: Path, policy: str) -> Measured:
    """Read a file of `benchmarks/fidelity.py`; ValueError if it holds fewer than two constants of the policy.

    A format behind the policy (``adaptive@int8``) is that of all constants. Without one it is what the policy brings
    along, or where a file has none of these (it is older than they are) nothing: everything as the model computes it.
    """
    found = store.read(path)
    policy, mark, kind = policy.partition(MARK)
    base = policies.parse(policy)
    name = dial(base)
    if name is None:
        raise ValueError(f"{policy} has no constant that makes a ladder")
    own = kind if mark else str(base.default_ladder or "")
    by_format: dict[str, dict[float, str]] = {}
    for spec in {record.policy for record in found.records} - {sweeps.FULL}:
        text, _, stored = spec.partition(MARK)
        one = policies.parse(text)
        # Only what differs in its constant from the policy asked for.
        if type(one) is type(base) and replace(one, **{name: getattr(base, name)}) == base:
            by_format.setdefault(stored, {})[getattr(one, name)] = spec
    constants = by_format.get(own) or ({} if mark else by_format.get("", {}))
    if len(constants) < 2:
        raise ValueError(f"{path} holds {len(constants)} constants of {policy}, and a ladder has several")
    rungs = [sweeps.FULL, *(constants[value] for value in sorted(constants))]
    table = {record.key: record for record in found.records}
    prompts = sorted({(family, sample) for family, sample, _ in table})
    rows = [[table.get((*prompt, rung)) for rung in rungs] for prompt in prompts]
    whole = [[one for one in row if one is not None] for row in rows if None not in row]
    return Measured(
        model=whole[0][0].model,
        rungs=rungs,
        losses=[[0.0, *(one.kl_mean for one in row[1:])] for row in whole],
        bytes=[[(one.bytes_full, one.bytes_kept) for one in row] for row in whole],
    )


def uncorrected(losses: Sequence[Sequence[float]], risk: float) -> int:
    """The loosest rung whose share of damaged prompts is at most the risk, as if these were all prompts."""
    means = [statistics.fmean(column) for column in zip(*map(made_monotone, losses), strict=True)]
    return max(index for index, mean in enumerate(means) if mean <= risk)


@dataclass(frozen=True)
class Splits:
    """What came out of many splits."""

    risks: list[float]  # share of the other half that was damaged
    chosen: list[int]  # rungs
    shares: list[float]  # bytes held in the other half

    @property
    def error(self) -> float:
        """Standard error of the mean risk, as if splits were independent; they are not, as they share prompts."""
        return statistics.stdev(self.risks) / len(self.risks) ** 0.5


def split(
    of: Measured, *, risk: float, damage: float, splits: int, choose: Callable[..., int] = loosest, seed: int = 0
) -> Splits:
    """Calibrate on a random half and count on the other, so many times."""
    damaged = [[float(loss > damage) for loss in row] for row in of.losses]
    rng, order = random.Random(seed), list(range(len(damaged)))
    risks, chosen, shares = [], [], []
    for _ in range(splits):
        rng.shuffle(order)
        half = len(order) // 2
        rung = choose([damaged[at] for at in order[:half]], risk)
        others = order[half:]
        risks.append(statistics.fmean(damaged[at][rung] for at in others))
        full, held = (sum(of.bytes[at][rung][part] for at in others) for part in (0, 1))
        chosen.append(rung)
        shares.append(held / full)
    return Splits(risks, chosen, shares)


def row(of: Measured, *, risk: float, damage: float, splits: int, seed: int) -> list[str]:
    """One line of the table."""
    kept = split(of, risk=risk, damage=damage, splits=splits, seed=seed)
    plain = split(of, risk=risk, damage=damage, splits=splits, seed=seed, choose=uncorrected)
    every = [[float(loss > damage) for loss in one] for one in of.losses]
    tenth, ninetieth = (sorted(kept.risks)[round(part * (splits - 1))] for part in (0.1, 0.9))
    return [
        of.model,
        str(len(of.losses)),
        f"{risk:g}",
        f"{damage:g}",
        f"{statistics.fmean(kept.risks):.3f} ± {kept.error:.3f}",
        f"{tenth:.3f} to {ninetieth:.3f}",
        f"{statistics.fmean(plain.risks):.3f}",
        of.rungs[statistics.mode(kept.chosen)],
        f"{statistics.fmean(kept.shares):.0%}",
        of.rungs[loosest(every, risk)],
    ]


HEADINGS = (
    "model", "prompts", "risk", "damage", "damaged of the other half", "10th to 90th percentile", "uncorrected",
    "chosen most often", "bytes", "chosen of all prompts",
)  # fmt: skip


def main() -> None:
    """Read the results, split them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files of benchmarks/fidelity.py or refreekv eval")
    parser.add_argument("--policy", default="adaptive", help="whose constants make the ladder")
    parser.add_argument("--risk", type=float, nargs="+", default=[0.05])
    parser.add_argument("--damage", type=float, nargs="+", default=[0.02])
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    table = []
    for path in arguments.results:
        of = measured(path, arguments.policy)
        for risk in arguments.risk:
            if len(of.losses) // 2 < prompts_needed(risk):
                parser.error(f"{path}: half of {len(of.losses)} prompts are fewer than {prompts_needed(risk)}")
            for damage in arguments.damage:
                table.append(row(of, risk=risk, damage=damage, splits=arguments.splits, seed=arguments.seed))
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ["---"] * len(HEADINGS), *table)]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
