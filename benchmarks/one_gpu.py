"""How long a prompt one GPU of some size reads and answers: the full cache, ours, and what `plan` forecasts.

    python benchmarks/one_gpu.py --rows all --out rows.jsonl                  # the whole table, on CUDA
    python benchmarks/one_gpu.py --rows llama-3-8b:int4:8GB --kv int4         # one row of it
    python benchmarks/one_gpu.py --rows llama-3-70b:int4:48GB --at 32768      # no search: time and memory there
    python benchmarks/one_gpu.py --table rows.jsonl                           # as a table

A row is SHAPE:WEIGHTS:MEMORY, of a shape in `random_models.SHAPES` and weights of its `FORMS` (int4: bitsandbytes' NF4,
int4-blocks: our own). Weights are random and made directly in the form that they have, so that what a policy keeps of
such a prompt says nothing: give one that keeps a fixed share, the share that real models keep at the fidelity in
question.

    limit     the process may hold MEMORY, the driver's context included (torch.cuda.set_per_process_memory_fraction)
    longest   the longest prompt that is read in chunks and answered with --new tokens, found by bisection; the
              first try is what `plan` forecasts
    peak      the most that was held, by the allocator and by the driver's context, beside `plan`'s forecast for
              that very length
    floor     (weights that a token reads + what the cache holds) / bandwidth of a copy on the same device

Kinds: ``full`` is transformers' DynamicCache, decoded by transformers; ``ours`` a ReFreeKVCache of --policy, --kv and
--prompt.
On a CPU, where no limit can be set, weights and cache are counted instead: for tests.
"""

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList

import refreekv
from decode import Stamps
from devices import copy_bandwidth
from random_models import FORMS, SHAPES, build, form_of, weight_bytes
from refreekv.core.quantisation import KVDtype
from refreekv.core.units import format_size, parse_bytes
from refreekv.engines.transformers.attachment import attached
from refreekv.engines.transformers.naming import NAME, cache_argument
from refreekv.planner.budgets import expected
from refreekv.planner.memory import Load
from refreekv.planner.plan import Row as Scenario
from refreekv.planner.plan import make
from refreekv.planner.source import Model
from refreekv.policies.base import AUTO

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
    peak: int = 0
    allocated: int = 0  # of the peak what tensors held: the rest is the context, and what the allocator could not use
    prefill_seconds: float = 0.0
    token_seconds: float = 0.0
    cache_bytes: int = 0
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
    longest: int = 0
    forecast_longest: int | None = None
    forecast_peak: int | None = None
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
            # What the driver holds is part of a smaller card's memory, too.
            self.context = total - free - torch.cuda.memory_reserved(device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - self.context) / total), device)
        self._counted = 0

    def begin(self) -> None:
        """Forget the peak."""
        self._counted = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def count(self, held: int) -> None:
        """On a CPU: so many bytes are held now; OutOfMemoryError past the limit."""
        self._counted = max(self._counted, held)
        if self.device.type != "cuda" and held > self.limit:
            raise torch.OutOfMemoryError(f"{held} bytes of {self.limit}")

    @property
    def peak(self) -> int:
        """The most that was held."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) + self.context
        return self._counted

    @property
    def allocated(self) -> int:
        """The most that tensors held."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self._counted

    def close(self) -> None:
        """Take the limit away."""
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


class Bench:
    """Reads and answers prompts with one model under one limit."""

    def __init__(
        self, model: Any, memory: Memory, *, policy: str, kv: str | None, prompt: str | None, chunk: int, new: int
    ):
        self.model, self.memory = model, memory
        self._policy, self._kv, self._prompt, self._chunk, self._new = policy, kv, prompt, chunk, new
        self._weights = weight_bytes(model)

    def cache(self, kind: str) -> Any:
        """A cache of a kind."""
        if kind == "full":
            return DynamicCache(config=self.model.config)
        return refreekv.ReFreeKVCache(self.model, self._policy, kv_dtype=self._kv, prompt_dtype=self._prompt)

    def attempt(self, kind: str, length: int) -> Try:
        """Read a prompt of a length and answer it, or run out of memory."""
        self.memory.begin()
        begin = time.perf_counter()
        tried = Try(length, fits=False, seconds=0.0)
        try:
            with torch.inference_mode():
                self._run(kind, length, tried)
            tried.fits = True
        except torch.OutOfMemoryError as error:
            # Its frames hold the cache.
            error.__traceback__ = None
        if not tried.fits:
            gc.collect()
        tried.peak, tried.allocated = self.memory.peak, self.memory.allocated
        self.memory.begin()
        tried.seconds = time.perf_counter() - begin
        return tried

    def _run(self, kind: str, length: int, tried: Try) -> None:
        device = self.memory.device
        cache = self.cache(kind)
        generator = torch.Generator(device).manual_seed(length)
        ids = torch.randint(1, self.model.config.vocab_size, (1, length), generator=generator, device=device)
        options = cache_argument(self.model.forward, cache)
        begin = time.perf_counter()
        for start in range(0, length - self._chunk, self._chunk):
            with contextlib.nullcontext() if kind == "full" else cache.prompt_until(length):
                self.model(ids[:, start : start + self._chunk], use_cache=True, logits_to_keep=1, **options)
            self.memory.count(self._weights + held(cache))
        stamps = Stamps()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._new, do_sample=False,
            logits_processor=LogitsProcessorList([stamps]), **{NAME: cache},
        )  # fmt: skip
        self.memory.count(self._weights + held(cache))
        tried.cache_bytes = held(cache)
        tried.kept_share = 1.0 if kind == "full" else cache.report.budget
        tried.prefill_seconds = stamps.times[1] - begin
        steps = [after - before for before, after in zip(stamps.times[1:], stamps.times[2:], strict=False)]
        tried.token_seconds = statistics.median(steps[len(steps) // 3 :]) if steps else 0.0


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


def forecast(row: Row, kind: str, length: int, bench: "Settings") -> Scenario | None:
    """What `refreekv plan` says of the row at a length; None where it does not know the number format."""
    config = SHAPES[row.shape]
    try:
        number = KVDtype.parse(bench.kv)
    except ValueError:  # several widths
        if kind != "full":
            return None
        number = None
    policy = refreekv.policies.parse(bench.policy)
    prompt = {} if bench.prompt == AUTO else {"prompt_number": KVDtype.parse(bench.prompt)}
    made = make(
        Model(row.shape, config),
        memory=row.limit,
        load=Load(length + bench.new, bench.new),
        weights=row.weights.partition("-")[0],
        number=number,
        expected=expected(policy, row.shape),
        chunk=bench.chunk,
        **prompt,
    )
    return made.rows[0 if kind == "full" else -1]


@dataclass(frozen=True)
class Settings:
    """What holds for all rows."""

    policy: str
    kv: str | None
    prompt: str | None
    chunk: int
    new: int
    resolution: float
    most: int
    seconds: float


def measure(row: Row, kinds: list[str], settings: Settings, device: torch.device, at: list[int]) -> Iterator[Result]:
    """One result a kind, or a kind and length where lengths are given."""
    memory = Memory(device, row.limit)
    model = build(SHAPES[row.shape], row.weights, device)
    bench = Bench(
        model, memory, policy=settings.policy, kv=settings.kv, prompt=settings.prompt, chunk=settings.chunk,
        new=settings.new,
    )  # fmt: skip
    bandwidth = None
    if at and device.type == "cuda":
        memory.close()
        bandwidth = copy_bandwidth()
        memory = bench.memory = Memory(device, row.limit)
    for kind in kinds:
        # Captured steps outlive the caches they are made for, as in a server.
        with attached(model) if kind != "full" else contextlib.nullcontext():
            for length in at or [0]:
                result = Result(
                    row.shape, form_of(model), row.limit, kind,
                    "full" if kind == "full" else settings.policy, "bf16" if kind == "full" else settings.kv or "bf16",
                    "bf16" if kind == "full" else settings.prompt or "bf16",
                    settings.chunk, settings.new, about(device), weight_bytes(model),
                )  # fmt: skip
                if length:
                    result.at = bench.attempt(kind, length)
                    result.tries = [result.at]
                    result.longest = length if result.at.fits else 0
                    if bandwidth is not None:
                        read = weight_bytes(model, read=True) + result.at.cache_bytes
                        result.floor_seconds = read / bandwidth
                else:
                    search(bench, row, result, settings)
                planned = forecast(row, kind, max(result.longest, length, 2), settings)
                result.forecast_peak = None if planned is None else planned.peak_bytes
                yield result
    memory.close()


def search(bench: Bench, row: Row, result: Result, settings: Settings) -> None:
    """Find the longest prompt that fits, and put all tries into the result."""
    planned = forecast(row, result.kind, 2, settings)
    if planned is not None:
        result.forecast_longest = max(planned.longest_context - settings.new, 0)
    begin = time.monotonic()

    def fits(length: int) -> bool:
        if time.monotonic() - begin > settings.seconds:
            return False
        tried = bench.attempt(result.kind, length)
        result.tries.append(tried)
        verdict = "answered" if tried.fits else "out of memory"
        print(f"    {result.kind} {length:,} tokens: {verdict}, {tried.seconds:.1f} s", flush=True)
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
        parts[0] += f" ({result.policy}, {result.kv}; prompts {result.prompt})"
    if result.at is None or not result.at.fits:
        return f"{parts[0]}: nothing fits"
    at = result.at
    parts.append(f"{at.length:,} tokens")
    if result.forecast_longest is not None:
        parts.append(f"forecast {result.forecast_longest:,}")
    parts.append(f"peak {format_size(at.peak)}")
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
    return ": ".join([parts[0], "; ".join(parts[1:])])


def table(rows: list[dict[str, Any]]) -> str:
    """Results as a Markdown table; ratios are to the full cache of the same shape, weights and limit."""
    full = {(r["shape"], r["weights"], r["limit"]): r["longest"] for r in rows if r["kind"] == "full" and r["longest"]}
    lines = ["| shape | weights | limit | cache | longest prompt | x full | forecast | peak | forecast | tokens/s |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        at, base = r["at"] or {}, full.get((r["shape"], r["weights"], r["limit"]))
        ratio = f"{r['longest'] / base:.2f}" if base else "–"
        planned = f"{r['forecast_longest']:,}" if r["forecast_longest"] is not None else "–"
        off = f"{r['forecast_peak'] / at['peak'] - 1:+.1%}" if r["forecast_peak"] and at.get("peak") else "–"
        speed = f"{1 / at['token_seconds']:.1f}" if at.get("token_seconds") else "–"
        cache = "full" if r["kind"] == "full" else f"{r['policy']}, {r['kv']}"
        lines.append(
            f"| {r['shape']} | {r['weights']} | {format_size(r['limit'])} | {cache} | {r['longest']:,} | {ratio} | "
            f"{planned} | {format_size(at.get('peak', 0))} | {off} | {speed} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, measure, print, and maybe write JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="all", help="SHAPE:WEIGHTS:MEMORY, separated by commas, or all")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of full, ours")
    parser.add_argument("--policy", default="streaming-llm:ratio=0.4", help="of ours")
    parser.add_argument("--kv", help="how ours stores what it keeps, such as int4; default: as computed")
    parser.add_argument(
        "--prompt", default=AUTO, help="how ours holds a prompt that is not read to its end: 16, int8, auto …"
    )
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prompt that are read at a time")
    parser.add_argument("--new", type=int, default=24, help="tokens of the answer")
    parser.add_argument("--at", default="", help="lengths to measure, separated by commas; no search")
    parser.add_argument("--resolution", type=float, default=0.02, help="of the search")
    parser.add_argument("--most", type=int, default=2**19, help="longest prompt that is tried")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new try of a search after so long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="add the results to this file, a JSON object a line")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print results as a table and end")
    given = parser.parse_args(arguments)
    if given.table:
        print(table([json.loads(one) for path in given.table for one in path.read_text().splitlines()]))
        return
    try:
        rows = [Row.parse(text) for text in (TABLE if given.rows == "all" else given.rows.split(","))]
        refreekv.policies.parse(given.policy)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    settings = Settings(
        policy=given.policy,
        kv=given.kv,
        prompt=None if given.prompt == "16" else given.prompt,
        chunk=given.chunk,
        new=given.new,
        resolution=given.resolution,
        most=given.most // STEP * STEP,
        seconds=given.seconds,
    )
    for row in rows:
        at = [int(one) for one in given.at.split(",") if one]
        for result in measure(row, given.kinds.split(","), settings, torch.device(given.device), at):
            print(line(result), flush=True)
            if given.out:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
