"""Memory against context, as a picture."""

from pathlib import Path
from typing import Any

from refreekv.planner.memory import use
from refreekv.planner.plan import Plan

POINTS = 160
_COLOURS = {"full cache": "#4c5f78", "worst case": "#c98a2b", "expected": "#1f8a70"}


def draw(plan: Plan, path: Path) -> None:
    """Write a PNG or SVG: what each scenario takes at every context, beside the memory there is.

    Raises
    ------
    ImportError
        Matplotlib is not installed.
    OSError, ValueError
        The file cannot be written, or its name has no ending that matplotlib knows.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    gib = 2**30
    contexts = _contexts(plan)
    fixed = (plan.machine.weights + plan.machine.reserve) / gib
    axes.fill_between(contexts, 0, plan.machine.weights / gib, color="#d9dee5", label=f"weights ({plan.weights.form})")
    axes.fill_between(contexts, plan.machine.weights / gib, fixed, color="#eceff3", label="reserve")
    highest = fixed
    for scenario in plan.scenarios:
        taken = [
            fixed + use(plan.geometry, plan.machine, scenario, plan.load.at(context)).peak / gib for context in contexts
        ]
        highest = max(highest, *taken)
        same = scenario.name == "worst case" and plan.number is None
        axes.plot(
            contexts,
            taken,
            color=_COLOURS[scenario.name],
            linewidth=2,
            linestyle=(0, (4, 3)) if same else "-",
            label=_label(plan, scenario.name),
        )
    memory = plan.machine.memory / gib
    axes.axhline(memory, color="#b3261e", linewidth=1.4)
    axes.annotate(
        f"{memory:.1f} GiB",
        (contexts[0], memory),
        xytext=(2, 4),
        textcoords="offset points",
        color="#b3261e",
        fontsize=9,
    )
    axes.axvline(plan.load.context, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    _name_contexts(axes, contexts)
    axes.set_xlim(contexts[0], contexts[-1])
    # Space for the legend above what matters; lines far beyond the memory may leave the picture.
    axes.set_ylim(0, 1.35 * max(memory, min(highest, 1.6 * memory), fixed))
    requests = plan.load.requests
    axes.set_xlabel(f"context of each request, tokens ({plan.load.output:,} of them generated)")
    axes.set_ylabel("GiB at the peak")
    axes.set_title(
        f"{plan.model.name}: memory for {requests} request{'s' if requests > 1 else ''} at once",
        loc="left",
        fontsize=11,
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    figure.savefig(path)


def _contexts(plan: Plan) -> list[int]:
    """Contexts to draw, evenly spaced on a logarithmic axis; the asked one is among them."""
    last = plan.model.context or max(4 * plan.load.context, 32768)
    longest = max((row.longest_context for row in plan.rows), default=0)
    last = max(min(last, max(4 * plan.load.context, 2 * longest, 8192)), plan.load.context)
    first = min(512, plan.load.context)
    spread = {round(first * (last / first) ** (index / (POINTS - 1))) for index in range(POINTS)}
    return sorted(spread | {plan.load.context})


def _name_contexts(axes: Any, contexts: list[int]) -> None:
    ticks = [2**power for power in range(4, 26) if contexts[0] <= 2**power <= contexts[-1]]
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
    axes.minorticks_off()


def _label(plan: Plan, name: str) -> str:
    if name == "full cache":
        return "full cache"
    stored = f", {plan.number} K/V" if plan.number is not None else ""
    if name == "worst case":
        return f"worst case: nothing evicted{stored}"
    return f"expected with {plan.policy}{stored}"
