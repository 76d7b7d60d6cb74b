"""What fits: weights, activations and K/V of the requests, at the moment when they take most."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from refreekv.core.footprint import PLAIN_BYTES, Reader, chunked_bytes
from refreekv.core.quantisation import KVDtype
from refreekv.planner.geometry import Geometry

LONGEST = 2**24
"""Contexts beyond this are not looked for."""
MOST = 100_000
"""Requests beyond this are not looked for."""


@dataclass(frozen=True)
class Machine:
    """The memory and what is in it whatever the requests."""

    memory: int  # bytes of the GPU, or of all GPUs that share the model
    weights: int  # bytes of the weights
    # bytes for what no formula knows: the driver's context, workspaces, captured graphs, what the allocator cannot use
    reserve: int
    activation_bytes: int  # bytes that one token takes while a prompt is read
    logit_bytes: int  # bytes of one token's logits; one line for each request
    chunk: int | None = None  # prompt tokens read in one call; None: the whole prompt
    reader: Reader | None = None  # the model's, where prompts that are coded chunk by chunk are asked about

    @property
    def available(self) -> int:
        """Bytes for K/V and activations; negative if the weights do not fit."""
        return self.memory - self.weights - self.reserve


@dataclass(frozen=True)
class Scenario:
    """One way to keep K/V."""

    name: str  # what to call it
    budget: Callable[[int], float]  # prompt tokens to the share of them that is kept
    number: KVDtype | None = None  # how kept entries are stored
    compacts: bool = True  # whether the prompt is held in full before it is compacted
    # how a prompt that is read in chunks is held until its end; None: in the model's precision
    prompt_number: KVDtype | None = None


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    context: int  # tokens of a request, prompt and output
    output: int  # those that are generated; all of them stay
    requests: int = 1  # at once

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.context - self.output

    def at(self, context: int) -> "Load":
        """The same with another context: the output stays, unless it would be more than half."""
        return replace(self, context=context, output=min(self.output, context // 2))


@dataclass(frozen=True)
class Use:
    """Bytes in use at a peak."""

    kv: int  # K/V of all requests when their last token is generated
    # K/V and activations at the worse of two moments: when the last request's prompt is read beside the others, and at
    # the end
    peak: int


def use(geometry: Geometry, machine: Machine, scenario: Scenario, load: Load) -> Use:
    """What a load takes.

    Which entries of a prompt matter shows at its end. While it is read in chunks, its K/V is there in full, in the
    scenario's format or in the model's precision; see `chunked_bytes`. Read in one call, each layer is compacted when
    the next one is done, so two layers are full at a time.

    K/V in a number format is decoded in place.
    """
    budget = scenario.budget(load.prompt)
    one = geometry.kept_bytes(load.prompt, load.output, budget, scenario.number)
    before = geometry.kept_bytes(load.prompt, 0, budget, scenario.number)
    full = geometry.full_bytes(load.prompt)
    called = load.prompt if machine.chunk is None else min(machine.chunk, load.prompt)
    beside = called * machine.activation_bytes
    if called < load.prompt and scenario.prompt_number is not None:
        reader = machine.reader or Reader(machine.activation_bytes // PLAIN_BYTES)
        number, layers = scenario.prompt_number, geometry.layers
        reading, beside = int(chunked_bytes(layers, load.prompt, called, number, before, reader)), 0
    elif scenario.compacts:
        widest = max((layer.bytes(load.prompt) for layer in geometry.prunable), default=0)
        reading = full if called < load.prompt else min(full, int(before + 2 * widest))
    else:
        reading = before
    prefill = (load.requests - 1) * one + reading + beside
    decode = load.requests * (one + machine.activation_bytes)
    return Use(load.requests * one, max(prefill, decode) + load.requests * machine.logit_bytes)


def fits(geometry: Geometry, machine: Machine, scenario: Scenario, load: Load) -> bool:
    """Whether a load fits."""
    return use(geometry, machine, scenario, load).peak <= machine.available


def longest_context(
    geometry: Geometry, machine: Machine, scenario: Scenario, load: Load, limit: int | None = None
) -> int:
    """Tokens of the longest context that fits for the load's number of requests; 0 if none does.

    ``limit`` is the model's own. Budgets fall in steps with length, so a longer context may
    fit where a shorter one does not; the answer is one up to which all fit.
    """
    stop = min(limit or LONGEST, LONGEST)
    edges = sorted({min(stop, 2**power) for power in range(1, LONGEST.bit_length())})
    fitting = 0
    for low, high in zip([1, *edges], edges, strict=False):
        if fits(geometry, machine, scenario, load.at(high)):
            fitting = high
            continue
        low = last(low, high, lambda context: fits(geometry, machine, scenario, load.at(context)))
        return max(fitting, low if fits(geometry, machine, scenario, load.at(low)) else 0)
    return fitting


def most_requests(geometry: Geometry, machine: Machine, scenario: Scenario, load: Load) -> int:
    """How many requests like the load's fit at once; 0 if none does."""

    def many(count: int) -> bool:
        return fits(geometry, machine, scenario, replace(load, requests=count))

    if not many(1):
        return 0
    low, high = 1, 2
    while high < MOST and many(high):
        low, high = high, 2 * high
    return min(last(low, high, many), MOST)


def last(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The last number in ``[low, high)`` up to which something holds, found by halves; ``low`` at least."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
