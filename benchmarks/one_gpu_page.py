"""The page docs/one-gpu.md: which model reads how long a prompt on cards of which size, from `plan`.

    python benchmarks/one_gpu_page.py --kv int4 benchmarks/runs/one-gpu.jsonl > docs/one-gpu.md

Files are results of `benchmarks/one_gpu.py`: what was measured stands in the page's second table, beside the forecast.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import one_gpu
import refreekv
from random_models import SHAPES
from refreekv.core.quantisation import KVDtype
from refreekv.core.units import format_size, parse_bytes
from refreekv.planner.budgets import expected
from refreekv.planner.memory import Load
from refreekv.planner.plan import RESERVE, Plan, make
from refreekv.planner.source import Model

CARDS = ("8GiB", "12GiB", "16GiB", "24GiB", "48GiB")
MODELS = (("llama-3-8b", "bf16"), ("llama-3-8b", "int4"), ("qwen2.5-32b", "int4"), ("llama-3-70b", "int4"))
OUTPUT = 512
"""Tokens of the answer that a prompt leaves room for."""
LONGEST = 128 * 1024
"""Tokens that these models are made for, at most."""

INTRO = """# One GPU

Which model reads how long a prompt on one card, and still answers with {output} tokens: the full cache | `{policy}`
with `--kv {kv}`. From `refreekv plan`, which reserves {reserve} for the driver and fragmentation and reads prompts in
chunks of 2,048 tokens; {longest:,} is where these models end. `int4`: 4-bit weights (4.5 bits with their scales) beside
embeddings in 16. A dash: the weights alone do not fit.
"""


def planned(shape: str, weights: str, memory: int, *, policy: str, kv: str | None) -> Plan:
    """What `plan` says of a model on a card."""
    model = Model(shape, SHAPES[shape])
    return make(
        model,
        memory=memory,
        load=Load(LONGEST, OUTPUT),
        weights=weights,
        number=KVDtype.parse(kv),
        expected=expected(refreekv.policies.parse(policy), shape),
    )


def cell(plan: Plan) -> str:
    """The longest prompts, full and ours."""
    lengths = [min(plan.rows[place].longest_context, LONGEST) - OUTPUT for place in (0, -1)]
    if plan.machine.available <= 0 or max(lengths) < 1:
        return "–"
    return " \\| ".join(f"{max(length, 0):,}" for length in lengths)


def page(policy: str, kv: str | None, rows: list[dict[str, Any]]) -> str:
    """The whole page."""
    intro = INTRO.format(output=OUTPUT, policy=policy, kv=kv or "bf16", reserve=format_size(RESERVE), longest=LONGEST)
    lines = [intro, f"| model | {' | '.join(CARDS)} |", "|---" * (len(CARDS) + 1) + "|"]
    for shape, weights in MODELS:
        plans = [planned(shape, weights, parse_bytes(card), policy=policy, kv=kv) for card in CARDS]
        lines.append(f"| {shape}, {weights} | {' | '.join(map(cell, plans))} |")
    if rows:
        abouts = sorted({row["about"] for row in rows})
        lines += ["", f"Measured within a limit ({'; '.join(abouts)}; random weights, n = 1 each):", ""]
        lines.append(one_gpu.table(rows))
    lines += ["", "`plan` takes your own model, card, context and number of requests: [plan.md](plan.md)."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results of one_gpu.py")
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--kv", help="how what is kept is stored; default: as computed")
    given = parser.parse_args(arguments)
    rows = [json.loads(line) for path in given.files for line in path.read_text(encoding="utf-8").splitlines()]
    print(page(given.policy, given.kv, rows), end="")


if __name__ == "__main__":
    main()
