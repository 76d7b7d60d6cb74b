"""Decode attention over packed lines, in Triton: a level's part of the softmax, in code space.

What is shared out, in which parts, is as in `kernels.decode`; a line is what `core.packed_lines` describes. Lines are
read as 16-bit words. Shifted and masked, a word's field is the middle of the mantissa of a float16 at 1024, and that
number less the field's middle is a factor as it is: two instructions for two codes. Values want a word of one entry
beside that of the next, which is how 16-bit matrices are transposed on their way from shared memory.

Entries are rows and the query heads of a KV head columns, of which a product needs no more than eight; sums over
entries are left open until the last block.
"""

# Tuples of another length have another type, and Triton's have as many parts as lines have tiles.
# mypy: disable-error-code="assignment"

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat, Side, step
from refreekv.kernels import pdl
from refreekv.kernels.decode import _at, _share, multiprocessors
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.probe import LOG2E, _capped

LEAST_FACTOR = tl.constexpr(-24.0)
"""Binary logarithm of the smallest float16, which no factor but zero is below."""


def _assembly(bits: int) -> str:
    """Fields of two 16-bit words in a register to as many registers of two float16."""
    each = 8 // bits
    lines = [f".reg .b32 y, z, m; shl.b32 y, ${2 * each}, 1; shr.b32 z, ${2 * each}, 7; "]
    for out in range(2 * each):
        place = out % each
        field = (2**bits - 1) << (1 + bits * place)
        middle = 1024 + ((2**bits - 1) << (bits * place))
        sign = int(torch.tensor(float(-middle), dtype=torch.float16).view(torch.int16)) & 0xFFFF
        source = "y" if out < each else "z"
        lines.append(
            f"lop3.b32 ${out}, {source}, 0x{field:04x}{field:04x}, 0x64006400, 0xEA; "
            f"mov.b32 m, 0x{sign:04x}{sign:04x}; add.rn.f16x2 ${out}, ${out}, m; "
        )
    return "{ " + "".join(lines) + "}"


ASSEMBLY_8, ASSEMBLY_4, ASSEMBLY_2 = (tl.constexpr(_assembly(bits)) for bits in (8, 4, 2))
CONSTRAINTS_8, CONSTRAINTS_4, CONSTRAINTS_2 = (tl.constexpr(",".join(["=r"] * n + ["r"])) for n in (2, 4, 8))


@triton.constexpr_function
def part_of(chunks, i, part):
    """A number out of a tuple of tuples, which not every Triton takes for a constant by itself."""
    return chunks[i][part]


@triton.jit
def _field(words, BITS: tl.constexpr, PLACE: tl.constexpr):
    """One field of each word as a float16, in plain Triton, which the interpreter knows."""
    EACH: tl.constexpr = 8 // BITS
    AT: tl.constexpr = BITS * (PLACE % EACH)
    MASK: tl.constexpr = ((1 << BITS) - 1) << (AT + 1)
    MIDDLE: tl.constexpr = 1024 + (((1 << BITS) - 1) << AT)
    moved = words << 1 if PLACE < EACH else words >> 7
    return ((moved & MASK) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - MIDDLE


@triton.jit
def _fields(words, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """All fields of words, less their middles, each times ``2 ** (1 + bits * place)`` of its place in a byte."""
    # One `return` for all: older Tritons take the type of the first one for that of all.
    if ASSEMBLY:
        if BITS == 8:
            fields = tl.inline_asm_elementwise(
                ASSEMBLY_8, CONSTRAINTS_8, [words], (tl.float16, tl.float16), is_pure=True, pack=2
            )
        elif BITS == 4:
            fields = tl.inline_asm_elementwise(
                ASSEMBLY_4, CONSTRAINTS_4, [words], (tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True, pack=2,
            )  # fmt: skip
        else:
            fields = tl.inline_asm_elementwise(
                ASSEMBLY_2, CONSTRAINTS_2, [words],
                (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True, pack=2,
            )  # fmt: skip
    else:
        if BITS == 8:
            fields = _field(words, 8, 0), _field(words, 8, 1)
        elif BITS == 4:
            fields = _field(words, 4, 0), _field(words, 4, 1), _field(words, 4, 2), _field(words, 4, 3)
        else:
            fields = (
                _field(words, 2, 0), _field(words, 2, 1), _field(words, 2, 2), _field(words, 2, 3),
                _field(words, 2, 4), _field(words, 2, 5), _field(words, 2, 6), _field(words, 2, 7),
            )  # fmt: skip
    return fields


@triton.jit
def _where(CHUNKS: tl.constexpr, AT: tl.constexpr, PLACE: tl.constexpr):
    """For a tile, a field of the words of a chunk: each one's number in its plane, its channel and whether it is one.

    And what the field's codes are worth; ``CHUNKS`` are those of `chunks`.
    """
    BITS: tl.constexpr = part_of(CHUNKS, AT, 0)
    EACH: tl.constexpr = 8 // BITS
    USED: tl.constexpr = part_of(CHUNKS, AT, 5)
    byte = part_of(CHUNKS, AT, 3) + 2 * tl.arange(0, part_of(CHUNKS, AT, 2)) + PLACE // EACH
    field = byte + (PLACE % EACH) * USED
    later = field >= part_of(CHUNKS, AT, 6)
    channel = field + tl.where(later, part_of(CHUNKS, AT, 8), part_of(CHUNKS, AT, 7))
    worth = tl.where(later, part_of(CHUNKS, AT, 10), part_of(CHUNKS, AT, 9)) / (2 << (BITS * (PLACE % EACH)))
    return field, channel, worth, byte < USED


@triton.jit
def _words(lines, line, CHUNKS: tl.constexpr, AT: tl.constexpr, LINE: tl.constexpr, ACROSS: tl.constexpr):
    """The words of a chunk of each line: ``[BLOCK, n]``, or ``[n, BLOCK]``."""
    n = tl.arange(0, part_of(CHUNKS, AT, 2))
    DIM: tl.constexpr = 0 if ACROSS else 1
    # The dimension that a vector lacks: lines' is that of the words.
    at = lines + tl.expand_dims(line * (LINE // 2), DIM) + tl.expand_dims(part_of(CHUNKS, AT, 1) + n, 1 - DIM)
    if part_of(CHUNKS, AT, 4) == part_of(CHUNKS, AT, 2):
        return tl.load(at)
    return tl.load(at, tl.expand_dims(n < part_of(CHUNKS, AT, 4), 1 - DIM), 0)


@triton.jit
def _packed_decode_kernel(
    query, scales, shifts, table, out, denominators,
    segments, kv_heads, group, softcap,
    HEAD: tl.constexpr, FIELDS: tl.constexpr, LINE: tl.constexpr, ALIGNED: tl.constexpr,
    KEY_CHUNKS: tl.constexpr, VALUE_CHUNKS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    HALF: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr,
    ASSEMBLY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    pdl.in_turn(EARLY)
    held, blocks, ends, block, stop = _share(table, segments, 0, BLOCK, BLOCK_S)
    head = tl.arange(0, BLOCK_G)
    dtype: tl.constexpr = tl.float16 if HALF else tl.float32
    while block < stop:
        segment, first, end, visible, _ = _at(block, table, held, blocks, ends, BLOCK_S)
        upto = tl.minimum(stop, end)
        # Lines and segments begin at such multiples, which Triton cannot know of a number.
        lines = tl.multiple_of(tl.load(table + segment * 4).to(tl.pointer_type(tl.uint16)), ALIGNED)
        factors = tl.multiple_of(tl.load(table + segment * 4 + 1).to(tl.pointer_type(tl.uint32)), 4)
        heads = segment * group + head  # rows and KV heads one after the other, as query heads are
        asking = head < group
        scale = tl.load(scales + heads, asking, 0.0)
        shift = tl.load(shifts + heads, asking, 0.0)
        q, results = (), ()
        for i in tl.static_range(KEY_CHUNKS):
            for place in tl.static_range(16 // part_of(KEYS, i, 0)):
                _, channel, worth, real = _where(KEYS, i, place)
                asked = query + heads[None, :].to(tl.int64) * HEAD + channel[:, None]
                part = tl.load(asked, asking[None, :] & real[:, None], 0.0) * worth[:, None]
                q = q + (part.to(dtype),)
        for i in tl.static_range(VALUE_CHUNKS):
            for _ in tl.static_range(16 // part_of(VALUES, i, 0)):
                results = results + (tl.zeros([part_of(VALUES, i, 2), BLOCK_G], tl.float32),)
        highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK, BLOCK_G], tl.float32)
        for start in range((block - first) * BLOCK, (upto - first) * BLOCK, BLOCK):
            n = start + tl.arange(0, BLOCK)
            inside = n < visible
            # Behind the end the last entry again, which will have no weight: this takes less than masks do.
            line = tl.minimum(n, visible - 1)
            both = tl.load(factors + line)
            key_factor = both.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            value_factor = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            products = tl.zeros([BLOCK, BLOCK_G], tl.float32)
            for i in tl.static_range(KEY_CHUNKS):
                tiles = _fields(_words(lines, line, KEYS, i, LINE, False), part_of(KEYS, i, 0), ASSEMBLY)
                for place in tl.static_range(16 // part_of(KEYS, i, 0)):
                    products = tl.dot(
                        tiles[place].to(dtype), q[part_of(KEYS, i, 12) + place], products, input_precision="ieee"
                    )
            logits = products * key_factor[:, None] * scale[None, :]
            if HAS_CAP:
                logits = _capped(logits + shift[None, :], softcap, True)
            logits = tl.where(inside[:, None], logits, float("-inf"))
            # Weights are at most 1 with the value's factor in them, whatever that is: float16 has room for no more.
            seen = logits + tl.maximum(tl.log2(value_factor), LEAST_FACTOR)[:, None]
            # A block holds at least one entry, so this is finite from the first one on.
            higher = tl.maximum(highest, tl.max(seen, 0))
            p = tl.exp2(logits - higher[None, :])
            shrink = tl.exp2(highest - higher)[None, :]
            highest = higher
            total = total * shrink + p
            weights = (p * value_factor[:, None]).to(dtype)
            new_results = ()
            for i in tl.static_range(VALUE_CHUNKS):
                tiles = _fields(_words(lines, line, VALUES, i, LINE, True), part_of(VALUES, i, 0), ASSEMBLY)
                for place in tl.static_range(16 // part_of(VALUES, i, 0)):
                    product = tl.dot(tiles[place].to(dtype), weights, input_precision="ieee")
                    new_results = new_results + (results[part_of(VALUES, i, 12) + place] * shrink + product,)
            results = new_results
        slot = (tl.program_id(0) + segment) * group + head
        denominator = tl.sum(total, 0)
        sum_of_all = highest + tl.log2(denominator)
        # What the mean key adds is the same for all of the segment's entries.
        tl.store(denominators + slot, sum_of_all if HAS_CAP else sum_of_all + shift, asking)
        for i in tl.static_range(VALUE_CHUNKS):
            for place in tl.static_range(16 // part_of(VALUES, i, 0)):
                field, _, worth, real = _where(VALUES, i, place)
                tl.store(
                    out + slot[None, :].to(tl.int64) * FIELDS + (part_of(VALUES, i, 11) + field)[:, None],
                    results[part_of(VALUES, i, 12) + place] * worth[:, None] / denominator[None, :],
                    asking[None, :] & real[:, None],
                )
        block = upto


@functools.cache
def chunks(side: Side, start: int) -> tuple[tuple[float, ...], ...]:
    """The words of a side whose first byte is ``start``, in parts whose sizes are powers of two, 16 at least.

    Of each part: bits of a field, first word in the line, words, first byte in the plane, words that are the plane's;
    the plane's bytes with codes, fields of its first range of channels, what a field's number lacks to its channel in
    the first and in the second range, what a code of theirs is worth, fields of the planes before, tiles of the parts
    before.
    """
    found = []
    before = tiles = 0
    for plane in side.planes:
        ranges = [(stop - first, first) for first, stop in plane.channels]
        widths = [side.widths[4 * first // side.size] for first, _ in plane.channels]
        worths = [step(width) * 2**shift for width, shift in zip(widths, plane.shifts, strict=True)]
        length, first = ranges[0]
        second = ranges[-1][1] - length if len(ranges) == 2 else first
        words, at = plane.bytes // 2, 0
        while at < words:
            size = max(16, 1 << ((words - at).bit_length() - 1))
            found.append(
                (plane.bits, (start + plane.start) // 2 + at, size, 2 * at, min(size, words - at),
                 plane.used, length, first, second, worths[0], worths[-1], before, tiles)
            )  # fmt: skip
            at += size
            tiles += 16 // plane.bits
        before += plane.count
    return tuple(found)


def fields_of(side: Side) -> int:
    """Fields of an entry, which a channel of width 6 has two of."""
    return sum(plane.count for plane in side.planes)


@on_its_device
def launch_packed_decode(
    query: Tensor,
    scales: Tensor,
    shifts: Tensor,
    table: Tensor,
    form: PackedFormat,
    softcap: float | None,
    like: Tensor,
    programs: int | None = None,
    block: int | None = None,
    warps: int | None = None,
    stages: int = 3,
    registers: int | None = None,
    assembly: bool | None = None,
) -> tuple[Tensor, Tensor, int, int]:
    """Each program's part of a level's attention.

    Parameters
    ----------
    query, scales, shifts : Tensor
        Of `launch_prepare`.
    table : Tensor
        See `kernels.packed_attention`.
    form : PackedFormat
        Of the lines.
    like : Tensor
        The model's queries, whose type decides that of the products: float32 for float32, else float16.
    programs, block, warps, stages, registers, assembly
        To be measured.

    Returns
    -------
    parts, denominators : Tensor
        By slot and query head: ``[slots, group, fields]`` and ``[slots, group]``.
    programs, block : int
        As `launch_join` must know them.
    """
    segments, batch = table.shape[0], like.shape[0]
    group = like.shape[1] * batch // segments
    half = like.dtype.itemsize == 2
    if warps is None:
        warps = 2 if half else 4
    if block is None:
        block = 64 if half and max(form.key_size, form.value_size) <= 128 else 32 if half else 16
    if programs is None:
        programs = (12 // warps) * multiprocessors(like.device)
    keys, values = chunks(form.keys, 0), chunks(form.values, form.keys.bytes)
    fields = fields_of(form.values)
    parts = torch.empty(programs + segments, group, fields, dtype=torch.float32, device=like.device)
    denominators = torch.empty(programs + segments, group, dtype=torch.float32, device=like.device)
    options: dict[str, Any] = {} if registers is None else {"maxnreg": registers}
    _packed_decode_kernel[(programs,)](
        query, scales, shifts, table, parts, denominators, segments, segments // batch, group,
        1.0 if softcap is None else softcap,
        HEAD=form.key_size, FIELDS=fields, LINE=form.line_bytes, ALIGNED=16 if form.line_bytes % 16 == 0 else 8,
        KEY_CHUNKS=len(keys), VALUE_CHUNKS=len(values), KEYS=keys, VALUES=values,
        HALF=half, BLOCK_G=max(8, triton.next_power_of_2(group)), BLOCK=block,
        BLOCK_S=triton.next_power_of_2(max(segments, 2)), HAS_CAP=softcap is not None,
        ASSEMBLY=like.is_cuda if assembly is None else assembly,
        num_warps=warps, num_stages=stages, **options, **pdl.options(batch, like),
    )  # fmt: skip
    return parts, denominators, programs, block


__all__ = ["LOG2E", "chunks", "fields_of", "launch_packed_decode"]
