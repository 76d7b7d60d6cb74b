"""``refreekv serve``: an OpenAI-compatible server, stock vLLM with the plugin."""

import os
import shlex
import sys
from typing import Annotated

import typer

from refreekv.cli.app import UserError, app, refusals
from refreekv.cli.options import DEFAULT_POLICY, KVDtypeOption, PolicyOption


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model id of the hub or a local folder.")],
    policy: PolicyOption = DEFAULT_POLICY,
    layers_per_group: Annotated[
        int,
        typer.Option(
            "--layers-per-group",
            metavar="N",
            help="CPUs only: layers that share a block table, and keep the union of what each would. 1 saves most.",
        ),
    ] = 1,
    kv_dtype: KVDtypeOption = "16",
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log of each finished request what was kept of its prompt.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and do not run it.")] = False,
) -> None:
    """Serve a model with vLLM and a compressed KV cache.

    All other options go to `vllm serve` as they are: --port, --max-model-len, --api-key …
    """
    from refreekv.engines.vllm.config import PluginOptions
    from refreekv.engines.vllm.launch import environment, installed_version, on_cpu, serve_command
    from refreekv.engines.vllm.refusals import check_options, check_policy, check_version

    with refusals():
        options = PluginOptions(policy, layers_per_group, kv_dtype, log_requests)
        check_policy(options.build())
        check_options(options, on_cpu=on_cpu())
        command = serve_command(model, options, context.args)
        if not dry_run:
            version = installed_version()
            if version is None:
                raise UserError("vLLM is not installed; run: pip install 'refreekv[vllm]'")
            check_version(version)
    settings = environment()
    shown = [f"{name}={value}" for name, value in settings.items()] + ["python", *map(shlex.quote, command)]
    typer.echo(" ".join(shown), err=not dry_run)
    if dry_run:
        return
    sys.stderr.flush()
    # The server takes this process's place: signals and its exit code are vLLM's own.
    os.execve(sys.executable, [sys.executable, *command], {**os.environ, **settings})
