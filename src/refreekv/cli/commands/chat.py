"""``refreekv chat``: talk to a model, every turn on the same pruned cache."""

import json
from typing import Annotated

import typer

from refreekv.cli import options
from refreekv.cli.app import UserError, app


@app.command()
def chat(
    model: options.ModelOption,
    policy: options.PolicyOption = options.DEFAULT_POLICY,
    kv_dtype: options.KVDtypeOption = "auto",
    calibration: options.CalibrationOption = None,
    verify: options.VerifyOption = None,
    keep_evicted: options.KeepEvictedOption = "auto",
    host_memory: options.HostMemoryOption = None,
    weights: options.WeightsOption = "auto",
    device_map: options.DeviceMapOption = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="Tokens of an answer at most.")
    ] = 512,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="0 is greedy. Default: as the model's own generation settings say."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    as_json: options.JsonOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Talk to a model; each message adds its own tokens to the same pruned cache.

    The line below an answer says what the cache holds and what a full one would. Without a
    terminal, messages are read from stdin, a line each. /help lists the commands.
    """
    from rich.console import Console

    from refreekv.cli import loading, prompts, running
    from refreekv.cli.chatting import Chat, transcript
    from refreekv.cli.conversation import Conversation, Sampling
    from refreekv.cli.progress import stderr_console

    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature must be a number from 0 on, got {temperature}")
    parsed, stored = running.parse(policy, kv_dtype, max_new_tokens)
    if system is not None:
        prompts.whole(system, "--system")
    loaded = loading.load(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, weights=weights, device_map=device_map
    )
    parsed, stored, verifying = running.calibrated(loaded, parsed, stored, calibration, verify=verify)
    conversation = Conversation(
        loaded,
        parsed,
        kv_dtype=stored,
        verify=verifying,
        keep_evicted=running.store_of(keep_evicted, loaded.device, host_memory),
        host_memory=host_memory,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, seed),
    )
    errors = stderr_console()
    chatting = Chat(conversation, errors if as_json else Console(highlight=False), errors)
    chatting.greet()
    chatting.run()
    if as_json:
        typer.echo(json.dumps(transcript(conversation), indent=2))
