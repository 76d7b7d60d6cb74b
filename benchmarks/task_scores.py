"""Task scores of real models with full and pruned caches, and the page of docs that shows them.

    python benchmarks/task_scores.py MODEL --data-dir DIR --out smollm2-tasks.jsonl [--batch-size 16]
    python benchmarks/task_scores.py --page docs/results-tasks.md benchmarks/runs/tasks/*.jsonl.gz

MODEL is a .gguf file, a checkpoint's folder or a hub id. The first form may be stopped and
started again. On the page a task counts where the full cache's answers are better than chance:
where the 95 % interval of the difference to the score of the same answers, each taken as if
given to another sample, lies above zero.
"""

import argparse
import contextlib
import datetime
import gzip
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import refreekv
from refreekv import policies as registry
from refreekv.evaluation import sweeps, task_loading, task_tables
from refreekv.evaluation.records import CHANCE, TaskRecord
from refreekv.evaluation.runner import device_name
from refreekv.evaluation.store import RecordFile, Results, read_records
from refreekv.evaluation.sweeps import FULL
from refreekv.evaluation.task_tables import FamilyResult
from refreekv.evaluation.tasks import Settings, plan, run
from refreekv.report import format_bytes

POLICIES = (
    *("refreekv", "refreekv-heavy-hitter", "adaptive"),
    *("snapkv:ratio=0.5", "streaming-llm:ratio=0.5", "h2o:ratio=0.5"),
)

TASKS = (
    # What small models can do, a few hundred to 6,500 tokens; the longest answers last.
    *("niah:tokens=600", "niah:tokens=1500", "niah:tokens=3000", "2wikimqa-e", "qasper-e", "hotpotqa-original"),
    *("multi-key-retrieval:tokens=1200,keys=8", "multi-value-retrieval:tokens=1200", "kv-retrieval-75"),
    *("question-after:tokens=600", "ruler-niah-multikey-2", "ruler-niah-multikey-3", "ruler-vt", "ruler-cwe"),
    *("ruler-fwe", "long-code:tokens=1500", "few-shot-arithmetic", "variable-tracking:tokens=1200", "truthfulqa"),
    *("system-prompt:tokens=500", "instructions:tokens=500", "qmsum", "gsm8k"),
    # Asked for, so that the page says what was not run.
    *("gpqa", "coqa", "narrativeqa", "qasper", "2wikimqa", "musique", "multi-news", "triviaqa", "lcc"),
    *("math500", "ifeval"),
)


class TimeUp(Exception):  # noqa: N818 - no error
    """The run's time is over; its file holds all that was done."""


def load(place: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    path = Path(place)
    options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        place, options["gguf_file"] = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    if options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype), **options)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), tokenizer


def measure(args: argparse.Namespace) -> None:
    """Answer and score, into a results file."""
    model, tokenizer = load(args.model, args.device, args.dtype)
    name = args.name or Path(args.model).stem
    known = registry.available()
    specs = args.policy or [spec for spec in POLICIES if spec.partition(":")[0] in known]
    chosen = sweeps.choose(specs)
    found, missing = task_loading.load(
        args.tasks.split(";") if args.tasks else TASKS,
        tokenizer,
        data_dir=args.data_dir,
        limit=args.limit,
        execute_code=args.execute_code,
    )
    settings = Settings(
        name, max_new_tokens=args.max_new_tokens, max_tokens=args.max_tokens, batch_size=args.batch_size
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
            "not_run": missing,
            "left_out": len(planned.left_out),
        },
    }
    policies = {spec: str(policy) for spec, policy in chosen.items()}
    ends = time.monotonic() + args.time_limit

    def check(count: int) -> None:
        del count
        if time.monotonic() > ends:
            raise TimeUp

    with RecordFile(args.out, setup, policies, TaskRecord) as results, contextlib.suppress(TimeUp):
        for bench in found:
            start, before = time.monotonic(), len(results.results.records)
            records = run(model, tokenizer, [bench], planned, chosen, settings, results, progress=check)
            took, made = time.monotonic() - start, len(results.results.records) - before
            scores = {one.policy: one.score for one in task_tables.summarise(records)[0]}
            line = ", ".join(f"{policy} {100 * score.mean:.1f}" for policy, score in scores.items() if score)
            print(f"{bench.name}: {line} ({made} answers, {took:.0f} s)", flush=True)


# -- the page -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """One model's results, by task and policy."""

    results: Results[TaskRecord]
    table: dict[str, dict[str, FamilyResult]]

    @property
    def useful(self) -> list[str]:
        """Tasks where the full cache is better than chance."""
        return [name for name, rows in self.table.items() if _above_chance(self.results.records, name)]


def read(path: Path) -> Model:
    """Results of one model; the file may be gzipped."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.stem
        plain.write_bytes(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        results = read_records(plain, TaskRecord)
    table: dict[str, dict[str, FamilyResult]] = {}
    for row in task_tables.summarise(results.records)[0]:
        table.setdefault(row.family, {})[row.policy] = row
    return Model(results, table)


def _above_chance(records: Iterable[TaskRecord], task: str) -> bool:
    scores = {one.key[1:]: one.scores["score"] for one in records if one.family == task}
    better = [
        score - scores[sample, CHANCE]
        for (sample, policy), score in scores.items()
        if policy == FULL and (sample, CHANCE) in scores
    ]
    return task_tables.bootstrap(better).low > 0


def page(models: Sequence[Model], files: Sequence[Path]) -> str:
    """The page."""
    parts = [INTRODUCTION.strip()]
    for model in models:
        parts += _sections(model)
    names = " ".join(path.as_posix() for path in files)
    parts.append(f"Made by `python benchmarks/task_scores.py --page docs/results-tasks.md {names}`.")
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """
# Task scores

Greedy answers, generated with the physically pruned cache, through lm-eval's tasks and our generated families
(`refreekv tasks --list`). Points of 100. Brackets are 95 % bootstrap intervals of the mean paired difference to the
full cache, over samples; a difference whose interval holds zero is not established at this n. *Chance* is the full
cache's answers, each scored as if it were given to another sample; a task counts only where the full cache is better
than that. These are very small models: what they cannot do with a full cache says nothing here, and larger models keep
more.
Fidelity, which needs no skill of the model, is on [the page of results](results.md).
"""


def _sections(model: Model) -> list[str]:
    setup, env = model.results.setup, model.results.setup["environment"]
    useful = model.useful
    policies = [name for name in model.results.policies if all(name in model.table[task] for task in useful)]
    head = (
        f"## {setup['model']}\n\n{setup['dtype']}, {env['device']}, torch {env['torch']}, transformers "
        f"{env['transformers']}, refreekv {setup['refreekv']}, {env['date']}."
    )
    parts = [_totals, _tasks, _needles]
    return [head, *filter(None, (part(model, useful, policies) for part in parts)), _rest(model, useful)]


def _totals(model: Model, useful: Sequence[str], policies: Sequence[str]) -> str:
    lines = [
        f"Over the {len(useful)} tasks above chance, each counting the same:",
        "",
        "| policy | kept | K/V bytes | mean change | worst task | same answer | tasks worse, established |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    for policy in policies:
        rows = [model.table[task][policy] for task in useful]
        changes = [(row.change.mean, row) for row in rows if row.change]
        worst = min(changes, key=lambda pair: pair[0])[1]
        kept, full = sum(row.bytes_kept for row in rows), sum(row.bytes_full for row in rows)
        lines.append(
            f"| `{policy}` | {_mean(row.budget for row in rows):.0%} | {format_bytes(kept)} of {format_bytes(full)} "
            f"| {100 * _mean(change for change, _ in changes):+.1f} | {worst.family}: {_change(worst)} "
            f"| {_mean(row.same for row in rows):.0%} | {sum(row.change.high < 0 for row in rows if row.change)} |"
        )
    return "\n".join(lines)


def _tasks(model: Model, useful: Sequence[str], policies: Sequence[str]) -> str:
    lines = [
        "| task | n | tokens | chance | full | " + " | ".join(f"`{policy}`" for policy in policies) + " |",
        "|---|---:|---:|---:|---:|" + "---:|" * len(policies),
    ]
    for task in useful:
        rows = model.table[task]
        full, chance = rows[FULL], rows[CHANCE]
        lengths = [one.prompt_tokens for one in model.results.records if one.family == task and one.policy == FULL]
        cells = [f"{_change(rows[policy])}, {rows[policy].budget:.0%} kept" for policy in policies]
        lines.append(
            f"| {task} | {full.n} | {round(_mean(lengths)):,} | {_points(chance)} | {_points(full)} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def _needles(model: Model, useful: Sequence[str], policies: Sequence[str]) -> str:
    grids = task_tables.by_place(model.results.records)
    families = [task for task in useful if (task, FULL) in grids]
    if not families:
        return ""
    depths = sorted({depth for _, depth in grids[families[0], FULL]})
    lines = [
        "Needles found, by depth in the text (0 %: its start):",
        "",
        "| task | cache | " + " | ".join(f"{depth:.0%}" for depth in depths) + " |",
        "|---|---|" + "---:|" * len(depths),
    ]
    for task in families:
        for policy in (FULL, *policies):
            scores = list(grids[task, policy].values())
            lines.append(f"| {task} | `{policy}` | " + " | ".join(f"{100 * score:.0f}" for score in scores) + " |")
    return "\n".join(lines)


def _rest(model: Model, useful: Sequence[str]) -> str:
    weak = [
        f"{task} ({_points(rows[FULL])}, chance {_points(rows[CHANCE])}, n = {rows[FULL].n})"
        for task, rows in model.table.items()
        if task not in useful and CHANCE in rows
    ]
    text = f"Measured, but not above chance with the full cache: {', '.join(weak) or 'none'}."
    missing = model.results.setup["environment"]["not_run"]
    if missing:
        text += f" Not run, for their data or permission was missing: {', '.join(missing)}."
    return text


def _points(row: FamilyResult) -> str:
    return f"{100 * row.score.mean:.1f}" if row.score else "–"


def _change(row: FamilyResult) -> str:
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
    parser.add_argument("--name", help="what to call the model")
    parser.add_argument("--tasks", help="tasks, separated by semicolons")
    parser.add_argument("--policy", action="append", help="a policy; may be repeated")
    parser.add_argument("--limit", type=int, default=40, help="samples of a task")
    parser.add_argument("--max-tokens", type=int, default=6500, help="leave out longer prompts")
    parser.add_argument("--max-new-tokens", type=int, help="limit of answers; each task's own by default")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="stop after so many seconds")
    parser.add_argument("--execute-code", action="store_true", help="run HumanEval's answers in a sandbox")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    args = parser.parse_args()
    if args.page:
        files = [Path(name) for name in args.model]
        args.page.write_text(page([read(path) for path in files], files), encoding="utf-8")
    elif len(args.model) != 1 or not args.out:
        parser.error("give one model and --out, or --page and results files")
    else:
        args.model = args.model[0]
        measure(args)


if __name__ == "__main__":
    main()
