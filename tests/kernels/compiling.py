"""Compiles what launchers launch, for GPUs that need not be there, and prints each kernel's shared memory.

A process of its own: tests run Triton in its interpreter.
"""

import importlib
import json
import pkgutil
import sys
from dataclasses import replace

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime.jit import JITFunction

from refreekv import kernels
from refreekv.core.four_bits import FourBits
from refreekv.core.needs import Grading, Rules
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import Ladder
from refreekv.core.reductions import ProbeReductions, Probes
from refreekv.core.surrogates import Surrogates
from refreekv.core.weight_blocks import FORMATS, from_file
from refreekv.kernels import block_products, four_bits, fused, shared_memory
from refreekv.kernels.cut import launch_cut
from refreekv.kernels.decode import launch_ragged_decode
from refreekv.kernels.linear import gated_linear, linears
from refreekv.kernels.means import launch_centres, launch_mapped_means
from refreekv.kernels.needs import launch_kept_first, launch_leveled, launch_needs
from refreekv.kernels.packed_calls import Moved, Oldest, PackedKV, Transfer
from refreekv.kernels.packed_join import MANY
from refreekv.kernels.packed_launch import launch_packed_attention
from refreekv.kernels.packed_oldest import code_alike
from refreekv.kernels.packed_recode import launch_recode
from refreekv.kernels.packed_storage import launch_pack
from refreekv.kernels.packed_unpack import launch_unpack
from refreekv.kernels.paged import Coded, PagedTable, Pool, Rows
from refreekv.kernels.paged_levels import launch_paged_levels
from refreekv.kernels.paged_storage import launch_move as launch_paged_move
from refreekv.kernels.paged_storage import launch_read, launch_spread, launch_sum
from refreekv.kernels.probe_launch import launch_both_reductions, launch_probe_reductions
from refreekv.kernels.queries import launch_asked
from refreekv.kernels.storage import launch_append, launch_fetch, launch_gather, launch_move, launch_take_out
from refreekv.kernels.surrogates import launch_put, launch_surrogates
from refreekv.kernels.table import Format

LIMITS = {86: 101_376, 90: 232_448}
"""Bytes of shared memory of a block, by compute capability (CUDA C++ Programming Guide)."""


class Driver:
    """The device that Triton asks for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


def no_assembly(*stage):
    """Leave out assembly, which follows the layout of shared memory and takes half of the time."""
    if not stage:
        return "no assembly", "no assembly"
    stages = stage[1]
    stages["ptx"] = lambda source, metadata: metadata.update(name="kernel") or ""
    stages["cubin"] = lambda source, metadata: b""
    return None


def stand_ins(dtype, heads, head_size):
    keys = torch.zeros(1, 1, 100, head_size, dtype=dtype)
    queries = torch.zeros(1, heads, 16, head_size, dtype=dtype)
    launch_surrogates(queries, keys, keys, torch.ones(1, 1, 100, dtype=torch.bool), 4)


def decode(dtype, heads, head_size):
    table = torch.zeros(1, 4, dtype=torch.int64)
    query, form = torch.zeros(1, heads, 1, head_size, dtype=dtype), Format((head_size,) * 2, dtype, dtype)
    launch_ragged_decode(query, table, form, 1.0, None, None)


def decode_of_two_types(dtype, heads, head_size):
    """As under autocast: keys in float32, values not."""
    query, table = torch.zeros(1, heads, 1, head_size), torch.zeros(1, 4, dtype=torch.int64)
    launch_ragged_decode(query, table, Format((head_size,) * 2, torch.float32, dtype), 1.0, None, None)


def storage_of_two_types(dtype, tokens, head_size):
    table, keys = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 1, tokens, head_size)
    form, spans = Format((head_size,) * 2, torch.float32, torch.float32), torch.zeros(1, 3, dtype=torch.int64)
    launch_append(keys, keys.to(dtype), table, form)
    launch_gather(keys, keys.to(dtype), table, spans, tokens, tokens, form)


def storage(dtype, tokens, head_size):
    table, entries = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 1, tokens, head_size, dtype=dtype)
    form, spans = Format((head_size,) * 2, dtype, dtype), torch.zeros(1, 3, dtype=torch.int64)
    launch_append(entries, entries, table, form)
    launch_gather(entries, entries, table, spans, tokens, tokens, form)
    launch_move(table, table, head_size * dtype.itemsize, head_size * dtype.itemsize, tokens)
    launch_fetch(table, table, head_size * dtype.itemsize, 4)
    launch_take_out(table, torch.zeros(2, 1, dtype=torch.int64), head_size * dtype.itemsize, 4)
    one, places = entries[:, :, :1], torch.zeros(1, 1, 1, dtype=torch.int64)
    launch_put(Surrogates(places, one, one, places == 0), entries, entries, torch.ones(1, 1, tokens, dtype=torch.bool))


def choosing(dtype, heads, head_size):
    """What chooses entries: probe, the paper's cut, and needs, each with and without what is optional.

    Of what needs have that is optional, every two go together, or go alone, or neither is there.
    """
    query, key = (torch.zeros(1, count, 300, head_size, dtype=dtype) for count in (heads, 1))
    launch_centres(key, key)
    launch_mapped_means((key[:, :, 0],) * 2, (torch.zeros(1, 1, head_size, head_size),) * 2)
    columns, real = torch.arange(300)[None], torch.ones(1, 300, dtype=torch.bool)
    for some in (None, real):
        launch_asked(columns, columns, some, 8, 16, 24)
    launch_probe_reductions(query, key, Probes(columns))
    launch_probe_reductions(query, key, Probes(columns, columns, real, real, 1.0, 8, 30.0, torch.zeros(heads), False))
    launch_both_reductions(query, query, key, Probes(columns), Probes(columns, distance=8, sums=False))
    scores = torch.zeros(1, 1, 300)
    launch_cut(scores, 4, 0.01, True)
    reductions = ProbeReductions(scores, scores)
    rules = Rules(4, 32, 1e-3, 1e-3, 0.1, 4, 0.9, 0.3)
    earlier, grading = torch.zeros(1, 1, 300, dtype=torch.bool), Grading(rules, torch.zeros(1, 1, 4))
    origins = torch.zeros(1, 1, dtype=torch.int32)
    for optional in (
        (earlier, grading, origins), (earlier, None, None), (None, grading, None), (None, None, origins)
    ):  # fmt: skip
        launch_needs(reductions, reductions, torch.zeros(1, 1), rules, *optional)
    order, kept, _ = launch_kept_first(torch.ones(1, 1, 300, dtype=torch.bool))
    launch_leveled(order, kept, torch.zeros(1, 1, 300, dtype=torch.uint8), 4, 4, 64)


def linear(dtype, rows, size):
    weight, x = torch.zeros(8192, size, dtype=dtype), torch.zeros(rows, 1, size, dtype=dtype)
    gated_linear(x, weight, weight, False)
    linears(x, [weight, weight], [None, None])
    linears(x, [weight], [weight[:, 0].contiguous()])


def small(dtype, rows, size):
    x, angles = torch.zeros(rows, 4, 1, size, dtype=dtype), torch.zeros(1, 1, size, dtype=dtype)
    fused.rms_norm(x, x[0, 0, 0], 1e-6, True)
    fused.add_rms_norm(x, x, x[0, 0, 0], 1e-6, True)
    fused.gated(x, x, False)
    fused.rotary(x, x, angles, angles)


def lines(dtype, heads, head_size, layout):
    """Queries, a table, a format and maps of packed lines."""
    table = torch.zeros(1, 4, dtype=torch.int64)
    form = PackedFormat(head_size, head_size, *(tuple(map(int, widths)) for widths in layout.split("/")))
    mean, matrix = torch.zeros(1, 1, head_size), torch.eye(head_size)[None, None]
    maps = PackedMaps.of(mean, matrix, mean, matrix, dtype)
    return torch.zeros(1, heads, 1, head_size, dtype=dtype), table, form, maps


def packed(dtype, heads, head_size, layout):
    query, table, form, maps = lines(dtype, heads, head_size, layout)
    launch_packed_attention(query, PackedKV(table, [table], [form], maps), 1.0, None, None, assembly=True)


def coding(dtype, heads, head_size, layout):
    _, table, form, maps = lines(dtype, heads, head_size, layout)
    entries, spans = torch.zeros(1, 1, 100, head_size, dtype=dtype), torch.zeros(1, 3, dtype=torch.int64)
    launch_pack(Transfer(entries, entries, None, table, form, maps, spans, 100, 100, None))
    code_alike([Oldest(entries, entries, table, table, form, maps, torch.ones(3, 1, dtype=torch.int64))])


def many(dtype, heads, head_size, layout):
    """So many segments that results come out of code space in a kernel of its own."""
    query, table, form, maps = lines(dtype, heads, head_size, layout)
    table, query = table.repeat(MANY, 1), query.repeat(MANY, 1, 1, 1)
    launch_packed_attention(query, PackedKV(table, [table], [form], maps), 1.0, None, None, assembly=True)


def ladder(dtype, heads, head_size, *widths):
    query, table, _, maps = lines(dtype, heads, head_size, "4444/4444")
    forms = [PackedFormat(head_size, head_size, (width,) * 4, (width,) * 4) for width in widths]
    launch_packed_attention(query, PackedKV(table, [table] * len(forms), forms, maps), 1.0, None, None, assembly=True)


def unpack(dtype, heads, head_size, layout):
    _, table, form, maps = lines(dtype, heads, head_size, layout)
    entries, spans = torch.zeros(1, 1, 100, head_size, dtype=dtype), torch.zeros(1, 3, dtype=torch.int64)
    for target in (None, table):
        launch_unpack(Transfer(entries, entries, target, table, form, maps, spans, 100, 100, None))


def recode(dtype, heads, head_size, layout):
    _, table, form, maps = lines(dtype, heads, head_size, layout)
    forms, listed = (form, PackedFormat(head_size, head_size, (8,) * 4, (8,) * 4)), torch.zeros(9, dtype=torch.int64)
    moved = Moved(table, table.repeat(2, 1), listed.to(torch.uint8), listed, listed[:1], forms, 0, maps, 9)
    launch_recode(table, moved)


def paged(dtype, group, head_size, kinds, queries=1):
    """Attention over pages with rungs of these kinds, if any; and what writes to pages."""
    pool = Pool.of([torch.zeros(4, 16, 2, 2 * head_size, dtype=dtype).transpose(1, 2)])
    table, forms = PagedTable.empty(pool, 2, 3), ()
    if kinds:
        forms = Ladder.parse(kinds).forms((head_size, head_size), sorted_keys=True)
        table = replace(table, coded=Coded.empty(pool, 2, forms))
    query = torch.zeros(3 * queries, 2 * group, head_size, dtype=dtype)
    zeros, places = torch.zeros(3, dtype=torch.int32), torch.zeros(2, 1, 2, dtype=torch.int64)
    rows = Rows(zeros, zeros, zeros, zeros, zeros, queries)
    cap, sinks = (30.0, None) if dtype == torch.float32 else (None, torch.zeros(2 * group))
    arguments = query, pool, 0, zeros[None], rows, table, query, 1.0, cap, sinks
    launch_paged_levels(*arguments, programs=9, assembly=True)
    launch_paged_move(zeros, pool, table, 0, zeros, places, 20, 4)
    launch_sum(zeros, pool, 4, 20)
    launch_read(zeros, pool, slice(0, 1), 20)
    for form in forms:
        lines, factors = (torch.zeros(5, size, dtype=torch.uint8) for size in (form.line_bytes, 4))
        launch_spread(lines, factors, pool, form, 0, zeros)
        launch_spread(lines, factors, pool, form, 0, zeros, 2 * pool.coded_tokens(form))


def in_blocks(dtype, rows, name):
    """A product with weights as a .gguf file has them, and unpacking them."""
    stored = FORMATS[name]
    blocks = from_file(torch.zeros(64, 1024 // stored.weights * stored.bytes, dtype=torch.uint8), name)
    block_products.product(torch.zeros(rows, 1024, dtype=dtype), blocks, torch.zeros(64, dtype=dtype))
    block_products.unpack(blocks, dtype)


def of_four_bits(dtype, rows, nested):
    """Products with codes; of shared memory their table of 32 KiB comes on top of what is said."""
    codes, book, size = torch.zeros(64 * 8192 // 2, dtype=torch.uint8), torch.zeros(16), 8192
    factors = torch.zeros(64 * size // 64, dtype=torch.uint8 if nested else torch.float32)
    parts = (torch.zeros(256), torch.zeros(32), torch.zeros(())) if nested else None
    weights, x = FourBits(codes, book, factors, parts, 64, (64, size)), torch.zeros(rows, 1, size, dtype=dtype)
    four_bits.linears(x, [weights] * 2, [None] * 2, assembly=True)
    four_bits.linears(x[..., :96].contiguous(), [weights._replace(shape=(64, 96))], [x[0, 0]], assembly=True)
    four_bits.gated_linear(x, weights, weights, False, assembly=True)


CASES = [
    (stand_ins, torch.float32, 6, 128),  # Qwen2.5-1.5B: did not fit an H100
    (stand_ins, torch.bfloat16, 8, 256),
    (decode, torch.float32, 8, 256),
    (decode_of_two_types, torch.bfloat16, 8, 128),
    (storage_of_two_types, torch.bfloat16, 1, 128),
    (storage_of_two_types, torch.float16, 40, 64),
    (linear, torch.bfloat16, 32, 256),
    (packed, torch.bfloat16, 4, 128, "6666/4444"),
    (paged, torch.bfloat16, 4, 128, ""),
]
# On the smallest of the GPUs alone: what takes long to compile, or little memory. What codes entries is compiled for an
# H100 in frames.py.
ONCE = [
    *((storage, dtype, 1, 128) for dtype in (torch.bfloat16, torch.float32)),
    (choosing, torch.bfloat16, 4, 128),
    (linear, torch.bfloat16, 1, 256),
    (small, torch.bfloat16, 2, 128),
    (many, torch.float32, 16, 256, "8888/8888"),
    (coding, torch.float32, 16, 256, "8888/8888"),
    (ladder, torch.bfloat16, 4, 128, 2, 8),
    (recode, torch.bfloat16, 4, 128, "4444/4444"),
    (unpack, torch.float32, 16, 256, "8888/8888"),
    (unpack, torch.bfloat16, 3, 64, "8642/4444"),
    (paged, torch.bfloat16, 4, 128, "k4v2+k7v6"),
    (paged, torch.float32, 3, 64, "int8", 2),
    *((in_blocks, torch.bfloat16, 1, name) for name in ("Q4_0", "Q5_K", "Q6_K", "Q8_0")),
    (in_blocks, torch.float32, 8, "Q4_K"),
    (of_four_bits, torch.bfloat16, 1, True),
    (of_four_bits, torch.float16, 4, False),
]
# More of the same, on all of the GPUs: minutes. Those above need as much memory, or more.
SLOW = [
    (stand_ins, torch.bfloat16, 8, 128),
    (packed, torch.float32, 16, 256, "8888/8888"),
    (many, torch.float32, 16, 256, "8888/8888"),
    (coding, torch.bfloat16, 4, 128, "6666/4444"),
    (coding, torch.float32, 16, 256, "8888/8888"),
    (ladder, torch.bfloat16, 4, 128, 2, 4, 6, 8),
    (recode, torch.bfloat16, 4, 128, "8642/4444"),
    (paged, torch.bfloat16, 4, 128, "k6v4"),
    (paged, torch.float32, 3, 64, "k4v2+int8", 2),
    (paged, torch.bfloat16, 4, 128, "k4v2+k4v4+k6v4+k7v6"),
]


def main():
    found, run = [], JITFunction.run

    def compile_only(kernel, *args, warmup, **options):
        compiled = run(kernel, *args, warmup=True, **options)
        name = f"{capability}: {launch.__name__} {dtype} {sizes} {kernel.__name__}"
        found.append((name, compiled.metadata.shared, LIMITS[capability]))
        return compiled

    JITFunction.run = compile_only
    knobs.runtime.add_stages_inspection_hook = no_assembly
    # Likewise what optimises for it, and where in the code of a kernel it is from.
    nvidia.llvm.optimize_module = lambda *_, **__: None
    knobs.compilation.disable_line_info = True
    shared_memory.bytes_of = lambda device: LIMITS[capability]
    for capability in LIMITS:
        triton.runtime.driver.set_active(Driver(capability))
        for launch, dtype, *sizes in SLOW if "slow" in sys.argv else CASES + ONCE * (capability == min(LIMITS)):
            launch(dtype, *sizes)
    print(json.dumps({"found": found, "kernels": sorted(all_kernels())}))


def all_kernels():
    """Names of all kernels of the package."""
    for module in pkgutil.iter_modules(kernels.__path__):
        members = vars(importlib.import_module(f"refreekv.kernels.{module.name}"))
        yield from (name for name, it in members.items() if isinstance(it, JITFunction) and name.endswith("_kernel"))


if __name__ == "__main__":
    main()
