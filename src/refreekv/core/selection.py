"""Importance to selection: the Uni-Metric and what a layer keeps.

The Uni-Metric (arXiv 2502.16886, section 3) stops evicting when the attention that
would be lost, measured as an L2 norm averaged over heads, passes a threshold::

    loss(i) = 1 - mean_h ||a_h restricted to the first i ranked positions|| / mean_h ||a_h||

What is kept is the shortest ranked prefix with ``loss <= threshold``. All prefixes are
measured at once: square, reorder, cumulative sum, square root, mean over heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from refreekv.core.surrogates import Surrogates


@dataclass(frozen=True)
class Selection:
    """What one layer keeps of its prompt, position by position.

    Attributes
    ----------
    keep : Tensor
        Boolean ``[B, G, n]`` with ``G`` either 1 (all KV heads keep the same
        positions) or the number of KV heads, which may keep different numbers.
    metric : Tensor or None
        ``[B]``: the criterion's value at what is kept (the Uni-Metric's loss), if any.
    reasons : dict
        Names of reasons to ``[B]``: the share of the real entries that stay for each. An entry may
        have several.
    surrogates : Surrogates or None
        Entries to store in the places of some that ``keep`` evicts; with as many KV heads as the keys.
    levels : Tensor or None
        uint8 ``[B, 1 or H_kv, n]``: in which rung of a ladder of number formats, from 0 on, each kept entry is to be
        stored; where surrogates are put, it is said of these. None: all in the rung of what is generated
        (`refreekv.core.quantisation.Ladder`). Without a ladder they say nothing, and first and newest entries stay
        as they are in any case.
    """

    keep: Tensor
    metric: Tensor | None = None
    reasons: Mapping[str, Tensor] = field(default_factory=dict)
    surrogates: Surrogates | None = None
    levels: Tensor | None = None


@dataclass(frozen=True)
class CutSelection:
    """What one layer keeps when one range after the sinks is dropped, for all heads alike.

    Attributes
    ----------
    cut : Tensor
        ``[B]``, integer: each row keeps its first ``sinks`` real positions and the
        columns from its cut on.
    sinks : int
        Leading real positions kept.
    metric : Tensor or None
        As in `Selection`.
    """

    cut: Tensor
    sinks: int
    metric: Tensor | None = None

    def mask(self, valid: Tensor) -> Tensor:
        """The selection as a mask ``[B, 1, n]``, given where the real positions are (``[B, n]``)."""
        columns = torch.arange(valid.shape[-1], device=valid.device)
        return (valid & (sink_mask(valid, self.sinks) | (columns >= self.cut[:, None])))[:, None]


def sink_mask(valid: Tensor, sinks: int) -> Tensor:
    """The first ``sinks`` real positions of each row; boolean, shaped like ``valid`` ``[B, n]``."""
    return valid & (valid.cumsum(-1) <= sinks)


def uni_metric_cut(
    rows: Tensor,
    *,
    sinks: int,
    threshold: float,
    includes_sinks: bool,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the position ranking (sinks, then newest to oldest) may be cut, and what that loses.

    Parameters
    ----------
    rows : Tensor
        ``[B, H, n]`` attention of the probe over the prompt, non-negative.
    sinks : int
        Leading positions that are never evicted.
    threshold : float
        Largest loss allowed, in [0, 1). 0 evicts nothing: an entry whose attention is
        too small for float32 still counts.
    includes_sinks : bool
        True: the norms run over all positions, as the paper's formula has it. False:
        over the positions after the sinks only, as the authors' released code has it.
    valid : Tensor, optional
        Boolean ``[B, n]``, False at padding, which is neither sink nor in the norm.

    Returns
    -------
    cut, loss : Tensor
        ``[B]`` integer: row ``b`` keeps its sinks and the columns ``cut[b] .. n-1``; the cut lies between the end of
        the sinks and ``n``. Rows without a usable norm (zero, or not a number) keep everything. And ``[B]`` float: the
        loss at that cut.
    """
    check_threshold(threshold)
    length = rows.shape[-1]
    first: int | Tensor
    if valid is None:
        first = min(sinks, length)
        sink_rows, rest_rows = rows[..., :first], rows[..., first:]
    else:
        sink = sink_mask(valid, sinks)
        rest = valid & ~sink
        sink_rows, rest_rows = rows.where(sink[:, None], 0.0), rows.where(rest[:, None], 0.0)
        # Columns before the first real position after the sinks are nothing to keep or drop.
        first = (rest.cumsum(-1) == 0).sum(-1)
    # From the end backwards: the i-th sum is the energy of the i newest columns.
    energy = _energy(rest_rows).flip(-1)
    base = _energy(sink_rows).sum(-1, keepdim=True) if includes_sinks else None
    kept, metric = _shortest_prefix(energy, base, threshold)
    if threshold == 0:
        kept = torch.full_like(kept, length)
    cut = length - kept
    return (cut.clamp_min(first) if isinstance(first, int) else torch.maximum(cut, first)), metric


def uni_metric_cut_of_worst(
    rows: Tensor,
    *,
    sinks: int,
    threshold: float,
    includes_sinks: bool,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The cut that no single probe row loses more than the threshold by, and the largest loss there.

    Parameters
    ----------
    rows : Tensor
        ``[B, H, k, n]``. Probes that see nothing after the sinks have no say.
    sinks, threshold, includes_sinks, valid
        As in `uni_metric_cut`.

    Returns
    -------
    cut, loss : Tensor
        ``[B]`` each.
    """
    batch, heads, probes, length = rows.shape
    alone = rows.transpose(1, 2).reshape(batch * probes, heads, length)
    each = None if valid is None else valid.repeat_interleave(probes, 0)
    cut, loss = uni_metric_cut(alone, sinks=sinks, threshold=threshold, includes_sinks=includes_sinks, valid=each)
    after = rows[..., sinks:] if valid is None else rows.where((valid & ~sink_mask(valid, sinks))[:, None, None], 0.0)
    silent = after.amax((1, 3)) <= 0 if after.shape[-1] else torch.ones_like(cut.view(batch, probes), dtype=torch.bool)
    cut, loss = cut.view(batch, probes), loss.view(batch, probes)
    # Where all are silent there is no norm, and everything stays, as for one row.
    cut = torch.where(silent & ~silent.all(1, keepdim=True), length, cut)
    lowest, worst = cut.min(1)
    return lowest, loss.gather(1, worst[:, None])[:, 0]


def uni_metric_keep(
    rows: Tensor,
    scores: Tensor,
    *,
    sinks: int,
    recent: int,
    threshold: float,
    includes_sinks: bool,
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """The Uni-Metric over a ranking by score instead of by position.

    Sinks rank first, then the ``recent`` last positions, then the rest by falling
    score, newer before older among equals. Each KV head has a ranking of its own; all
    stop at the same count, so the loss stays one number per layer.

    Parameters
    ----------
    rows : Tensor
        ``[B, H, n]`` attention rows that the norms are taken of.
    scores : Tensor
        ``[B, H_kv, n]`` importance.
    sinks, threshold, includes_sinks, valid
        As in `uni_metric_cut`.
    recent : int
        Trailing positions that are never evicted.

    Returns
    -------
    keep : Tensor
        Boolean ``[B, H_kv, n]``.
    loss : Tensor
        ``[B]``.
    """
    check_threshold(threshold)
    batch, heads, length = rows.shape
    kv_heads = scores.shape[1]
    sink = sink_mask(valid, sinks)
    last = sink_mask(valid.flip(-1), recent).flip(-1) & ~sink
    rank_key = scores.float()
    rank_key = torch.where(last[:, None], float("inf"), rank_key)
    rank_key = torch.where((valid & ~sink)[:, None], rank_key, float("-inf"))
    # A stable descending sort of the flipped scores puts newer positions first among equals.
    order = length - 1 - torch.sort(rank_key.flip(-1), dim=-1, descending=True, stable=True).indices
    group = heads // kv_heads
    rest = valid & ~sink
    energy = _energy(rows.where(rest[:, None], 0.0)).view(batch, kv_heads, group, length)
    energy = energy.gather(-1, order[:, :, None].expand(-1, -1, group, -1)).flatten(1, 2)
    base = _energy(rows.where(sink[:, None], 0.0)).sum(-1, keepdim=True) if includes_sinks else None
    kept, loss = _shortest_prefix(energy, base, threshold, at_least=last.sum(-1))
    kept = rest.sum(-1) if threshold == 0 else kept.minimum(rest.sum(-1))
    ranked = torch.arange(length, device=rows.device) < kept[:, None]
    keep = torch.zeros_like(order, dtype=torch.bool)
    keep.scatter_(-1, order, ranked[:, None].expand(-1, kv_heads, -1))
    return keep | sink[:, None], loss


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless ``threshold`` is a number with ``0 <= threshold < 1``."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0.0 <= threshold < 1.0:
        raise ValueError(
            f"threshold must lie in [0, 1), got {threshold!r}: it is the share of the attention "
            "norm that may be lost (the paper uses 0.01; 0 keeps everything)"
        )


def _energy(rows: Tensor) -> Tensor:
    """Squares, in double precision where there is one.

    Sums of squares run over up to 10^5 terms of very different size; in double the cut
    is where exact arithmetic puts it. The arrays are small (B * H * n).
    """
    return rows.to(torch.float32 if rows.device.type == "mps" else torch.float64).square()


def _shortest_prefix(
    energy: Tensor, base: Tensor | None, threshold: float, at_least: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fewest ranked positions whose loss is within the threshold, and that loss.

    Parameters
    ----------
    energy : Tensor
        ``[B, H, r]`` squares in ranked order.
    base : Tensor or None
        ``[B, H, 1]`` energy that is kept in any case and counts in the norm.
    threshold : float
        Largest loss.
    at_least : Tensor, optional
        ``[B]``: positions that are kept in any case.

    Returns
    -------
    kept, loss : Tensor
        ``[B]`` each. All ``r`` positions if the norm is zero or not a number.
    """
    ranked = energy.shape[-1]
    norms = energy.cumsum(-1)
    if base is not None:
        norms = norms + base
    # Column i: the norm of the first i positions.
    start = norms.new_zeros((*norms.shape[:-1], 1)) if base is None else base
    norms = torch.cat([start, norms], dim=-1).sqrt().mean(1)
    full = norms[:, -1:]
    # Strictly above a limit that is lower by a rounding: a zero or broken norm passes nowhere.
    enough = norms > full * ((1.0 - threshold) * (1.0 - 1e-12))
    kept = (ranked + 1 - enough.sum(-1)).clamp_max(ranked)
    if at_least is not None:
        kept = torch.maximum(kept, at_least)
    loss = 1.0 - norms.gather(-1, kept[:, None]) / full
    return kept, loss[:, 0].nan_to_num(0.0)  # nothing to lose, nothing lost
