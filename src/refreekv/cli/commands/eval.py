"""``refreekv eval``: what policies keep and what that costs, on a model of one's own."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refreekv.cli.app import UserError, app, one_line, refusals
from refreekv.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption, TrustOption

if TYPE_CHECKING:
    from refreekv.evaluation.data.samples import Sample

TABLE_WIDTH = 180


@app.command("eval")
def evaluate(
    model: ModelOption,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Results, one JSON line for each sample and policy. An interrupted run goes on where it was; "
            "further policies, families or samples are added.",
        ),
    ],
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", metavar="DIR", help="Take the tasks' data from local JSONL files.")
    ] = None,
    families: Annotated[
        list[str] | None,
        typer.Option("--families", metavar="NAME[:PARAM=VALUE,…],…", help="Task families. Default: all with data."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", metavar="NAME,…", help="Score answers of these tasks instead: the same as `refreekv tasks`."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME[:PARAM=VALUE[,VALUE…],…]",
            help="A policy, or several of it: refreekv:threshold=0.001,0.01. With @int4, @int8 or @fp8 behind it, "
            "what it keeps is stored so. May be given more than once.",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", help="A list of policies with a name: paper-ablations or peers. May be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="Samples of each family.")] = 10,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Leave out longer prompts.")] = 6500,
    continuation: Annotated[
        int, typer.Option("--continuation", metavar="N", help="Tokens of the full cache's answer to compare.")
    ] = 48,
    seed: Annotated[int, typer.Option("--seed", help="For the choice of samples and the intervals.")] = 0,
    rows: Annotated[
        int | None, typer.Option("--rows", metavar="N", help="Policies in one batch. Default: as memory allows.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables here.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure fidelity: how far policies take the model from its own full-cache answers.

    One prefill a sample for all policies; each then reads the full cache's answer over what it
    keeps of the prompt. The full cache itself, run a second time, is the noise floor.
    """
    if tasks:
        from refreekv.cli.commands.tasks import Request, score_tasks

        score_tasks(
            Request(
                model=model,
                tasks=tasks,
                policy=policy,
                suite=suite,
                data_dir=data_dir,
                limit=limit,
                seed=seed,
                max_tokens=max_tokens,
                out=out,
                dtype=dtype,
                device=device,
                as_json=as_json,
                trust_remote_code=trust_remote_code,
            )
        )
        return
    for name, value, least in (("--limit", limit, 1), ("--continuation", continuation, 1)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    from refreekv.evaluation import sweeps

    with refusals():
        chosen = sweeps.choose(policy or ([] if suite else ["refreekv"]), suite or [])
    samples, missing = _samples(families, data_dir, limit, seed)

    from refreekv.cli import loading
    from refreekv.cli.progress import counting, stderr_console
    from refreekv.evaluation import summary
    from refreekv.evaluation.fidelity import runner
    from refreekv.evaluation.fidelity.bench import Bench
    from refreekv.evaluation.results import ResultsFile

    loaded = loading.load(loading.find(model), dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with refusals():
        bench = Bench(loaded.model, loaded.tokenizer, loaded.name, continuation=continuation, rows=rows)
    place = str(data_dir.resolve()) if data_dir is not None else None
    setup = runner.setup_of(bench, max_tokens=max_tokens, seed=seed, data_dir=place)
    try:
        with refusals():
            results = ResultsFile(out, setup, {name: str(one) for name, one in chosen.items()})
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or one_line(error)}") from error
    console = stderr_console()
    with results:
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
    tables = summary.summarize(records, seed=seed)
    if markdown is not None:
        _write(markdown, summary.markdown(tables, setup=setup))
    if as_json:
        skipped = {f"{family}/{sample}": reason for (family, sample), reason in planned.skipped.items()}
        result = {"setup": setup, "not_run": missing, "skipped": skipped, **tables.to_dict()}
        typer.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console

    shown = Console(highlight=False)
    if not shown.is_terminal:  # files have room for whole tables
        shown = Console(highlight=False, width=TABLE_WIDTH)
    shown.print(summary.rich_tables(tables))


def _samples(
    wanted: list[str] | None, data_dir: Path | None, limit: int, seed: int
) -> tuple[list["Sample"], dict[str, str]]:
    """The samples of all families, and the families without data, with the reason."""
    from refreekv.evaluation.data import families

    with refusals():
        chosen = families.split(wanted) if wanted else list(families.names())
        for name in chosen:
            families.parse(name)
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder")
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


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
