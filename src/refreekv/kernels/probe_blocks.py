"""Probe reductions on a CPU: in blocks of rows that stay in the cache, with masks on their diagonals only.

`core.reductions.probe_reductions` is the plain version. What is different here is what costs time on a CPU: a
block has as many rows as fit, so that few operations are started; it ends where its last query's sight ends; what
its queries do not all see is a triangle at that end, and only that is masked; and keys in half precision are
widened once.
"""

import torch
from torch import Tensor

from refreekv.core.reductions import ProbeReductions, Probes, check_heads

BLOCK = 2**19
"""Probabilities of a block for each thread: with the logits before them, 4 MiB."""

LEAST_ROWS = 64
"""Rows of a block on prompts so long that fewer would fit: keys are read once a block."""

WIDENED = 2**24
"""Most numbers of half-precision keys that are there in float32, too, unless one KV head has more."""


def probe_reductions(query: Tensor, key: Tensor, probes: Probes) -> ProbeReductions:
    """`core.reductions.probe_reductions`: its parameters, results and errors."""
    batch, heads, count, dim = query.shape
    # Denominators that are known save nothing here: a softmax in place is one pass.
    query_columns, columns, valid, query_real, scaling, distance, softcap, sink_logits, sums, _told = probes
    kv_heads, length = key.shape[1], key.shape[2]
    check_heads(heads, kv_heads)
    group = heads // kv_heads
    # How many of the first keys each query sees, and how many of them count: [B | 1, k].
    seen, counted = (_keys_up_to(query_columns - back, columns, length) for back in (0, distance))
    if query_real is not None:
        seen, counted, query_real = torch.broadcast_tensors(seen, counted, query_real)
    query = (query.float() * (dim**-0.5 if scaling is None else scaling)).view(batch, kv_heads, group, count, dim)
    sinks = None if sink_logits is None else sink_logits.float().view(-1, kv_heads, group, 1).expand(batch, -1, -1, -1)
    shape = (batch, kv_heads, length)
    # Types are said everywhere: PyTorch's default type is the user's.
    peak = torch.zeros(shape, dtype=torch.float32, device=key.device)
    total = torch.zeros_like(peak) if sums else None
    most = torch.get_num_threads() * BLOCK
    at_once = kv_heads if key.dtype == torch.float32 else max(1, min(kv_heads, WIDENED // (length * dim)))
    at_once = max(1, min(at_once, most // (LEAST_ROWS * length)))
    step = max(1, most // (at_once * group * length), -(-LEAST_ROWS // (at_once * group)))
    scratch = peak.new_empty(2, at_once * group * min(step, count) * length)
    for row in range(batch):
        line = row % len(seen)  # one for all rows, or one each
        for first in range(0, kv_heads, at_once):
            some = slice(first, first + at_once)
            shown = None
            if valid is not None:
                shown = valid[row, None] if valid.dim() == 2 else valid[row, some]
            _reduce(
                query[row, some],
                key[row, some].float(),
                seen[line],
                counted[line],
                None if query_real is None else query_real[line],
                shown,
                None if sinks is None else sinks[row, some],
                softcap,
                step,
                scratch,
                peak[row, some],
                None if total is None else total[row, some],
            )
    if total is None:
        return ProbeReductions(peak, None)
    return ProbeReductions(peak, total.div_(_times_seen(counted, query_real, length).mul_(group)[:, None]))


def _reduce(
    query: Tensor,
    key: Tensor,
    seen: Tensor,
    counted: Tensor,
    real: Tensor | None,
    shown: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    step: int,
    scratch: Tensor,
    peak: Tensor,
    total: Tensor | None,
) -> None:
    """Raise ``peak`` and ``total`` ``[h, n]`` by what queries ``[h, g, k, D]`` give to keys ``[h, n, D]``.

    ``seen`` and ``counted`` are ``[k]``, ``shown`` is ``[1 | h, n]`` and ``sinks`` is ``[h, g, 1]``.
    """
    kv_heads, group, probes, dim = query.shape
    key = key.transpose(1, 2)
    asked = None if real is None else real.expand(kv_heads, -1)
    bias = None
    if shown is not None:
        bias = peak.new_zeros(shown.shape).masked_fill_(~shown, float("-inf"))[:, None]
        # A query that sees nothing has a softmax that is not a number.
        sees = seen > shown.to(torch.uint8).argmax(1, keepdim=True)
        sees &= shown.any(1, keepdim=True)
        asked = sees.expand(kv_heads, -1) if asked is None else sees & asked
    elif int(seen.min()) == 0:
        asked = (seen > 0).expand(kv_heads, -1) if asked is None else (seen > 0) & asked
    if asked is not None and bool(asked.all()):
        asked = None
    sight, counts = seen.tolist(), counted.tolist()
    for start in range(0, probes, step):
        part = slice(start, min(start + step, probes))
        end, mine = max(sight[part]), part.stop - part.start
        if end == 0:
            continue
        rows = group * mine
        block = query[:, :, part].reshape(kv_heads, rows, dim)  # [h, g * c, D]
        logits, weights = (half[: kv_heads * rows * end].view(kv_heads, rows, end) for half in scratch)
        torch.bmm(block, key[:, :, :end], out=logits)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            logits.add_(bias[..., :end])
        _fill_from(logits, seen[part], min(sight[part]), end, float("-inf"))
        if sinks is None:
            torch.softmax(logits, -1, out=weights)
        else:
            sink = sinks.expand(-1, -1, mine).reshape(kv_heads, rows, 1)
            weights.copy_(torch.cat([logits, sink], -1).softmax(-1)[..., :end])
        _fill_from(weights, counted[part], min(counts[part]), end, 0.0)
        if asked is not None:
            silent = ~asked[:, None, part].expand(-1, group, -1).reshape(kv_heads, rows, 1)
            weights.masked_fill_(silent, 0.0)
        highest = peak[:, :end]
        torch.maximum(highest, weights.amax(1), out=highest)
        if total is not None:
            ones = weights.new_ones(1, 1, rows).expand(kv_heads, -1, -1)
            total[:, :end] += torch.bmm(ones, weights)[:, 0]


def _fill_from(rows: Tensor, limits: Tensor, lowest: int, end: int, value: float) -> None:
    """Fill each row of ``[h, g * c, end]`` from its query's limit ``[c]`` on; the lowest limit is known."""
    if lowest < end:
        hidden = torch.arange(lowest, end, device=limits.device) >= limits[:, None]  # [c, end - lowest]
        tail = rows.view(rows.shape[0], -1, len(limits), end)[..., lowest:]
        tail.masked_fill_(hidden, value)


def _keys_up_to(at: Tensor, columns: Tensor | None, length: int) -> Tensor:
    """How many keys have a column of at most ``at``."""
    if columns is None:
        return (at + 1).clamp(0, length)
    return torch.searchsorted(columns, at.contiguous(), right=True)


def _times_seen(counted: Tensor, real: Tensor | None, length: int) -> Tensor:
    """``[B | 1, n]`` float32: how many of the queries count for each key, at least 1."""
    ends = torch.zeros(len(counted), length + 1, dtype=torch.float32, device=counted.device)
    one = torch.ones_like(counted) if real is None else real
    ends.scatter_add_(1, counted.long(), one.float())
    # A query counts for all keys before its end.
    return ends.flip(1).cumsum(1).flip(1)[:, 1:].clamp_min(1)
