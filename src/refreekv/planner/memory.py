"""What fits: weights, activations and K/V of the requests, at the moment when they take most."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from refreekv.core.footprint import PLAIN_BYTES, Mix, Reader, called_bytes, chunked_bytes, least_hosted
from refreekv.core.quantisation import KVDtype
from refreekv.planner.geometry import Geometry

LONGEST = 2**24
"""Contexts beyond this are not looked for."""
MOST = 100_000
"""Requests beyond this are not looked for."""

SPARE = 2**28
"""Bytes of the GPU that stay free beyond the reserve where codes can go to host memory instead."""


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
    reader: Reader | None = None  # the model's; None: nobody asks what attention takes beside its entries
    host: int = 0  # bytes of host memory for codes that do not fit

    @property
    def available(self) -> int:
        """Bytes for K/V and activations; negative if the weights do not fit."""
        return self.memory - self.weights - self.reserve


@dataclass(frozen=True)
class Scenario:
    """One way to keep K/V."""

    name: str  # what to call it
    budget: Callable[[int], float]  # prompt tokens to the share of them that is kept
    number: KVDtype | Mix | None = None  # how kept entries are stored
    compacts: bool = True  # whether the prompt is held in full before it is compacted
    # how a prompt that is read in chunks is held until its end; None: in the model's precision
    prompt_number: KVDtype | None = None
    narrower: tuple[KVDtype, ...] = ()  # formats that are tried one after the other where it does not fit in that
    queries: Callable[[int], int] = lambda _: 0  # prompt tokens to the queries that a layer holds until their end
    # whether matrices of 4 bits may be unpacked some rows at a time where whole ones do not fit
    may_slice: bool = False


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
    # layers whose codes are in host memory, while a prompt is read and while tokens are generated
    reading_layers: int = 0
    layers: int = 0
    host: int = 0  # bytes of what is there while tokens are generated, of all requests
    most_host: int = 0  # and at most
    read: KVDtype | None = None  # how the prompt is held until its end
    sliced: bool = False  # whether matrices of 4 bits are unpacked some rows at a time


def use(geometry: Geometry, machine: Machine, scenario: Scenario, load: Load) -> Use:
    """What a load takes.

    Which entries of a prompt matter shows at its end. While it is read in chunks, its K/V is there in full, in the
    scenario's format or in the model's precision; see `chunked_bytes`. Read in one call, each layer is compacted when
    the next one is done, so two layers are full at a time.

    K/V in a number format is decoded in place. Codes that do not fit are in host memory, if the machine has some for
    them: those of as many full-attention layers as it takes, and two layers' pass through the device. Where that does
    not do, matrices of 4 bits are unpacked some rows at a time, and then the prompt is held in narrower formats until
    its end.
    """
    called = load.prompt if machine.chunk is None else min(machine.chunk, load.prompt)
    reader = machine.reader or Reader(machine.activation_bytes // PLAIN_BYTES)
    ways = reader.ways if scenario.may_slice else (reader,)
    formats = (scenario.prompt_number, *scenario.narrower) if called < load.prompt else (None,)
    for number, way in itertools.product(formats, ways):
        taken = _use(geometry, machine, scenario, load, called, number, way)
        if taken.peak <= machine.available:
            break
    return taken


def _use(
    geometry: Geometry,
    machine: Machine,
    scenario: Scenario,
    load: Load,
    called: int,
    read: KVDtype | None,
    reader: Reader,
) -> Use:
    """What a load takes whose prompt is read ``called`` tokens at a time and held in a format until its end."""
    budget, number = scenario.budget(load.prompt), scenario.number
    if isinstance(number, Mix):
        number = number.at_most(read)
    one = geometry.kept_bytes(load.prompt, load.output, budget, number)
    before = geometry.kept_bytes(load.prompt, 0, budget, number)
    kept_codes = _codes(geometry, number, budget * load.prompt)
    read_codes = max((layer.unfinished_lines(load.prompt, read) for layer in set(geometry.layers)), default=0)
    logits = load.requests * machine.logit_bytes
    queries = scenario.queries(load.prompt)

    def at_the_end(hosted: int) -> float:
        staged = min(hosted, 2) * load.requests * kept_codes
        own = load.requests * (one - hosted * kept_codes + machine.activation_bytes)
        return own + staged + logits

    def while_reading(hosted: int) -> float:
        beside = reader.behind(called, PLAIN_BYTES)
        if read is not None:
            reading = chunked_bytes(
                geometry.layers, load.prompt, called, read, before, reader, hosted=hosted, queries=queries
            )
            beside = 0
        elif scenario.compacts:
            full = geometry.full_bytes(load.prompt)
            widest = max((layer.bytes(load.prompt) for layer in geometry.prunable), default=0)
            reading = full if called < load.prompt else min(full, int(before + 2 * widest))
        else:
            reading = before
        if read is None and called < load.prompt and machine.reader is not None:
            beside = called_bytes(reader, PLAIN_BYTES, called, load.prompt)
        return (load.requests - 1) * (one - layers * kept_codes) + int(reading) + beside + logits

    def most(codes: float, room: float) -> int:
        return min(len(geometry.prunable), int(room // codes)) if codes else 0

    room = machine.available - (SPARE if machine.host else 0)
    layers = least_hosted(lambda hosted: at_the_end(hosted) <= room, most(load.requests * kept_codes, machine.host))
    others = (load.requests - 1) * layers * kept_codes
    reading_layers = least_hosted(lambda hosted: while_reading(hosted) <= room, most(read_codes, machine.host - others))
    host = int(load.requests * layers * kept_codes)
    return Use(
        load.requests * one,
        int(max(while_reading(reading_layers), at_the_end(layers))),
        reading_layers,
        layers,
        host,
        max(host, int(others + reading_layers * read_codes)),
        read,
        reader.is_sliced,
    )


def _codes(geometry: Geometry, number: KVDtype | Mix | None, entries: float) -> float:
    """Bytes of the codes of one full-attention layer that keeps so many entries: the largest one's."""
    if number is None:
        return 0
    full = (layer for layer in set(geometry.layers) if layer.kind == "full")
    return max((layer.line_bytes(number) * number.coded(entries) for layer in full if layer.takes(number)), default=0.0)


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
