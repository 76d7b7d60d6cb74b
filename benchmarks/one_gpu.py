"""How long a prompt one GPU of some size reads and answers: the full cache, ours, and what `plan` forecasts.

    python benchmarks/one_gpu.py --rows all --out rows.jsonl                  # the whole table, on CUDA
    python benchmarks/one_gpu.py --rows llama-3-8b:int4:8GB --kv int4         # one row of it
    python benchmarks/one_gpu.py --rows llama-3-70b:int4:48GB --at 32768      # no search: time and memory there
    python benchmarks/one_gpu.py --rows llama-3-8b:int4:8GB --ours "@auto;@int4" --at "7000;9000,9500;12000"
    python benchmarks/one_gpu.py --rows llama-3-70b:int4:48GB --ours "adaptive@auto;adaptive@auto@auto@auto"
    python benchmarks/one_gpu.py --table rows.jsonl                           # as a table

A row is SHAPE:WEIGHTS:MEMORY, of a shape in `random_models.SHAPES` and weights of its `FORMS` (int4: bitsandbytes' NF4,
int4-blocks: our own). Weights are random and made directly in the form that they have, so that what a policy keeps of
such a prompt says nothing: give one that keeps a fixed share, the share that real models keep at the fidelity in
question, or `adaptive-as-measured`, which costs what `adaptive` does and keeps what that kept of real text.

    limit     the process may hold MEMORY, the driver's context included (torch.cuda.set_per_process_memory_fraction)
    longest   the longest prompt that is read in chunks and answered with --new tokens, found by bisection; the
              first try is what `plan` forecasts
    chunk     the prompt is read in --chunk tokens at a time, or in a half, a quarter … of it, down to 256, where `plan`
              says that memory does not suffice for more; of both kinds alike. Of ours, weights of 4 bits are unpacked
              some rows of a matrix at a time where `plan` says that whole matrices do not fit with that chunk, as
              `generate` decides by itself
    peak      the most that tensors held and the driver at the time, beside `plan`'s forecast for that very length. What
              the allocator reserves grows up to a limit whatever is needed, and is listed beside it. The driver takes
              more and more and gives nothing back: it is asked behind the last chunk but one, at the answer's first
              token, and at its end, and each time the most that tensors held since is added to it
    floor     (weights that a token reads + what the cache holds) / bandwidth of a copy on the same device; or what it
              holds in host memory / bandwidth of a copy from there, if that is more

Kinds: ``full`` is transformers' DynamicCache, decoded by transformers; ``ours`` a ReFreeKVCache of --policy, --kv,
--prompt and --host, or one for each of --ours: POLICY@KV@PROMPT@HOST, what is left out is as these options say.
On a CPU, where no limit can be set, weights and cache are counted instead: for tests.
"""

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import refreekv
from as_measured import AsMeasured, expected
from as_measured import parse as parse_policy
from decode import Stamps
from devices import bus_bandwidth, copy_bandwidth
from random_models import FORMS, SHAPES, build, form_of, weight_bytes
from refreekv.core.footprint import Mix
from refreekv.core.quantisation import PROMPT_DTYPE, KVDtype
from refreekv.core.units import format_size, parse_bytes
from refreekv.engines.transformers.attachment import attached
from refreekv.engines.transformers.copy_scores import copy_scores
from refreekv.engines.transformers.host_tier import parse_host_memory
from refreekv.engines.transformers.key_codes import key_codes
from refreekv.engines.transformers.naming import NAME, cache_argument
from refreekv.engines.transformers.reading import parse_prompt_dtype
from refreekv.planner import widths
from refreekv.planner.memory import Load
from refreekv.planner.plan import Row as Scenario
from refreekv.planner.plan import make
from refreekv.planner.source import Model
from refreekv.policies.base import AUTO, ladder_for

TABLE = ("llama-3-70b:int4:48GB", "qwen2.5-32b:int4:24GB", "llama-3-8b:int4:8GB", "llama-3-8b:bf16:24GB")
KINDS = ("full", "ours")
STEP = 64
"""Lengths are multiples of this."""


@dataclass(frozen=True)
class Row:
    """What is asked of one shape."""

    shape: str
    weights: str
    limit: int

    @classmethod
    def parse(cls, text: str) -> "Row":
        """``"llama-3-8b:int4:8GB"``; ValueError for anything else."""
        parts = text.split(":")
        if len(parts) != 3 or parts[0] not in SHAPES or parts[1] not in FORMS:
            raise ValueError(
                f"a row is SHAPE:WEIGHTS:MEMORY, with a shape of {', '.join(SHAPES)} and weights of "
                f"{', '.join(FORMS)}; got {text!r}"
            )
        return cls(parts[0], parts[1], parse_bytes(parts[2]))


@dataclass
class Try:
    """One prompt of a length: whether it was read and answered, and what that took."""

    length: int
    fits: bool
    seconds: float
    peak: int = 0  # the most that tensors held and the driver, at a time
    allocated: int = 0  # of the peak what tensors held
    reserved: int = 0  # what the allocator had at most: blocks that it could not use, too
    before: int = 0  # what tensors held before it: the weights, and what an earlier try left
    peak_read: int = 0  # what tensors held at most until all but the last chunk was read
    peak_prompt: int = 0  # until all of it was
    driver_read: int = 0  # what the driver held when all but the last chunk was read
    driver_prompt: int = 0  # and when all of it was: before a step is captured
    chunk: int = 0
    sliced: bool = False  # whether weights of 4 bits were unpacked some rows of a matrix at a time
    prefill_seconds: float = 0.0
    token_seconds: float = 0.0
    cache_bytes: int = 0
    host_bytes: int = 0  # of the cache, in host memory
    host_layers: int = 0
    kept_share: float = 1.0


@dataclass
class Result:
    """A row with one kind of cache."""

    shape: str
    weights: str
    limit: int
    kind: str
    policy: str
    kv: str
    prompt: str
    chunk: int
    new: int
    about: str
    weight_bytes: int
    host: str | None = None
    constants_seconds: float = 0.0  # what is measured once of a model: copy scores and codes for its keys
    longest: int = 0
    forecast_longest: int | None = None
    forecast_peak: int | None = None
    forecast_host: int | None = None
    floor_seconds: float | None = None
    at: Try | None = None
    tries: list[Try] = field(default_factory=list)


class Memory:
    """The memory of a device, less than there is of it."""

    def __init__(self, device: torch.device, limit: int):
        self.device, self.limit = device, limit
        self.context = 0
        if device.type == "cuda":
            torch.zeros(1, device=device)
            free, total = torch.cuda.mem_get_info(device)
            self.context = total - free - torch.cuda.memory_reserved(device)
        self._counted = 0
        self._noted = self._noted_allocated = self._noted_reserved = 0  # of parts that have ended
        self._limit_tensors()

    def _limit_tensors(self) -> None:
        """What the driver holds by now is part of a smaller card's memory, too."""
        if self.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.device)[1]
            share = min(1.0, (self.limit - self.driver) / total)
            torch.cuda.set_per_process_memory_fraction(share, self.device)

    @property
    def driver(self) -> int:
        """Bytes of the device that the driver holds for this process by now: kernels that spill make it grow."""
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return max(self.context, total - free - torch.cuda.memory_reserved(self.device))

    @property
    def held(self) -> int:
        """Bytes that tensors hold now."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else self._counted

    def begin(self) -> None:
        """Forget the peak."""
        self._counted = self._noted = self._noted_allocated = self._noted_reserved = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._limit_tensors()

    def count(self, held: int) -> None:
        """On a CPU: so many bytes are held now; OutOfMemoryError past the limit."""
        self._counted = max(self._counted, held)
        if self.device.type != "cuda" and held > self.limit:
            raise torch.OutOfMemoryError(f"{held} bytes of {self.limit}")

    def note(self) -> None:
        """End a part: what the driver takes from now on was not there when tensors held most in it."""
        self._noted, self._noted_allocated, self._noted_reserved = self.peak, self.allocated, self.reserved
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak(self) -> int:
        """The most that was held at a time, by tensors and by the driver."""
        return max(self._noted, self._part[0] + self.driver)

    @property
    def reserved(self) -> int:
        """The most that the allocator had."""
        return max(self._noted_reserved, self._part[1])

    @property
    def allocated(self) -> int:
        """The most that tensors held."""
        return max(self._noted_allocated, self._part[0])

    @property
    def _part(self) -> tuple[int, int]:
        """The most that tensors held, and that the allocator had, since the last part ended."""
        if self.device.type != "cuda":
            return self._counted, self._counted
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def close(self) -> None:
        """Take the limit away."""
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


@dataclass(frozen=True)
class Variant:
    """How a cache of ours is made."""

    policy: str
    kv: str
    prompt: str
    host: str | None

    @classmethod
    def parse(cls, text: str, default: "Variant") -> "Variant":
        """``"adaptive@auto@int8@8GiB"``: what is left out is the default's; ValueError for what cannot be."""
        parts = text.split("@")
        if len(parts) > 4:
            raise ValueError(f"a cache is POLICY@KV@PROMPT@HOST, got {text!r}")
        given = [part or None for part in (*parts, *[""] * (4 - len(parts)))]
        found = cls(
            given[0] or default.policy, given[1] or default.kv, given[2] or default.prompt, given[3] or default.host
        )
        ladder_for(parse_policy(found.policy), None if found.kv == "bf16" else found.kv)
        parse_prompt_dtype(none_for_16(found.prompt))
        parse_host_memory(found.host)
        return found

    @property
    def stored(self) -> widths.Stored:
        """How `plan` says that it stores what it keeps."""
        policy = parse_policy(self.policy)
        found = widths.stored(policy, self.kv, "")
        if isinstance(policy, AsMeasured) and isinstance(found.expected, Mix):
            return replace(found, expected=Mix(found.expected.ladder, policy.shares))
        return found

    def cache(self, model: Any) -> refreekv.ReFreeKVCache:
        """A cache."""
        return refreekv.ReFreeKVCache(
            model,
            parse_policy(self.policy),
            kv_dtype=None if self.kv == "bf16" else self.kv,
            prompt_dtype=none_for_16(self.prompt),
            host_memory=self.host,
        )


class FirstToken(LogitsProcessor):
    """Notes when a prompt was read, and before a step is captured, what memory that took."""

    def __init__(self, memory: Memory, tried: Try):
        self._memory, self._tried, self._noted = memory, tried, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note it once and change nothing."""
        if not self._noted:
            self._noted = True
            self._memory.note()
            self._tried.driver_prompt, self._tried.peak_prompt = self._memory.driver, self._memory.allocated
        return scores


class Bench:
    """Reads and answers prompts with one model under one limit."""

    def __init__(self, model: Any, memory: Memory, *, variant: Variant, chunk: int, new: int):
        self.model, self.memory, self.variant = model, memory, variant
        self.chunk, self.sliced, self._new = chunk, False, new
        self._weights = weight_bytes(model)

    def cache(self, kind: str) -> Any:
        """A cache of a kind."""
        return DynamicCache(config=self.model.config) if kind == "full" else self.variant.cache(self.model)

    def measure_constants(self) -> float:
        """Measure what is measured once of a model, as the first prompt would; the seconds that it took."""
        cache, begin = self.variant.cache(self.model), time.perf_counter()
        if cache.state.codes_wanted:
            key_codes(self.model)
        if cache.policy.reads_copy_scores:
            copy_scores(self.model)
        if self.memory.device.type == "cuda":
            torch.cuda.synchronize(self.memory.device)
        return time.perf_counter() - begin

    def attempt(self, kind: str, length: int) -> Try:
        """Read a prompt of a length and answer it, or run out of memory."""
        self.memory.begin()
        begin = time.perf_counter()
        tried = Try(length, False, 0.0, before=self.memory.held, chunk=self.chunk, sliced=self.sliced)
        try:
            with torch.inference_mode():
                self._run(kind, length, tried)
            tried.fits = True
        except torch.OutOfMemoryError as error:
            # Their frames hold the cache.
            release(error)
        if not tried.fits:
            gc.collect()
        tried.peak, tried.allocated, tried.reserved = self.memory.peak, self.memory.allocated, self.memory.reserved
        self.memory.begin()
        tried.seconds = time.perf_counter() - begin
        return tried

    def _run(self, kind: str, length: int, tried: Try) -> None:
        device = self.memory.device
        cache = self.cache(kind)
        if kind != "full":
            cache.state.sliced = self.sliced
        generator = torch.Generator(device).manual_seed(length)
        ids = torch.randint(1, self.model.config.vocab_size, (1, length), generator=generator, device=device)
        options = cache_argument(self.model.forward, cache)
        begin = time.perf_counter()
        for start in range(0, length - self.chunk, self.chunk):
            with contextlib.nullcontext() if kind == "full" else cache.prompt_until(length):
                self.model(ids[:, start : start + self.chunk], use_cache=True, logits_to_keep=1, **options)
            self.memory.count(self._weights + held(cache))
        self.memory.note()
        tried.driver_read, tried.peak_read = self.memory.driver, self.memory.allocated
        stamps = Stamps()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._new, do_sample=False,
            logits_processor=LogitsProcessorList([stamps, FirstToken(self.memory, tried)]), **{NAME: cache},
        )  # fmt: skip
        self.memory.count(self._weights + held(cache))
        tried.cache_bytes = held(cache)
        if kind != "full":
            report = cache.report
            tried.kept_share, tried.host_bytes = report.budget, report.host_bytes
            tried.host_layers = sum(layer.host_bytes > 0 for layer in report.layers)
        tried.prefill_seconds = stamps.times[1] - begin
        steps = [after - before for before, after in zip(stamps.times[1:], stamps.times[2:], strict=False)]
        tried.token_seconds = statistics.median(steps[len(steps) // 3 :]) if steps else 0.0


def release(error: BaseException | None) -> None:
    """Let go of the frames of an error, and of those that it came out of."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def held(cache: Any) -> int:
    """Bytes of a cache's keys and values."""
    if isinstance(cache, DynamicCache) and not isinstance(cache, refreekv.ReFreeKVCache):
        tensors = [t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors)
    return cache.report.bytes_after


def longest(fits: Callable[[int], bool], guess: int, *, most: int, resolution: float = 0.02) -> int:
    """The longest length that fits, to within ``resolution`` of itself; 0 if none does.

    What fits is taken to fit at all shorter lengths. The first tries are around ``guess``.
    """
    low, high, width = 0, 0, 0.02  # what fits, and what does not; 0: not known
    length = min(_rounded(guess), most)
    while True:
        if fits(length):
            low = length
        else:
            high = length
        if low >= most or 0 < high <= STEP or (low and high and high - low <= max(STEP, resolution * low)):
            return low
        if low and high:
            length = _rounded((low + high) // 2)
        else:  # further away each time
            length = _rounded(low * (1 + width) if low else high * (1 - width))
            width *= 2
        length = min(max(length, low + STEP), high - STEP if high else most)


def _rounded(length: float) -> int:
    return max(int(length) // STEP, 1) * STEP


LEAST_CHUNK = 256
"""Tokens of a chunk that are not halved."""


def chunks(most: int) -> list[int]:
    """Tokens of the chunks that are thought of, the largest first."""
    found = [most]
    while found[-1] // 2 >= LEAST_CHUNK:
        found.append(found[-1] // 2)
    return found


def reading_for(row: Row, kind: str, length: int, settings: "Settings") -> tuple[int, bool]:
    """The largest chunk with which `refreekv plan` says that a prompt fits, the smallest if it does with none.

    And whether it says that matrices of 4 bits are to be unpacked some rows at a time.
    """
    for chunk in chunks(settings.chunk):
        planned = forecast(row, kind, length, replace(settings, chunk=chunk))
        if planned.fits:
            break
    return chunk, planned.sliced


def forecast(row: Row, kind: str, length: int, settings: "Settings") -> Scenario:
    """What `refreekv plan` says of the row at a length."""
    variant = settings.variant
    policy, stored = parse_policy(variant.policy), variant.stored
    prompt = PROMPT_DTYPE if variant.prompt == AUTO else KVDtype.parse(none_for_16(variant.prompt))
    host = parse_host_memory(variant.host)
    made = make(
        Model(row.shape, SHAPES[row.shape]),
        memory=row.limit,
        load=Load(length + settings.new, settings.new),
        weights=row.weights.partition("-")[0],
        number=stored.expected,
        worst=stored.worst,
        expected=expected(policy, row.shape),
        chunk=settings.chunk,
        host=0 if host is None else UNLIMITED if isinstance(host, str) else host,
        queries=lambda prompt: policy.probe_plan(prompt).count,
        prompt_number=prompt,
    )
    return made.rows[0 if kind == "full" else -1]


def none_for_16(text: str) -> str | None:
    """How a prompt is held, by its name."""
    return None if text == "16" else text


UNLIMITED = 2**50
"""Bytes of host memory, where nobody says how many."""


@dataclass(frozen=True)
class Settings:
    """What holds for all rows."""

    variant: Variant
    chunk: int
    new: int
    resolution: float
    most: int
    seconds: float


def measure(
    row: Row, kinds: list[str], variants: list[Variant], settings: Settings, device: torch.device, at: list[list[int]]
) -> Iterator[Result]:
    """One result a kind and variant, or one for each length where lengths are given: for all, or for each variant."""
    memory = Memory(device, row.limit)
    model = build(SHAPES[row.shape], row.weights, device)
    speeds: tuple[float, float] | None = None
    if any(at) and device.type == "cuda":
        memory.close()
        speeds = copy_bandwidth(), bus_bandwidth()
        memory = Memory(device, row.limit)
    tasks = [("full", variants[0])] if "full" in kinds else []
    tasks += [("ours", variant) for variant in variants] if "ours" in kinds else []
    for (kind, variant), lengths in zip(tasks, at * len(tasks) if len(at) == 1 else at, strict=True):
        own = replace(settings, variant=variant)
        bench = Bench(model, memory, variant=variant, chunk=settings.chunk, new=settings.new)
        # Captured steps outlive the caches they are made for, as in a server.
        with attached(model) if kind != "full" else contextlib.nullcontext():
            constants = 0.0 if kind == "full" else bench.measure_constants()
            for length in lengths or [0]:
                full = kind == "full"
                result = Result(
                    row.shape, form_of(model), row.limit, kind, "full" if full else variant.policy,
                    "bf16" if full else variant.kv, "bf16" if full else variant.prompt, settings.chunk, settings.new,
                    about(device), weight_bytes(model), None if full else variant.host, constants,
                )  # fmt: skip
                if length:
                    bench.chunk, bench.sliced = reading_for(row, kind, length, own)
                    result.at = bench.attempt(kind, length)
                    result.tries = [result.at]
                    result.longest = length if result.at.fits else 0
                    if speeds is not None:
                        read = weight_bytes(model, read=True) + result.at.cache_bytes - result.at.host_bytes
                        result.floor_seconds = max(read / speeds[0], result.at.host_bytes / speeds[1])
                else:
                    search(bench, row, result, own)
                tried = max(result.longest, length, 2)
                result.chunk = settings.chunk if result.at is None else result.at.chunk
                planned = forecast(row, kind, tried, replace(own, chunk=result.chunk))
                result.forecast_peak, result.forecast_host = planned.peak_bytes, planned.host_bytes
                yield result
    memory.close()


def search(bench: Bench, row: Row, result: Result, settings: Settings) -> None:
    """Find the longest prompt that fits, and put all tries into the result."""
    planned = (forecast(row, result.kind, 2, replace(settings, chunk=chunk)) for chunk in chunks(settings.chunk))
    result.forecast_longest = max(max(one.longest_context for one in planned) - settings.new, 0)
    begin = time.monotonic()

    def fits(length: int) -> bool:
        if time.monotonic() - begin > settings.seconds:
            return False
        bench.chunk, bench.sliced = reading_for(row, result.kind, length, settings)
        tried = bench.attempt(result.kind, length)
        result.tries.append(tried)
        verdict = "answered" if tried.fits else "out of memory"
        held = f"{format_size(tried.before)} held before, {format_size(tried.allocated)} at most"
        what = f"{result.kind} {length:,} tokens in chunks of {tried.chunk:,}"
        print(f"    {what}: {verdict}, {tried.seconds:.1f} s; {held}", flush=True)
        return tried.fits

    guess = result.forecast_longest or settings.chunk
    result.longest = longest(fits, guess, most=settings.most, resolution=settings.resolution)
    result.at = next((one for one in result.tries if one.length == result.longest and one.fits), None)


def about(device: torch.device) -> str:
    """Device, software and day."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, counted and not measured"
    return f"{name}; torch {torch.__version__}; {date.today()}"


def line(result: Result) -> str:
    """A result for people."""
    parts = [f"{result.shape} {result.weights}, {format_size(result.limit)}, {result.kind}"]
    if result.kind != "full":
        parts[0] += f" ({result.policy}, {result.kv}; prompts {result.prompt}"
        parts[0] += ")" if result.host is None else f"; host memory {result.host})"
    if result.at is None or not result.at.fits:
        return f"{parts[0]}: nothing fits"
    at = result.at
    parts.append(f"{at.length:,} tokens")
    if result.forecast_longest is not None:
        parts.append(f"forecast {result.forecast_longest:,}")
    parts.append(f"chunks of {at.chunk:,}" + (", matrices in slices" if at.sliced else ""))
    parts.append(f"peak {format_size(at.peak)}, of which tensors {format_size(at.allocated)}")
    if result.forecast_peak is not None:
        parts.append(f"forecast {format_size(result.forecast_peak)} ({result.forecast_peak / at.peak - 1:+.1%})")
    parts.append(f"prefill {at.prefill_seconds:.1f} s")
    if at.token_seconds:
        parts.append(f"{1 / at.token_seconds:.1f} tokens/s")
    if result.floor_seconds:
        parts.append(
            f"{at.token_seconds / result.floor_seconds:.2f} x the floor of {result.floor_seconds * 1e3:.1f} ms"
        )
    parts.append(f"K/V {format_size(at.cache_bytes)}, {at.kept_share:.0%} kept")
    if result.host is not None:
        parts.append(f"{format_size(at.host_bytes)} of it in host memory, codes of {at.host_layers} layers")
    if result.constants_seconds:
        parts.append(f"constants of the model {result.constants_seconds:.1f} s")
    return ": ".join([parts[0], "; ".join(parts[1:])])


def table(rows: list[dict[str, Any]]) -> str:
    """Results as a Markdown table; ratios are to the full cache of the same shape, weights and limit.

    Peaks of results that know none of their parts are sums of what may not have been there at a time.
    """
    full = {(r["shape"], r["weights"], r["limit"]): r["longest"] for r in rows if r["kind"] == "full" and r["longest"]}
    head = "shape | weights | limit | cache | longest prompt | x full | forecast | peak | forecast | tokens/s | on"
    lines = [f"| {head} |", "|---" * 11 + "|"]
    for r in rows:
        at, base = r["at"] or {}, full.get((r["shape"], r["weights"], r["limit"]))
        ratio = f"{r['longest'] / base:.2f}" if base else "–"
        planned = f"{r['forecast_longest']:,}" if r["forecast_longest"] is not None else "–"
        off = f"{r['forecast_peak'] / at['peak'] - 1:+.1%}" if r["forecast_peak"] and at.get("peak") else "–"
        speed = f"{1 / at['token_seconds']:.1f}" if at.get("token_seconds") else "–"
        on = r["about"].partition(";")[0].removeprefix("NVIDIA ").partition(" ")[0].rstrip(",")
        most = f"{'' if 'peak_prompt' in at else '≤ '}{format_size(at.get('peak', 0))}"
        cache = "full" if r["kind"] == "full" else f"{r['policy']}, {r['kv']}"
        cache += f", prompts {r['prompt']}" if r["kind"] != "full" and r["prompt"] != AUTO else ""
        cache += f", host {r['host']}: {format_size(at.get('host_bytes', 0))}" if r.get("host") else ""
        lines.append(
            f"| {r['shape']} | {r['weights']} | {format_size(r['limit'])} | {cache} | {r['longest']:,} | {ratio} | "
            f"{planned} | {most} | {off} | {speed} | {on} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, measure, print, and maybe write JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="all", help="SHAPE:WEIGHTS:MEMORY, separated by commas, or all")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of full, ours")
    parser.add_argument("--policy", default="streaming-llm:ratio=0.4", help="of ours")
    parser.add_argument("--kv", default="bf16", help="how ours stores what it keeps: int4, auto …; bf16: as computed")
    parser.add_argument(
        "--prompt", default=AUTO, help="how ours holds a prompt that is not read to its end: 16, int8, auto …"
    )
    parser.add_argument("--host", help="host memory of ours: auto, 8GiB …; default: none")
    parser.add_argument("--ours", help="several caches of ours, POLICY@KV@PROMPT@HOST, with semicolons between them")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prompt that are read at a time")
    parser.add_argument("--new", type=int, default=24, help="tokens of the answer")
    parser.add_argument(
        "--at", default="", help="lengths to measure, separated by commas; no search. With semicolons: a list a cache"
    )
    parser.add_argument("--resolution", type=float, default=0.02, help="of the search")
    parser.add_argument("--most", type=int, default=2**19, help="longest prompt that is tried")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new try of a search after so long")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="add the results to this file, a JSON object a line")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print results as a table and end")
    given = parser.parse_args(arguments)
    if given.table:
        print(table([json.loads(one) for path in given.table for one in path.read_text().splitlines()]))
        return
    try:
        rows = [Row.parse(text) for text in (TABLE if given.rows == "all" else given.rows.split(","))]
        default = Variant.parse(given.policy, Variant(given.policy, given.kv, given.prompt, given.host))
        variants = [Variant.parse(one, default) for one in given.ours.split(";")] if given.ours else [default]
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    settings = Settings(
        variant=default,
        chunk=given.chunk,
        new=given.new,
        resolution=given.resolution,
        most=given.most // STEP * STEP,
        seconds=given.seconds,
    )
    at = [[int(one) for one in lengths.split(",") if one] for lengths in given.at.split(";")]
    kinds = given.kinds.split(",")
    caches = ("full" in kinds) + ("ours" in kinds) * len(variants)
    if len(at) not in (1, caches):
        parser.error(f"--at has {len(at)} lists of lengths for {caches} caches")
    for row in rows:
        for result in measure(row, kinds, variants, settings, torch.device(given.device), at):
            print(line(result), flush=True)
            if given.out:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
