"""Probe reductions in Triton: attention of many queries, reduced per position while keys stream by.

Three kernels. The first finds each query's softmax denominator over one split of the keys, the
second joins the splits; both are left out where attention has told its own. The third takes a block
of keys, holds it, runs all queries that can see it past it, and writes up to three numbers a key.
No row ever leaves the chip. The query heads of one KV head are rows of one matrix, so that each key
is read once for all of them, in the first kernel and in the third.

Most blocks of queries see a block of keys either whole or not at all: loops are in two parts, of
which one compares no columns.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LENGTHS = ["query_columns", "probes", "length", "rows", "sc_b", "sc_k", "sv_b", "sv_h"]
"""Arguments that follow from a prompt's length: another one is no reason to compile for seconds."""
STRIDES = ["sd_b", "sd_k", "sd_h", "sd_q"]
OTHERS = ["other_columns", "other_denominators", "other_probes", "other_rows"]
OTHERS += ["oq_k", "oc_b", "oc_k", "od_b", "od_k", "od_h", "od_q"]


@triton.jit
def _capped(logits, softcap, HAS_CAP: tl.constexpr):
    """Logits in units of log 2, after Gemma 2's soft cap if there is one."""
    if HAS_CAP:
        x = 2.0 * logits / softcap
        # tanh by one exponential, from the side that cannot overflow.
        e = tl.exp2(-tl.abs(x) * LOG2E)
        logits = softcap * tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    return logits * LOG2E


@triton.jit
def _logits(q, k, scaling, softcap, HAS_CAP: tl.constexpr):
    product = tl.dot(q, k, input_precision="ieee")
    return _capped(product * scaling, softcap, True) if HAS_CAP else product * (scaling * LOG2E)


@triton.jit
def _exponentials(
    q, at, keys, columns, shown, start, stop, highest, total, scaling, softcap, sk_n,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Rows' running maximum and sum of exponentials, taken on over the keys from ``start`` to ``stop``."""
    d, place = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    at_lines = keys + place.to(tl.int64)[None, :] * sk_n + d[:, None]
    far = tl.full([], 0, tl.int64)
    for first in range(start, stop, BLOCK_N):
        n = first + place
        lines = at_lines + (far + first) * sk_n
        if MASKED:
            inside = n < stop
            k = tl.load(lines, inside[None, :] & (d < HEAD)[:, None], 0.0)
        elif HEAD == BLOCK_D:
            k = tl.load(lines)
        else:
            k = tl.load(lines, (d < HEAD)[:, None], 0.0)
        logits = _logits(q, k, scaling, softcap, HAS_CAP)
        if MASKED:
            column = tl.load(columns + n, inside, 0) if HAS_COLUMNS else n
            if HAS_VALID:
                inside = inside & (tl.load(shown + n, inside, 0) != 0)
            logits = tl.where(inside[None, :] & (column[None, :] <= at[:, None]), logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # A row that has seen nothing yet: keep its exponentials away from inf - inf.
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        highest = higher
    return highest, total


@triton.jit(do_not_specialize=[*LENGTHS, "split_keys"])
def _denominator_kernel(
    query, key, query_columns, columns, valid, out,
    probes, length, kv_heads, split_keys, rows,
    scaling, softcap,
    sq_b, sq_h, sq_k, sk_b, sk_h, sk_n, sc_b, sc_k, sv_b, sv_h,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """``out[b, h, split, row]``: log2 of the sum of exponentials over one split of the keys."""
    pair = tl.program_id(2).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    first = tl.program_id(1) * split_keys
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Row = query * group + head of the group: rows that are near see nearly the same keys.
    probe, head = row // GROUP, kv_head * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_D)
    real = row < rows
    at = tl.load(query_columns + batch * sc_b + probe * sc_k, real, -1).to(tl.int32)
    lines = query + batch * sq_b + head * sq_h + probe.to(tl.int64) * sq_k
    q = tl.load(lines[:, None] + d[None, :], real[:, None] & (d < HEAD)[None, :], 0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    stop = tl.minimum(first + split_keys, length)
    # A key is never in a column before its index: what follows the newest query is hidden from all.
    stop = tl.maximum(tl.minimum(stop, tl.max(at) + 1), first)
    keys = key + batch * sk_b + kv_head * sk_h
    shown = valid + batch * sv_b + kv_head * sv_h
    clear = first
    if not HAS_VALID and not HAS_COLUMNS:
        # What all rows see: up to the oldest query.
        oldest = tl.min(tl.where(real, at, 2147483647))
        clear += tl.maximum(tl.minimum(stop, oldest + 1) - first, 0) // BLOCK_N * BLOCK_N
        highest, total = _exponentials(
            q, at, keys, columns, shown, first, clear, highest, total, scaling, softcap, sk_n,
            HEAD, BLOCK_D, BLOCK_N, False, HAS_VALID, HAS_COLUMNS, HAS_CAP,
        )  # fmt: skip
    highest, total = _exponentials(
        q, at, keys, columns, shown, clear, stop, highest, total, scaling, softcap, sk_n,
        HEAD, BLOCK_D, BLOCK_N, True, HAS_VALID, HAS_COLUMNS, HAS_CAP,
    )  # fmt: skip
    result = tl.where(total > 0, highest + tl.log2(total), float("-inf"))
    tl.store(out + (pair * tl.num_programs(1) + tl.program_id(1)) * rows + row, result, real)


@triton.jit(do_not_specialize=["splits", "rows"])
def _join_kernel(partial, sinks, out, splits, rows, group, kv_heads, BLOCK: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Denominators of whole rows from those of the splits, and of the learned sink if there is one."""
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < rows
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + pair % kv_heads * group + row % group, real, 0.0).to(tl.float32) * LOG2E
    total = tl.where(highest == float("-inf"), 0.0, 1.0)
    for split in range(splits):
        part = tl.load(partial + (pair * splits + split) * rows + row, real, float("-inf"))
        higher = tl.maximum(highest, part)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(highest - base) + tl.exp2(part - base)
        highest = higher
    tl.store(out + pair * rows + row, tl.where(total > 0, highest + tl.log2(total), float("-inf")), real)


@triton.jit
def _past(
    k, column, query, query_columns, denominators, start, stop, peak, total, count,
    rows, first_head, distance, scaling, softcap, unit, sq_h, sq_k, sc_k, sd_h, sd_q,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, SUMS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Run the rows from ``start`` to ``stop`` past a block of keys. The peak is one of logarithms."""
    d, place = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    # Blocks begin with a query's first head, as a rule: then addresses of the first one's rows serve all of them.
    aligned: tl.constexpr = BLOCK_M % GROUP == 0
    at_lines = query + (first_head + place % GROUP).to(tl.int64) * sq_h + (place // GROUP).to(tl.int64) * sq_k
    at_whole = place % GROUP * sd_h + place // GROUP * sd_q
    far = tl.full([], 0, tl.int64)
    for first in range(start, stop, BLOCK_M):
        row = first + place
        if aligned:
            ahead = first // GROUP
            probe = ahead + place // GROUP
            lines, own = at_lines + (far + ahead) * sq_k, denominators + ahead * sd_q + at_whole
        else:
            probe = row // GROUP
            lines = query + (first_head + row % GROUP) * sq_h + probe.to(tl.int64) * sq_k
            own = denominators + row % GROUP * sd_h + probe * sd_q
        # Behind the last row there is nothing, under a denominator that leaves nothing of it.
        there = row < rows
        if HEAD == BLOCK_D:
            q = tl.load(lines[None, :] + d[:, None], there[None, :], 0.0)
        else:
            q = tl.load(lines[None, :] + d[:, None], there[None, :] & (d < HEAD)[:, None], 0.0)
        whole = tl.load(own, there, float("inf")) * unit
        # Keys times queries, and not the other way round: what is reduced then lies within few threads.
        share = _logits(k, q, scaling, softcap, HAS_CAP) - whole[None, :]
        if MASKED:
            at = tl.load(query_columns + probe * sc_k, there, -1).to(tl.int32)
            counts = there[None, :] & (column[:, None] + distance <= at[None, :])
            # A hidden logit may lie far above the denominator: it must not be exponentiated.
            share = tl.where(counts, share, float("-inf"))
            if SUMS:
                count += tl.sum(counts.to(tl.int32), 1)
        peak = tl.maximum(peak, tl.max(share, 1))
        if SUMS:
            total += tl.sum(tl.exp2(share), 1)
    return peak, total, count


@triton.jit
def _counted(
    k, column, oldest, newest, query, query_columns, denominators, probes, rows, first_head, distance, scaling,
    softcap, unit, sq_h, sq_k, sc_k, sd_h, sd_q,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, SUMS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Peak, and with ``SUMS`` mean, of a block of keys over all rows of some queries."""
    # The first query that counts any of these keys, and the first from which on all count all of them.
    every = tl.arange(0, BLOCK_P)
    at = tl.load(query_columns + every * sc_k, every < probes, -1).to(tl.int32)
    first = tl.min(tl.where((at >= oldest + distance) & (every < probes), every, probes), 0)
    clear = tl.max(tl.where((at < newest + distance) & (every < probes), every + 1, 0), 0)
    start = first * GROUP // BLOCK_M * BLOCK_M
    middle = tl.minimum(tl.maximum((clear * GROUP + BLOCK_M - 1) // BLOCK_M * BLOCK_M, start), rows)
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.int32)
    # With sums, columns are compared for half a block at a time: there are no registers for those of a whole one.
    COMPARED: tl.constexpr = BLOCK_M // 2 if SUMS and BLOCK_M > 32 else BLOCK_M
    peak, total, count = _past(
        k, column, query, query_columns, denominators, start, middle, peak, total, count,
        rows, first_head, distance, scaling, softcap, unit, sq_h, sq_k, sc_k, sd_h, sd_q,
        GROUP, HEAD, BLOCK_D, COMPARED, True, SUMS, HAS_CAP,
    )  # fmt: skip
    peak, total, count = _past(
        k, column, query, query_columns, denominators, middle, rows, peak, total, count,
        rows, first_head, distance, scaling, softcap, unit, sq_h, sq_k, sc_k, sd_h, sd_q,
        GROUP, HEAD, BLOCK_D, BLOCK_M, False, SUMS, HAS_CAP,
    )  # fmt: skip
    # All rows from the middle on count.
    return tl.exp2(peak), total / tl.maximum(count + rows - middle, 1).to(tl.float32)


@triton.jit(do_not_specialize=[*LENGTHS, "denominators", *STRIDES, *OTHERS])
def _reduce_kernel(
    query, key, query_columns, columns, valid, denominators, peak_out, mean_out,
    other_query, other_columns, other_denominators, other_peak, other_mean,
    probes, rows, distance, unit, other_probes, other_rows, other_distance, other_unit,
    length, kv_heads, scaling, softcap,
    sq_b, sq_h, sq_k, sk_b, sk_h, sk_n, sc_b, sc_k, sv_b, sv_h, sd_b, sd_k, sd_h, sd_q,
    oq_b, oq_h, oq_k, oc_b, oc_k, od_b, od_k, od_h, od_q,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, SUMS: tl.constexpr, OTHER_P: tl.constexpr, OTHER_SUMS: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Peak, and with ``SUMS`` mean, of one block of keys over all rows; with ``OTHER_P`` of other queries as well.

    ``denominators`` are logarithms, in ``unit`` of those to base 2.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = n < length
    line = key + batch * sk_b + kv_head * sk_h + n.to(tl.int64) * sk_n
    k = tl.load(line[:, None] + d[None, :], inside[:, None] & (d < HEAD)[None, :], 0.0)
    column = tl.load(columns + n, inside, 0) if HAS_COLUMNS else n
    oldest = tl.min(tl.where(inside, column, 2147483647))
    newest = tl.max(tl.where(inside, column, 0))
    if HAS_VALID:
        inside = inside & (tl.load(valid + batch * sv_b + kv_head * sv_h + n, inside, 0) != 0)
    out = pair * length + n
    peak, mean = _counted(
        k, column, oldest, newest, query + batch * sq_b, query_columns + batch * sc_b,
        denominators + batch * sd_b + kv_head * sd_k, probes, rows, kv_head * GROUP, distance, scaling, softcap,
        unit, sq_h, sq_k, sc_k, sd_h, sd_q, GROUP, HEAD, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_P, SUMS, HAS_CAP,
    )  # fmt: skip
    # Padding took part like any key, as keys do not touch each other; nothing of it is given out.
    tl.store(peak_out + out, tl.where(inside, peak, 0.0), n < length)
    if SUMS:
        tl.store(mean_out + out, tl.where(inside, mean, 0.0), n < length)
    if OTHER_P > 0:
        peak, mean = _counted(
            k, column, oldest, newest, other_query + batch * oq_b, other_columns + batch * oc_b,
            other_denominators + batch * od_b + kv_head * od_k, other_probes, other_rows, kv_head * GROUP,
            other_distance, scaling, softcap, other_unit, oq_h, oq_k, oc_k, od_h, od_q,
            GROUP, HEAD, BLOCK_D, BLOCK_M, BLOCK_N, OTHER_P, OTHER_SUMS, HAS_CAP,
        )  # fmt: skip
        tl.store(other_peak + out, tl.where(inside, peak, 0.0), n < length)
        if OTHER_SUMS:
            tl.store(other_mean + out, tl.where(inside, mean, 0.0), n < length)
