"""Attention over packed lines, against its own floor, and bfloat16; and what packing takes.

    python benchmarks/packed_speed.py                    # Llama-3-8B's heads: 32 query heads, 8 KV heads of 128
    python benchmarks/packed_speed.py --tune             # other launch settings, at 16 x 8192 and 1 x 32768
    python benchmarks/packed_speed.py --parts split      # what of the time goes to which kernel

The floor is the bytes that must move (lines, factors and exact entries, once) at the bandwidth of a copy. Times are
medians of CUDA graph replays, over several input sets, of all that a layer launches: preparing queries, exact entries,
each level, joining. Keys are in quarters of different widths, as a model's own codes have them. `mix` has half of the
entries evicted, a tenth with keys of 6 bits and the rest in 4; `ladder` 41, 15, 10 and 34% in each of the default's
four formats, as on Qwen2.5-Coder at 4,000 tokens, `L2` 40 and 10% in two; every format has 68 exact entries a head
beside its own. `--tune` compiles settings side by side first.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from devices import copy_bandwidth, device_seconds, header
from kernel_speed import HEADS, KV_HEADS, SIZE, TYPE, arena, decode_attention, random
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import KVDtype
from refreekv.kernels.packed_calls import PackedKV, Transfer
from refreekv.kernels.packed_decode import launch_packed_decode
from refreekv.kernels.packed_join import launch_packed_join, launch_prepare
from refreekv.kernels.packed_launch import launch_packed_attention
from refreekv.kernels.packed_storage import launch_pack
from refreekv.storage.arena import KVArena

EXACT, WORKERS = 68, 12
SHAPES = ((16, 8192), (32, 8192), (8, 32768), (1, 8192), (1, 32768))
FORMATS = {
    "K4V4": (("k4v4", 1.0),),
    "K6V4": (("k6v4", 1.0),),
    "K8V8": (("k8v8", 1.0),),
    "mix": (("k4v4", 0.4), ("k6v4", 0.1)),
    "L2": (("k4v4", 0.4), ("k8v8", 0.1)),
    "ladder": (("k4v2", 0.41), ("k4v4", 0.15), ("k6v4", 0.1), ("k7v6", 0.34)),
}


def form_of(kind: str) -> PackedFormat:
    """The lines of a number format."""
    return KVDtype(kind).form((SIZE, SIZE), sorted_keys=True)


def maps() -> PackedMaps:
    """Random rotations behind random means."""
    rotations = [torch.linalg.qr(torch.randn(1, KV_HEADS, SIZE, SIZE, device="cuda"))[0] for _ in range(2)]
    means = [torch.randn(1, KV_HEADS, SIZE, device="cuda") for _ in range(2)]
    return PackedMaps.of(means[0], rotations[0], means[1], rotations[1], TYPE)


class Level:
    """Segments of equal lengths, of random codes."""

    def __init__(self, form: PackedFormat, segments: int, length: int):
        self.form, self.count = form, segments * length
        self.lines = torch.randint(0, 256, (self.count, form.line_bytes), dtype=torch.uint8, device="cuda")
        self.factors = (torch.rand(self.count, 2, device="cuda") + 0.5).half()
        rows = torch.arange(segments, device="cuda") * length
        full = torch.full_like(rows, length)
        lines = self.lines.data_ptr() + rows * form.line_bytes
        self.table = torch.stack([lines, self.factors.data_ptr() + rows * 4, full, full], 1)


class Setup:
    """What one layer attends to."""

    def __init__(self, batch: int, length: int, name: str):
        self.levels = [Level(form_of(kind), batch * KV_HEADS, round(length * share)) for kind, share in FORMATS[name]]
        self.exact: KVArena = arena([(EXACT,) * KV_HEADS] * batch)
        self.query, self.maps = random(batch, HEADS, 1, SIZE), maps()
        self.bytes = sum(level.count * level.form.entry_bytes for level in self.levels)
        self.bytes += batch * KV_HEADS * EXACT * 2 * SIZE * TYPE.itemsize

    def call(self, **settings: Any) -> Callable[[], object]:
        """All that a layer launches."""
        tables, forms = [level.table for level in self.levels], [level.form for level in self.levels]
        return lambda: launch_packed_attention(
            self.query, PackedKV(self.exact.table, tables, forms, self.maps), SIZE**-0.5, None, None, **settings
        )


def setups(batch: int, length: int, name: str) -> list[Setup]:
    """Input sets that a cache does not hold together."""
    first = Setup(batch, length, name)
    count = max(4, min(16, 10**9 // first.bytes))
    return [first, *(Setup(batch, length, name) for _ in range(count - 1))]


def attention(batch: int, length: int, name: str, bandwidth: float, **settings: Any) -> dict[str, float]:
    """One shape in one format."""
    found = setups(batch, length, name)
    seconds = device_seconds([setup.call(**settings) for setup in found])
    floor = found[0].bytes / bandwidth
    return {"us": seconds * 1e6, "floor_us": floor * 1e6, "over_floor": seconds / floor, "bytes": found[0].bytes}


def split(batch: int, length: int, name: str, **join_settings: int) -> list[tuple[str, float]]:
    """Microseconds of each kernel by itself, begun when the one before is over."""
    found = setups(batch, length, name)
    prepare, decode, join = [], [], []
    for setup in found:
        m, q = setup.maps, setup.query
        start = (q, m.key_mean, m.key_dual, m.key_bound, SIZE**-0.5, None)
        prepare.append(lambda start=start: launch_prepare(*start))
        tables, forms = [level.table for level in setup.levels], [level.form for level in setup.levels]
        middle = (q, launch_prepare(*start), setup.exact.table, tables, forms, SIZE, SIZE**-0.5, None)
        decode.append(lambda middle=middle: launch_packed_decode(*middle, early=False))
        last = (q, launch_packed_decode(*middle), forms, m.value_mean, m.value_back, None)
        join.append(lambda last=last: launch_packed_join(*last, early=False, **join_settings))
    calls = {"prepare": prepare, "decode": decode, "join": join}
    return [(kernel, device_seconds(some) * 1e6) for kernel, some in calls.items()]


def packing(length: int, name: str, **settings: int) -> dict[str, float]:
    """All entries of a prompt to lines, from what a projection leaves."""
    form, the_maps = form_of(FORMATS[name][0][0]), maps()
    dense = [[random(1, length, KV_HEADS, SIZE).transpose(1, 2) for _ in range(2)] for _ in range(4)]
    targets = [Level(form, KV_HEADS, length) for _ in dense]
    spans = torch.zeros(KV_HEADS, 3, dtype=torch.int64, device="cuda")

    def pack(pair: list[torch.Tensor], target: Level) -> Callable[[], object]:
        given = Transfer(*pair, None, target.table, form, the_maps, spans, length, length, None)
        return lambda: launch_pack(given, **settings)

    seconds = device_seconds([pack(p, t) for p, t in zip(dense, targets, strict=True)])
    moved = length * KV_HEADS * (2 * SIZE * TYPE.itemsize + form.entry_bytes)
    return {"us": seconds * 1e6, "bandwidth": moved / seconds}


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--parts", default="attention,pack", help="attention, split, pack")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.formats.split(",")
    if arguments.compile is not None:
        compile_all(names, arguments.compile)
        return
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{header()}; copy {bandwidth / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    if arguments.tune:
        tune(names, bandwidth, rows)
    parts = [] if arguments.tune else arguments.parts.split(",")
    if "attention" in parts:
        print(f"{'':12s}{'bfloat16':>10s}" + "".join(f"{name:>9s}{'x floor':>8s}" for name in names))
        for batch, length in SHAPES:
            lengths = [(length,) * KV_HEADS] * batch
            exact = decode_attention(batch, lengths)["us"]
            line = f"{batch:3d} x {length:5d} {exact:10.1f}"
            for name in names:
                result = attention(batch, length, name, bandwidth)
                rows.append({"shape": [batch, length], "format": name, "bfloat16_us": exact, **result})
                line += f"{result['us']:9.1f}{result['over_floor']:8.2f}"
                torch.cuda.empty_cache()
            print(line, flush=True)
    if "split" in parts:
        for batch, length in SHAPES:
            for name in names:
                found = split(batch, length, name)
                rows.append({"shape": [batch, length], "format": name, "split": found})
                line = "  ".join(f"{kernel} {us:6.1f}" for kernel, us in found)
                print(f"{batch:3d} x {length:5d} {name:5s} {line}", flush=True)
                torch.cuda.empty_cache()
    if "pack" in parts:
        for length in (8192, 32768):
            for name in names[:3]:
                result = packing(length, name)
                rows.append({"pack": length, "format": name, **result})
                print(f"pack {length} entries a head, {name}: {result['us']:8.1f} us", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:  # noqa: PTH123
            json.dump({"setup": header(), "copy_bandwidth": bandwidth, "rows": rows}, file, indent=1)


def tuned() -> list[dict[str, Any]]:
    """Launch settings, one change at a time and some together."""
    return [
        {}, {"joined": 32}, {"block": 16}, {"block": 16, "joined": 32}, {"block": 16, "each": 16}, {"block": 64},
        {"stages": 2}, {"each": 16}, {"each": 8, "block": 64}, {"early": False}, {"extra": 0}, {"extra": 96},
        {"beside": 600}, {"beside": 1600}, {"beside": 3200}, {"exact_block": 32}, {"warps": 2, "block": 64, "each": 8},
        {"warps": 2, "block": 32}, {"warps": 4, "block": 128, "each": 4},
    ]  # fmt: skip


def compile_all(names: list[str], part: int) -> None:
    """Compile every twelfth setting: what takes most of the time of a tuning."""
    for index, settings in enumerate(tuned()):
        if index % WORKERS == part:
            for name in names:
                with contextlib.suppress(Exception):  # a setting that the device has no room for
                    attention(1, 512, name, 1e12, **settings)


def tune(names: list[str], bandwidth: float, rows: list[dict[str, Any]]) -> None:
    """Other launch settings, the best first."""
    command = [sys.executable, __file__, "--formats", ",".join(names), "--compile"]
    workers = [subprocess.Popen([*command, str(part)]) for part in range(WORKERS)]
    for worker in workers:
        worker.wait()
    changes = tuned()
    for batch, length in ((16, 8192), (1, 32768)):
        for name in names:
            found = []
            for settings in changes:
                try:
                    result = attention(batch, length, name, bandwidth, **settings)
                except Exception as error:  # a setting that the device has no room for
                    print(f"{name} {settings}: {type(error).__name__} {str(error)[:80]}")
                    continue
                found.append((result["us"], str(settings)))
                rows.append({"shape": [batch, length], "format": name, "settings": settings, **result})
                torch.cuda.empty_cache()
            print(f"{batch} x {length} {name}: us, settings")
            print("   " + "  ".join(f"{us:.1f} {settings}" for us, settings in sorted(found)), flush=True)
    if "K4V4" not in names:
        return
    for batch, length in ((16, 8192), (1, 8192)):
        for whole, heads, out, parts, warps in (
            (True, 4, 128, 16, 8), (True, 4, 64, 8, 4), (True, 1, 32, 64, 4), (False, 1, 128, 32, 4),
            (False, 1, 128, 32, 2), (False, 1, 128, 16, 4), (False, 2, 128, 16, 4), (False, 4, 128, 16, 8),
        ):  # fmt: skip
            settings = {"whole": whole, "heads_each": heads, "out_each": out, "parts_each": parts, "warps": warps}
            us = dict(split(batch, length, "K4V4", **settings))["join"]
            print(f"join {batch} x {length} {settings}: {us:.1f} us", flush=True)
    for name in ("K4V4", "K6V4"):
        for block, warps in ((64, 4), (64, 8), (128, 8), (32, 4), (128, 4)):
            us = packing(8192, name, block=block, warps=warps)["us"]
            print(f"pack 8192 {name}, block {block}, {warps} warps: {us:.1f} us", flush=True)


if __name__ == "__main__":
    main()
