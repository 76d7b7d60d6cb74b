"""Task scores of real models with full and pruned caches, and the page of docs that shows them.

    python benchmarks/task_scores.py MODEL --data-dir DIR --plan benchmarks/plans/tasks-qwen.toml --out qwen.jsonl
    python benchmarks/task_scores.py --page lab/results-tasks.md benchmarks/runs/tasks/*.jsonl.gz

MODEL is a .gguf file, a checkpoint's folder or a hub id. The first form may be stopped, also by
``--time-limit``, and started again. Tasks take turns, so that a run cut short has seen all of
them, and the page counts only samples that every policy has answered. On the page a task counts
where the full cache's answers are better than chance: where the 95 % interval of the difference
to the score of the same answers, each taken as if given to another sample, lies above zero.
"""

import argparse
import contextlib
import datetime
import itertools
import logging
import platform
import random
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import refreekv
from checkpoints import load
from refreekv.engines.transformers.attachment import attached
from refreekv.evaluation import sweeps, tables
from refreekv.evaluation.fidelity.runner import device_name
from refreekv.evaluation.records import CHANCE, TaskRecord
from refreekv.evaluation.results import RecordFile, Results
from refreekv.evaluation.results import read as read_records
from refreekv.evaluation.sweeps import FULL
from refreekv.evaluation.tables import Estimate
from refreekv.evaluation.tasks import loading as task_loading
from refreekv.evaluation.tasks.loading import BenchTask
from refreekv.evaluation.tasks.running import Plan, Settings, plan, run
from refreekv.report import format_bytes

STARTED = time.monotonic()


@dataclass(frozen=True)
class Wanted:
    """What to measure: the contents of a plan file.

    Attributes
    ----------
    tasks : list of str
        As for ``refreekv eval --tasks``, in the order of their turns.
    policies : list of str
        As for ``refreekv eval``. The full cache is measured always.
    samples : int
        Of each task at most.
    turn : int
        Samples of a task in its turn, and prompts a batch.
    max_tokens : int
        Longer prompts are left out.
    max_new_tokens : int or None
        Limit of answers where a task's own is higher.
    """

    tasks: list[str]
    policies: list[str]
    samples: int = 20
    turn: int = 10
    max_tokens: int = 6500
    max_new_tokens: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Wanted":
        """The plan file with what the arguments put in place of it."""
        wanted = cls(**tomllib.loads(args.plan.read_text(encoding="utf-8")))
        return replace(
            wanted,
            tasks=args.tasks.split(";") if args.tasks else wanted.tasks,
            policies=args.policy or wanted.policies,
            samples=args.samples or wanted.samples,
            turn=args.turn or wanted.turn,
        )


class TimeUp(Exception):  # noqa: N818 - no error
    """The run's time is over; its file holds all that was done."""


def measure(args: argparse.Namespace) -> None:
    """Answer and score, into a results file."""
    logging.basicConfig()  # warnings go to where stderr is now: lm-eval is kept quiet later
    wanted = Wanted.of(args)
    model, tokenizer, model_name = load(args.model, args.device, args.dtype)
    chosen = sweeps.choose(wanted.policies)
    found, missing = task_loading.load(
        wanted.tasks, tokenizer, data_dir=args.data_dir, limit=wanted.samples, execute_code=args.execute_code
    )
    settings = Settings(
        args.name or model_name.removesuffix(".gguf"),
        max_new_tokens=wanted.max_new_tokens,
        max_tokens=wanted.max_tokens,
        batch_size=wanted.turn,
    )
    planned = plan(model, tokenizer, found, settings)
    setup = {
        **settings.to_dict(),
        "refreekv": refreekv.__version__,
        "dtype": args.dtype,
        "environment": {
            "device": device_name(model.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "batch": wanted.turn,
            "asked": [bench.name for bench in found],
            "not_run": list(missing),
            "left_out": len(planned.left_out),
        },
    }
    policies = {spec: str(policy) for spec, policy in chosen.items()}
    print(f"{planned.count} samples of {len(found)} tasks, {time.monotonic() - STARTED:.0f} s to get there", flush=True)
    for name, why in missing.items():
        print(f"not run: {name}: {why}")

    def check(count: int) -> None:
        del count
        if time.monotonic() - STARTED > args.time_limit:
            raise TimeUp

    with (
        RecordFile(args.out, setup, policies, TaskRecord) as results,
        attached(model),  # so that graphs of decoding steps are captured once, not once a turn
        contextlib.suppress(TimeUp),
    ):
        for bench, turn in turns(planned, found, wanted.turn):
            start, before = time.monotonic(), len(results.results.records)
            records = run(model, tokenizer, [bench], turn, chosen, settings, results, progress=check)
            took, made = time.monotonic() - start, len(results.results.records) - before
            scores = {one.policy: one.score for one in tables.scores(records)[0].itertuples()}
            line = ", ".join(f"{policy} {100 * score.mean:.1f}" for policy, score in scores.items() if score)
            print(f"{bench.name}: {line} ({made} answers, {took:.1f} s)", flush=True)


def turns(planned: Plan, found: Sequence[BenchTask], size: int) -> Iterator[tuple[BenchTask, Plan]]:
    """A few samples of each task, then a few more of each, until all had their turn."""
    left = {}
    for bench in found:
        documents = list(planned.documents[bench.name])
        if bench.indices is not None:
            # Datasets may be sorted; what we generate goes round depths and kinds.
            random.Random(bench.name).shuffle(documents)
        # No turn of one: chance takes an answer to another sample.
        ends = list(range(size, len(documents) - 1, size))
        left[bench.name] = [documents[start:end] for start, end in itertools.pairwise([0, *ends, len(documents)])]
    for number in range(max(map(len, left.values()), default=0)):
        for bench in found:
            if number < len(left[bench.name]):
                yield bench, Plan({bench.name: left[bench.name][number]})


# -- the page -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """One model's results, by task and policy."""

    results: Results[TaskRecord]
    table: dict[str, dict[str, Any]]

    @property
    def useful(self) -> list[str]:
        """Tasks where the full cache is better than chance."""
        return [name for name, rows in self.table.items() if _above_chance(self.results.records, name)]


def read(path: Path) -> Model:
    """Results of one model; the file may be gzipped."""
    results = read_records(path, TaskRecord)
    results.records = answered_by_all(results.records)
    table: dict[str, dict[str, Any]] = {}
    for row in tables.scores(results.records)[0].itertuples():
        table.setdefault(row.family, {})[row.policy] = row
    return Model(results, table)


def answered_by_all(records: Sequence[TaskRecord]) -> list[TaskRecord]:
    """Without the samples that a run cut short has asked some policies only."""
    policies = {one.policy for one in records} - {CHANCE}
    asked: dict[tuple[str, str], set[str]] = {}
    for one in records:
        asked.setdefault(one.key[:2], set()).add(one.policy)
    return [one for one in records if policies <= asked[one.key[:2]]]


def _above_chance(records: Iterable[TaskRecord], task: str) -> bool:
    scores = {one.key[1:]: one.scores["score"] for one in records if one.family == task}
    better = [
        score - scores[sample, CHANCE]
        for (sample, policy), score in scores.items()
        if policy == FULL and (sample, CHANCE) in scores
    ]
    return tables.bootstrap(better).low > 0


def page(models: Sequence[Model], files: Sequence[Path], place: Path) -> str:
    """The page, which goes to a place."""
    names = " ".join(path.as_posix() for path in files)
    made_by = f"`python benchmarks/task_scores.py --page {place.as_posix()} {names}`"
    parts = [f"<!-- Generated by {made_by}; do not edit. -->", INTRODUCTION.strip()]
    for model in models:
        parts += _sections(model)
    parts.append(f"Made by {made_by}.")
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """
# Task scores

Greedy answers, generated with the physically pruned cache, through lm-eval's tasks and our generated families
(`refreekv eval --list`). Points of 100. These are small models: what they cannot do with a full cache says nothing.

- Brackets are 95 % bootstrap intervals over samples, of the mean paired difference to the full cache or of the mean
  share of its score; a difference whose interval holds zero is not established at this n. Where no sample changed the
  interval is a point, which says less than it seems: 10 samples without a change leave room for a quarter that do.
- *Chance* is the full cache's answers, each scored as if it were given to another sample; a task counts only where the
  full cache is better than that.
- The full cache is that of transformers. `adaptive:constant=0` keeps everything as well, but goes through refreekv's
  own kernels: what it differs by is no effect of pruning.
- K/V bytes are those held at the end of the answer, room to grow into included. *Same answer*: to the letter.

Fidelity, which needs no skill of the model, is on [the page of results](results.md).
"""


def _sections(model: Model) -> list[str]:
    setup, env = model.results.setup, model.results.setup["environment"]
    useful = model.useful
    policies = [name for name in model.results.policies if all(name in model.table[task] for task in useful)]
    head = (
        f"## {setup['model']}\n\n{setup['dtype']}, {env['device']}, torch {env['torch']}, transformers "
        f"{env['transformers']}, refreekv {setup['refreekv']}, {env['date']}; {env['batch']} prompts a batch. "
        f"By default, {', '.join(f'`{model.results.policies[name]}`' for name in policies if ':' not in name)}."
    )
    if "note" in env:
        head += f" {env['note']}"
    parts = [_totals, _tasks, _needles] if useful else []
    return [head, *filter(None, (part(model, useful, policies) for part in parts)), _rest(model, useful)]


def _totals(model: Model, useful: Sequence[str], policies: Sequence[str]) -> str:
    headings = ["policy", "kept", "K/V bytes", "mean change", "of the full score", "worst task", "same answer"]
    headings += ["samples worse, better", "tasks worse, established"]
    lines = []
    for policy in policies:
        rows = [model.table[task][policy] for task in useful]
        shares = {task: _share(model.table[task], policy) for task in useful}
        worst = min(useful, key=lambda task: shares[task])
        mean = _shares_interval(model, useful, policy)
        kept, full = sum(row.bytes_kept for row in rows), sum(row.bytes_full for row in rows)
        lines.append(
            [
                f"`{policy}`",
                f"{_mean(row.budget for row in rows):.0%}",
                f"{format_bytes(kept)} of {format_bytes(full)}",
                f"{100 * _mean(row.change.mean for row in rows if row.change):+.1f}",
                f"{mean.mean:.1%} [{mean.low:.1%}, {mean.high:.1%}]",
                f"{worst}: {shares[worst]:.1%}, {_change(model.table[worst][policy])}",
                f"{_mean(row.same for row in rows):.0%}",
                _worse_and_better(model, useful, policy),
                str(sum(row.change.high < 0 for row in rows if row.change)),
            ]
        )
    title = f"Over the {len(useful)} tasks above chance, each counting the same:\n\n"
    return title + tables.markdown_table(headings, lines, left=(0, 5))


def _share(rows: dict[str, Any], policy: str) -> float:
    """A policy's score on a task as a share of the full cache's."""
    score, full = rows[policy].score, rows[FULL].score
    assert score is not None
    assert full is not None  # the task is above chance
    return score.mean / full.mean


def _worse_and_better(model: Model, useful: Sequence[str], policy: str) -> str:
    scores = {one.key: one.scores["score"] for one in model.results.records if one.family in useful}
    changes = [scores[family, sample, policy] - score for (family, sample, who), score in scores.items() if who == FULL]
    return f"{sum(one < 0 for one in changes)}, {sum(one > 0 for one in changes)} of {len(changes)}"


def _shares_interval(model: Model, useful: Sequence[str], policy: str) -> Estimate:
    """Mean share of the full cache's score over tasks; bootstrapped over the samples of each."""
    scores = {one.key: one.scores["score"] for one in model.results.records}
    generator = torch.Generator().manual_seed(0)
    draws = []
    for task in useful:
        samples = [sample for family, sample, who in scores if family == task and who == FULL]
        full, own = (np.array([scores[task, sample, who] for sample in samples]) for who in (FULL, policy))
        draws.append(1 + (own - full)[tables.draws(len(samples), generator)].mean(-1) / full.mean())
    return Estimate(
        _mean(_share(model.table[task], policy) for task in useful), *tables.interval(np.mean(draws, axis=0))
    )


def _tasks(model: Model, useful: Sequence[str], policies: Sequence[str]) -> str:
    lines = []
    for task in useful:
        rows = model.table[task]
        full, chance = rows[FULL], rows[CHANCE]
        lengths = [one.prompt_tokens for one in model.results.records if one.family == task and one.policy == FULL]
        cells = [f"{_change(rows[policy])}, {rows[policy].budget:.0%} kept" for policy in policies]
        lines.append([task, str(full.n), f"{round(_mean(lengths)):,}", _points(chance), _points(full), *cells])
    headings = ["task", "n", "tokens", "chance", "full", *(f"`{policy}`" for policy in policies)]
    return tables.markdown_table(headings, lines)


def _needles(model: Model, useful: Sequence[str], policies: Sequence[str]) -> str:
    grids = tables.by_place(model.results.records)
    families = [task for task in useful if (task, FULL) in grids]
    if not families:
        return ""
    depths = sorted({depth for _, depth in grids[families[0], FULL]})
    lines = [
        [task, f"`{policy}`", *(f"{100 * score:.0f}" for score in grids[task, policy].values())]
        for task in families
        for policy in (FULL, *policies)
    ]
    title = "Needles found, by depth in the text (0 %: its start):\n\n"
    return title + tables.markdown_table(["task", "cache", *(f"{depth:.0%}" for depth in depths)], lines, left=(0, 1))


def _rest(model: Model, useful: Sequence[str]) -> str:
    weak = [
        f"{task} ({_points(rows[FULL])}, chance {_points(rows[CHANCE])}, n = {rows[FULL].n})"
        for task, rows in model.table.items()
        if task not in useful and CHANCE in rows
    ]
    text = f"Measured, but not above chance with the full cache: {', '.join(weak) or 'none'}."
    env = model.results.setup["environment"]
    late = [name for name in env["asked"] if name not in model.table]
    if late:
        text += f" Not reached by the run: {', '.join(late)}."
    # What was missing when the run began may have been there when it went on.
    missing = [name for name in env["not_run"] if name not in model.table]
    if missing:
        text += f" Not run, for their data, a package or permission was missing: {', '.join(missing)}."
    return text


def _points(row: Any) -> str:
    return f"{100 * row.score.mean:.1f}" if row.score else "–"


def _change(row: Any) -> str:
    change = row.change
    return f"{100 * change.mean:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]" if change else "–"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model; with --page, results files", nargs="+")
    parser.add_argument("--page", type=Path, help="write this page from results files, and measure nothing")
    parser.add_argument("--out", type=Path, help="results file")
    parser.add_argument("--data-dir", type=Path, help="local JSONL in place of the hub")
    parser.add_argument("--plan", type=Path, help="a TOML file with the fields of Wanted")
    parser.add_argument("--name", help="what to call the model")
    parser.add_argument("--tasks", help="in place of the plan's, separated by semicolons")
    parser.add_argument("--policy", action="append", help="in place of the plan's; may be repeated")
    parser.add_argument("--samples", type=int, help="in place of the plan's")
    parser.add_argument("--turn", type=int, help="in place of the plan's")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), help="stop so many seconds after the start, loading included"
    )
    parser.add_argument("--execute-code", action="store_true", help="run HumanEval's answers in a sandbox")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    args = parser.parse_args()
    if args.page:
        files = [Path(name) for name in args.model]
        args.page.write_text(page([read(path) for path in files], files, args.page), encoding="utf-8")
    elif len(args.model) != 1 or not args.out or not args.plan:
        parser.error("give one model, --plan and --out, or --page and results files")
    else:
        args.model = args.model[0]
        measure(args)


if __name__ == "__main__":
    main()
