"""What policies keep by prompt length, for ``refreekv plan``: from the results of ``refreekv eval``.

    refreekv eval --model … --data-dir … --policy … --continuation 8 --show 0 --out results.jsonl
    python benchmarks/budgets.py results.jsonl --machine "2-core CPU" --command "refreekv eval …"

writes ``src/refreekv/planner/budgets.json``. Policies and models that the file has already and the
results have again are replaced; others stay.
"""

import argparse
import datetime
import json
from pathlib import Path

from refreekv.evaluation.store import read
from refreekv.planner import budgets

DEFAULT = Path(__file__).parents[1] / "src" / "refreekv" / "planner" / "budgets.json"


def main() -> None:
    """Read the results, write the file, say what it holds of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files that refreekv eval wrote")
    parser.add_argument("--out", type=Path, default=DEFAULT)
    parser.add_argument("--machine", required=True, help="what it ran on, in words")
    parser.add_argument("--command", required=True, help="the command that made the results")
    parser.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat())
    parser.add_argument("--new", action="store_true", help="forget what the file holds")
    options = parser.parse_args()

    found: list[budgets.Measured] = []
    for path in options.results:
        results = read(path)
        source = {
            "command": options.command,
            "date": options.date,
            "machine": options.machine,
            "dtype": results.setup.get("dtype"),
            "refreekv": results.setup.get("refreekv"),
        }
        found += budgets.derive(results.records, source)
    known: list[budgets.Measured] = []
    if options.out.is_file() and not options.new:
        known = budgets.read(json.loads(options.out.read_text(encoding="utf-8")))
    again = {(one.policy, one.model) for one in found}
    merged = [one for one in known if (one.policy, one.model) not in again] + found
    options.out.write_text(json.dumps(budgets.write(merged), indent=1) + "\n", encoding="utf-8")
    for one in found:
        cells = (f"{b.start:,}+: {b.mean:.0%} [{b.low:.0%}, {b.high:.0%}] n={b.n}" for b in one.buckets)
        print(f"{one.policy} on {one.model}: {'; '.join(cells)}")


if __name__ == "__main__":
    main()
