"""``refreekv inspect``: what is kept of one prompt, as a page to look at."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import refreekv
from refreekv.cli import options, prompts
from refreekv.cli.app import UserError, app, one_line

if TYPE_CHECKING:
    from refreekv.cli.comparing import Comparison
    from refreekv.cli.loading import Loaded
    from refreekv.evaluation.inspect.inspection import Inspection


@app.command()
def inspect(
    model: options.ModelOption,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt.")] = None,
    prompt_file: options.PromptFileOption = None,
    policy: options.PolicyOption = options.DEFAULT_POLICY,
    kv_dtype: options.KVDtypeOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The HTML page to write. Default: inspect.html.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write a picture, too.")] = None,
    max_new_tokens: options.MaxNewTokensOption = 64,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    weights: options.WeightsOption = "auto",
    device_map: options.DeviceMapOption = None,
    chat: options.ChatOption = None,
    as_json: options.JsonOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Show on a page what is kept of one prompt, and both answers.

    The page is one file and opens offline: the prompt with every token shaded by how many
    layers and heads keep it, layer by layer, and the answers of the full and the pruned cache.
    """
    from refreekv.cli import comparing, loading, running

    parsed, stored = running.parse(policy, kv_dtype, max_new_tokens)
    page = out or Path("inspect.html")
    _check_writable(page, png)
    text = prompts.read(prompt, prompt_file)
    loaded = loading.load(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, weights=weights, device_map=device_map
    )
    inputs = prompts.encode(loaded, text, chat=chat, max_new_tokens=max_new_tokens)
    result = comparing.compare(loaded, inputs, parsed, max_new_tokens=max_new_tokens, kv_dtype=stored)
    inspection = _inspection(loaded, inputs, parsed, result)
    try:
        inspection.write_html(page)
        if png is not None:
            from refreekv.evaluation.inspect.png import write_png

            write_png(inspection, png)
    except (OSError, ImportError) as error:
        raise UserError(one_line(error)) from error

    written = [str(path) for path in (page, png) if path is not None]
    if as_json:
        about = {"refreekv": refreekv.__version__, "model": loaded.name, "policy": parsed.spec}
        typer.echo(json.dumps({**about, **result.to_dict(), "kept": inspection.kept, "files": written}, indent=2))
        return
    typer.echo(str(result.report).partition("\n")[0])
    typer.echo(inspection.agreement)
    typer.echo(f"Written: {', '.join(written)}")


def _check_writable(*paths: Path | None) -> None:
    """`UserError` for what cannot be written, before the long work."""
    for path in filter(None, paths):
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a file to write")
        if not path.parent.is_dir():
            raise UserError(f"the folder of {path} does not exist")


def _inspection(
    loaded: "Loaded", inputs: dict[str, Any], policy: "refreekv.policies.Policy", result: "Comparison"
) -> "Inspection":
    import torch
    import transformers

    from refreekv.evaluation.inspect.inspection import Inspection
    from refreekv.serving.detokenizing import token_texts

    length = result.prompt_tokens
    full, compressed = result.full, result.compressed
    return Inspection(
        model=loaded.name,
        policy=policy.spec,
        tokens=token_texts(loaded.tokenizer, inputs["input_ids"][0].tolist()),
        # Of the prompt only: what was generated since is all there.
        kept=[
            [[[start, min(stop, length)] for start, stop in head if start < length] for head in layer]
            for layer in result.kept
        ],
        report=result.report,
        full=full.text,
        compressed=compressed.text,
        first_difference=result.first_difference,
        new_tokens=max(len(full.tokens), len(compressed.tokens)),
        facts={
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": str(loaded.model.device),
            "K/V stored in": result.report.kv_dtype or "the model's precision",
            "decoding": "greedy",
            "prefill": f"{full.prefill_seconds:.2f} s full, {compressed.prefill_seconds:.2f} s pruned (one run each)",
            "versions": f"refreekv {refreekv.__version__}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
        },
    )
