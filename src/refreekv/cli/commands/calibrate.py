"""``refreekv calibrate``: the loosest constant that keeps a stated risk, in a file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import refreekv
from refreekv.cli import options
from refreekv.cli.app import UserError, app, one_line, refusals
from refreekv.cli.commands.check import read

if TYPE_CHECKING:
    from refreekv.engines.calibration import Calibration


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a .gguf file, or a model id.")],
    prompts: Annotated[
        Path,
        typer.Option("--prompts", metavar="FILE", help="Prompts like those to come, in the forms that `check` reads."),
    ],
    risk: Annotated[
        float, typer.Option("--risk", help="Share of prompts that may be damaged, between 0 and 1.")
    ] = 0.05,
    damage: Annotated[
        float, typer.Option("--damage", help="Nats a token (KL, mean over the answer) above which a prompt is damaged.")
    ] = 0.02,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")] = Path("calibration.json"),
    policy: options.PolicyOption = options.DEFAULT_POLICY,
    kv_dtype: options.KVDtypeOption = "auto",
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    weights: options.WeightsOption = "auto",
    device_map: options.DeviceMapOption = None,
    as_json: options.JsonOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Find the loosest constant that damages few prompts, and write it to a file that compress and serve take.

    By conformal risk control: the expected share of prompts with more damage than --damage is at most --risk, for
    prompts that are exchangeable with those in --prompts: prompts like these, for this model.
    """
    from refreekv.cli import loading
    from refreekv.cli.progress import counting, stderr_console
    from refreekv.engines.calibration import check_asked, check_enough
    from refreekv.evaluation.checking.calibrate import FACTORS
    from refreekv.evaluation.checking.calibrate import calibrate as measure
    from refreekv.evaluation.checking.check import NothingMeasuredError
    from refreekv.policies.base import ladder_for
    from refreekv.policies.constants import at_factors

    given = read(prompts)
    with refusals():
        check_asked(risk, damage)
        check_enough(len(given), risk)
        parsed, stored = refreekv.policies.parse(policy), None if kv_dtype == "16" else kv_dtype
        at_factors(parsed, FACTORS)
        ladder_for(parsed, stored)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"{out} cannot be written: give a file in a folder that exists")
    loaded = loading.load(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, weights=weights, device_map=device_map
    )
    with refusals():
        refreekv.ReFreeKVCache(loaded.model, parsed, kv_dtype=stored)
    with (
        counting(stderr_console(), "Calibrating", "reading the first prompt", len(given)) as advance,
        loading.quiet_transformers(),
    ):
        try:
            found = measure(
                loaded.model,
                loaded.tokenizer,
                given,
                risk=risk,
                damage=damage,
                policy=parsed,
                kv_dtype=stored,
                name=loaded.name,
                on_prompt=lambda _: advance(),
            )
        except NothingMeasuredError as error:
            raise UserError(one_line(error)) from error
    try:
        found.save(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or one_line(error)}") from error
    if as_json:
        typer.echo(json.dumps({**_summary(found), "file": str(out)}, indent=2))
    else:
        _show(found, out)


def _summary(found: "Calibration") -> dict[str, object]:
    steps = [
        {"policy": step, "bytes_share": share, "damaged": sum(row[at] for row in found.damaged), "bound": bound}
        for at, (step, share, bound) in enumerate(zip(found.steps, found.shares, found.bounds, strict=True))
    ]
    return {
        "model": found.model["name"],
        "prompts": found.prompts,
        "risk": found.risk,
        "damage": found.damage,
        "kv_dtype": found.kv_dtype,
        "chosen": found.steps[found.step],
        "noisy": found.noisy,
        "steps": steps,
    }


def _show(found: "Calibration", out: Path) -> None:
    from rich.console import Console
    from rich.text import Text

    from refreekv.cli import views

    console = Console(highlight=False)
    stored = "" if found.kv_dtype == "auto" else f", {found.kv_dtype or 16}"
    rows = []
    for at, step in enumerate(found.steps):
        hurt = sum(row[at] for row in found.damaged)
        mark = "◀ chosen" if at == found.step else ""
        share, bound = f"{found.shares[at]:.0%}", f"{found.bounds[at]:.3f}"
        rows.append((step + (stored if at else ""), share, f"{hurt:.0f} of {found.prompts}", bound, mark))
    console.print(views.table(("", "bytes", "damaged", f"bound (≤ {found.risk:g})", ""), rows, left=(0, 4), gap=2))
    console.print()
    console.print(Text(str(found), style="bold"))
    if found.noisy:
        console.print(
            Text(
                f"The full cache itself, run a second time, differs by more than that on {found.noisy} of "
                f"{found.prompts} prompts: a larger --damage says more.",
                style="yellow",
            )
        )
    console.print(Text("It holds for prompts like these: exchangeable with them, for this model.", style="dim"))
    console.print(Text(f"Written: {out}. Use: refreekv.compress(model, calibration={str(out)!r})"))
