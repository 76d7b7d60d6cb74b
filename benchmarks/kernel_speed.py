"""The kernels alone, against the bandwidth of a copy on the same device.

    python benchmarks/kernel_speed.py                # a Llama-3-8B layer: 32 query heads, 8 KV heads of 128
    python benchmarks/kernel_speed.py --tune         # decode attention at other launch settings

Bandwidth counts the bytes that must move: of decode attention every key and value once, of a
gather and a move every entry read and written; packed lines: packed_speed.py. Medians of CUDA
graph replays over several input sets, 2 GB and more together where the kernel is bound by memory.
"""

import argparse
import json
from collections.abc import Callable, Sequence

import torch

from devices import copy_bandwidth, device_seconds, header
from refreekv import kernels, policies
from refreekv.core.probes import attention_rows
from refreekv.core.selection import uni_metric_cut
from refreekv.kernels import fused, linear
from refreekv.kernels.cut import launch_cut
from refreekv.kernels.decode import launch_ragged_decode, multiprocessors
from refreekv.policies import LayerView
from refreekv.storage.arena import KVArena

HEADS, KV_HEADS, SIZE = 32, 8, 128
TYPE = torch.bfloat16


def random(*shape: int) -> torch.Tensor:
    """Normally distributed numbers."""
    return torch.randn(*shape, device="cuda", dtype=TYPE)


def arena(lengths: list[tuple[int, ...]], size: int = SIZE) -> KVArena:
    """An arena of random entries."""
    empty = torch.empty(0, size, device="cuda", dtype=TYPE)
    made = KVArena.like(empty, empty, lengths)
    made.keys.normal_()
    made.values.normal_()
    return made


def sets(bytes_of_one: int, most: int = 8) -> int:
    """Input sets that make 2 GB together, four at least."""
    return max(2, min(most, 2 * 10**9 // bytes_of_one))


def ragged(batch: int, mean: int, low: float, high: float) -> list[tuple[int, ...]]:
    """Lengths spread uniformly between shares of the longest, rescaled to a given mean."""
    share = torch.rand(batch * KV_HEADS) * (high - low) + low
    lengths = (share / share.mean() * mean).round().long()
    lengths[-1] += batch * KV_HEADS * mean - int(lengths.sum())
    return [tuple(row) for row in lengths.view(batch, KV_HEADS).tolist()]


def decode_attention(batch: int, lengths: list[tuple[int, ...]], size: int = SIZE, **settings: int) -> dict[str, float]:
    """Attention of one token a row."""
    entries = sum(map(sum, lengths))
    moved = entries * 2 * size * TYPE.itemsize
    arenas = [arena(lengths, size) for _ in range(sets(moved))]
    queries = [random(batch, HEADS, 1, size) for _ in arenas]
    form = arenas[0].form

    def call(query: torch.Tensor, table: torch.Tensor) -> Callable[[], object]:
        return lambda: launch_ragged_decode(query, table, form, size**-0.5, None, None, **settings)

    seconds = device_seconds([call(q, a.table) for q, a in zip(queries, arenas, strict=True)])
    return {"us": seconds * 1e6, "bandwidth": moved / seconds}


def storage_kernels() -> list[tuple[str, dict[str, float]]]:
    """Gather, move and append."""
    rows = []
    for length in (8192, 32768):
        dense = [(random(1, KV_HEADS, length, SIZE), random(1, KV_HEADS, length, SIZE)) for _ in range(4)]
        kept = length // 2
        lengths, spans = [(kept,) * KV_HEADS], [(0, 4, length - kept)] * KV_HEADS
        targets = [KVArena.like(*pair, lengths) for pair in dense]
        where = torch.tensor(spans, device="cuda")

        def gather(pair, target, where=where, length=length, kept=kept):
            return lambda: kernels.gather(*pair, target.table, where, target.form, end=length, longest=kept)

        seconds = device_seconds([gather(p, t) for p, t in zip(dense, targets, strict=True)])
        moved = 2 * kept * KV_HEADS * 2 * SIZE * TYPE.itemsize
        rows.append((f"gather half of {length}, K and V", {"us": seconds * 1e6, "bandwidth": moved / seconds}))
        sources = [arena(lengths) for _ in targets]

        def move(source, target, kept=kept):
            return lambda: kernels.move(
                source.table, target.table, key_bytes=2 * SIZE, value_bytes=2 * SIZE, longest=kept
            )

        seconds = device_seconds([move(s, t) for s, t in zip(sources, targets, strict=True)])
        rows.append((f"move {kept} entries a head", {"us": seconds * 1e6, "bandwidth": moved / seconds}))
    for batch in (1, 32):
        growth = arena([(1000,) * KV_HEADS] * batch)
        new = random(batch, 1, KV_HEADS, SIZE).transpose(1, 2)
        seconds = device_seconds([lambda n=new, r=growth: kernels.append(n, n, r.table, r.form)], rounds=20)
        rows.append((f"append, batch {batch}", {"us": seconds * 1e6}))
    return rows


def probe_kernels() -> list[tuple[str, dict[str, float]]]:
    """Probe reductions, beside the rows of the last queries in torch; and what a policy makes of them."""
    rows = []
    for length in (8192, 32768):
        # Keys and queries as a projection leaves them.
        keys = [random(1, length, KV_HEADS, SIZE).transpose(1, 2) for _ in range(4)]
        queries, columns = random(1, length, HEADS, SIZE).transpose(1, 2), torch.arange(length, device="cuda")
        each = length // 256
        last, spread = slice(-64, None), slice(each - 1, None, each)
        for name, part, distance, sums in (("64 last", last, 0, True), ("256 spread, peaks only", spread, 64, False)):

            def call(key, part=part, distance=distance, sums=sums, queries=queries, columns=columns):
                return lambda: kernels.probe_reductions(
                    queries[:, :, part], key, kernels.Probes(columns[None, part], distance=distance, sums=sums)
                )

            seconds = device_seconds([call(key) for key in keys], 10)
            rows.append((f"probe reductions, {name}, {length} keys", {"us": seconds * 1e6}))
        seconds = device_seconds([lambda k=key, q=queries: attention_rows(q[:, :, -64:], k) for key in keys], 10)
        rows.append((f"  rows of 64 queries in torch, {length} keys", {"us": seconds * 1e6}))
        peak, mean, far = (torch.rand(1, KV_HEADS, length, device="cuda") ** 20 for _ in range(3))
        view = LayerView(
            keys[0], keys[0], None, None, 0, 1, heads=HEADS, copy_scores=torch.zeros(1, KV_HEADS, device="cuda"),
            window=kernels.ProbeReductions(peak, mean), spread=kernels.ProbeReductions(far, None),
        )  # fmt: skip
        row = torch.rand(1, HEADS, 1, length, device="cuda").softmax(-1)
        calls = {
            "adaptive's choice": lambda v=view: policies.create("adaptive").select(v),
            "entries of 8 heads listed": lambda p=peak: kernels.kept_first(p > 1e-3),
            "the Uni-Metric's cut": lambda r=row: launch_cut(r[:, :, 0], 4, 0.3, False),
            "  the same in torch": lambda r=row: uni_metric_cut(
                r[:, :, 0], sinks=4, threshold=0.3, includes_sinks=False
            ),
        }
        rows += [(f"{n}, {length} keys", {"us": device_seconds([c], 10, rounds=5) * 1e6}) for n, c in calls.items()]
    return rows


def small_kernels() -> list[tuple[str, dict[str, float]]]:
    """What is fused into the captured step, and the products with weights around it."""
    rows = []
    for batch in (1, 32):
        x, weight, wide = random(batch, 1, 4096), random(4096), random(batch, 1, 14336)
        query, key = random(batch, HEADS, 1, SIZE), random(batch, KV_HEADS, 1, SIZE)
        angle = random(batch, 1, SIZE)
        calls = {
            "norm": lambda x=x, w=weight: fused.rms_norm(x, w, 1e-5, False),
            "gated": lambda x=wide: fused.gated(x, x, False),
            "rotary": lambda q=query, k=key, a=angle: fused.rotary(q, k, a, a),
        }
        rows += [(f"{n}, batch {batch}", {"us": device_seconds([c], rounds=50) * 1e6}) for n, c in calls.items()]
    return rows


SHAPES = {
    "q, k, v": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate, up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
    "logits": ((128256,), 4096),
}


def products(batch: int, tilings: Sequence[linear.Tiling | None]) -> list[tuple[str, dict[str, float]]]:
    """Products with a layer's weights: torch's and ours."""
    rows = []
    for name, (outs, size) in SHAPES.items():
        one = sum(outs) * size * 2
        weights = [[random(out, size) for out in outs] for _ in range(max(2, min(12, 10**9 // one)))]

        def note(what: str, calls: list[Callable[[], object]], one: int = one) -> None:
            seconds = device_seconds(calls, 8)
            rows.append((what, {"us": seconds * 1e6, "bandwidth": one / seconds}))

        x = random(batch, 1, size)
        note(
            f"torch, {name}, batch {batch}",
            [lambda ws=ws, x=x: [torch.nn.functional.linear(x, w) for w in ws] for ws in weights],
        )
        for tiling in tilings:
            if len(outs) == 2:
                calls = [lambda ws=ws, x=x, t=tiling: linear.gated_linear(x, *ws, False, t) for ws in weights]
            else:
                calls = [lambda ws=ws, x=x, t=tiling: linear.linears(x, ws, [None] * len(ws), t) for ws in weights]
            note(f"ours, {name}, batch {batch} {'' if tiling is None else tuple(tiling)}", calls)
    return rows


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--parts", default="decode,storage,probe,small,products", help="of all that is measured")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{header()}; copy {bandwidth / 1e12:.2f} TB/s")
    rows: list[tuple[str, dict[str, float]]] = []

    def show(name: str, result: dict[str, float]) -> None:
        rows.append((name, result))
        share = f"{result['bandwidth'] / bandwidth:8.1%} of copy" if "bandwidth" in result else ""
        print(f"{name:58s} {result['us']:10.1f} us {share}", flush=True)

    equal = [(8192,) * KV_HEADS] * 16
    wanted = arguments.parts.split(",")
    if arguments.tune:
        multi = multiprocessors(torch.device("cuda", torch.cuda.current_device()))
        for lengths, name in (
            (equal, "16 x 8192"),
            ([(8192,) * KV_HEADS], "1 x 8192"),
            ([(2048,) * KV_HEADS], "1 x 2048"),
        ):
            for block, stages, warps in (
                (64, 3, 4),
                (64, 2, 4),
                (64, 4, 4),
                (128, 2, 4),
                (128, 2, 8),
                (128, 3, 8),
                (32, 4, 4),
            ):
                for per in (1, 2, 3, 4):
                    settings = {"programs": per * multi, "block": block, "stages": stages, "warps": warps}
                    try:
                        show(f"decode {name} {settings}", decode_attention(len(lengths), lengths, **settings))
                    except Exception as error:  # a setting that the device has no room for
                        print(f"decode {name} {settings}: {type(error).__name__}")
                        break
        wanted = []
    if "decode" in wanted:
        for batch, length in ((1, 8192), (1, 32768), (16, 8192), (16, 2048), (32, 8192)):
            show(f"decode attention {batch} x {length}", decode_attention(batch, [(length,) * KV_HEADS] * batch))
        show("decode attention 16 x 8192 mean, uniform 10-100%", decode_attention(16, ragged(16, 8192, 0.1, 1.0)))
        show("decode attention 16 x 8192 mean, one head of 8 full", decode_attention(16, [(32768,) + (4681,) * 7] * 16))
        for size in (64, 80, 96, 256):
            show(f"decode attention 16 x 8192, head size {size}", decode_attention(16, equal, size))
    parts = {
        "storage": [storage_kernels],
        "probe": [probe_kernels],
        "small": [small_kernels],
        "products": [lambda b=b: products(b, [None]) for b in (1, 16, 32)],
    }
    for part in [part for name, some in parts.items() if name in wanted for part in some]:
        for name, result in part():
            show(name, result)
    if arguments.json:
        with open(arguments.json, "w") as file:  # noqa: PTH123
            json.dump({"setup": header(), "copy_bandwidth": bandwidth, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
