"""How fast the kernels of the vLLM plugin read what is kept: entries as they are, and coded ones of several widths.

    python benchmarks/paged_speed.py                       # one layer of Llama-3-8B's shape, 80 s
    python benchmarks/paged_speed.py --tune --rows 32 --formats "k4v2+k4v4+k6v4+k7v6,int4"
    python benchmarks/paged_speed.py --shape qwen2.5-1.5b

`--tune` compares settings of the kernel.

Each case has sequences whose heads keep between half and one and a half times as many entries, 68 of each as they are,
and a tail of ordinary blocks. The bytes of all that is read over the time of a captured graph's replay, which holds
every layer's attention once; data are larger than any cache. A sequence of each case is compared with plain attention
over what the codes stand for, in float64.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refreekv.core.quantisation import Ladder
from refreekv.core.rotation import rotation
from refreekv.kernels.decode import multiprocessors
from refreekv.kernels.paged import FIRST, HELD, Coded, PagedTable, Pool, Rows
from refreekv.kernels.paged_levels import launch_paged_levels

SHAPES = {"llama-3-8b": (8, 4, 128), "qwen2.5-1.5b": (2, 6, 128), "smollm2": (3, 3, 64)}
"""KV heads, query heads of each, elements of a head."""

LAYERS, TOKENS, EXACT = 4, 16, 68

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float16)
"""On a CPU, where Triton's interpreter runs the kernels, only `error_of` says something."""

TUNED: list[dict[str, Any]] = [
    {}, {"stages": 3}, {"beside": 0}, {"beside": 4096}, {"extra": 8}, {"extra": 48}, {"least": 256},
    {"each": 10}, {"each": 14}, {"coded_block": 16}, {"coded_block": 64, "each": 8},
    *({"warps": 2, "coded_block": 64, "each": each, "block": 32} for each in (6, 8)),
    {"warps": 4, "coded_block": 64, "each": 4, "block": 32},
    {"whole": False}, {"whole": True}, *({"joined": joined} for joined in (8, 32)),
    *({"programs": multiprocessors(torch.device(DEVICE)) * each} for each in (2, 4, 8, 12)),
]  # fmt: skip
"""Settings of `launch_paged_levels`."""


@dataclass
class Case:
    """Sequences with private pages of random contents, and what `plain` said of some of their heads."""

    pool: Pool
    table: PagedTable
    rows: Rows
    block_table: Tensor
    query: Tensor
    bytes: int
    tail: int
    wanted: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)


def case(shape: str, kind: str, rows: int, kept: int, tail: int, longest: int = 1) -> Case:
    """Make one: a format or a ladder, ``16`` for entries as they are."""
    heads, group, size = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    forms = () if kind == "16" else Ladder.parse(kind).forms((size, size), sorted_keys=True)
    share = [0.5, 0.25, 0.15, 0.1][: len(forms)] if len(forms) > 1 else [1.0] * len(forms)
    counts = (kept * (0.5 + torch.rand(LAYERS, rows, heads, generator=generator))).long()
    exact = counts if not forms else torch.full_like(counts, EXACT)
    rungs = [((counts - exact) * part).long() for part in share]
    item, lines = 2, heads * TOKENS
    page = lines * 2 * size * item
    # Pages of each sequence: those with entries as they are, then those of each rung.
    most, starts, firsts = 0, [], []
    for row in range(rows):
        at, own = -(-int(exact[:, row].sum()) // lines), []
        for form, count in zip(forms, rungs, strict=True):
            own.append(at)
            at += -(-int(count[:, row].sum()) // (page // form.entry_bytes))
        starts.append((own, at))
        most = max(most, -(-at // LAYERS))
    ordinary = -(-tail // TOKENS) + 1
    blocks = rows * (most + ordinary) + 1
    memory = torch.randn(LAYERS, blocks, TOKENS, heads, 2 * size, dtype=DTYPE, device=DEVICE)
    pool = Pool.of([part.transpose(1, 2) for part in memory])
    table = PagedTable.empty(pool, rows, most)
    order = 1 + torch.randperm(blocks - 1, generator=generator).int()
    table.pages.copy_(order[: rows * most].view(rows, most))
    if forms:
        table = replace(table, coded=Coded.empty(pool, rows, forms))
        table.coded.key_means.normal_()
        table.coded.value_means.normal_()
    raw = memory.view(torch.uint8).view(LAYERS, blocks, page)
    for row in range(rows):
        own, end = starts[row]
        for rung, form in enumerate(forms):
            stop = own[rung + 1] if rung + 1 < len(forms) else end
            for index in range(own[rung], stop):
                block, layer = int(order[row * most + index // LAYERS]), index % LAYERS
                count = page // form.entry_bytes
                codes = torch.randint(0, 256, (count * form.line_bytes,), device=DEVICE, dtype=torch.int16)
                raw[layer, block, : count * form.line_bytes] = codes.byte()
                factors = torch.rand(count * 2, device=DEVICE) * 0.3 + 0.2
                raw[layer, block, count * form.line_bytes : count * form.entry_bytes] = factors.half().view(torch.uint8)
    segments = torch.zeros_like(table.segments, device="cpu")
    for row in range(rows):
        flat = exact[:, row].flatten()
        segments[:, row, :, FIRST] = (flat.cumsum(0) - flat).view(LAYERS, heads)
        segments[:, row, :, HELD] = exact[:, row]
        for rung, form in enumerate(forms):
            flat = rungs[rung][:, row].flatten()
            begin = starts[row][0][rung] * (page // form.entry_bytes)
            first = begin + (flat.cumsum(0) - flat).view(LAYERS, heads)
            firsts.append((row, rung, torch.stack([first, rungs[rung][:, row]], -1)))
    table.segments.copy_(segments)
    for row, rung, part in firsts:
        table.coded.segments[:, row, :, rung] = part.to(DEVICE)
    table.starts.fill_(100)
    numbers = torch.arange(rows, device=DEVICE, dtype=torch.int32)
    begins = numbers * longest
    length = torch.full_like(numbers, 100 + tail)
    block_table = torch.zeros(rows, (100 + tail) // TOKENS + 1, dtype=torch.int32)
    for row in range(rows):
        needed = range(100 // TOKENS, (100 + tail - 1) // TOKENS + 1)
        for place, block in enumerate(needed):
            block_table[row, block] = order[rows * most + row * ordinary + place]
    total = (int(exact.sum()) + LAYERS * rows * heads * tail) * 2 * size * item
    total += sum(int(count.sum()) * form.entry_bytes for form, count in zip(forms, rungs, strict=True))
    query = torch.randn(rows * longest, heads * group, size, dtype=DTYPE, device=DEVICE)
    asked = Rows(begins, begins + longest, length, numbers, numbers, longest, True)
    return Case(pool, table, asked, block_table.to(DEVICE), query, total, tail)


def attend(found: Case, layer: int, **settings: Any) -> Tensor:
    """The kernel's attention in one layer."""
    out = torch.empty_like(found.query)
    arguments = found.query, found.pool, layer, found.block_table, found.rows, found.table, out, 0.08, None, None
    launch_paged_levels(*arguments, **settings)
    return out


def plain(found: Case, layer: int, row: int, head: int) -> Tensor:
    """Attention of a row's last query in one KV head, in float64."""
    pool, table, size = found.pool, found.table, found.pool.size
    cache = pool.cache
    entries: list[Tensor] = []

    def page_of(index: int) -> Tensor:
        block, own = int(table.pages[row, index // pool.layers]), index % pool.layers
        begin = cache.storage_offset() + int(pool.offsets[own]) * 16 + block * cache.stride(0)
        return torch.as_strided(cache, (pool.lines * 2 * size,), (1,), begin)

    first, held = table.segments[layer, row, head, [FIRST, HELD]].tolist()
    pages = range(first // pool.lines, (first + held - 1) // pool.lines + 1)
    lines = torch.cat([page_of(index).view(pool.lines, -1) for index in pages])
    entries.append(lines[first - pages[0] * pool.lines :][:held].double())
    coded = table.coded
    back = rotation(size).T.to(DEVICE)
    for rung, form in enumerate(() if coded is None else coded.forms):
        first, count = coded.segments[layer, row, head, rung].tolist()
        each = pool.coded_lines(form)
        if not count:
            continue
        pages = range(first // each, (first + count - 1) // each + 1)
        raw = torch.stack([page_of(index).view(torch.uint8) for index in pages])
        own = raw[:, : each * form.line_bytes].reshape(-1, form.line_bytes)[first - pages[0] * each :][:count]
        factors = raw[:, each * form.line_bytes : each * form.entry_bytes].reshape(-1, 4)[first - pages[0] * each :]
        keys, values = form.unpack(own.cpu(), factors[:count].contiguous().cpu().view(torch.float16), torch.float64)
        keys = keys.to(DEVICE) @ coded.key_duals[layer][head].double() + coded.key_means[layer, row, head]
        entries.append(torch.cat([keys, values.to(DEVICE) @ back + coded.value_means[layer, row, head]], -1))
    for position in range(100, 100 + found.tail):
        block = int(found.block_table[row, position // TOKENS])
        begin = cache.storage_offset() + int(pool.offsets[layer]) * 16 + block * cache.stride(0)
        begin += (position % TOKENS) * cache.stride(2) + head * cache.stride(1)
        entries.append(torch.as_strided(cache, (1, 2 * size), (1, 1), begin).double())
    all_of = torch.cat(entries)
    group = found.query.shape[1] // pool.heads
    asked = found.query[int(found.rows.ends[row]) - 1, head * group : (head + 1) * group].double()
    return (asked @ all_of[:, :size].T * 0.08).softmax(-1) @ all_of[:, size:]


def error_of(found: Case, **settings: Any) -> float:
    """Relative error of a few heads."""
    worst = 0.0
    rows, heads = len(found.rows.begins), found.pool.heads
    group = found.query.shape[1] // heads
    for layer, row, head in ((0, 0, 0), (LAYERS - 1, rows - 1, heads - 1), (1, rows // 2, heads // 2)):
        out = attend(found, layer, **settings)[int(found.rows.ends[row]) - 1, head * group : (head + 1) * group]
        if (layer, row, head) not in found.wanted:
            found.wanted[layer, row, head] = plain(found, layer, row, head)
        want = found.wanted[layer, row, head]
        worst = max(worst, float((out.double() - want).norm() / want.norm()))
    return worst


def microseconds(run: Any, repeats: int = 20) -> float:
    """Of a call that goes through all layers: a layer's time, median of a captured graph's replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(stop) / LAYERS)
    return statistics.median(times)


def timed(found: Case, **settings: Any) -> float:
    """Microseconds of a layer's attention."""
    return microseconds(lambda: [attend(found, layer, **settings) for layer in range(LAYERS)])


def split(found: Case) -> dict[str, float]:
    """Microseconds of each kernel of a layer, by name."""
    attend(found, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            for layer in range(LAYERS):
                attend(found, layer)
        torch.cuda.synchronize()
    averages = profile.key_averages()
    return {event.key[:40]: event.device_time_total / (3 * LAYERS) for event in averages if event.device_time_total > 0}


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--formats", default="16,int4,k6v4,int8,k4v2+k4v4+k6v4+k7v6")
    parser.add_argument("--rows", default="1,8,32,64")
    parser.add_argument("--kept", type=int, default=4000, help="entries of a head, on average")
    parser.add_argument("--tail", type=int, default=128)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=80, help="no new case is begun later")
    parser.add_argument("--out", help="where all numbers go, as JSON lines")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    begin = time.perf_counter()
    formats, rows = options.formats.split(","), [int(number) for number in options.rows.split(",")]
    if options.compile is not None:
        small = {kind: case(options.shape, kind, 2, 100, 20) for kind in formats}
        for index, settings in enumerate(TUNED):
            if index % 12 == options.compile:
                for kind in formats:
                    try:
                        attend(small[kind], 0, **settings)
                    except Exception as error:
                        print(settings, kind, type(error).__name__, str(error)[:200])
        return
    said = []
    print(torch.cuda.get_device_name(0), torch.__version__, flush=True)
    if options.tune:
        # Compiling is most of the time: many at once.
        command = [sys.executable, __file__, *sys.argv[1:]]
        workers = [subprocess.Popen([*command, "--compile", str(index)], env=os.environ) for index in range(12)]
        for worker in workers:
            worker.wait()
        print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    for kind in formats:
        for count in rows:
            if time.perf_counter() - begin > options.seconds:
                continue
            found = case(options.shape, kind, count, options.kept, options.tail)
            all_settings: list[dict[str, Any]] = list(TUNED) if options.tune else [{}]
            lines = []
            for settings in all_settings:
                try:
                    error, took = error_of(found, **settings), timed(found, **settings)
                except Exception as failure:
                    print(f"{kind} {count} {settings}: {type(failure).__name__} {str(failure)[:300]}", flush=True)
                    continue
                speed = found.bytes / LAYERS / took / 1e6
                lines.append((took, settings, speed, error))
                said.append({"format": kind, "rows": count, "us": took, "TB/s": speed, "error": error, **settings})
            for took, settings, speed, error in sorted(lines, key=lambda line: line[0]):
                shown = " ".join(f"{name}={value}" for name, value in settings.items())
                print(f"{kind:16} {count:3} rows {took:8.1f} us {speed:5.2f} TB/s, off {error:.4f} {shown}", flush=True)
            if not options.tune and count == rows[-1]:
                print("   " + "  ".join(f"{name} {took:.1f}" for name, took in split(found).items()), flush=True)
            del found
            torch.cuda.empty_cache()
    if options.out:
        Path(options.out).write_text("".join(json.dumps(line) + "\n" for line in said))


if __name__ == "__main__":
    main()
