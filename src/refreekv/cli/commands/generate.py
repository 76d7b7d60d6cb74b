"""``refreekv generate``: one answer with a compressed cache."""

import contextlib
import json
import sys
from typing import Annotated

import typer

import refreekv
from refreekv.cli import options, prompts
from refreekv.cli.app import app, refusals


@app.command()
def generate(
    model: options.ModelOption,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt.")] = None,
    prompt_file: options.PromptFileOption = None,
    policy: options.PolicyOption = options.DEFAULT_POLICY,
    kv_dtype: options.KVDtypeOption = "auto",
    calibration: options.CalibrationOption = None,
    verify: options.VerifyOption = None,
    host_memory: options.HostMemoryOption = None,
    max_new_tokens: options.MaxNewTokensOption = 128,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    weights: options.WeightsOption = "auto",
    device_map: options.DeviceMapOption = None,
    chat: options.ChatOption = None,
    as_json: options.JsonOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Generate greedily from a prompt, with a compressed KV cache.

    The text goes to stdout, what was kept and saved to stderr.
    """
    from refreekv.cli import loading, running
    from refreekv.cli.progress import counting, stderr_console

    parsed, stored = running.parse(policy, kv_dtype, max_new_tokens)
    text = prompts.read(prompt, prompt_file)
    loaded = loading.load(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, weights=weights, device_map=device_map
    )
    parsed, stored, verifying = running.calibrated(loaded, parsed, stored, calibration, verify=verify)
    inputs = prompts.encode(loaded, text, chat=chat, max_new_tokens=max_new_tokens)
    prompt_tokens = inputs["input_ids"].shape[1]

    streaming = sys.stdout.isatty() and not as_json
    with contextlib.ExitStack() as stack:
        with refusals():
            session = stack.enter_context(
                refreekv.compress(loaded.model, parsed, kv_dtype=stored, verify=verifying, host_memory=host_memory)
            )
        stream = None
        if streaming:
            from transformers import TextStreamer

            stream = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        bar = stack.enter_context(contextlib.ExitStack())
        advance = bar.enter_context(
            counting(stderr_console(), "Generating", f"reading {prompt_tokens:,} tokens", max_new_tokens)
        )
        # A bar below text that is still growing would be drawn into it.
        on_token = bar.close if streaming else advance
        run = running.generate(loaded, inputs, max_new_tokens=max_new_tokens, on_token=on_token, stream=stream)
    report = session.report

    if as_json:
        result = {
            "model": loaded.name,
            "policy": report.policy,
            "kv_dtype": report.kv_dtype,
            "prompt_tokens": prompt_tokens,
            "text": run.text,
            "tokens": run.tokens,
            "prefill_seconds": run.prefill_seconds,
            "decode_seconds": run.decode_seconds,
            "token_seconds": run.token_seconds,
            "report": report.to_dict(),
        }
        typer.echo(json.dumps(result, indent=2))
        return
    if not streaming:
        typer.echo(run.text)
    speed = f", then {1000 * run.token_seconds:.0f} ms a token" if run.token_seconds is not None else ""
    typer.echo("\n" + str(report).partition("\n")[0], err=True)
    typer.echo(
        f"{prompt_tokens:,} prompt tokens, {len(run.tokens):,} new; "
        f"{run.prefill_seconds:.1f} s to the first token{speed}",
        err=True,
    )
