"""``refreekv plan``: what a model takes before it runs, and what a load needs."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import refreekv
from refreekv.cli.app import UserError, app, one_line, refusals
from refreekv.cli.options import DEFAULT_POLICY, JsonOption, PolicyOption

if TYPE_CHECKING:
    from refreekv.planner.fleet import Result, Speed
    from refreekv.planner.plan import Plan, Speeds

DEFAULT_CONTEXT = 8192
DEFAULT_OUTPUT = 512
BUS = "50GB"
"""PCIe 5.0 x16 in practice; 4.0 gives half of it."""
UNLIMITED = 2**50
"""Bytes of host memory, where as much as it takes is asked for."""

LEFT_OUT = (
    "The simulation leaves out prefix caching, speculative decoding, swapping, priorities, tensor parallelism inside "
    "a replica, and everything outside of the engine. A step takes as long as moving its bytes or computing its "
    "tokens, whichever is longer, and a fixed part."
)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model id of the hub, a folder or a config.json. No weights are read."),
    ],
    vram: Annotated[str, typer.Option("--vram", metavar="SIZE", help="Memory of the GPU: 24GB (10⁹) or 24GiB (2³⁰).")],
    context: Annotated[
        str | None,
        typer.Option(
            "--context", metavar="TOKENS", help="Tokens of a request, output included: 8192, 32k. Default: 8k."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", metavar="TOKENS", help="Those of them that are generated. Default: 512, at most half."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", metavar="N", help="Requests at once.")] = 1,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="bf16|int8|int4", help="Default: as the checkpoint or the configuration says."
        ),
    ] = None,
    kv: Annotated[
        str,
        typer.Option(
            "--kv",
            metavar="bf16|int8|int4|k6v4|auto",
            help="How kept K/V is stored; auto: in the policy's own widths, as compress does, in measured shares.",
        ),
    ] = "auto",
    prompt_kv: Annotated[
        str,
        typer.Option(
            "--prompt-kv",
            metavar="auto|bf16|int8|int4|k6v4",
            help="How a prompt read in chunks is held until its end (compress: prompt_dtype; in vLLM: bf16); auto: in "
            "int8, or in k6v4 where only that fits.",
        ),
    ] = "auto",
    host_memory: Annotated[
        str | None,
        typer.Option(
            "--host-memory",
            metavar="auto|SIZE",
            help="Host memory for codes that do not fit on the GPU; auto: as much as it takes. Not with --kv bf16.",
        ),
    ] = None,
    bus: Annotated[
        str, typer.Option("--bus", metavar="SIZE", help="Bytes a second that come from host memory in practice.")
    ] = BUS,
    policy: PolicyOption = DEFAULT_POLICY,
    prefill_chunk: Annotated[
        str, typer.Option("--prefill-chunk", metavar="TOKENS", help="Prompt tokens read in one call, or all.")
    ] = "2048",
    reserve: Annotated[
        str | None,
        typer.Option(
            "--reserve",
            metavar="SIZE",
            help="For the driver, workspaces, graphs and fragmentation.",
            show_default="0.75GiB and 1 % of the memory",
        ),
    ] = None,
    budgets: Annotated[
        Path | None,
        typer.Option("--budgets", metavar="FILE", help="Measured budgets of your own, from benchmarks/budgets.py."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw memory against context (.png, .svg, .pdf).")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Simulate a load: JSON lines with arrival (seconds), prompt_tokens, output_tokens.",
        ),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help="GPUs, each with a copy of the model.")] = 1,
    price: Annotated[float | None, typer.Option("--price", metavar="X", help="Price of a GPU for an hour.")] = None,
    target: Annotated[
        float,
        typer.Option("--first-token", metavar="SECONDS", help="What 90% of requests shall have their first token in."),
    ] = 5.0,
    bandwidth: Annotated[
        str, typer.Option("--bandwidth", metavar="SIZE", help="Bytes a second that the GPU's memory gives in practice.")
    ] = "2.7TB",
    tflops: Annotated[
        float,
        typer.Option("--tflops", metavar="N", help="10¹² operations a second that matrix products reach in practice."),
    ] = 500.0,
    step_overhead: Annotated[
        float,
        typer.Option("--step-overhead", metavar="MS", help="Fixed part of a step: scheduling, launches, sampling."),
    ] = 2.0,
    max_running: Annotated[int, typer.Option("--max-running", metavar="N", help="Requests in one step at most.")] = 256,
    block_size: Annotated[int, typer.Option("--block-size", metavar="N", help="Tokens in a K/V block.")] = 16,
    as_json: JsonOption = False,
) -> None:
    """Say what a model takes in memory, what fits, and what to change if it does not.

    Three scenarios: the full cache; the worst case, in which the policy keeps everything; and what
    the policy is expected to keep, from measurements. With --trace also: what a load needs.
    """
    counts = {"--concurrency": concurrency, "--gpus": gpus, "--max-running": max_running, "--block-size": block_size}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    for name, number in (("--first-token", target), ("--tflops", tflops), ("--price", price)):
        if number is not None and not 0 < number < float("inf"):
            raise UserError(f"{name} must be more than 0, got {number:g}")
    if not 0 <= step_overhead < float("inf"):
        raise UserError(f"--step-overhead must be 0 or more, got {step_overhead:g}")
    if gpus > 1 and trace is None:
        raise UserError("--gpus is for a simulated load; give one with --trace")
    if plot is not None:
        _check_plot(plot)

    with refusals():
        from refreekv.core.units import parse_bytes
        from refreekv.planner.fleet import Speed
        from refreekv.planner.plan import Speeds

        memory = parse_bytes(vram, "--vram")
        kept_free = None if reserve is None else parse_bytes(reserve, "--reserve")
        speed = Speed(parse_bytes(bandwidth, "--bandwidth"), tflops * 1e12, step_overhead / 1000)
        host = 0
        if host_memory is not None:
            host = UNLIMITED if host_memory == "auto" else parse_bytes(host_memory, "--host-memory")
            if trace is not None:
                raise UserError(
                    "--host-memory is for compress, and a simulated load is one of an engine: leave one out"
                )
        made = _make(
            model, memory, kept_free, context, output, concurrency, weights, (kv, prompt_kv), policy, prefill_chunk,
            budgets, host, Speeds(speed.bandwidth, parse_bytes(bus, "--bus")),
        )  # fmt: skip
    load = None
    if trace is not None:
        load = _simulate(made, trace, gpus, speed, price, target, block_size, max_running)
    if plot is not None:
        from refreekv.planner.plot import draw

        try:
            draw(made, plot)
        except OSError as error:
            raise UserError(f"cannot write {plot}: {error.strerror or one_line(error)}") from error
    if as_json:
        result: dict[str, Any] = {"refreekv": refreekv.__version__, **made.to_dict()}
        if load is not None:
            results, needed, costs = load
            result["load_simulation"] = {
                "trace": str(trace),
                "first_token_target": target,
                "price": price,
                "step_time": {"bandwidth": speed.bandwidth, "flops": speed.flops, "overhead": speed.overhead},
                "scenarios": [
                    {**one.to_dict(), "gpus_needed": needed[one.scenario], "cost_at_needed": costs.get(one.scenario)}
                    for one in results
                ],
                "left_out": LEFT_OUT,
            }
        typer.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console
    from rich.text import Text

    from refreekv.cli import plan_views

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(plan_views.plan_view(made))
    if load is not None:
        title = Text(f"Load of {trace}", style="bold")
        console.print("", title, plan_views.load_view(load[0], load[1], target, load[2]), sep="\n")
        console.print(Text(LEFT_OUT, style="dim"))
    if plot is not None:
        console.print(Text(f"Drawn: {plot}", style="dim"))


def _check_plot(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs Matplotlib; run: pip install 'refreekv[report]'")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot writes .png, .svg or .pdf, not {path.suffix or 'a file without an ending'!r}")


def _make(
    model: str,
    memory: int,
    reserve: int | None,
    context: str | None,
    output: str | None,
    concurrency: int,
    weights: str | None,
    kv: tuple[str, str],
    policy: str,
    prefill_chunk: str,
    budgets: Path | None,
    host: int,
    speeds: "Speeds",
) -> "Plan":
    """The plan, from what stands on the command line; what is wrong there is a ValueError."""
    from refreekv.core.units import parse_tokens
    from refreekv.engines.transformers.reading import parse_prompt_dtype
    from refreekv.planner import budgets as measured
    from refreekv.planner import source, widths
    from refreekv.planner.memory import Load
    from refreekv.planner.plan import make

    parsed = refreekv.policies.parse(policy)
    prompt_number = None if kv[1] == "bf16" else parse_prompt_dtype(kv[1])
    chunk = None if prefill_chunk == "all" else parse_tokens(prefill_chunk, "--prefill-chunk")
    tokens = None if context is None else parse_tokens(context, "--context")
    generated = None if output is None else parse_tokens(output, "--output")
    if weights is not None and weights not in ("bf16", "int8", "int4"):
        raise ValueError(f"--weights must be bf16, int8 or int4, got {weights!r}")
    own = None
    if budgets is not None:
        try:
            own = measured.read(json.loads(budgets.read_text(encoding="utf-8")))
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"cannot read --budgets {budgets}: {error}") from error
    found = source.find(model)
    if tokens is None:
        tokens = min(DEFAULT_CONTEXT, found.context or DEFAULT_CONTEXT)
    if generated is None:
        generated = min(DEFAULT_OUTPUT, tokens // 2)
    stored = widths.stored(parsed, kv[0], found.name)
    return make(
        found,
        memory=memory,
        load=Load(tokens, generated, concurrency),
        weights=weights,
        number=stored.expected,
        worst=stored.worst,
        stored_source=stored.source,
        optional=kv[0] == "auto",
        policy=policy,
        queries=lambda prompt: parsed.probe_plan(prompt).count,
        expected=measured.expected(parsed, found.name, own),
        reserve=reserve,
        chunk=chunk,
        prompt_number=prompt_number,
        host=host,
        speeds=speeds,
    )


def _simulate(
    made: "Plan",
    trace: Path,
    gpus: int,
    speed: "Speed",
    price: float | None,
    target: float,
    block_size: int,
    max_running: int,
) -> tuple[list["Result"], dict[str, int | None], dict[str, float | None]]:
    """Each scenario on the asked GPUs; how many it needs; what a million tokens costs on those."""
    from refreekv.planner import fleet
    from refreekv.planner import trace as traces

    try:
        with refusals():
            requests = traces.read(trace)
    except OSError as error:
        raise UserError(f"cannot read --trace {trace}: {error.strerror or one_line(error)}") from error
    active = made.counts.active(made.model.text)
    results: list[Result] = []
    needed: dict[str, int | None] = {}
    costs: dict[str, float | None] = {}
    for scenario in made.scenarios:
        if scenario.name == "worst case" and made.number is None:
            continue  # the same as the full cache
        with refusals():
            engine = fleet.engine(made.geometry, made.machine, scenario, speed, active, block_size, max_running)
        results.append(fleet.simulate(requests, engine, gpus, name=scenario.name, price=price))
        needed[scenario.name] = count = fleet.gpus_needed(requests, engine, target=target)
        if count and price is not None:
            costs[scenario.name] = fleet.simulate(
                requests, engine, count, name=scenario.name, price=price
            ).cost_per_million
    return results, needed, costs
