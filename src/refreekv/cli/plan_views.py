"""What a plan and a simulation look like in a terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from refreekv.cli.views import header, table
from refreekv.core.units import format_size
from refreekv.planner.fleet import Result
from refreekv.planner.plan import Plan, Row


def plan_view(plan: Plan) -> RenderableType:
    """Facts, the scenarios, what to change, notes."""
    parts: list[RenderableType] = [header(_facts(plan)), "", _scenarios(plan)]
    if plan.advice:
        parts += ["", Text("It does not fit. One of these makes it fit:", style="bold yellow")]
        parts += [Text(f"  • {line}") for line in plan.advice]
    if plan.notes:
        parts += ["", *(Text(note, style="dim") for note in plan.notes)]
    return Group(*parts)


def _facts(plan: Plan) -> dict[str, str]:
    machine, load, geometry = plan.machine, plan.load, plan.geometry
    stored = geometry.stored_per_token(plan.number)
    in_format = f", {format_size(stored)} in {plan.number}" if plan.number is not None else ""
    bounded = f", and {format_size(geometry.bounded_bytes)} at most for the rest" if geometry.bounded_bytes else ""
    read = "each prompt in one call" if machine.chunk is None else f"prompts in chunks of {machine.chunk:,}"
    called = load.prompt if machine.chunk is None else min(machine.chunk, load.prompt)
    billions = plan.weights.parameters / 1e9
    facts = {
        "Model": f"{plan.model.name} ({plan.model.text.model_type}, {billions:.2f} billion parameters)",
        "K/V": geometry.describe(),
        "K/V of a token": f"{format_size(geometry.bytes_per_token)} in bf16{in_format}{bounded}",
        "Memory": f"{format_size(machine.memory)}; weights {format_size(machine.weights)} ({plan.weights.form}, "
        f"{plan.weights.source}), reserve {format_size(machine.reserve)} (assumed: driver, workspaces, graphs)",
        "Reading": f"{read}: {format_size(called * machine.activation_bytes)} of activations",
        "Asked for": f"{load.requests:,} request{'s' if load.requests > 1 else ''} at once of {load.context:,} tokens, "
        f"{load.output:,} of them generated",
        "Policy": plan.policy,
    }
    if plan.expected is not None and plan.geometry.prunable:
        facts["Expected from"] = plan.expected.source
    if plan.stored_source:
        facts["Widths"] = plan.stored_source
    if machine.host and len(plan.rows) > 1:
        facts |= {f"Host memory, {row.scenario}": _hosted(plan, row) for row in plan.rows[1:]}
    return facts


def _hosted(plan: Plan, row: Row) -> str:
    layers = len(plan.geometry.prunable)
    if not row.host_bytes:
        return "not needed"
    step = "" if row.step_seconds is None else f"; a step takes at least {1e3 * row.step_seconds:.0f} ms"
    return (
        f"codes of {row.host_reading_layers} of {layers} layers while a prompt is read, of {row.host_layers} while "
        f"tokens are generated: {format_size(row.host_bytes)} at most{step}"
    )


def _scenarios(plan: Plan) -> Table:
    headings = ["", "kept", "K/V a token", "K/V in all", "at the peak", "fits", "longest context", "at once"]
    rows = [_cells(plan, row) for row in plan.rows]
    if any(row.read != "bf16" for row in plan.rows):
        headings.insert(4, "prompt held in")
        for cells, row in zip(rows, plan.rows, strict=True):
            cells.insert(4, row.read)
    return table(headings, rows)


def _cells(plan: Plan, row: Row) -> list[str | Text]:
    limit = plan.model.context
    longest = f"{row.longest_context:,}" if row.longest_context else "none"
    if limit is not None and row.longest_context >= limit:
        longest += " (the model's)"
    return [
        row.scenario if row.stored == "bf16" else f"{row.scenario}, {row.stored}",
        f"{row.budget:.0%}",
        format_size(round(row.bytes_per_token)),
        format_size(row.kv_bytes),
        format_size(row.peak_bytes),
        Text("yes", style="green") if row.fits else Text("no", style="bold red"),
        longest,
        f"{row.requests:,}",
    ]


def load_view(
    results: Sequence[Result], needed: dict[str, int | None], target: float, costs: dict[str, float | None]
) -> Table:
    """Simulations side by side, one column each."""
    rows: dict[str, Iterable[str]] = {
        "GPUs": (f"{r.gpus:,}" for r in results),
        "Requests completed": (f"{r.completed:,}" for r in results),
    }
    if any(r.refused for r in results):
        rows["Requests that no GPU can hold"] = (f"{r.refused:,}" for r in results)
    rows |= {
        "Running at once on a GPU, mean (most)": (f"{r.mean_running:.1f} ({r.most_running:,})" for r in results),
        "Waiting for a GPU, mean": (f"{r.mean_waiting:.1f}" for r in results),
        "K/V pool in use, mean": (f"{r.pool_used:.0%}" for r in results),
        "Preemptions": (f"{r.preemptions:,}" for r in results),
        "First token, p50 / p90 / p99": (_seconds(r.first_token) for r in results),
        "Whole answer, p50 / p90 / p99": (_seconds(r.latency) for r in results),
        "Between tokens, p50 / p90 / p99": (_seconds(r.between_tokens) for r in results),
        "Output tokens a second, all GPUs": (f"{r.output_tokens_per_second:,.0f}" for r in results),
    }
    if any(r.cost_per_million is not None for r in results):
        rows["A million tokens on these GPUs"] = (_money(r.cost_per_million) for r in results)
    counts = (needed[r.scenario] for r in results)
    rows[f"GPUs for p90 first token ≤ {target:g} s"] = (
        f"{n:,}" if n else "more than there are requests" for n in counts
    )
    if costs:
        rows["A million tokens on those"] = (_money(costs.get(r.scenario)) for r in results)
    return table(("", *(r.scenario for r in results)), [(name, *cells) for name, cells in rows.items()])


def _seconds(values: dict[str, float]) -> str:
    return " / ".join(f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s" for value in values.values())


def _money(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3f}"
