"""A plan: what a model takes on a machine, in three scenarios, and what to change if it does not fit."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from refreekv.core.footprint import Mix, Reader, activation_elements
from refreekv.core.quantisation import PROMPT_DTYPE, PROMPT_DTYPES, KVDtype
from refreekv.core.units import format_size
from refreekv.planner.budgets import Expected
from refreekv.planner.geometry import Geometry, measure
from refreekv.planner.memory import Load, Machine, Scenario, longest_context, most_requests, use
from refreekv.planner.source import Model
from refreekv.planner.weights import BITS, Counts, Weights, count, packed_matrices, weigh
from refreekv.policies.base import AUTO

RESERVE = 3 * 2**28
"""0.75 GiB for a CUDA context with the kernels in it, which took .69 to .77 on an H100 (docs/one-gpu.md)."""
PIECES = 100
"""One part in so many of a GPU's memory is in pieces that nothing fits into."""
CHUNK = 2048
"""Prompt tokens that serving engines read in one step."""


@dataclass(frozen=True)
class Speeds:
    """Bytes a second that memories give in practice."""

    memory: float  # the GPU's own
    bus: float  # the host's, over the bus

    def step(self, here: float, there: float) -> float:
        """Seconds of a step that reads so many bytes of each: they come beside each other."""
        return max(here / self.memory, there / self.bus)


@dataclass(frozen=True)
class Row:
    """One scenario."""

    scenario: str  # ``"full cache"``, ``"worst case"`` (the policy keeps everything) or ``"expected"``
    stored: str  # number format of kept K/V
    budget: float  # share of the prompt that is kept
    bytes_per_token: float  # K/V bytes of one more prompt token, as kept
    kv_bytes: int  # K/V of all requests when they are complete
    peak_bytes: int  # everything at the worst moment, weights and reserve included
    fits: bool  # whether that is in the machine's memory
    longest_context: int  # for the asked number of requests
    requests: int  # that fit at once, of the asked context
    # layers whose codes are in host memory: while a prompt is read, and while tokens are generated
    host_reading_layers: int = 0
    host_layers: int = 0
    host_bytes: int = 0  # of host memory at most
    # a step at least: all that it reads, of the GPU's memory and over the bus beside it; None: nobody said how fast
    step_seconds: float | None = None
    read: str = "bf16"  # how the prompt is held until its end
    # whether matrices of 4 bits are unpacked some rows at a time while it is read, as memory is short
    sliced: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that `make` worked out."""

    model: Model
    geometry: Geometry
    weights: Weights
    counts: Counts
    machine: Machine
    load: Load
    policy: str
    number: KVDtype | Mix | None
    expected: Expected | None
    scenarios: tuple[Scenario, ...]
    rows: tuple[Row, ...]
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    stored_source: str = ""  # where the shares of several number formats are from

    def to_dict(self) -> dict[str, Any]:
        """As plain types, ready for JSON."""
        geometry = self.geometry
        return {
            "model": self.model.name,
            "model_type": self.model.text.model_type,
            "model_context": self.model.context,
            "kv": {
                "layers": geometry.describe(),
                "bytes_per_token": geometry.bytes_per_token,
                "stored_bytes_per_token": geometry.stored_per_token(self.number),
                "bounded_bytes": geometry.bounded_bytes,
                "dtype": "bf16" if self.number is None else str(self.number),
                "shares": list(self.number.shares) if isinstance(self.number, Mix) else None,
                "shares_from": self.stored_source or None,
            },
            "weights": asdict(self.weights),
            "machine": asdict(self.machine),
            "load": {**asdict(self.load), "prompt": self.load.prompt},
            "policy": self.policy,
            "expected_from": None if self.expected is None else self.expected.source,
            "scenarios": [asdict(row) for row in self.rows],
            "advice": list(self.advice),
            "notes": list(self.notes),
        }


def reserve_of(memory: int) -> int:
    """Bytes of a GPU for the driver, workspaces, captured graphs and fragmentation: an assumption."""
    return RESERVE + memory // PIECES


def make(
    model: Model,
    *,
    memory: int,
    load: Load,
    weights: str | None = None,
    number: KVDtype | Mix | None = None,
    worst: KVDtype | Mix | None = None,
    stored_source: str = "",
    optional: bool = False,
    policy: str = "",
    expected: Expected | None = None,
    reserve: int | None = None,
    chunk: int | None = CHUNK,
    prompt_number: KVDtype | str | None = AUTO,
    host: int = 0,
    speeds: Speeds | None = None,
    queries: Callable[[int], int] = lambda _: 0,
) -> Plan:
    """Work out what a model takes.

    Parameters
    ----------
    model : Model
        From `source.find`.
    memory : int
        Bytes of the GPU.
    load : Load
        What is asked for.
    weights : str, optional
        ``"bf16"``, ``"int8"`` or ``"int4"``; None: as the checkpoint is.
    number : KVDtype or Mix, optional
        How kept K/V is stored.
    worst : KVDtype or Mix, optional
        How it is stored where the policy keeps everything; as ``number`` if nobody says.
    stored_source : str
        Where the shares of a `Mix` are from, in words.
    optional : bool
        Whether entries that cannot be coded are stored as they are, since nobody asked for codes by name.
    policy : str
        Name of the policy, for the record.
    expected : Expected, optional
        What it keeps; None leaves that row out.
    reserve : int, optional
        Bytes for what no formula knows; None: `reserve_of` the memory.
    chunk : int or None
        Prompt tokens in one call; None: all.
    prompt_number : KVDtype, "auto" or None
        How a prompt that is read in chunks is held until its end; "auto": in the first of `PROMPT_DTYPES` in which it
        fits; None: in the model's precision.
    host : int
        Bytes of host memory for codes that do not fit on the GPU.
    queries : callable
        Prompt tokens to the queries that each layer holds for its policy while they are read.
    speeds : Speeds, optional
        What memories give, to say what a step takes.

    Raises
    ------
    ValueError
        A context beyond the model's, no tokens for a prompt in it, or unknown weights.
    ModelError
        A model that cannot be planned for.
    """
    if model.context is not None and load.context > model.context:
        raise ValueError(
            f"a context of {load.context:,} tokens is more than the {model.context:,} that {model.name} is made for"
        )
    if not 0 <= load.output < load.context:
        raise ValueError(f"an output of {load.output:,} tokens leaves no prompt in a context of {load.context:,}")
    geometry = measure(model)
    counts = count(model)
    weighed = weigh(model, weights, counts)
    machine = Machine(
        memory,
        weighed.bytes,
        reserve_of(memory) if reserve is None else reserve,
        activation_bytes=2 * activation_elements(model.text),
        logit_bytes=4 * int(model.text.vocab_size),
        chunk=chunk,
        reader=Reader.of(model.text, packed_matrices(model, weighed, counts)),
        host=host,
    )
    codable = all(layer.takes(PROMPT_DTYPE) for layer in geometry.prunable)
    if optional and number is not None and not codable and not host:
        number = worst = None
        stored_source = "K/V stays in 16 bits: number formats take heads of a multiple of 16 elements"
    if host and number is None:
        raise ValueError("host memory holds codes, and K/V is to be stored as it is computed: choose --kv auto or int4")
    scenarios = [Scenario("full cache", lambda _: 1.0, compacts=False)]
    if geometry.prunable:
        held, narrower = (PROMPT_DTYPE, PROMPT_DTYPES[1:]) if isinstance(prompt_number, str) else (prompt_number, ())
        if isinstance(prompt_number, str) and not codable:
            held, narrower = None, ()
        ours = functools.partial(Scenario, prompt_number=held, narrower=narrower, queries=queries, may_slice=True)
        at_worst = number if worst is None else worst
        scenarios.append(ours("worst case", lambda _: 1.0, at_worst, compacts=number is not None))
        if expected is not None:
            scenarios.append(ours("expected", expected.budget, number))
    rows = tuple(_row(geometry, machine, scenario, load, model.context, speeds) for scenario in scenarios)
    return Plan(
        model,
        geometry,
        weighed,
        counts,
        machine,
        load,
        policy,
        number,
        expected,
        tuple(scenarios),
        rows,
        tuple(_advice(model, counts, geometry, machine, scenarios[-1], load, rows)) if not rows[-1].fits else (),
        tuple(_notes(geometry, expected, load, number, rows, isinstance(prompt_number, str))),
        stored_source,
    )


def _row(
    geometry: Geometry, machine: Machine, scenario: Scenario, load: Load, limit: int | None, speeds: Speeds | None
) -> Row:
    taken = use(geometry, machine, scenario, load)
    budget = scenario.budget(load.prompt)
    latent = sum(2 * layer.elements for layer in geometry.layers if layer.kind == "latent")
    per_token = latent + budget * (geometry.stored_per_token(scenario.number) - latent)
    return Row(
        scenario.name,
        "bf16" if scenario.number is None else str(scenario.number),
        budget if geometry.prunable else 1.0,
        per_token,
        taken.kv,
        machine.weights + machine.reserve + taken.peak,
        taken.peak <= machine.available,
        longest_context(geometry, machine, scenario, load, limit),
        most_requests(geometry, machine, scenario, load),
        taken.reading_layers,
        taken.layers,
        taken.most_host,
        None if speeds is None else speeds.step(machine.weights + taken.kv - taken.host, taken.host),
        "bf16" if taken.read is None else str(taken.read),
        taken.sliced,
    )


def _advice(
    model: Model,
    counts: Counts,
    geometry: Geometry,
    machine: Machine,
    scenario: Scenario,
    load: Load,
    rows: Sequence[Row],
) -> list[str]:
    """What would make the last scenario fit, the smallest change first."""
    advice: list[str] = []

    def fits(machine: Machine = machine, scenario: Scenario = scenario) -> bool:
        return use(geometry, machine, scenario, load).peak <= machine.available

    row = rows[-1]
    if machine.chunk is None and fits(replace(machine, chunk=CHUNK)):
        advice.append(f"read prompts in chunks: --prefill-chunk {CHUNK} (generate: prefill_chunk_size={CHUNK})")
    if machine.chunk is not None and fits(replace(machine, chunk=None)):
        advice.append("read each prompt in one call: --prefill-chunk all")
    kinds = [KVDtype(kind) for kind in ("int8", "int4")]
    kinds = [kind for kind in kinds if all(layer.takes(kind) for layer in geometry.prunable)]
    kinds = kinds if geometry.prunable and scenario.number is None else []
    sizes = {form: weigh(model, form, counts).bytes for form in BITS}
    sizes = {form: size for form, size in sizes.items() if size < machine.weights}
    stored = next((kind for kind in kinds if fits(scenario=_stored(scenario, kind))), None)
    loaded = next((form for form, size in sizes.items() if fits(replace(machine, weights=size))), None)
    if stored is not None:
        advice.append(_kv_advice(stored))
    if loaded is not None:
        advice.append(_weight_advice(loaded, sizes[loaded]))
    if stored is None and loaded is None:
        pairs = ((form, kind) for form in sizes for kind in kinds)
        both = (pair for pair in pairs if fits(replace(machine, weights=sizes[pair[0]]), _stored(scenario, pair[1])))
        for form, kind in itertools.islice(both, 1):
            advice.append(f"{_weight_advice(form, sizes[form])}, and {_kv_advice(kind)}")
    if not machine.host and scenario.number is not None:
        there = use(geometry, replace(machine, host=2**50), scenario, load)
        if there.peak <= machine.available:
            count, size = max(there.layers, there.reading_layers), format_size(there.most_host)
            advice.append(
                f"hold codes of {count} layers in {size} of host memory: --host-memory auto (compress(model, "
                "host_memory='auto'))"
            )
    if row.requests >= 1:
        advice.append(f"at most {row.requests:,} of these requests at once: --concurrency {row.requests}")
    if row.longest_context >= 1:
        advice.append(f"a context of at most {row.longest_context:,} tokens: --context {row.longest_context}")
    advice.append(f"a machine with {format_size(row.peak_bytes)}: --vram {-(-row.peak_bytes // 2**30)}GiB")
    return advice


def _stored(scenario: Scenario, number: KVDtype | Mix | None) -> Scenario:
    return replace(scenario, number=number, compacts=True)


def _kv_advice(number: KVDtype | None) -> str:
    return f"store K/V in {number}: --kv {number} (compress(model, kv_dtype='{number}'))"


def _weight_advice(form: str, size: int) -> str:
    return f"load the weights in {form}: --weights {form} ({format_size(size)})"


def _notes(
    geometry: Geometry,
    expected: Expected | None,
    load: Load,
    number: KVDtype | Mix | None,
    rows: Sequence[Row],
    auto: bool,
) -> list[str]:
    notes = []
    kinds = {layer.kind for layer in geometry.layers}
    if "latent" in kinds:
        notes.append("Latent attention (MLA) stores one small vector for each token; pruning does not apply to it.")
    if "window" in kinds:
        notes.append("Window layers hold a bounded number of tokens; only full-attention layers are pruned.")
    if "state" in kinds:
        notes.append("Layers with a fixed state take the same whatever the length; they are not pruned.")
    if not geometry.prunable:
        notes.append("This model has no layer that refreekv prunes: the full cache is all there is.")
    if number is not None and kinds != {"full"}:
        notes.append(f"K/V of other than full-attention layers is not stored in {number}.")
    if geometry.prunable and expected is None:
        notes.append(
            "Nothing is known about what this policy keeps, so there is no expected row: "
            "measure it with refreekv eval and benchmarks/budgets.py."
        )
    if expected is not None and expected.is_extrapolated(load.prompt):
        notes.append(f"No prompt of {load.prompt:,} tokens was measured: the nearest measured length speaks for it.")
    if expected is not None and expected.measured:
        notes.append(
            "Expected is what was measured on other prompts and maybe other models; the worst case is the limit."
        )
    narrow = [row for row in rows if row.read not in ("bf16", str(PROMPT_DTYPE))]
    if auto and narrow:
        notes.append(
            f"Until its end the prompt is held in {narrow[-1].read}, as it does not fit in {PROMPT_DTYPE}: that loses "
            "about as much again as the default does."
        )
    if rows[-1].sliced and rows[-1].fits:
        notes.append(
            "While the prompt is read, matrices of 4 bits are unpacked some rows at a time, as whole ones do not fit: "
            "that takes longer."
        )
    if len(rows) > 1 and rows[-1].longest_context <= rows[0].longest_context and load.requests == 1:
        notes.append(
            "One request alone: until a prompt ends nothing of it is evicted, so pruning makes no longer prompt fit "
            "than it is held in until then (--prompt-kv, --prefill-chunk); more requests and turns fit."
        )
    return notes
