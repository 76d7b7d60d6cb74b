"""What reading a part of each request again buys: the worst sample with and without ``verify``, at equal mean bytes.

    python benchmarks/verify.py MODEL --data-dir DIR --plan benchmarks/plans/risk.toml --out verify-MODEL.jsonl
    python benchmarks/verify.py MODEL --sizes 1000 2000 --each 4 --out verify-MODEL.jsonl
    python benchmarks/verify.py MODEL --compare snapkv:ratio=0.5 full@int4 adaptive --sizes 700 --out seen-MODEL.jsonl
    python benchmarks/verify.py --table verify-*.jsonl seen-*.jsonl --markdown table.md

The first two forms measure a model (a .gguf file, a folder or a hub id), on task families or on prompts of the kinds
that `refreekv check` has: for each prompt and each constant of the ladder what is kept, the divergence of each token of
the full cache's answer (`evaluation.fidelity.bench`), and that of each of the last 32 tokens of the prompt, read again
(`engines.transformers.verifying`). The table plays through what ``verify`` would have chosen, for several first
constants and damages allowed: by the end of the prompt, or by the first 16 tokens of the answer, which bring no damage
then. Beside it stands the constant that holds as many bytes on all prompts alike (interpolated between two of the
ladder). Damage is counted from the 17th token on, with and without. With ``--compare``: what both readings see of
policies and formats of any kind, each by itself.
"""

import argparse
import datetime
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoints
import fidelity
import refreekv
from refreekv import policies
from refreekv.engines.transformers.read_again import ANSWER, PROMPT, TOKENS, Recheck, divergence
from refreekv.engines.transformers.verifying import Verification
from refreekv.evaluation.checking import prompts as own
from refreekv.evaluation.checking.check import as_stored, head_sizes
from refreekv.evaluation.data.encoding import Encoded, encode
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity.bench import Bench, Job, skip_reason
from refreekv.evaluation.fidelity.formats import MARK, parse
from refreekv.evaluation.fidelity.prefill import call
from refreekv.evaluation.fidelity.runner import device_name
from refreekv.evaluation.results import contents
from refreekv.policies import Policy
from refreekv.policies.base import AUTO
from refreekv.policies.constants import at_factors

FACTORS = (16.0, 8.0, 4.0, 2.0, 1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""Constants of the ladder from loose to strict, in units of the policy's own."""

STEP = 2
"""Rungs of the ladder that ``verify`` goes at a time: a quarter of the constant."""


class Noting(Verification):
    """Tries every step, and notes the divergence of each token that is read again."""

    def __init__(self, rungs: Sequence[Policy]):
        super().__init__(rungs[0], Recheck())
        self.steps = [*rungs, policies.create("full")]
        self.found: list[list[float]] = []

    def _difference(self, reference: Tensor, logits: Tensor, counted: Tensor | None) -> float:
        self.found.append([float(f"{kl:.4g}") for kl in divergence(reference, logits)[0].tolist()])
        return float("inf")


@torch.no_grad()
def read_again(model: Any, encoded: Encoded, rungs: Sequence[Policy], kv_dtype: str = AUTO) -> list[list[float]]:
    """Divergences ``[rungs, tokens]`` of a prompt's last tokens over what each rung keeps."""
    cache = refreekv.ReFreeKVCache(model, rungs[0], kv_dtype=kv_dtype, verify=True)
    cache.state.verification = noting = Noting(rungs)
    # One call as in `generate`, which asks for the logits of the last token alone.
    ids = torch.tensor([encoded.context], device=model.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    call(model, ids, cache, positions=positions, mask=None, keep=1)
    # A prompt of which nothing goes is not read.
    return noting.found or [[0.0]] * len(rungs)


def read_each(model: Any, encoded: Encoded, asked: Sequence[str]) -> list[list[float]]:
    """The same of policies that have nothing to do with each other, one prefill each."""
    found = []
    for spec in asked:
        policy, _, kind = spec.partition(MARK)
        found += read_again(model, encoded, [policies.parse(policy)], kind or AUTO)
    return found


def measure(
    bench: Bench,
    samples: Sequence[Sample],
    rungs: Sequence[Policy],
    out: Path,
    setup: dict[str, Any],
    *,
    apart: Sequence[str] = (),
) -> None:
    """Append a line for each sample that the file does not hold yet."""
    done = set()
    if out.exists():
        done = {line["sample"] for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    # In the number formats that caches store in.
    sizes = head_sizes(bench.model)
    specs = {one.spec: as_stored(one, AUTO, sizes) for one in rungs}
    if apart:
        specs = {spec: parse(spec) if MARK in spec else as_stored(policies.parse(spec), AUTO, sizes) for spec in apart}
    asked: dict[str, Policy | None] = {"full": None, **specs}
    for number, sample in enumerate(samples, 1):
        name = f"{sample.family}/{sample.id}"
        encoded = encode(bench.tokenizer, sample)
        if name in done or skip_reason(bench.model, encoded, continuation=bench.continuation, max_tokens=2**31):
            continue
        begin = time.perf_counter()
        (records,) = bench.measure([Job(sample, encoded, asked)])
        floor, *measured = records
        line = {
            "sample": name,
            "tokens": len(encoded.context),
            "bytes_full": floor.bytes_full,
            "floor": floor.kl_mean,
            "rungs": [record.policy for record in measured],
            "bytes": [record.bytes_kept for record in measured],
            "answer": [[float(f"{kl:.4g}") for kl in record.kl_tokens or ()] for record in measured],
            "apart": bool(apart),
            "again": read_each(bench.model, encoded, apart) if apart else read_again(bench.model, encoded, rungs),
            **setup,
        }
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{number}/{len(samples)} {name}: {time.perf_counter() - begin:.1f} s", flush=True)


# -- the table ----------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing: an answer that has ended brings no damage."""
    return sum(values) / len(values) if values else 0.0


def rest(line: dict[str, Any], rung: int) -> float:
    """Damage behind the tokens that a reading of the answer would look at; none behind the last rung."""
    return 0.0 if rung >= len(line["rungs"]) else mean(line["answer"][rung][TOKENS[ANSWER] :])


def read(line: dict[str, Any], rung: int, where: str) -> float:
    """What a reading finds at a rung."""
    return mean(line["again"][rung] if where == PROMPT else line["answer"][rung][: TOKENS[ANSWER]])


def outcome(lines: Sequence[dict[str, Any]], chosen: Sequence[int]) -> tuple[float, float, float]:
    """Share of bytes, mean and worst damage where each prompt has a rung of its own."""
    shares, damages = [], []
    for line, rung in zip(lines, chosen, strict=True):
        shares.append(1.0 if rung >= len(line["rungs"]) else line["bytes"][rung] / line["bytes_full"])
        damages.append(rest(line, rung))
    return mean(shares), mean(damages), max(damages)


def fixed(lines: Sequence[dict[str, Any]], rung: int) -> tuple[float, float, float]:
    """The same of one constant on all prompts; the rung behind the last is everything."""
    return outcome(lines, [rung] * len(lines))


def verified(lines: Sequence[dict[str, Any]], first: int, allowed: float, where: str) -> list[int]:
    """The rung that each prompt ends at, from a first one on: three are tried, then everything is kept."""
    chosen = []
    for line in lines:
        last = len(line["rungs"])
        tried = [rung for rung in (first, first + STEP, first + 2 * STEP) if rung < last]
        chosen.append(next((rung for rung in tried if read(line, rung, where) <= allowed), last))
    return chosen


def alike(lines: Sequence[dict[str, Any]], share: float) -> tuple[float, float]:
    """Mean and worst damage of one constant for all that holds so many bytes, between two of the ladder."""
    points = sorted(fixed(lines, rung) for rung in range(len(lines[0]["rungs"]) + 1))
    if share <= points[0][0]:
        return points[0][1:]
    for (low, *before), (high, *after) in itertools.pairwise(points):
        if low <= share <= high:
            part = (share - low) / (high - low) if high > low else 0.0
            return tuple(a + part * (b - a) for a, b in zip(before, after, strict=True))  # type: ignore[return-value]
    return points[-1][1:]


def table(lines: Sequence[dict[str, Any]], allowed: Sequence[float]) -> list[list[str]]:
    """A line for each first constant, reading and damage allowed."""
    rows = []
    for first in range(len(lines[0]["rungs"]) - 2 * STEP):
        share, average, worst = fixed(lines, first)
        found = " / ".join(f"{correlation(lines, first, where):.2f}" for where in TOKENS)
        name = lines[0]["rungs"][first]
        rows.append([name, "–", f"{share:.1%}", f"{average:.4f}", f"{worst:.4f}", "", "", "", found])
        for where, limit in itertools.product(TOKENS, allowed):
            chosen = verified(lines, first, limit, where)
            share, average, worst = outcome(lines, chosen)
            other_mean, other_worst = alike(lines, share)
            stepped = mean([float(rung != first) for rung in chosen])
            rows.append(
                [
                    "", f"{where}, {limit:g}", f"{share:.1%}", f"{average:.4f}", f"{worst:.4f}", f"{stepped:.0%}",
                    f"{other_mean:.4f}", f"{other_worst:.4f}", "",
                ]
            )  # fmt: skip
    return rows


def seen(lines: Sequence[dict[str, Any]], limit: float) -> list[list[str]]:
    """A line for each policy that was read by itself: damaged answers, and how many of those each reading sees."""
    rows = []
    for at, name in enumerate(lines[0]["rungs"]):
        damage = [rest(line, at) for line in lines]
        hurt = [one > limit for one in damage]
        share = mean([line["bytes"][at] / line["bytes_full"] for line in lines])
        cells = [name, f"{share:.0%}", f"{mean(damage):.4f}", f"{max(damage):.4f}", f"{sum(hurt)} of {len(lines)}"]
        for where in TOKENS:
            again = [read(line, at, where) for line in lines]
            caught = sum(a and b > limit for a, b in zip(hurt, again, strict=True))
            false = sum(not a and b > limit for a, b in zip(hurt, again, strict=True))
            cells += [f"{mean(again):.4f}", f"{caught} of {sum(hurt)}", f"{false} of {len(lines) - sum(hurt)}"]
        rows.append(cells)
    return rows


SEEN = (
    "policy", "bytes", "answer: KL mean", "worst", "answers damaged", "prompt's end: mean", "seen", "false alarms",
    "answer's beginning: mean", "seen", "false alarms",
)  # fmt: skip

HEADINGS = (
    "first constant", "reads, allows", "bytes", "KL mean", "worst prompt", "stepped up",
    "one constant, same bytes: mean", "worst", "rank correlation: prompt / answer",
)  # fmt: skip


def correlation(lines: Sequence[dict[str, Any]], rung: int, where: str) -> float:
    """Spearman's, over prompts, between what is read again and the damage of the rest of the answer."""

    def ranks(values: Sequence[float]) -> list[float]:
        order = sorted(values)
        return [(order.index(value) + len(order) - 1 - order[::-1].index(value)) / 2 for value in values]

    pairs = [ranks([read(line, rung, where) for line in lines]), ranks([rest(line, rung) for line in lines])]
    return float(torch.corrcoef(torch.tensor(pairs))[0, 1])


def main() -> None:
    """Measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--plan", type=Path, help="families and their samples, as benchmarks/fidelity.py reads them")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 2000], help="without a plan: tokens of prompts")
    parser.add_argument("--each", type=int, default=2, help="without a plan: prompts of each kind and size")
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--compare", nargs="+", default=[], help="policies to read by themselves, in place of a ladder")
    parser.add_argument("--continuation", type=int, default=48)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--out", type=Path, help="results; an interrupted run goes on")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these results")
    parser.add_argument("--allowed", type=float, nargs="+", default=[0.005, 0.02])
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    if arguments.table:
        text = ""
        for path in arguments.table:
            lines = [json.loads(line) for line in contents(path).decode().splitlines()]
            apart = lines[0]["apart"]
            heads = SEEN if apart else HEADINGS
            body = seen(lines, arguments.allowed[-1]) if apart else table(lines, arguments.allowed)
            about = {name: lines[0][name] for name in ("model", "dtype", "device", "date")}
            text += f"{', '.join(about.values())}; {len(lines)} prompts\n\n"
            text += "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *body]) + "\n\n"
        print(text)
        if arguments.markdown:
            arguments.markdown.write_text(text, encoding="utf-8")
        return
    if not arguments.model or not arguments.out:
        parser.error("give a model and --out, or --table")
    model, tokenizer, name = checkpoints.load(arguments.model, arguments.device, arguments.dtype)
    bench = Bench(model, tokenizer, name, arguments.continuation, per_token=True)
    if arguments.plan:
        arguments.random = None
        plan = fidelity.Plan.of(argparse.Namespace(plan=arguments.plan, policy=[], suite=[]))
        samples = fidelity.samples_of(arguments, plan, tokenizer)
    else:
        samples = [
            own.prompt(kind, size, index)
            for index in range(arguments.each)
            for size in arguments.sizes
            for kind in own.KINDS
        ]
    setup = {
        "model": name,
        "dtype": arguments.dtype,
        "device": device_name(model.device),
        "date": datetime.date.today().isoformat(),
        "refreekv": refreekv.__version__,
    }
    rungs = at_factors(policies.parse(arguments.policy), FACTORS)
    measure(bench, samples, rungs, arguments.out, setup, apart=arguments.compare)


if __name__ == "__main__":
    main()
