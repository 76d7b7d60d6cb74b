"""Products of a few rows with weights of 4 bits (`core.four_bits`): each code is read once, and no weight written out.

What limits such a product is not memory but the instructions that make numbers of codes. Here a byte, two codes, is
looked up at once: the two numbers of each of the 256 bytes lie in shared memory, once for each lane of half a warp, so
that no two of them want the same bank. It takes five instructions to get two weights in float32, and one of each to
multiply and add it for a row. Factors that are codes themselves are read as they are.
"""

# Tuples of another length have another type, and Triton's have as many parts as there are rows.
# mypy: disable-error-code="assignment"

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core import four_bits
from refreekv.core.four_bits import NESTED_BLOCK, FourBits
from refreekv.kernels import pdl
from refreekv.kernels.decode import multiprocessors
from refreekv.kernels.device_guard import on_its_device

PIECE, SCALED = tl.constexpr(four_bits.PIECE), tl.constexpr(NESTED_BLOCK)


class Tiling(NamedTuple):
    """How a product is cut up: rows of the matrix, and weights of each, that a program takes at a time; warps.

    And how many programs there are for a multiprocessor, and registers for a thread, if not as many as it likes.
    """

    block_n: int
    block_k: int
    warps: int
    programs: int
    registers: int | None = None


def tiling_for(rows: int, size: int, *, gated: bool = False) -> Tiling:
    """What was fastest on an H100 for rows of 8,192 and 28,672 weights; shorter blocks where long ones do not fit."""
    if -(-size // 4096) * 4096 > 1.1 * size:
        return Tiling(16, 1024, 4, 5)
    return Tiling(8, 4096, 4, 4) if gated or rows > 1 else Tiling(16, 4096, 8, 2)


TABLE = tl.constexpr(".shared .align 128 .b8 refreekv_pairs[32768]; mov.u32 $0, 0;")
FILL = tl.constexpr(
    "{ .reg .b32 a; mov.u32 a, refreekv_pairs; add.u32 a, a, $1; st.shared.v2.f32 [a], {$2, $3}; mov.u32 $0, 0; }"
)
LANE = tl.constexpr("{ .reg .b32 a; mov.u32 a, %laneid; and.b32 a, a, 15; shl.b32 $0, a, 3; }")


def _lookups(rows: int) -> str:
    """A word's eight weights times the numbers of each row, summed up."""
    word, lane, first = rows, rows + 1, rows + 2
    lines = [".reg .b32 a, t; .reg .f32 v, w; mov.u32 t, refreekv_pairs; "]
    for byte, move in enumerate(("shl.b32 a, {}, 7", "shr.b32 a, {}, 1", "shr.b32 a, {}, 9", "shr.b32 a, {}, 17")):
        lines.append(
            f"{move.format(f'${word}')}; lop3.b32 a, a, 0x7f80, ${lane}, 0xEA; add.u32 a, a, t; "
            "ld.shared.v2.f32 {v, w}, [a]; "
        )
        for row in range(rows):
            x = first + 8 * row + 2 * byte
            lines.append(f"fma.rn.f32 ${row}, v, ${x}, ${row}; " if byte else f"mul.rn.f32 ${row}, v, ${x}; ")
            lines.append(f"fma.rn.f32 ${row}, w, ${x + 1}, ${row}; ")
    return "{ " + "".join(lines) + "}"


def _constraints(rows: int) -> str:
    return ",".join(["=&f"] * rows + ["r", "r"] + ["f"] * 8 * rows)


def _unpacked(halves: str) -> str:
    """Eight 16-bit numbers in float32, or zeros where the flag is not set."""
    lines = [
        ".reg .pred p; .reg .b32 a<4>; .reg .b16 l, h; setp.ne.b32 p, $9, 0; "
        + "".join(f"mov.b32 a{i}, 0; " for i in range(4))
        + "@p ld.global.v4.b32 {a0, a1, a2, a3}, [$8]; "
    ]
    lines += [halves.format(word=i, low=2 * i, high=2 * i + 1) for i in range(4)]
    return "{ " + "".join(lines) + "}"


INPUT_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 8 + ["l", "r", "r"]))
INPUTS_FP32 = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $9, 0; "
    + "".join(f"mov.f32 ${i}, 0f00000000; " for i in range(8))
    + "@p ld.global.v4.f32 {$0, $1, $2, $3}, [$8]; @p ld.global.v4.f32 {$4, $5, $6, $7}, [$8 + 16]; }"
)
INPUTS_BF16 = tl.constexpr(_unpacked("shl.b32 ${low}, a{word}, 16; and.b32 ${high}, a{word}, 0xffff0000; "))
INPUTS_FP16 = tl.constexpr(_unpacked("mov.b32 {{l, h}}, a{word}; cvt.f32.f16 ${low}, l; cvt.f32.f16 ${high}, h; "))
LOOKUPS_1, LOOKUPS_2, LOOKUPS_3, LOOKUPS_4 = (tl.constexpr(_lookups(rows)) for rows in (1, 2, 3, 4))
CONSTRAINTS_1, CONSTRAINTS_2, CONSTRAINTS_3, CONSTRAINTS_4 = (tl.constexpr(_constraints(rows)) for rows in (1, 2, 3, 4))


@triton.jit
def _begin(book, ASSEMBLY: tl.constexpr, DEPENDENT: tl.constexpr):
    """Fill the table of pairs and wait for the input; what a lane adds to the place of a byte's pair."""
    if ASSEMBLY:
        tl.inline_asm_elementwise(TABLE, "=r", [], tl.int32, is_pure=False, pack=1)
        byte = tl.arange(0, 256)
        first, second = tl.load(book + (byte >> 4)), tl.load(book + (byte & 15))
        for copy in tl.static_range(16):
            # Another copy for each byte, so that no two threads want the same bank.
            at = byte * 128 + ((byte + copy) & 15) * 8
            tl.inline_asm_elementwise(FILL, "=r,r,f,f", [at, first, second], tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
    pdl.in_turn(DEPENDENT)
    return tl.inline_asm_elementwise(LANE, "=r", [], tl.int32, is_pure=False, pack=1) if ASSEMBLY else 0


@triton.jit
def _products(words, x, book, lane, ROWS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The eight weights of each word, less their blocks' factors, times ``x``, summed up: one block for each row."""
    if ASSEMBLY:
        if ROWS == 1:
            products = (
                tl.inline_asm_elementwise(
                    LOOKUPS_1, CONSTRAINTS_1, (words, lane) + x, tl.float32, is_pure=True, pack=1
                ),
            )
        elif ROWS == 2:
            products = tl.inline_asm_elementwise(
                LOOKUPS_2, CONSTRAINTS_2, (words, lane) + x, (tl.float32, tl.float32), is_pure=True, pack=1
            )
        elif ROWS == 3:
            products = tl.inline_asm_elementwise(
                LOOKUPS_3, CONSTRAINTS_3, (words, lane) + x, (tl.float32, tl.float32, tl.float32), is_pure=True, pack=1
            )
        else:
            products = tl.inline_asm_elementwise(
                LOOKUPS_4, CONSTRAINTS_4, (words, lane) + x, (tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True, pack=1,
            )  # fmt: skip
    else:
        products = ()
        for m in tl.static_range(ROWS):
            total = tl.zeros(words.shape, tl.float32)
            for i in tl.static_range(8):
                code = (words >> (8 * (i // 2) + 4 - 4 * (i % 2))) & 15
                total += tl.load(book + code) * x[8 * m + i]
            products = products + (total,)
    return products


@triton.jit
def _inputs(x, word, inside, lane, ASSEMBLY: tl.constexpr):
    """The input's numbers that a word's eight weights are multiplied by, in float32: ``[1, BLOCK_W]`` each."""
    if ASSEMBLY:
        # Triton would load them by other threads than it loads words, and hand them over through shared memory.
        # What is loaded depends on `lane`, which is known only when the input is there: so it is not loaded before.
        eight = (x + word * 8).to(tl.int64)[None, :]
        if x.dtype.element_ty == tl.float32:
            inputs = tl.inline_asm_elementwise(
                INPUTS_FP32, INPUT_CONSTRAINTS, [eight, inside.to(tl.int32)[None, :], lane],
                (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True, pack=1,
            )  # fmt: skip
        elif x.dtype.element_ty == tl.bfloat16:
            inputs = tl.inline_asm_elementwise(
                INPUTS_BF16, INPUT_CONSTRAINTS, [eight, inside.to(tl.int32)[None, :], lane],
                (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            inputs = tl.inline_asm_elementwise(
                INPUTS_FP16, INPUT_CONSTRAINTS, [eight, inside.to(tl.int32)[None, :], lane],
                (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True, pack=1,
            )  # fmt: skip
    else:
        inputs = ()
        for i in tl.static_range(8):
            inputs = inputs + (tl.load(x + word * 8 + i, inside, 0.0).to(tl.float32)[None, :],)
    return inputs


@triton.jit
def _factors(factors, values, scales, offset, block, inside, NESTED: tl.constexpr, EVEN: tl.constexpr):
    stored = tl.load(factors + block) if EVEN else tl.load(factors + block, inside, 0)
    if NESTED:
        scale = tl.load(scales + (block // SCALED)) if EVEN else tl.load(scales + (block // SCALED), inside, 0.0)
        result = tl.load(values + stored.to(tl.int32)) * scale + offset
    else:
        result = stored
    return result


@triton.jit
def _sums(
    x, codes, factors, values, scales, offset, book, lane, n, count, size,
    ROWS: tl.constexpr, SHIFT: tl.constexpr, NESTED: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """``weight[n] @ x[m]`` in float32 for each ``m``."""
    BLOCK_P: tl.constexpr = BLOCK_K // PIECE
    BLOCK_N: tl.constexpr = n.shape[0]
    line = tl.minimum(n, count - 1)
    # Rows are whole pieces, and tensors begin at multiples of 16 bytes, which Triton cannot know of what it looks up.
    lines = tl.multiple_of(codes, 16) + tl.multiple_of(line * (size // 8), 4)[:, None]
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros([BLOCK_N, BLOCK_P], tl.float32),)
    for start in range(0, size, BLOCK_K):
        word = start // 8 + tl.arange(0, BLOCK_K // 8)
        k = start + tl.arange(0, BLOCK_P) * PIECE
        inside = (word >= 0) if EVEN else word * 8 < size
        there = (k >= 0) if EVEN else k < size
        if EVEN:
            words = tl.load(lines + word[None, :], eviction_policy="evict_first")
        else:
            words = tl.load(lines + word[None, :], inside[None, :], 0, eviction_policy="evict_first")
        # Turned over: so they are loaded by the threads that sum up what they are factors of.
        block = (line[None, :] * size + k[:, None]) >> SHIFT
        factor = tl.trans(_factors(factors, values, scales, offset, block, there[:, None], NESTED, EVEN))
        inputs = ()
        for m in tl.static_range(ROWS):
            inputs = inputs + _inputs(x + m * size, word, inside, lane, ASSEMBLY)
        parts = _products(words, inputs, book, lane, ROWS, ASSEMBLY)
        new_totals = ()
        for m in tl.static_range(ROWS):
            new_totals = new_totals + (totals[m] + factor * tl.sum(tl.reshape(parts[m], (BLOCK_N, BLOCK_P, 4)), 2),)
        totals = new_totals
    sums = ()
    for m in tl.static_range(ROWS):
        sums = sums + (tl.sum(totals[m], 1),)
    return sums


@triton.jit
def _four_bits_kernel(
    x, codes, factors, nested, biases, outs, book, counts, tiles, size,
    ROWS: tl.constexpr, SHIFT: tl.constexpr, NESTED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, ASSEMBLY: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Up to three products with one input; each program makes columns of one of them, then of another."""
    lane = _begin(book, ASSEMBLY, DEPENDENT)
    for tile in range(tl.program_id(0), tiles[0] + tiles[1] + tiles[2], tl.num_programs(0)):
        if tile < tiles[0]:
            code, factor, bias, y, count, of_it = codes[0], factors[0], biases[0], outs[0], counts[0], tile
            values, scales, offset = nested[0], nested[1], nested[2]
        elif tile < tiles[0] + tiles[1]:
            code, factor, bias, y, count, of_it = codes[1], factors[1], biases[1], outs[1], counts[1], tile - tiles[0]
            values, scales, offset = nested[3], nested[4], nested[5]
        else:
            code, factor, bias, y, count = codes[2], factors[2], biases[2], outs[2], counts[2]
            of_it = tile - tiles[0] - tiles[1]
            values, scales, offset = nested[6], nested[7], nested[8]
        n = of_it * BLOCK_N + tl.arange(0, BLOCK_N)
        added = tl.load(offset) if NESTED else 0.0
        sums = _sums(
            x, code, factor, values, scales, added, book, lane, n, count, size,
            ROWS, SHIFT, NESTED, BLOCK_K, EVEN, ASSEMBLY,
        )  # fmt: skip
        for m in tl.static_range(ROWS):
            result = sums[m]
            if HAS_BIAS:
                result += tl.load(bias + n, n < count, 0.0).to(tl.float32)
            tl.store(y + m * count + n, result.to(y.dtype.element_ty), n < count)


@triton.jit
def _gated_four_bits_kernel(
    x, codes, factors, nested, y, book, count, size,
    GELU: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr, NESTED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, ASSEMBLY: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    lane = _begin(book, ASSEMBLY, DEPENDENT)
    kind = y.dtype.element_ty
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK_N), tl.num_programs(0)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        gates = _sums(
            x, codes[0], factors[0], nested[0], nested[1], tl.load(nested[2]) if NESTED else 0.0, book, lane,
            n, count, size, ROWS, SHIFT, NESTED, BLOCK_K, EVEN, ASSEMBLY,
        )  # fmt: skip
        ups = _sums(
            x, codes[1], factors[1], nested[3], nested[4], tl.load(nested[5]) if NESTED else 0.0, book, lane,
            n, count, size, ROWS, SHIFT, NESTED, BLOCK_K, EVEN, ASSEMBLY,
        )  # fmt: skip
        for m in tl.static_range(ROWS):
            g, u = gates[m].to(kind).to(tl.float32), ups[m].to(kind).to(tl.float32)
            inner = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
            active = (g / (1.0 + tl.exp(-inner))).to(kind).to(tl.float32)
            tl.store(y + m * count + n, (active * u).to(kind), n < count)


@on_its_device
def linears(
    x: Tensor, weights: Sequence[FourBits], biases: Sequence[Tensor | None], tiling: Tiling | None = None,
    assembly: bool | None = None,
) -> list[Tensor]:  # fmt: skip
    """``x @ weight.T + bias`` for one to three matrices of one kind of codes.

    ``x`` is ``[B, 1, K]`` and contiguous, with `core.four_bits.MOST_ROWS` rows at most; results are ``[B, 1, N]``.
    Either all have a bias or none has.
    """
    x, rows, size = _aligned(x), x.shape[0], x.shape[-1]
    tiling = tiling_for(rows, size) if tiling is None else tiling
    counts = [one.shape[0] for one in weights]
    outs = [torch.empty(rows, 1, count, dtype=x.dtype, device=x.device) for count in counts]
    tiles = [triton.cdiv(count, tiling.block_n) for count in counts]
    spare = 3 - len(weights)
    has_bias = biases[0] is not None
    codes, factors, nested = _parts([*weights, *[weights[0]] * spare])
    _four_bits_kernel[(_programs(x, sum(tiles), tiling),)](
        x, codes, factors, nested, (*biases, *[biases[0]] * spare) if has_bias else factors,
        (*outs, *[outs[0]] * spare), weights[0].book, (*counts, *[counts[0]] * spare), (*tiles, *[0] * spare), size,
        HAS_BIAS=has_bias, **_settings(x, weights[0], tiling, assembly),
    )  # fmt: skip
    return outs


@on_its_device
def gated_linear(
    x: Tensor, gate: FourBits, up: FourBits, gelu: bool, tiling: Tiling | None = None, assembly: bool | None = None
) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``, or with the tanh form of GELU; ``[B, 1, K]`` to ``[B, 1, N]``."""
    tiling = tiling_for(x.shape[0], x.shape[-1], gated=True) if tiling is None else tiling
    x, count = _aligned(x), gate.shape[0]
    out = torch.empty(x.shape[0], 1, count, dtype=x.dtype, device=x.device)
    _gated_four_bits_kernel[(_programs(x, triton.cdiv(count, tiling.block_n), tiling),)](
        x, *_parts([gate, up]), out, gate.book, count, x.shape[-1], GELU=gelu, **_settings(x, gate, tiling, assembly)
    )
    return out


def _parts(weights: Sequence[FourBits]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Codes as 32-bit words, factors, and what is said of nested ones."""
    nested = tuple(part for one in weights for part in (one.nested or (one.factors,) * 3))
    return tuple(one.codes.view(torch.int32) for one in weights), tuple(one.factors for one in weights), nested


def _aligned(x: Tensor) -> Tensor:
    """The same numbers where 16 bytes can be read at once."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _programs(x: Tensor, tiles: int, tiling: Tiling) -> int:
    """Programs, of which none has more than one tile more than another has."""
    most = tiling.programs * multiprocessors(x.device)
    return int(triton.cdiv(tiles, triton.cdiv(tiles, most)))


def _settings(x: Tensor, weights: FourBits, tiling: Tiling, assembly: bool | None) -> dict[str, Any]:
    rows, size = x.shape[0], x.shape[-1]
    return {
        **pdl.options(rows, x),
        "ROWS": rows,
        "SHIFT": weights.block.bit_length() - 1,
        "NESTED": weights.nested is not None,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": tiling.block_k,
        "EVEN": size % tiling.block_k == 0,
        "ASSEMBLY": x.is_cuda if assembly is None else assembly,
        "num_warps": tiling.warps,
        "maxnreg": tiling.registers,
    }
