"""``refreekv check``: whether a model takes a compressed cache, and which line of code to use."""

import collections
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import refreekv
from refreekv.cli import options
from refreekv.cli.app import UserError, app, one_line, refusals

if TYPE_CHECKING:
    from refreekv.evaluation.checking.check import Check
    from refreekv.evaluation.data.samples import Sample

WORDS = {
    "survives": "nobody can tell: within a few times of what the full cache differs from itself in bf16",
    "visible": "single words change, most answers stay",
    "breaks": "other answers",
}


@app.command()
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a .gguf file, or a model id.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Your own: JSON Lines (prompt or messages), or text with lines of --- between prompts. All are read.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", metavar="NAME[:PARAM=VALUE,…][@int8]", help="A further policy to try. May be given repeatedly."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            metavar="N",
            help="Begin no further prompt of the package after so long; 0: read all. Default: 60 on a GPU, 180 else.",
        ),
    ] = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    weights: options.WeightsOption = "auto",
    device_map: options.DeviceMapOption = None,
    as_json: options.JsonOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Say whether a model takes a compressed cache: bytes, damage, worst prompt, and which line to use.

    The full cache answers each prompt; number formats and policies then read that answer over what they keep of the
    prompt, and are compared with it token by token. Exit code 1: the default breaks this model.
    """
    from refreekv.cli import loading
    from refreekv.cli.progress import counting, stderr_console
    from refreekv.evaluation.checking import check as checking
    from refreekv.evaluation.checking.prompts import rounds

    if seconds is not None and not seconds >= 0:
        raise UserError(f"--seconds must be at least 0, got {seconds}")
    given = None if prompts is None else read(prompts)
    loaded = loading.load(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, weights=weights, device_map=device_map
    )
    with refusals():  # what there is to refuse, before the long work
        checking.candidates(loaded.model, policy or [])
        refreekv.ReFreeKVCache(loaded.model)
    total = len(given) if given is not None else sum(len(one) for one in rounds())
    with (
        counting(stderr_console(), "Checking", "reading the first prompt", total) as advance,
        loading.quiet_transformers(),
    ):
        try:
            found = checking.check(
                loaded.model,
                loaded.tokenizer,
                prompts=given,
                more=policy or [],
                seconds=seconds,
                name=loaded.name,
                on_prompt=lambda _: advance(),
            )
        except checking.NothingMeasuredError as error:
            raise UserError(one_line(error)) from error
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found)
    if found.breaks:
        raise typer.Exit(1)


def read(file: Path) -> "list[Sample]":
    """Prompts of a user's file; `UserError` if there are none."""
    from refreekv.evaluation.data.own_prompts import read_prompts

    try:
        return read_prompts(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or one_line(error)}") from error
    except ValueError as error:
        raise UserError(one_line(error)) from error


def _show(found: "Check") -> None:
    from rich.console import Console
    from rich.text import Text

    from refreekv.cli import views

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    shortest, longest = found.prompt_lengths
    console.print(
        views.header(
            {
                "Model": f"{found.model}, {found.dtype} on {found.device}",
                "Prompts": f"{found.floor.prompts}, of {shortest:,} to {longest:,} tokens, in {found.seconds:.0f} s",
            }
        )
    )
    styles = {"survives": "green", "visible": "yellow", "breaks": "bold red"}
    rows = [
        (
            f"{one.name} (default)" if one is found.default else one.name,
            f"{one.bytes_share:.0%}",
            f"{one.kl_mean:.4f}",
            f"{one.kl_worst:.4f}",
            one.worst_prompt,
            f"{one.changed_tokens:.1%}",
            f"{one.changed_answers:.0%}",
            Text(one.verdict or "noise floor", style=styles.get(one.verdict, "dim")),
        )
        for one in (found.floor, *found.results)
    ]
    headings = ("", f"bytes of {found.dtype}", "KL mean", "worst", "of prompt", "tokens", "answers", "")
    console.print("", views.table(headings, rows, left=(0, 4, 7), gap=2), sep="\n")
    said = {one.verdict for one in found.results}
    lines = [f"{verdict}: {words}" for verdict, words in WORDS.items() if verdict in said]
    lines.append("KL in nats a token; tokens, answers: share whose most likely tokens change")
    for reason, names in _by_reason(found.skipped).items():
        shown = ", ".join(names) if len(names) < 4 else f"{len(names)} prompts, such as {names[0]}"
        lines.append(f"left out: {shown} ({reason})")
    console.print("", *(Text(line, style="dim") for line in lines), "", sep="\n")
    console.print(Text(found.advice, style="bold"))
    if found.breaks:
        console.print(Text(f"The default, {found.default.name}, breaks this model.", style="bold red"))


def _by_reason(skipped: dict[str, str]) -> dict[str, list[str]]:
    reasons = collections.defaultdict(list)
    for name, reason in skipped.items():
        reasons[reason].append(name)
    return reasons
