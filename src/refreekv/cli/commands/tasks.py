"""``refreekv tasks``: benchmark scores with the full and with pruned caches."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import refreekv
from refreekv.cli.app import UserError, app, one_line, refusals
from refreekv.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption, TrustOption

if TYPE_CHECKING:
    from refreekv.cli.loading import Loaded
    from refreekv.evaluation.task_tables import Estimate, FamilyResult, PolicyResult
    from refreekv.evaluation.tasks.loading import BenchTask
    from refreekv.policies import Policy


BASES = ("full", "chance")
"""What policies are compared with."""


@dataclass(frozen=True)
class Request:
    """What is to be scored, and how; as the options of the command."""

    model: str
    tasks: list[str] | None = None
    policy: list[str] | None = None
    suite: list[str] | None = None
    data_dir: Path | None = None
    limit: int = 20
    seed: int = 0
    max_new_tokens: int | None = None
    max_tokens: int | None = None
    batch_size: int = 1
    chat: bool | None = None
    out: Path | None = None
    execute_code: bool = False
    dtype: str = "auto"
    device: str = "auto"
    as_json: bool = False
    trust_remote_code: bool = False


def _list(wanted: bool) -> None:
    if wanted:
        from refreekv.evaluation.tasks import loading as task_loading

        listing = task_loading.names()
        width = max(map(len, listing))
        for name, summary in listing.items():
            typer.echo(f"{name:<{width}}  {summary}")
        raise typer.Exit


@app.command()
def tasks(
    model: ModelOption,
    wanted: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "--families",
            metavar="NAME[:PARAM=VALUE,…],…",
            help="Tasks, as a list or by several options; `paper` is the paper's thirteen; any name that lm-eval "
            "knows will do. Default: all of `--list` whose data is there.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME[:PARAM=VALUE,…]",
            help="A policy to measure beside the full cache; may be given several times, values may be lists.",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", help="A list of policies with a name: paper-ablations or peers. May be repeated."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Datasets as JSONL, in place of the Hugging Face hub."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, metavar="N", help="Samples of each task.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Decides which samples, and what is generated.")] = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", min=1, metavar="N", help="Cut answers here, where a task's own limit is higher."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, metavar="N", help="Leave out longer prompts.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Prompts a batch.")] = 1,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Use the chat template. Default: where there is one and a task's prompts suit it."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "--output", metavar="FILE", help="JSON lines, one a sample and policy; continued if it exists."
        ),
    ] = None,
    execute_code: Annotated[
        bool, typer.Option("--execute-code", help="Let HumanEval run what the model wrote, in a sandbox.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
    show: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Show all tasks and exit.")
    ] = False,
) -> None:
    """Score answers of benchmarks and stress tests, generated with the full and with pruned caches.

    Runs through lm-eval. Where likelihoods are compared, the prompt is prefilled and pruned
    before the choices are scored.
    """
    del show  # its callback did it
    score_tasks(
        Request(
            model=model,
            tasks=wanted,
            policy=policy,
            suite=suite,
            data_dir=data_dir,
            limit=limit,
            seed=seed,
            max_new_tokens=max_new_tokens,
            max_tokens=max_tokens,
            batch_size=batch_size,
            chat=chat,
            out=out,
            execute_code=execute_code,
            dtype=dtype,
            device=device,
            as_json=as_json,
            trust_remote_code=trust_remote_code,
        )
    )


def score_tasks(request: Request) -> None:
    """Load, run and show."""
    from refreekv.cli import loading
    from refreekv.evaluation import sweeps, task_tables
    from refreekv.evaluation.data.families import split
    from refreekv.evaluation.tasks import loading as task_loading
    from refreekv.evaluation.tasks.benchmarks import PAPER
    from refreekv.evaluation.tasks.scoring import MetricUnavailable

    with refusals():
        chosen = sweeps.choose(request.policy or ([] if request.suite else ["refreekv"]), request.suite or [])
    if request.data_dir is not None and not request.data_dir.is_dir():
        raise UserError(f"--data-dir {request.data_dir} is not a folder")
    listed = split(request.tasks) if request.tasks else list(task_loading.names())
    wanted = [one for name in listed for one in (PAPER if name == "paper" else (name,))]
    source = loading.find(request.model)
    loaded = loading.load(
        source, dtype=request.dtype, device=request.device, trust_remote_code=request.trust_remote_code
    )
    for one in chosen.values():  # refuse before the long work
        with refusals(), refreekv.compress(loaded.model, one):
            pass
    try:
        with refusals():
            found, missing = task_loading.load(
                wanted,
                loaded.tokenizer,
                data_dir=request.data_dir,
                limit=request.limit,
                seed=request.seed,
                execute_code=request.execute_code,
            )
    except MetricUnavailable as error:
        raise UserError(one_line(error)) from error
    records, left_out = _run(request, loaded, found, chosen) if found else ([], [])
    results, totals = task_tables.summarise(records)
    if request.as_json:
        result = {
            "refreekv": refreekv.__version__,
            "model": loaded.name,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "limit": request.limit,
            "seed": request.seed,
            "tasks": [asdict(one) for one in results],
            "policies": [{**asdict(one), "worst": one.worst.family if one.worst else None} for one in totals],
            "needles": [
                {"family": family, "policy": policy, "length": length, "depth": depth, "score": score}
                for (family, policy), cells in task_tables.by_place(records).items()
                for (length, depth), score in cells.items()
            ],
            "not_run": missing,
            "left_out": left_out,
        }
        typer.echo(json.dumps(result, indent=2))
        return
    _show(results, totals, missing, left_out)
    _show_needles(task_tables.by_place(records))


def _run(
    request: Request, loaded: "Loaded", found: "list[BenchTask]", chosen: "dict[str, Policy]"
) -> tuple[list[Any], list[str]]:
    from refreekv.evaluation.records import TaskRecord
    from refreekv.evaluation.results import RecordFile
    from refreekv.evaluation.tasks import running as bench

    settings = bench.Settings(
        loaded.name,
        max_new_tokens=request.max_new_tokens,
        max_tokens=request.max_tokens,
        batch_size=request.batch_size,
        chat=request.chat,
        seed=request.seed,
    )
    with refusals():
        planned = bench.plan(loaded.model, loaded.tokenizer, found, settings)
    setup = {
        **settings.to_dict(),
        "refreekv": refreekv.__version__,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "attention": loaded.model.config._attn_implementation,
    }
    with tempfile.TemporaryDirectory(prefix="refreekv-tasks-") as folder:
        path = request.out or Path(folder) / "results.jsonl"
        try:
            with refusals():
                file = RecordFile(path, setup, {name: str(one) for name, one in chosen.items()}, TaskRecord)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
        with file as results, _progress(planned.count * (len(chosen) + 1)) as advance:
            records = bench.run(
                loaded.model, loaded.tokenizer, found, planned, chosen, settings, results, progress=advance
            )
    return records, planned.left_out


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar over answers; yields what to call with how many are done."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from refreekv.cli.progress import stderr_console

    console = stderr_console()
    if not console.is_terminal:
        console.print(f"{total} answers …", markup=False, soft_wrap=True)
        yield lambda count: None
        return
    columns = (TextColumn("Answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.update(task, advance=count)


def _show(
    results: list["FamilyResult"], totals: list["PolicyResult"], missing: dict[str, str], left_out: list[str]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Task and policy", overflow="fold")
    for heading in ("Score", "Change", "Same", "Kept"):
        table.add_column(heading, justify="right", no_wrap=True)
    family = ""
    for one in results:
        if one.family != family:
            family = one.family
            table.add_row(Text(f"{family} (n = {one.n})", style="bold"))
        table.add_row(
            Text(f"  {one.policy}"),
            _interval(one.score, signed=False),
            _interval(one.change, signed=True) if one.policy not in BASES else "",
            f"{one.same:.0%}" if one.policy not in BASES else "",
            f"{one.budget:.0%}" if one.policy != "chance" else "",
        )
    console.print(table)
    console.print("\nOver tasks, each counting the same", style="bold")
    for total in totals:
        score = "no score" if total.score is None else f"score {100 * total.score:.1f}"
        line = f"  {total.policy}: {score}, {total.budget:.0%} kept"
        if total.worst and total.change is not None:
            assert total.worst.change is not None
            line += (
                f", change {100 * total.change:+.1f}; worst {total.worst.family} ({100 * total.worst.change.mean:+.1f})"
            )
        console.print(line, markup=False, soft_wrap=True)
    note = (
        "Scores and changes to the full cache in points of 100, with 95 % bootstrap intervals; same: its very text; "
        "chance: the full cache's answers to other samples of the task."
    )
    console.print(note, style="dim", soft_wrap=True)
    for name, why in missing.items():
        console.print(f"not run: {name}: {why}", style="yellow", markup=False, soft_wrap=True)
    if left_out:
        console.print(f"left out: {len(left_out)} samples, such as {left_out[0]}", style="yellow", markup=False)


def _show_needles(grids: dict[tuple[str, str], dict[tuple[float, float], float]]) -> None:
    """Where needles are found: a line for each length, a column for each depth."""
    from rich.console import Console
    from rich.table import Table

    for (family, policy), cells in grids.items():
        lengths, depths = ([*dict.fromkeys(part)] for part in zip(*cells, strict=True))
        if policy == "chance" or len(cells) < 2:
            continue
        table = Table(box=None, pad_edge=False)
        table.add_column("Tokens", justify="right")
        for depth in depths:
            table.add_column(f"{depth:.0%}", justify="right")
        for length in lengths:
            table.add_row(f"{length:,}", *(f"{100 * cells[length, depth]:.0f}" for depth in depths))
        console = Console(highlight=False)
        console.print(f"\n{family}, {policy}: score by length and depth", markup=False, soft_wrap=True)
        console.print(table)


def _interval(estimate: "Estimate | None", *, signed: bool) -> str:
    if estimate is None:
        return "–"
    sign = "+" if signed else ""
    return f"{100 * estimate.mean:{sign}.1f} [{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]"
