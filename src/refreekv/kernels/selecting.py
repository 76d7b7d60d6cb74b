"""Which entries a policy's scores keep, in what order and rungs, and what stands in for the others."""

from torch import Tensor

from refreekv.core import needs as needs_in_torch
from refreekv.core import selection
from refreekv.core import surrogates as surrogates_in_torch
from refreekv.core.needs import Grading, Needs, Rules
from refreekv.core.reductions import ProbeReductions
from refreekv.core.surrogates import Surrogates
from refreekv.kernels import dispatch, reference


def needed(
    window: ProbeReductions,
    spread: ProbeReductions,
    scores: Tensor | None,
    rules: Rules,
    *,
    real: Tensor | None = None,
    earlier: Tensor | None = None,
    grading: Grading | None = None,
    origins: Tensor | None = None,
) -> Needs:
    """The entries that probed queries look at, their surroundings, and all of the heads that copy.

    Parameters and results are those of `core.needs.needs`, which this is on the CPU, with padding, without copy
    scores and where all heads keep one set. Else it is three launches on CUDA. With ``grading`` their rungs come with
    them, those of `core.needs.levels`. ``origins``, integers ``[B | 1, H_kv]``, say that each head's real entries are
    those from there on.
    """
    peak, plain = window.peak, (real is None or origins is not None) and not rules.together
    long = origins is not None or peak.shape[-1] >= rules.min_length
    if dispatch.on_triton(peak) and plain and scores is not None and long:
        from refreekv.kernels.needs import launch_needs

        return launch_needs(window, spread, scores, rules, earlier, grading, origins)
    found = needs_in_torch.needs(window, spread, scores, rules, real=real, earlier=earlier)
    if grading is None:
        return found
    return found._replace(levels=needs_in_torch.levels(window, spread, scores, *grading, real=real))


def uni_metric_cut(
    rows: Tensor, *, sinks: int, threshold: float, includes_sinks: bool = False, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where the position ranking may be cut, and what that loses.

    Parameters and results are those of `core.selection.uni_metric_cut`, which this is on the CPU and
    with padding. Without, it is three launches on CUDA.
    """
    if dispatch.on_triton(rows) and valid is None and threshold > 0:
        from refreekv.kernels.cut import launch_cut

        return launch_cut(rows, sinks, threshold, includes_sinks)
    return selection.uni_metric_cut(rows, sinks=sinks, threshold=threshold, includes_sinks=includes_sinks, valid=valid)


def kept_first(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the kept entries are. One launch on CUDA, and the host does not wait for it.

    Parameters
    ----------
    keep : Tensor
        Boolean ``[B, G, n]``.

    Returns
    -------
    order, counts : Tensor
        int32 ``[B, G, n]``, the indices of the True entries in ascending order and then zeros; and
        how many they are, ``[B, G]``.
    marks : Tensor
        uint8 ``[B, G, bytes]``: a bit for each entry, the first in the lowest bit.
    """
    if dispatch.on_triton(keep):
        from refreekv.kernels.needs import launch_kept_first

        return launch_kept_first(keep)
    return reference.kept_first(keep)


def leveled(
    order: Tensor, kept: Tensor, levels: Tensor, *, rungs: int, first: int, recent: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rungs of the kept entries in their order, and of those that are coded, which are in each. One launch on CUDA.

    Parameters
    ----------
    order, kept : Tensor
        ``[B, 1 | G, n]`` and ``[B, 1 | G]`` int32, as `kept_first` gives them.
    levels : Tensor
        uint8 ``[B, 1 | G, n]``: the rung of each entry, kept or not; what is above the last one counts as that.
    rungs : int
        How many there are.
    first, recent : int
        Kept entries at the beginning and at the end that are not coded.

    Returns
    -------
    ordered, counts : Tensor
        uint8 ``[B, G, n]``, of which each line's first ``kept`` say something, and int32 ``[B, rungs, G]``.
    listed, packed : Tensor
        int32 ``[B, G, n]``: the entries that are coded, those of the first rung first; and their rungs in their own
        order, four of them in a byte of uint8 ``[B, G, n / 4]``, the first in the lowest bits.
    """
    if dispatch.on_triton(levels):
        from refreekv.kernels.needs import launch_leveled

        return launch_leveled(order, kept, levels, rungs, first, recent)
    return reference.leveled(order, kept, levels, rungs, first, recent)


def make_surrogates(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    keep: Tensor,
    *,
    count: int,
    real: Tensor | None = None,
    asked: Tensor | None = None,
) -> Surrogates:
    """Surrogates of all that is not kept.

    Parameters, results and meaning are those of `core.surrogates.make`, but ``keep``: boolean
    ``[B, H_kv, n]``, whose opposite that takes.
    """
    rows = queries.shape[1] // keys.shape[1] * queries.shape[2]
    if dispatch.on_triton(keys) and real is None and asked is None and count <= 16 and rows <= 128:
        from refreekv.kernels.surrogates import launch_surrogates, tile_for

        if tile := tile_for(queries, keys, values):
            return launch_surrogates(queries, keys, values, keep, count, tile)
    gone = ~keep if real is None else real & ~keep
    return surrogates_in_torch.make(queries, keys, values, gone, count=count, real=real, asked=asked)


def put_surrogates(chosen: Surrogates, keys: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """Write surrogates over the entries ``[B, H_kv, n, D]`` whose places they take; what is kept with them."""
    if dispatch.on_triton(keys):
        from refreekv.kernels.surrogates import launch_put

        return launch_put(chosen, keys, values, keep)
    surrogates_in_torch.put(chosen, keys, values)
    return keep.scatter(-1, chosen.columns, keep.gather(-1, chosen.columns) | chosen.real)
