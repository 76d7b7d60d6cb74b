r"""Peak memory of reading a prompt, against what plans say: full cache, chunks, chunks that are coded.

    python benchmarks/prompt_memory.py --shape llama-3-8b --lengths 8192,32768,65536 --chunk 2048
    python benchmarks/prompt_memory.py --shape llama-3-8b --lengths 131072 --limit 24GiB

Random weights of a named shape in bfloat16, random tokens, `generate` for two tokens. Peaks are those of
``torch.cuda.max_memory_allocated`` less what was allocated before (the weights); forecasts are
`planner.memory.use` without weights and reserve. With --limit the process may take no more, weights included: what does
not fit says so, and the row ``by itself`` is `compress` without a chunk size, which finds chunks by its own forecast.
"""

import argparse
import gc
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import refreekv
from refreekv import KVDtype
from refreekv.core.footprint import Reader
from refreekv.core.units import format_size, parse_bytes
from refreekv.evaluation.tables import markdown_table
from refreekv.planner.geometry import Geometry, LayerKV
from refreekv.planner.memory import Load, Machine, Scenario, use

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256},
    "qwen2.5-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                     "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
    "small": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024},
}  # fmt: skip


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any] | None, int | None, Scenario | None]]:
    """Names, what `compress` is given (None: nothing), chunk, and the planner's scenario."""
    kept, policy = arguments.kept, f"snapkv:ratio={arguments.kept}"

    def scenario(number: str | None, prompt: str | None) -> Scenario:
        return Scenario("", lambda _: kept, KVDtype.parse(number), prompt_number=KVDtype.parse(prompt))

    full = Scenario("", lambda _: 1.0, compacts=False)
    yield "full cache, one call", None, None, full
    yield "full cache, chunks", None, arguments.chunk, full
    yield "one call", {"policy": policy}, None, scenario(None, None)
    yield "chunks, not coded", {"policy": policy, "prompt_dtype": None}, arguments.chunk, scenario(None, None)
    for number in (None, "int8", "int4"):
        stored = "" if number is None else f", kept in {number}"
        settings = {"policy": policy, "kv_dtype": number}
        yield f"chunks in int8{stored}", settings, arguments.chunk, scenario(number, "int8")
    settings = {"policy": policy, "kv_dtype": "int4", "prompt_dtype": "int4"}
    yield "chunks in int4, kept in int4", settings, arguments.chunk, scenario("int4", "int4")
    yield "by itself, kept in int4", {"policy": policy, "kv_dtype": "int4"}, None, None


def measure(model: Any, ids: torch.Tensor, settings: dict[str, Any] | None, chunk: int | None) -> tuple[int, float]:
    """Bytes at the peak beside what was there, and seconds."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated(), time.perf_counter()
    with nullcontext() if settings is None else refreekv.compress(model, decode="eager", **settings):
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, prefill_chunk_size=chunk)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, time.perf_counter() - begin


def main() -> None:
    """Parse the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--kept", type=float, default=0.25, help="share of the prompt that snapkv keeps")
    parser.add_argument("--limit", help="memory that the process may take, such as 24GiB")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("peaks are measured on a CUDA device")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("refreekv").setLevel(logging.INFO)
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape = {**shape, "num_hidden_layers": arguments.layers}
    config = LlamaConfig(**shape, max_position_embeddings=2**20, attn_implementation="sdpa")
    config.eos_token_id = None
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    if arguments.limit:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(parse_bytes(arguments.limit, "--limit") / total)
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    geometry = Geometry((LayerKV("full", config.num_key_value_heads, size, size),) * config.num_hidden_layers)
    reader = Reader.of(config)
    lines = []
    for length in map(int, arguments.lengths.split(",")):
        ids = torch.randint(2, config.vocab_size, (1, length), device="cuda")
        measure(model, ids[:, :256], {"policy": "full"}, None)  # kernels and workspaces
        for name, settings, chunk, scenario in rows(arguments):
            try:
                peak, seconds = measure(model, ids, settings, chunk)
                measured, took = format_size(peak), f"{seconds:.1f} s"
            except torch.OutOfMemoryError:
                peak, measured, took = 0, "out of memory", "–"
            said, off = "–", "–"
            if scenario is not None:
                machine = Machine(
                    2**60, 0, 0, activation_bytes=2 * reader.activation, logit_bytes=2 * config.vocab_size, chunk=chunk,
                    reader=reader,
                )  # fmt: skip
                forecast = use(geometry, machine, scenario, Load(length + 2, 2)).peak
                said = format_size(forecast)
                off = f"{forecast / peak - 1:+.1%}" if peak else "–"
            lines.append((f"{length:,}", name, measured, said, off, took))
            print(" | ".join(lines[-1]), flush=True)
    heading = ("tokens", "read", "peak beside weights", "forecast", "off", "time")
    print(
        f"\n{torch.cuda.get_device_name()}, {arguments.shape}, chunks of {arguments.chunk:,}, kept {arguments.kept:.0%}"
    )
    print(markdown_table(heading, lines, left=(1,)))


if __name__ == "__main__":
    main()
