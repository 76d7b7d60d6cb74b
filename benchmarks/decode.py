"""Milliseconds a token of `generate`: transformers' caches, ours, and the floor that memory sets.

    python benchmarks/decode.py                                    # the whole table, on CUDA
    python benchmarks/decode.py --batches 1 --contexts 8192        # one corner of it
    python benchmarks/decode.py --kinds ours --kv-dtype int8       # ours with what is kept in 8 bits; the floor follows
    python benchmarks/decode.py --kinds ours --kv-dtype k4v2+k4v4+k6v6+int8 --rungs 0.6,0.2,0.1,0.1  # in four widths

Llama-3-8B's shape in bfloat16 with random weights, its embedding shared with the output layer, so
that all weights are read for each token. Caches are filled with random entries instead of a
prefill; ours is filled through its own pruning step with a policy that keeps the newest share, so
that decoding runs over what it would run over. Then `generate` makes tokens, and the median time
between two of them counts, the first ones (capture, compilation) left out and told apart. The mean
beside it has the growth of the storage in it. Ours lets the host be one token ahead of the device
and no more, so that intervals are the device's all the same.

    floor    (weights + kept K/V) / bandwidth of a copy on the same device
    device   time of one replay of the captured step: generate's own work left out
    second   seconds before the second token, which holds the capture
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, StaticCache

import refreekv
from devices import copy_bandwidth, header
from overhead import SHAPES
from refreekv.core.quantisation import Ladder
from refreekv.core.selection import Selection
from refreekv.engines.transformers.attachment import Attachment
from refreekv.engines.transformers.key_codes import key_codes
from refreekv.engines.transformers.naming import NAME
from refreekv.policies import LayerView, Policy
from refreekv.pruning.calls import AttentionCall

TYPE = torch.bfloat16


@dataclass(frozen=True)
class Share(Policy):
    """The newest share of a prompt of one length, in shares of number formats; of anything else everything."""

    name = "share"
    length: int = 0
    share: float = 1.0
    rungs: tuple[float, ...] = (1.0,)

    def select(self, view: LayerView) -> Selection | None:
        """The newest entries, drawn into rungs."""
        batch, heads, entries, _ = view.keys.shape
        if entries != self.length or (self.share == 1.0 and len(self.rungs) == 1):
            return None
        columns = torch.arange(entries, device=view.keys.device)
        kept = (columns >= entries - round(self.share * entries)).expand(batch, 1, -1)
        bounds = torch.tensor(self.rungs, device=columns.device).cumsum(0)[:-1]
        drawn = torch.rand(batch, heads, entries, device=columns.device)
        return Selection(kept, levels=torch.bucketize(drawn, bounds).to(torch.uint8))


class Stamps(LogitsProcessor):
    """Notes when each token's logits are asked for; `generate` waits for the device, or for the token before."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note the time and change nothing."""
        self.times.append(time.perf_counter())
        return scores


def entries(config: LlamaConfig, batch: int, length: int) -> torch.Tensor:
    """Random keys or values of one layer."""
    size = config.hidden_size // config.num_attention_heads
    return torch.randn(batch, config.num_key_value_heads, length, size, device="cuda", dtype=TYPE)


@torch.inference_mode(False)
@torch.no_grad()
def filled(
    model: Any,
    kind: str,
    batch: int,
    context: int,
    budget: float,
    decode: str,
    kv_dtype: str | None,
    rungs: tuple[float, ...],
) -> Any:
    """A cache that holds ``context`` tokens."""
    config = model.config
    if kind == "dynamic":
        cache: Any = DynamicCache(config=config)
    elif kind == "static":
        cache = StaticCache(config=config, max_cache_len=context + 128)
    else:
        cache = refreekv.ReFreeKVCache(model, Share(context, budget, rungs), decode=decode, kv_dtype=kv_dtype)
        if cache.kv_dtype is not None:
            # Entries come without a forward, which would measure them.
            cache.state.key_codes, cache.state.codes_wanted = key_codes(model), False
    query = torch.randn(batch, config.num_attention_heads, 1, config.hidden_size // config.num_attention_heads)
    query = query.to("cuda", TYPE).expand(-1, -1, context, -1)
    for index in range(config.num_hidden_layers):
        cache.update(entries(config, batch, context), entries(config, batch, context), index)
        if kind == "ours":
            cache.layers[index].after_attention(AttentionCall(query, None))
            cache.state.finish()
    return cache


@torch.no_grad()
def generate(model: Any, cache: Any, batch: int, context: int, tokens: int) -> list[float]:
    """Seconds between tokens; the first is that of the first token."""
    ids = torch.randint(1, 1000, (batch, context + 1), device="cuda")
    stamps = Stamps()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **{NAME: cache},
        do_sample=False, eos_token_id=None, pad_token_id=0, logits_processor=LogitsProcessorList([stamps]),
    )  # fmt: skip
    torch.cuda.synchronize()
    return [after - before for before, after in zip(stamps.times, stamps.times[1:], strict=False)]


def entry_bytes(config: LlamaConfig, kv_dtype: str | None, rungs: tuple[float, ...] = (1.0,)) -> float:
    """Bytes of one token's key and value in one KV head; of codes with their scales, by the shares of rungs."""
    size = config.hidden_size // config.num_attention_heads
    if kv_dtype is None:
        return 2 * size * TYPE.itemsize
    kinds = Ladder.parse(kv_dtype).rungs
    return sum(share * kind.entry_bytes((size, size)) for share, kind in zip(rungs, kinds, strict=True))


def kept_bytes(layers: Any) -> int:
    """Bytes of all that is kept: exact entries, codes, what says which rung they are in, and means; without room."""
    held = 0
    for layer in layers:
        storage = layer.ragged
        held += sum(sum(map(sum, arena.lengths)) * sum(arena.line_bytes) for arena in storage.tables)
        if storage.coding is not None:
            held += storage.lines.members.nbytes + sum(part.nbytes for part in storage.coding.means)
    return held


def replay_seconds(model: Any) -> float:
    """Time of one replay of the step that was captured last. Its cache is of no use afterwards."""
    step = list(model.__dict__["_refreekv_attachment"]._decoder._steps.values())[-1]
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step._graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure(
    model: Any, kind: str, batch: int, context: int, budget: float, decode: str, tokens: int, kv_dtype: str | None,
    rungs: tuple[float, ...],
) -> dict[str, Any]:  # fmt: skip
    """One point of the table."""
    gc.collect()
    torch.cuda.empty_cache()
    row: dict[str, Any] = {"kind": kind, "batch": batch, "context": context, "budget": budget}
    cache = filled(model, kind, batch, context, budget, decode, kv_dtype, rungs)
    intervals = generate(model, cache, batch, context, tokens)
    steady = intervals[len(intervals) // 3 :]
    row |= {"ms": statistics.median(steady) * 1e3, "mean_ms": statistics.mean(steady) * 1e3}
    row |= {"slowest_ms": max(steady) * 1e3, "second_s": intervals[1]}
    if kind == "ours":
        layers = cache.pruned_layers
        row["kept_bytes"] = kept_bytes(layers)
        row["allocated_bytes"] = sum(layer.ragged.nbytes for layer in layers)
        if decode != "eager":
            row["device_ms"] = replay_seconds(model) * 1e3
    else:
        row["kept_bytes"] = batch * context * model.config.num_hidden_layers * 4096
    return row


def main() -> None:
    """Parse the arguments, measure, print a table and maybe write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8,16,32")
    parser.add_argument("--contexts", default="4096,8192,32768")
    parser.add_argument("--budgets", default="1.0,0.5,0.25")
    parser.add_argument("--kinds", default="dynamic,ours", help="of dynamic, static, ours")
    parser.add_argument("--dynamic", default="", help="points of the dynamic cache, such as 1x8192; default: all")
    parser.add_argument("--static", default="1x8192,8x4096", help="points at which static caches are compiled")
    parser.add_argument("--decode", default="graph", help="graph or eager")
    parser.add_argument("--kv-dtype", help="how ours stores what it keeps, such as int8; default: as computed")
    parser.add_argument(
        "--rungs", default="1.0", help="shares of what is kept in each of several formats of --kv-dtype"
    )
    parser.add_argument("--tokens", type=int, default=36)
    parser.add_argument("--seconds", type=float, default=1e9, help="no new point after so long")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    started = time.monotonic()
    config = LlamaConfig(**SHAPES["llama-3-8b"], max_position_embeddings=131072, tie_word_embeddings=True)
    config.dtype = TYPE
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(TYPE)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    bandwidth = copy_bandwidth()
    setup = f"{header()}; copy {bandwidth / 1e12:.2f} TB/s; weights {weights / 1e9:.2f} GB; decode={arguments.decode}"
    rungs = tuple(float(share) for share in arguments.rungs.split(","))
    if arguments.kv_dtype:
        setup += f"; ours in {arguments.kv_dtype}, shares {arguments.rungs}"
    print(setup)
    print(f"{'':8s} {'batch':>5s} {'context':>7s} {'budget':>6s} {'ms/token':>9s} {'mean':>7s} {'device':>7s}"
          f" {'floor':>6s} {'x floor':>7s} {'second s':>8s} {'alloc':>6s}")  # fmt: skip
    kinds = arguments.kinds.split(",")
    batches, contexts = ([int(n) for n in part.split(",")] for part in (arguments.batches, arguments.contexts))
    points = []
    for batch in batches:
        for context in contexts:
            point = f"{batch}x{context}"
            if "dynamic" in kinds and (not arguments.dynamic or point in arguments.dynamic.split(",")):
                points.append(("dynamic", batch, context, 1.0))
            if "static" in kinds and point in arguments.static.split(","):
                points.append(("static", batch, context, 1.0))
            if "ours" in kinds:
                points += [("ours", batch, context, float(budget)) for budget in arguments.budgets.split(",")]
    rows: list[dict[str, Any]] = []
    free = torch.cuda.mem_get_info()[0]
    # What is compiled comes last, and baselines run on the model as refreekv leaves it.
    points.sort(key=lambda point: ("ours", "dynamic", "static").index(point[0]))
    attachment: Attachment | None = Attachment.attach(model)  # keeps captured steps from one cache to the next
    for kind, batch, context, budget in points:
        name = f"{kind:8s} {batch:5d} {context:7d} {budget:6.2f}"
        if time.monotonic() - started > arguments.seconds:
            print(f"{name} out of time")
            continue
        one = entry_bytes(config, arguments.kv_dtype if kind == "ours" else None, rungs)
        expected = batch * context * config.num_hidden_layers * config.num_key_value_heads * one * budget
        if expected * (1.1 if kind == "ours" else 1.25) + 5e9 > free:
            print(f"{name} does not fit")
            continue
        if kind != "ours" and attachment is not None:
            attachment.detach()
            attachment = None
        tokens = arguments.tokens if kind != "dynamic" else max(8, arguments.tokens // 4)
        try:
            row = measure(model, kind, batch, context, budget, arguments.decode, tokens, arguments.kv_dtype, rungs)
        except (RuntimeError, ValueError, TypeError) as error:
            print(f"{name} {type(error).__name__}: {str(error)[:300]}")
            continue
        row["floor_ms"] = (weights + row["kept_bytes"]) / bandwidth * 1e3
        rows.append(row)
        print(f"{name} {row['ms']:9.2f} {row['mean_ms']:7.2f} {row.get('device_ms', 0):7.2f} {row['floor_ms']:6.2f}"
              f" {row['ms'] / row['floor_ms']:7.2f} {row['second_s']:8.2f}"
              f" {row.get('allocated_bytes', row['kept_bytes']) / row['kept_bytes']:6.3f}", flush=True)  # fmt: skip
        if arguments.json:
            with open(arguments.json, "w") as file:  # noqa: PTH123
                json.dump({"setup": setup, "bandwidth": bandwidth, "weights": weights, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
