"""What policies keep by prompt length, for ``refreekv plan``: from results of the fidelity bench.

    python benchmarks/budgets.py                       # from benchmarks/runs, as committed
    python benchmarks/budgets.py results.jsonl --out mine.json --machine "one RTX 4090" --command "refreekv eval …"

The first form writes ``src/refreekv/planner/budgets.json``; the second a file for ``--budgets``.
Policies whose parameters fix a ratio or a size are left out, as nothing has to be measured there,
and so are those with several parameters changed.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refreekv.evaluation import results as store
from refreekv.evaluation import tables
from refreekv.planner import budgets, measurements

HERE = Path(__file__).parent
DEFAULT = HERE.parent / "src" / "refreekv" / "planner" / "budgets.json"
FIXED = ("ratio=", "size=")
EDGES = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Prompt lengths at which buckets begin."""
LEAST = 3
"""Prompts that a bucket needs to be used."""


def main() -> None:
    """Read the results, write the file, say what it holds of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="files of the bench, may be gzipped")
    parser.add_argument("--out", type=Path, default=DEFAULT)
    parser.add_argument("--machine", help="what it ran on, if the results do not say")
    parser.add_argument("--command", help="the command that made the results, if they do not say")
    options = parser.parse_args()
    found = collect(options.results or sorted((HERE / "runs").glob("*.jsonl.gz")), options.machine, options.command)
    options.out.write_text(measurements.dump(found), encoding="utf-8")
    for one in found:
        cells = (f"{b.start:,}+: {b.mean:.0%} [{b.low:.0%}, {b.high:.0%}] n={b.n}" for b in one.buckets)
        print(f"{one.policy} on {one.model}: {'; '.join(cells)}")


def collect(paths: Sequence[Path], machine: str | None = None, command: str | None = None) -> list[budgets.Measured]:
    """Measurements from files of results, each with what it says about itself."""
    found: list[budgets.Measured] = []
    for path in paths:
        results = store.read(path)
        setup: dict[str, Any] = results.setup
        environment = setup.get("environment", {})
        plan = setup.get("plan")
        source = {
            "command": command
            or (f"benchmarks/fidelity.py --plan benchmarks/plans/{plan}" if plan else "refreekv eval"),
            "date": environment.get("date"),
            "machine": machine or environment.get("device"),
            "dtype": setup.get("dtype"),
            "refreekv": setup.get("refreekv"),
        }
        records = [record for record in results.records if _is_measured(record.policy)]
        found += derive(records, source)
    return found


def _is_measured(policy: str) -> bool:
    """Policies with one parameter changed at most, and none that fixes what is kept."""
    return "," not in policy and not any(fixed in policy for fixed in FIXED)


def derive(records: Iterable[Any], source: Mapping[str, Any], *, seed: int = 0) -> list[budgets.Measured]:
    """Measurements from the records of ``refreekv eval``, one for each policy and model.

    Parameters
    ----------
    records : iterable of FidelityRecord
        The records; those of the full cache are left out.
    source : dict
        What to store beside them.
    seed : int
        For the intervals.
    """
    generator = np.random.default_rng(seed)
    groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
    families: dict[tuple[str, str], set[str]] = {}
    for record in records:
        if record.policy == "full":
            continue
        key = (record.policy, record.model)
        groups.setdefault(key, []).append((record.prompt_tokens, record.budget))
        families.setdefault(key, set()).add(record.family)
    found = []
    for (policy, model), pairs in sorted(groups.items()):
        buckets = []
        for start, stop in zip(EDGES, (*EDGES[1:], 2**31), strict=True):
            shares = np.array([share for length, share in pairs if start <= length < stop])
            if len(shares) < LEAST:
                continue
            low, high = tables.interval(generator.choice(shares, (tables.DRAWS, len(shares))).mean(1))
            numbers = (round(float(x), 4) for x in (shares.mean(), low, high, shares.max()))
            buckets.append(budgets.Bucket(start, stop, len(shares), *numbers))
        if buckets:
            about = {**source, "families": len(families[policy, model])}
            found.append(budgets.Measured(policy, model, about, tuple(buckets)))
    return found


if __name__ == "__main__":
    main()
