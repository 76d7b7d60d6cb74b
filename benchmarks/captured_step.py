"""The captured step of a coded cache alone: milliseconds a replay, its floor, and what its kernels take.

    python benchmarks/captured_step.py                                  # Llama-3-8B's shape, 16 and 32 x 8192, on CUDA
    python benchmarks/captured_step.py --kv-dtype k4v4 --shares 1 --no-profile

No prompt is read: tables lead to random codes, whose lengths differ a little from head to head as entries do that are
drawn, and to 68 exact entries a head, to which nothing is added. A minute with the kernels' compilation. The profile
is that of the last of three replays: for each kernel its mean time, and the gap between it and what ran before, which
is negative where kernels begin early and wait. The floor is (weights + kept K/V) / bandwidth of a copy.
"""

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from devices import copy_bandwidth, header
from overhead import SHAPES
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.quantisation import KVDtype
from refreekv.engines.transformers.attachment import attached
from refreekv.engines.transformers.graph import Step
from refreekv.engines.transformers.step_tables import Form
from refreekv.kernels import Format

EXACT = 68
REPLAYS = 25


def table_of(keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """Segments one after the other in two tensors, with no room behind them; ``sizes`` are bytes of an entry."""
    starts = lengths.cumsum(0) - lengths
    places = [part.data_ptr() + starts * size for part, size in zip((keys, values), sizes, strict=True)]
    return torch.stack([*places, lengths, lengths], 1)


def random_layer(
    segments: int, context: int, form: Form, shares: list[float], device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tables of exact entries and of each format's lines, and the memory that they lead to."""
    size, dtype = form.exact.sizes[0], form.exact.key_type
    exact = torch.randn(2, segments * EXACT, size, device=device, dtype=dtype)
    all_exact = torch.full((segments,), EXACT, device=device)
    tables, held = [table_of(exact[0], exact[1], all_exact, (size * dtype.itemsize,) * 2)], [exact]
    for packed, share in zip(form.packed, shares, strict=True):
        spread = torch.randn(segments, device=device) * (context * share * (1 - share)) ** 0.5
        lengths = (context * share + spread).round().long()
        count = int(lengths.sum())
        lines = torch.randint(0, 256, (count, packed.line_bytes), dtype=torch.uint8, device=device)
        factors = (torch.rand(count, 2, device=device) + 0.5).half()
        tables.append(table_of(lines, factors, lengths, (packed.line_bytes, 4)))
        held += [lines, factors]
    return tables, held


def replay(step: Step) -> None:
    """The step once; without a graph it is run."""
    if step._graph is not None:
        step._graph.replay()
        return
    with torch.no_grad():
        step._run()


def milliseconds(step: Step) -> list[float]:
    """Times of replays, each waited for."""
    times = []
    for _ in range(REPLAYS + 3):
        if step.ids.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay(step)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            replay(step)
            times.append(1e3 * (time.perf_counter() - started))
    return times[3:]


def profile(step: Step, replays: int = 3) -> None:
    """Print what the kernels of a replay take, products and norms apart by what they follow."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(replays):
            replay(step)
        torch.cuda.synchronize()
    spans: list[tuple[int, int, str]] = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in found.profiler.kineto_results.events()
        if "CUDA" in str(event.device_type()) and event.duration_ns() > 0 and "Graph" not in event.name()
    )
    spans = spans[-(len(spans) // replays) :]
    taken: dict[str, list[float]] = defaultdict(list)
    gaps: dict[str, list[float]] = defaultdict(list)
    over, before = spans[0][0], ""
    for begin, end, name in spans:
        label = name[:44] + (f" after {before[:20]}" if "linear" in name or "norm" in name else "")
        taken[label].append((end - begin) / 1e3)
        gaps[label].append((begin - over) / 1e3)
        over, before = max(over, end), name
    print(f"{len(spans)} kernels, {(over - spans[0][0]) / 1e6:.3f} ms from the first to the last")
    for label in sorted(taken, key=lambda label: -sum(taken[label])):
        us, gap = taken[label], statistics.mean(gaps[label])
        print(f"  {sum(us) / 1e3:7.3f} ms  {statistics.mean(us):8.2f} us x {len(us):4d}  gap {gap:7.2f}  {label}")


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="default: the shape's")
    parser.add_argument("--batches", default="16,32")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--kv-dtype", default="k4v2+k4v4+k6v4+k7v6")
    parser.add_argument("--shares", default="0.41,0.15,0.10,0.34", help="of the entries in each format")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    config = LlamaConfig(**SHAPES[arguments.shape], max_position_embeddings=131072, tie_word_embeddings=True)
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers
    config.dtype = torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    with device:
        torch.set_default_dtype(config.dtype)
        model: Any = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    bandwidth = copy_bandwidth() if cuda else float("nan")
    print(f"{header() if cuda else 'CPU'}; copy {bandwidth / 1e12:.2f} TB/s; weights {weights / 1e9:.2f} GB")
    size, kv_heads = config.hidden_size // config.num_attention_heads, config.num_key_value_heads
    kinds, shares = arguments.kv_dtype.split("+"), [float(share) for share in arguments.shares.split(",")]
    packed: list[PackedFormat] = [KVDtype(kind).form((size, size), sorted_keys=True) for kind in kinds]
    form = Form(Format((size, size), config.dtype, config.dtype), tuple(packed))
    forward, layers = model.forward, config.num_hidden_layers
    with attached(model):
        for batch in map(int, arguments.batches.split(",")):
            step = Step(model, forward, batch, [batch * kv_heads] * layers, [form] * layers)
            kept = []
            for reads in step.reads:
                tables, held = random_layer(batch * kv_heads, arguments.context, form, shares, device)
                for mine, table in zip(reads.tables, tables, strict=True):
                    mine.copy_(table)
                kept += held
            step.positions.fill_(arguments.context)
            times = milliseconds(step)
            floor = (weights + sum(part.nbytes for part in kept)) / bandwidth * 1e3
            ms = statistics.median(times)
            print(f"{batch} x {arguments.context} {arguments.kv_dtype}: {ms:.3f} ms ({min(times):.3f} to "
                  f"{max(times):.3f}), floor {floor:.3f}, {ms / floor:.3f} x", flush=True)  # fmt: skip
            if cuda and not arguments.no_profile:
                profile(step)
            del step, kept, held


if __name__ == "__main__":
    main()
