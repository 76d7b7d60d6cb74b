"""The adaptive policy's choice in three launches, and the order of kept entries in one.

Tests compare them with `core.needs.needs` and `reference.kept_first`, in plain torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreekv.core.needs import REASONS, Grading, Needs, Rules
from refreekv.core.neighbours import LEVELS
from refreekv.core.reductions import ProbeReductions
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.sizes import blocks_of, power_of_2

BLOCK = 1024
COUNTED = 8192
"""Entries that are counted at a time, fewer than 65,536."""
NEVER = tl.constexpr(-(2**30))
REAL = tl.constexpr(9)
"""Where among a chunk's numbers is how many entries it has, if heads have different numbers of them."""
FEW = 32
"""Chunks up to which it is one kernel, however many there are."""
LOST = tl.constexpr(8)
"""Where among a chunk's numbers the highest peak is that is not kept; before it the `REASONS`, in their order."""


@triton.jit
def _level(exponent):
    """``2 ** -exponent``, exactly."""
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other)


@triton.jit(do_not_specialize=["length"])
def _mass_kernel(peak, mass, out, length, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """``out[pair, chunk, level]``: the chunk's mass that peaks at a power of two or above; all of it in the last."""
    chunk, chunks, pair = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    n = chunk * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(peak + pair * length + n, n < length, -1.0)
    m = tl.load(mass + pair * length + n, n < length, 0.0)
    exponent = tl.arange(0, 32)
    least = tl.where(exponent <= LEVELS, _level(exponent), -1.0)
    held = tl.sum(tl.where(p[None, :] >= least[:, None], m[None, :], 0.0), 1)
    tl.store(out + (pair * chunks + chunk) * 32 + exponent, held)


@triton.jit(do_not_specialize=["length", "chunks", "ss_b", "st_b", "st_h", "sd_b", "so_b", "min_length"])
def _needs_kernel(
    peak, spread, masses, scores, earlier, keep_out, stats_out, damage, levels_out, origins,
    length, kv_heads, ss_b, st_b, st_h, sd_b, so_b, sinks, recent, follow, chunks, min_length,
    unit, spread_unit, hit, share, copying, level_unit, level_spread_unit, level_copying, weight, expected, code_unit,
    LEVELS: tl.constexpr, RUNGS: tl.constexpr, HAS_EARLIER: tl.constexpr, HAS_ORIGINS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    # The highest power of two at which the share of the mass is held.
    exponent, part = tl.arange(0, 32), tl.arange(0, BLOCK_C)
    lines = masses + (pair * chunks + part)[:, None] * 32 + exponent[None, :]
    held = tl.sum(tl.load(lines, (part < chunks)[:, None], 0.0), 0)
    whole = tl.max(tl.where(exponent == 31, held, 0.0), 0)
    missing = tl.sum(((held < whole * share) & (exponent <= LEVELS)).to(tl.int32), 0)
    at_mass = tl.where(missing <= LEVELS, _level(missing), 0.0)

    start = chunk * BLOCK
    n = start + tl.arange(0, BLOCK)
    # What comes before a head's first entry fills its line up.
    origin = tl.load(origins + batch * so_b + head) if HAS_ORIGINS else 0
    inside, first, last = (n < length) & (n >= origin), n > origin, n + 1 < length
    peak += pair * length
    spread += pair * length
    here, left = tl.load(peak + n, inside, -1.0), tl.load(peak + n - 1, inside & first, -1.0)
    around = tl.maximum(tl.maximum(here, left), tl.load(peak + n + 1, last, -1.0))
    far = tl.maximum(tl.load(spread + n, inside, -1.0), tl.load(spread + n - 1, inside & first, -1.0))
    far = tl.maximum(far, tl.load(spread + n + 1, last, -1.0))
    # The newest hit before each position: within the chunk, or among the last ones before it.
    before = start - 1 - tl.arange(0, BLOCK_F)
    found = tl.load(peak + before, before >= origin, -1.0)
    carried = tl.max(tl.where((before >= origin) & (found >= hit), before, NEVER), 0)
    latest = tl.associative_scan(tl.where(first & (left >= hit), n - 1, NEVER), 0, _larger)
    latest = tl.maximum(latest, carried)

    why_sinks, why_recent = n < origin + sinks, n >= length - recent
    why_window, why_spread = around >= unit, far >= spread_unit
    why_following = (latest >= 0) & (latest >= n - follow)
    why_mass = here >= at_mass
    score = tl.load(scores + batch * ss_b + head + n * 0)
    why_copying = score >= copying
    keep = why_sinks | why_recent | why_window | why_spread | why_following | why_mass | why_copying
    out = stats_out + (pair * chunks + chunk) * 16
    if HAS_EARLIER:
        why_earlier = tl.load(earlier + batch * st_b + head * st_h + n, inside, 0) != 0
        keep = keep | why_earlier
        tl.store(out + 7, tl.sum((why_earlier & inside).to(tl.float32), 0))
    if HAS_ORIGINS:
        keep = (keep | (length - origin < min_length)) & inside
        tl.store(out + REAL, tl.sum(inside.to(tl.float32), 0))
    tl.store(out + 0, tl.sum((why_sinks & inside).to(tl.float32), 0))
    tl.store(out + 1, tl.sum((why_recent & inside).to(tl.float32), 0))
    tl.store(out + 2, tl.sum((why_window & inside).to(tl.float32), 0))
    tl.store(out + 3, tl.sum((why_spread & inside).to(tl.float32), 0))
    tl.store(out + 4, tl.sum((why_following & inside).to(tl.float32), 0))
    tl.store(out + 5, tl.sum((why_mass & inside).to(tl.float32), 0))
    tl.store(out + 6, tl.sum((why_copying & inside).to(tl.float32), 0))
    tl.store(out + LOST, tl.max(tl.where(inside & (keep == 0), here, 0.0), 0))
    tl.store(keep_out + pair * length + n, keep.to(tl.uint8), n < length)
    if RUNGS > 1:
        # Divided as `core.needs.levels` does it: to the nearest number.
        worth = tl.maximum(tl.div_rn(around, level_unit), tl.div_rn(far, level_spread_unit))
        worth = tl.maximum(tl.where(score >= level_copying, worth * weight, worth), score * expected)
        level = tl.zeros([BLOCK], tl.int32)
        for rung in tl.static_range(RUNGS - 1):
            does = tl.load(damage + batch * sd_b + head * RUNGS + rung)
            level += (worth * does > code_unit).to(tl.int32)
        tl.store(levels_out + pair * length + n, tl.where(inside, level, 0).to(tl.uint8), n < length)


@triton.jit(do_not_specialize=["lines"])
def _tally_kernel(stats, out, lines, share, BLOCK: tl.constexpr, HAS_ORIGINS: tl.constexpr):
    """All chunks of all heads of a row together: sums, as shares of its entries, and the largest of what is lost.

    ``share`` is one over how many they are, if all heads have equally many.
    """
    row, which, some = tl.program_id(0), tl.arange(0, 16), tl.arange(0, BLOCK)
    total, highest = tl.zeros([16], tl.float32), tl.zeros([16], tl.float32)
    for start in range(0, lines, BLOCK):
        line = (start + some)[:, None]
        part = tl.load(stats + (row * lines + line) * 16 + which[None, :], line < lines, 0.0)
        total += tl.sum(part, 0)
        highest = tl.maximum(highest, tl.max(part, 0))
    if HAS_ORIGINS:
        total = tl.div_rn(total, tl.maximum(tl.sum(tl.where(which == REAL, total, 0.0), 0), 1.0) + total * 0.0)
    else:
        total *= share
    tl.store(out + row * 16 + which, tl.where(which == LOST, highest, total))


@on_its_device
def launch_needs(
    window: ProbeReductions,
    spread: ProbeReductions,
    scores: Tensor,
    rules: Rules,
    earlier: Tensor | None = None,
    grading: Grading | None = None,
    origins: Tensor | None = None,
) -> Needs:
    """`core.needs.needs` of rows without padding that are no shorter than ``min_length``, head by head.

    With ``grading`` `core.needs.levels` as well. With ``origins``, integers ``[B | 1, H_kv]``, what is before a head's
    first entry is not real, and heads may be shorter than that.
    """
    assert window.mean is not None
    peak, mass, far = (part.contiguous() for part in (window.peak, window.mean, spread.peak))
    batch, kv_heads, length = peak.shape
    chunks, pairs = blocks_of(length, BLOCK), batch * kv_heads
    masses = torch.empty(pairs, chunks, 32, dtype=torch.float32, device=peak.device)
    stats = torch.empty(batch, kv_heads * chunks, 16, dtype=torch.float32, device=peak.device)
    numbers = torch.empty(batch, 16, dtype=torch.float32, device=peak.device)
    keep = torch.empty(batch, kv_heads, length, dtype=torch.bool, device=peak.device)
    _mass_kernel[(chunks, pairs)](peak, mass, masses, length, LEVELS=LEVELS, BLOCK=BLOCK, num_warps=8)
    places = None if earlier is None else earlier.expand(batch, kv_heads, length).view(torch.uint8)
    rungs, by, damage, step = None, rules, peak, 0
    if grading is not None:
        by, damage = grading.rules, grading.damage.contiguous()
        rungs = torch.empty(batch, kv_heads, length, dtype=torch.uint8, device=peak.device)
        step = damage.stride(0) if damage.shape[0] > 1 else 0
    _needs_kernel[(chunks, pairs)](
        peak, far, masses, scores, keep if places is None else places, keep.view(torch.uint8), stats,
        damage, keep.view(torch.uint8) if rungs is None else rungs, stats if origins is None else origins,
        length, kv_heads, scores.stride(0) if scores.shape[0] > 1 else 0,
        *((0, 0) if places is None else places.stride()[:2]), step,
        origins.stride(0) if origins is not None and origins.shape[0] > 1 else 0, rules.sinks, rules.recent,
        rules.follow, chunks, rules.min_length,
        rules.unit, rules.spread_unit, rules.hit, rules.share, rules.copying,
        float(by.unit), float(by.spread_unit), float(by.copying), float(by.copying_weight),
        float(by.copying_peak / by.unit), float(by.code_unit),
        LEVELS=LEVELS, RUNGS=1 if rungs is None else damage.shape[-1], HAS_EARLIER=places is not None,
        HAS_ORIGINS=origins is not None, BLOCK=BLOCK,
        BLOCK_F=power_of_2(max(rules.follow, 1)), BLOCK_C=power_of_2(max(chunks, FEW)), num_warps=8,
    )  # fmt: skip
    _tally_kernel[(batch,)](
        stats, numbers, kv_heads * chunks, 1.0 / (kv_heads * length), BLOCK=64, HAS_ORIGINS=origins is not None
    )
    names = REASONS if places is not None else REASONS[:-1]
    return Needs(keep, numbers[:, LOST.value], dict(zip(names, numbers.unbind(1), strict=False)), rungs)


@triton.jit(do_not_specialize=["length", "size"])
def _order_kernel(keep, order, counts, marks, length, size, BLOCK: tl.constexpr):
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keep += line * length
    order += line * length
    place = tl.arange(0, BLOCK)
    # Counted anew by each program: a few bytes an entry, in place of a launch that adds up.
    before = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, length, BLOCK):
        here = tl.load(keep + first + place, first + place < length, 0).to(tl.int32)
        total += here
        before += tl.where(first < chunk * BLOCK, here, 0)
    n = chunk * BLOCK + place
    here = tl.load(keep + n, n < length, 0).to(tl.int32)
    held = tl.sum(total, 0)
    tl.store(order + tl.sum(before, 0) + tl.cumsum(here, 0) - 1, n, here != 0)
    tl.store(order + n, tl.zeros([BLOCK], tl.int32), (n >= held) & (n < length))  # readers gather with all of it
    if chunk == 0:
        tl.store(counts + line, held)
    byte, eight = chunk * (BLOCK // 8) + tl.arange(0, BLOCK // 8), tl.arange(0, 8)
    at = byte[:, None] * 8 + eight[None, :]
    bits = tl.load(keep + at, at < length, 0).to(tl.int32) << eight[None, :]
    tl.store(marks + line * size + byte, tl.sum(bits, 1).to(tl.uint8), byte < size)


@on_its_device
def launch_kept_first(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.kept_first`."""
    keep = keep.contiguous()
    length = keep.shape[-1]
    order = torch.empty(keep.shape, dtype=torch.int32, device=keep.device)
    counts = torch.empty(keep.shape[:-1], dtype=torch.int32, device=keep.device)
    marks = torch.empty(*keep.shape[:-1], blocks_of(length, 8), dtype=torch.uint8, device=keep.device)
    block = 2048
    _order_kernel[(blocks_of(length, block), counts.numel())](
        keep.view(torch.uint8), order, counts, marks, length, marks.shape[-1], BLOCK=block, num_warps=8
    )
    return order, counts, marks


@triton.jit(do_not_specialize=["length", "so_b", "so_g", "sl_b", "sl_g", "sk_b", "sk_g"])
def _leveled_kernel(
    order, kept, levels, ordered, counts, listed, packed, length, groups, so_b, so_g, sk_b, sk_g, sl_b, sl_g, first,
    recent, RUNGS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, group = line // groups, line % groups
    held = tl.load(kept + row * sk_b + group * sk_g)
    order += row * so_b + group * so_g
    levels += row * sl_b + group * sl_g
    rung, place = tl.arange(0, WIDE), tl.arange(0, BLOCK)
    # Counted anew by each program, in place of a launch that adds up. All reads of many entries are under way at once.
    before = tl.zeros([WIDE], tl.int32)
    total = tl.zeros([WIDE], tl.int32)
    for start in range(0, held, COUNTED):
        n = start + tl.arange(0, COUNTED)
        at = tl.load(order + n, n < held, 0)
        level = tl.minimum(tl.load(levels + at, n < held, 0).to(tl.int32), RUNGS - 1)
        coded = (n >= first) & (n < held - recent)
        # Those before this program's in the upper half: neither has more than 16 bits.
        worth = tl.where(n < chunk * BLOCK, 65537, 1)
        found = tl.sum(tl.where((level[None, :] == rung[:, None]) & coded[None, :], worth[None, :], 0), 1)
        total += found & 65535
        before += found >> 16
    if chunk == 0:
        tl.store(counts + row * RUNGS * groups + rung * groups + group, total, rung < RUNGS)
    n = chunk * BLOCK + place
    at = tl.load(order + n, n < held, 0)
    level = tl.minimum(tl.load(levels + at, n < held, 0).to(tl.int32), RUNGS - 1)
    tl.store(ordered + line * length + n, level.to(tl.uint8), n < length)
    coded = (n >= first) & (n < held - recent)
    for one in tl.static_range(RUNGS):
        begin = tl.sum(tl.where(rung < one, total, 0) + tl.where(rung == one, before, 0), 0)
        here = (coded & (level == one)).to(tl.int32)
        tl.store(listed + line * length + begin + tl.cumsum(here, 0) - 1, at, here != 0)
    size = (length + 3) // 4
    byte, four = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4), tl.arange(0, 4)
    n = first + byte[:, None] * 4 + four[None, :]
    at = tl.load(order + n, n < held - recent, 0)
    level = tl.minimum(tl.load(levels + at, n < held - recent, 0).to(tl.int32), RUNGS - 1)
    tl.store(packed + line * size + byte, tl.sum(level << (2 * four)[None, :], 1).to(tl.uint8), byte < size)


@on_its_device
def launch_leveled(
    order: Tensor, kept: Tensor, levels: Tensor, rungs: int, first: int, recent: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.leveled`."""
    batch, length = order.shape[0], order.shape[2]
    groups, device = max(levels.shape[1], kept.shape[1]), order.device
    ordered = torch.empty(batch, groups, length, dtype=torch.uint8, device=device)
    counts = torch.empty(batch, rungs, groups, dtype=torch.int32, device=device)
    listed = torch.empty(batch, groups, length, dtype=torch.int32, device=device)
    packed = torch.empty(batch, groups, blocks_of(length, 4), dtype=torch.uint8, device=device)
    wide = order.expand(-1, groups, -1), kept.expand(-1, groups), levels.expand(-1, groups, -1)
    strides = [step for part in wide for step in part.stride()[:2]]
    if any(part.stride(-1) != 1 for part in (order, levels)):
        raise ValueError("order and levels need a line's numbers one after the other")
    block = 2048
    _leveled_kernel[(blocks_of(length, block), batch * groups)](
        *wide, ordered, counts, listed, packed, length, groups, *strides, first, recent,
        RUNGS=rungs, WIDE=power_of_2(max(rungs, 2)), BLOCK=block, COUNTED=COUNTED, num_warps=8,
    )  # fmt: skip
    return ordered, counts, listed, packed
