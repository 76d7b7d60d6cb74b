"""``refreekv eval``: what policies keep and what that costs, on a model of one's own."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import refreekv
from refreekv.cli.app import UserError, app, one_line, refusals
from refreekv.cli.options import DEFAULT_POLICY, DeviceOption, DtypeOption, JsonOption, ModelOption, TrustOption

if TYPE_CHECKING:
    from rich.console import Console

    from refreekv.cli.loading import Loaded
    from refreekv.evaluation.data.samples import Sample
    from refreekv.policies import Policy

TABLE_WIDTH = 180
BASES = ("full", "chance")
"""What policies are compared with."""
NOTE = (
    "Scores and changes to the full cache in points of 100, with 95 % bootstrap intervals; same: its very text; "
    "chance: the full cache's answers to other samples of the task."
)


def _list(wanted: bool) -> None:
    if wanted:
        from refreekv.evaluation.data import families

        fidelity, tasks = families.names(), families.task_names()
        listing = tasks | fidelity
        width = max(map(len, listing))
        for name in sorted(listing):
            ways = " and ".join(way for way, known in (("fidelity", fidelity), ("task", tasks)) if name in known)
            typer.echo(f"{name:<{width}}  {ways:<17}  {listing[name]}")
        raise typer.Exit


@dataclass(frozen=True)
class _Request:
    """What both kinds of measurement need."""

    loaded: "Loaded"
    chosen: "dict[str, Policy]"
    data_dir: Path | None
    out: Path
    seed: int
    as_json: bool


@app.command("eval")
def evaluate(
    model: ModelOption,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "--output",
            metavar="FILE",
            help="Results, one JSON line for each sample and policy. An interrupted run goes on where it was; "
            "further policies, families or samples are added.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Data as JSONL files, in place of the Hugging Face hub."),
    ] = None,
    families: Annotated[
        list[str] | None,
        typer.Option("--families", metavar="NAME[:PARAM=VALUE,…],…", help="Task families. Default: all with data."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME[:PARAM=VALUE,…],…",
            help="Score generated answers of these tasks instead, through lm-eval, of which any task will do; "
            "`paper`: the paper's thirteen; `all`: all of `--list` whose data is there.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME[:PARAM=VALUE[,VALUE…],…]",
            help="A policy, or several of it: refreekv:threshold=0.001,0.01. With @int4, @int8 or @k6v4 behind it, "
            "what it keeps is stored so. May be given more than once.",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", help="A list of policies with a name: paper-ablations or peers. May be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Samples of each family or task. Default: 10; tasks: 20.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", metavar="N", help="Leave out longer prompts. Default: 6500; tasks: as the model allows."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="For the choice of samples, what is generated, and the intervals.")
    ] = 0,
    continuation: Annotated[
        int, typer.Option("--continuation", metavar="N", help="Fidelity: tokens of the full cache's answer to compare.")
    ] = 48,
    rows: Annotated[
        int | None,
        typer.Option("--rows", metavar="N", help="Fidelity: policies in one batch. Default: as memory allows."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Fidelity: write the tables here.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", help="Tasks: cut answers here, where their own limit is higher."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Tasks: prompts a batch.")] = 1,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Tasks: use the chat template. Default: if there is one and the prompts suit it."
        ),
    ] = None,
    execute_code: Annotated[
        bool, typer.Option("--execute-code", help="Tasks: let HumanEval run what the model wrote, in a sandbox.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
    show: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Show all families and tasks and exit.")
    ] = False,
) -> None:
    """Measure fidelity: how far policies take the model from its own full-cache answers.

    One prefill a sample for all policies; each then reads the full cache's answer over what it
    keeps of the prompt. The full cache itself, run a second time, is the noise floor.

    With --tasks: score answers of benchmarks and stress tests, generated with the full and with pruned
    caches. Where likelihoods are compared, the prompt is prefilled and pruned before the choices are scored.
    """
    del show  # its callback did it
    counts = {"--limit": limit, "--max-tokens": max_tokens, "--continuation": continuation, "--rows": rows}
    for name, value in {**counts, "--max-new-tokens": max_new_tokens, "--batch-size": batch_size}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if families and tasks:
        raise UserError("give --families for fidelity or --tasks for scores, not both")
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder")
    try:
        from refreekv.evaluation import sweeps, tables  # noqa: F401 - pandas is missed before the long work
    except ImportError as error:
        raise UserError(one_line(error)) from error
    from refreekv.cli import loading
    from refreekv.evaluation.fidelity.runner import MAX_TOKENS

    with refusals():
        chosen = sweeps.choose(policy or ([] if suite else [DEFAULT_POLICY]), suite or [])
    samples: list[Sample] = []
    missing: dict[str, str] = {}
    if not tasks:
        samples, missing = _samples(families, data_dir, limit or 10, seed)
    loaded = loading.load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="refreekv-eval-") as folder:
        request = _Request(loaded, chosen, data_dir, out or Path(folder) / "results.jsonl", seed, as_json)
        if tasks:
            _score(
                request,
                tasks,
                limit or 20,
                execute_code,
                max_new_tokens=max_new_tokens,
                max_tokens=max_tokens,
                batch_size=batch_size,
                chat=chat,
            )
        else:
            _compare(request, samples, missing, max_tokens or MAX_TOKENS, continuation, rows, markdown)


@contextlib.contextmanager
def _results(request: _Request, setup: dict[str, Any], record: type[Any]) -> Iterator[Any]:
    """The results file, open for more."""
    from refreekv.evaluation.results import RecordFile

    try:
        with refusals():
            file = RecordFile(request.out, setup, {name: str(one) for name, one in request.chosen.items()}, record)
    except OSError as error:
        raise UserError(f"cannot write {request.out}: {error.strerror or one_line(error)}") from error
    with file as results:
        yield results


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    # Files hold whole tables.
    return console if console.is_terminal else Console(highlight=False, width=TABLE_WIDTH)


# -- fidelity -----------------------------------------------------------------------------


def _compare(
    request: _Request,
    samples: list["Sample"],
    missing: dict[str, str],
    max_tokens: int,
    continuation: int,
    rows: int | None,
    markdown: Path | None,
) -> None:
    from rich.text import Text

    from refreekv.cli import loading, views
    from refreekv.cli.progress import counting, stderr_console
    from refreekv.evaluation import tables
    from refreekv.evaluation.fidelity import runner
    from refreekv.evaluation.fidelity.bench import Bench
    from refreekv.evaluation.records import FidelityRecord

    loaded, chosen = request.loaded, request.chosen
    bench = Bench(loaded.model, loaded.tokenizer, loaded.name, continuation=continuation, rows=rows)
    place = str(request.data_dir.resolve()) if request.data_dir is not None else None
    setup = runner.setup_of(bench, max_tokens=max_tokens, seed=request.seed, data_dir=place)
    console = stderr_console()
    with _results(request, setup, FidelityRecord) as results:
        with loading.quiet_transformers():
            planned = runner.plan(bench, samples, chosen, results, max_tokens=max_tokens)
        for text in _notes(missing, planned):
            console.print(text, markup=False, soft_wrap=True)
        jobs = len(planned.jobs)
        what = f"{jobs} samples, {len(chosen)} policies and the full cache"
        with loading.quiet_transformers(), counting(console, what, "the first sample", jobs) as advance:
            runner.execute(bench, planned, results, advance)
        records, setup = results.results.records, results.results.setup
    if not records:
        raise UserError("no sample could be measured" + ("; see above" if planned.skipped or missing else ""))
    made = tables.fidelity(records, seed=request.seed)
    if markdown is not None:
        try:
            markdown.write_text(tables.markdown(made, setup=setup), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {markdown}: {error.strerror or one_line(error)}") from error
    if request.as_json:
        skipped = {f"{family}/{sample}": reason for (family, sample), reason in planned.skipped.items()}
        result = {"setup": setup, "not_run": missing, "skipped": skipped, **made.to_dict()}
        typer.echo(json.dumps(result, indent=2))
        return
    shown = _console()
    for title, headings, lines in tables.texts(made):
        styled = [[Text(cell, style="dim" if at == 0 else "") for cell in line] for at, line in enumerate(lines)]
        shown.print(views.table(headings, styled, gap=1, title=title, title_justify="left"), "", sep="\n")
    shown.print(Text(tables.NOTE, style="dim"))


def _samples(
    wanted: list[str] | None, data_dir: Path | None, limit: int, seed: int
) -> tuple[list["Sample"], dict[str, str]]:
    """The samples of all families, and the families without data, with the reason."""
    from refreekv.evaluation.data import families

    with refusals():
        chosen = families.split(wanted) if wanted else list(families.names())
        for name in chosen:
            families.parse(name)
    samples: list[Sample] = []
    missing: dict[str, str] = {}
    for name in chosen:
        try:
            with refusals():
                samples += families.load(name, data_dir=data_dir, limit=limit, seed=seed)
        except families.DataMissing as error:
            missing[name] = one_line(error)
    return samples, missing


def _notes(missing: dict[str, str], planned: Any) -> list[str]:
    """What is not measured, and what is there already, in words."""
    notes = [f"Not run: {family}: {reason}" for family, reason in missing.items()]
    by_family: dict[str, list[str]] = {}
    for (family, _), reason in planned.skipped.items():
        by_family.setdefault(family, []).append(reason)
    notes += [f"Left out of {family}: {len(reasons)} samples, as {reasons[0]}" for family, reasons in by_family.items()]
    if planned.done:
        notes.append(f"{planned.done} results are in the file already")
    return notes


# -- task scores --------------------------------------------------------------------------


def _score(request: _Request, tasks: list[str], limit: int, execute_code: bool, **options: Any) -> None:
    from refreekv.cli.progress import counting, stderr_console
    from refreekv.evaluation import tables
    from refreekv.evaluation.data import families
    from refreekv.evaluation.data.catalogue import PAPER
    from refreekv.evaluation.records import TaskRecord
    from refreekv.evaluation.tasks import loading as task_loading
    from refreekv.evaluation.tasks.scoring import MetricUnavailable

    loaded, chosen = request.loaded, request.chosen
    for one in chosen.values():  # refuse before the long work
        with refusals(), refreekv.compress(loaded.model, one):
            pass
    suites = {"paper": PAPER, "all": tuple(families.task_names())}
    wanted = [one for name in families.split(tasks) for one in suites.get(name, (name,))]
    try:
        with refusals():
            found, missing = task_loading.load(
                wanted,
                loaded.tokenizer,
                data_dir=request.data_dir,
                limit=limit,
                seed=request.seed,
                execute_code=execute_code,
            )
    except MetricUnavailable as error:
        raise UserError(one_line(error)) from error
    records: list[TaskRecord] = []
    left_out: list[str] = []
    if found:
        from refreekv.evaluation.tasks import running

        settings = running.Settings(loaded.name, seed=request.seed, **options)
        with refusals():
            planned = running.plan(loaded.model, loaded.tokenizer, found, settings)
        left_out = planned.left_out
        setup = {
            **settings.to_dict(),
            "refreekv": refreekv.__version__,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "attention": loaded.model.config._attn_implementation,
        }
        answers = planned.count * (len(chosen) + 1)
        with (
            _results(request, setup, TaskRecord) as results,
            counting(stderr_console(), f"{answers} answers", "the first one", answers) as advance,
        ):
            records = running.run(
                loaded.model, loaded.tokenizer, found, planned, chosen, settings, results, progress=advance
            )
    results_table, totals = tables.scores(records)
    places = tables.by_place(records)
    if request.as_json:
        result = {
            "refreekv": refreekv.__version__,
            "model": loaded.name,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "limit": limit,
            "seed": request.seed,
            "tasks": tables.plain(results_table),
            "policies": tables.plain(totals),
            "needles": [
                {"family": family, "policy": policy, "length": length, "depth": depth, "score": score}
                for (family, policy), cells in places.items()
                for (length, depth), score in cells.items()
            ],
            "not_run": missing,
            "left_out": left_out,
        }
        typer.echo(json.dumps(result, indent=2))
        return
    _show_scores(results_table, totals)
    console = _console()
    console.print(NOTE, style="dim", soft_wrap=True)
    for name, why in missing.items():
        console.print(f"not run: {name}: {why}", style="yellow", markup=False, soft_wrap=True)
    if left_out:
        console.print(f"left out: {len(left_out)} samples, such as {left_out[0]}", style="yellow", markup=False)
    _show_needles(places)


def _show_scores(results: Any, totals: Any) -> None:
    from rich.text import Text

    from refreekv.cli import views

    console = _console()
    rows: list[tuple[Text | str, ...]] = []
    changes: dict[tuple[str, str], Any] = {}
    family = ""
    for one in results.itertuples():
        if one.family != family:
            family = one.family
            rows.append((Text(f"{family} (n = {one.n})", style="bold"),))
        compared = one.policy not in BASES
        changes[one.family, one.policy] = one.change
        rows.append(
            (
                f"  {one.policy}",
                _points(one.score),
                _points(one.change, "+") if compared else "",
                f"{one.same:.0%}" if compared else "",
                f"{one.budget:.0%}" if one.policy != "chance" else "",
            )
        )
    console.print(views.table(("Task and policy", "Score", "Change", "Same", "Kept"), rows, gap=2))
    console.print("\nOver tasks, each counting the same", style="bold")
    for total in totals.itertuples():
        score = "no score" if total.score is None else f"score {100 * total.score:.1f}"
        line = f"  {total.policy}: {score}, {total.budget:.0%} kept"
        if total.worst is not None:
            worst = changes[total.worst, total.policy].mean
            line += f", change {100 * total.change:+.1f}; worst {total.worst} ({100 * worst:+.1f})"
        console.print(line, markup=False, soft_wrap=True)


def _show_needles(grids: dict[tuple[str, str], dict[tuple[float, float], float]]) -> None:
    """Where needles are found: a line for each length, a column for each depth."""
    from refreekv.cli import views

    console = _console()
    for (family, policy), cells in grids.items():
        lengths, depths = ([*dict.fromkeys(part)] for part in zip(*cells, strict=True))
        if policy == "chance" or len(cells) < 2:
            continue
        rows = [(f"{length:,}", *(f"{100 * cells[length, depth]:.0f}" for depth in depths)) for length in lengths]
        console.print(f"\n{family}, {policy}: score by length and depth", markup=False, soft_wrap=True)
        console.print(views.table(("Tokens", *(f"{depth:.0%}" for depth in depths)), rows, left=(), gap=1))


def _points(estimate: Any, sign: str = "") -> str:
    if estimate is None:
        return "–"
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"
