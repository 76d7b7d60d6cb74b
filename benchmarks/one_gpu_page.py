"""The page docs/one-gpu.md: which model reads how long a prompt on cards of which size, from `plan`.

    python benchmarks/one_gpu_page.py benchmarks/runs/one-gpu.jsonl > docs/one-gpu.md

Files are results of `benchmarks/one_gpu.py` and `benchmarks/chat_speed.py`: what was measured stands in tables of its
own, beside the forecast.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import chat_speed
import one_gpu
import refreekv
from random_models import SHAPES
from refreekv.core.quantisation import KVDtype
from refreekv.core.units import format_size, parse_bytes
from refreekv.planner import widths
from refreekv.planner.budgets import expected
from refreekv.planner.memory import Load
from refreekv.planner.plan import RESERVE, Plan, Speeds, make
from refreekv.planner.source import Model
from refreekv.policies.base import AUTO

CARDS = ("8GiB", "12GiB", "16GiB", "24GiB", "48GiB")
MODELS = (("llama-3-8b", "bf16"), ("llama-3-8b", "int4"), ("qwen2.5-32b", "int4"), ("llama-3-70b", "int4"))
OUTPUT = 512
"""Tokens of the answer that a prompt leaves room for."""
LONGEST = 128 * 1024
"""Tokens that these models are made for, at most."""
HOST = 2**50
"""Bytes of host memory: as much as it takes."""
BUS = 50e9
"""Bytes a second from host memory: PCIe 5.0 x16 in practice."""
MEMORY = 2.7e12
"""Bytes a second of the GPU's own memory."""

INTRO = """# One GPU

Which model reads how long a prompt on one card, and still answers with {output} tokens: the full cache | `{policy}`
with `--kv {kv}`, which holds a prompt in int8 until its end and in `k6v4` where only that fits | the same with `--kv
int4 --prompt-kv int4`, which reads prompts over 4 bits and loses more
([lab/quantisation.md](../lab/quantisation.md#prompts-read-over-their-own-codes)). From `refreekv plan`, which reserves
{reserve} and 1 % of the memory for the driver and fragmentation and reads prompts in chunks of 2,048 tokens, for our
caches with slices of matrices where whole ones of 4 bits do not fit; {longest:,} is where these models end. Twelve rows
were measured within a limit: they stand below. `int4`: 4-bit weights (4.5 bits with their scales) beside embeddings in
16. A dash: the weights alone do not fit.
"""
SHARES = """Entries are taken to be stored in these shares: {source}.
"""
MEASURED = """Measured within a limit ({abouts}; random weights, n = 1 each; `benchmarks/one_gpu.py`). What is called
`adaptive-as-measured` costs what `adaptive` does and keeps what that kept of real text with its constants until
2026-11-27, as random weights say nothing about it. Full caches were searched for, to within 1 %; the other lengths
were chosen, and more may fit where the peak is below the limit. A peak is the most that tensors and the driver held at
a time; with ≤ it is the most that tensors held, and added to it what the driver held at the end, by when that had
grown by up to .08 GB. Beside it stands `plan`'s forecast for that length, of the time of the run. Llama-3-8B's rows in
NF4 were read with matrices in slices of 32 MiB (an earlier form), as `generate` does by itself where whole ones do not
fit, the others with whole matrices; 22,336 tokens of Qwen2.5-32B were out of memory in slices, too. The H200's host
ran three other processes, which the full cache's tokens show, as they are not captured.
[lab/performance.md](../lab/performance.md) has what slices cost in time:
"""
WITH_HOST = """With `--host-memory auto`, which holds codes of layers that do not fit in the host's memory: the longest
prompt (host memory that it takes while it is read; what a token then takes at least, at {bus:.0f} GB/s from the host,
PCIe 5.0 x16, and twice as long at PCIe 4.0). What a card then still limits is one layer in full precision, and a
chunk's masks.
"""


def planned(
    shape: str,
    weights: str,
    memory: int,
    *,
    policy: str,
    kv: str,
    prompt: KVDtype | str = AUTO,
    host: int = 0,
    tokens: int = 0,
) -> Plan:
    """What `plan` says of a model on a card; ``tokens``: of a context that is asked for."""
    model, parsed = Model(shape, SHAPES[shape]), refreekv.policies.parse(policy)
    stored = widths.stored(parsed, kv, shape)
    return make(
        model,
        memory=memory,
        load=Load(tokens or LONGEST, OUTPUT),
        weights=weights,
        number=stored.expected,
        worst=stored.worst,
        stored_source=stored.source,
        expected=expected(parsed, shape),
        prompt_number=prompt,
        host=host,
        speeds=Speeds(MEMORY, BUS),
        queries=lambda prompt: parsed.probe_plan(prompt).count,
    )


def cell(plan: Plan, loosest: Plan) -> str:
    """The longest prompts: full, ours, and ours at its loosest."""
    rows = plan.rows[0], plan.rows[-1], loosest.rows[-1]
    lengths = [min(row.longest_context, LONGEST) - OUTPUT for row in rows]
    if plan.machine.available <= 0 or max(lengths) < 1:
        return "–"
    return " \\| ".join(f"{max(length, 0):,}" for length in lengths)


def hosted_cell(shape: str, weights: str, memory: int, *, policy: str, kv: str) -> str:
    """The longest prompt with host memory, how much that is, and what a token takes."""
    plan = planned(shape, weights, memory, policy=policy, kv=kv, host=HOST)
    context = min(plan.rows[-1].longest_context, LONGEST)
    if plan.machine.available <= 0 or context <= OUTPUT:
        return "–"
    row = planned(shape, weights, memory, policy=policy, kv=kv, host=HOST, tokens=context).rows[-1]
    size = "none" if not row.host_bytes else format_size(row.host_bytes)
    return f"{context - OUTPUT:,} ({size}; {1e3 * (row.step_seconds or 0):.0f} ms)"


def page(policy: str, kv: str, rows: list[dict[str, Any]]) -> str:
    """The whole page."""
    intro = INTRO.format(output=OUTPUT, policy=policy, kv=kv, reserve=format_size(RESERVE), longest=LONGEST)
    head = [f"| model | {' | '.join(CARDS)} |", "|---" * (len(CARDS) + 1) + "|"]
    lines, hosted, source = [intro, *head], [WITH_HOST.format(bus=BUS / 1e9), *head], ""
    for shape, weights in MODELS:
        plans = [planned(shape, weights, parse_bytes(card), policy=policy, kv=kv) for card in CARDS]
        four = KVDtype("int4")
        loosest = [
            planned(shape, weights, parse_bytes(card), policy=policy, kv=str(four), prompt=four) for card in CARDS
        ]
        lines.append(f"| {shape}, {weights} | {' | '.join(map(cell, plans, loosest))} |")
        cells = [hosted_cell(shape, weights, parse_bytes(card), policy=policy, kv=kv) for card in CARDS]
        hosted.append(f"| {shape}, {weights} | {' | '.join(cells)} |")
        source = plans[0].stored_source
    lines += ["", *([SHARES.format(source=source)] if source else []), *hosted]
    # Where the first tries were out of memory and time was up, nothing was found.
    gpu = [row for row in rows if "limit" in row and row["longest"]]
    chats = [row for row in rows if "limit" not in row]
    if gpu:
        abouts = sorted({row["about"] for row in gpu})
        lines += ["", MEASURED.format(abouts="; ".join(abouts)), one_gpu.table(gpu)]
    if chats:
        lines += ["", chat_speed.table(chats)]
    lines += ["", "`plan` takes your own model, card, context and number of requests: [plan.md](plan.md)."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results of one_gpu.py and chat_speed.py")
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--kv", default="auto", help="how what is kept is stored")
    given = parser.parse_args(arguments)
    rows = [json.loads(line) for path in given.files for line in path.read_text(encoding="utf-8").splitlines()]
    print(page(given.policy, given.kv, rows), end="")


if __name__ == "__main__":
    main()
