"""Attention of a prompt's probes, as a policy looks at it, and which queries these are."""

from torch import Tensor

from refreekv.core import reductions
from refreekv.core.reductions import ProbeReductions, Probes
from refreekv.kernels import dispatch, ops, probe_blocks, reference


def probe_reductions(query: Tensor, key: Tensor, probes: Probes) -> ProbeReductions:
    """Per-position peak and mean of the probes' attention, ``[B, H_kv, n]`` float32 each.

    Parameters, results and errors are those of `core.reductions.probe_reductions`, the plain version.
    On CUDA two kernels read the keys once each, or one where ``logsumexp`` is known, and no row is ever written out:
    memory is the results and, where it is not, one float32 a query, head and split of the keys. On a CPU it goes in
    blocks (`probe_blocks`).
    """
    reductions.check_heads(query.shape[1], key.shape[1])
    if probes.scaling is None:
        probes = probes._replace(scaling=query.shape[-1] ** -0.5)
    if dispatch.on_triton(key):
        reduce = ops.probe_reductions_on_cuda if dispatch.at_once(key) else ops.probe_reductions_op
        peak, mean = reduce(query, key, *probes)
        return ProbeReductions(peak, mean if probes.sums else None)
    plain = probe_blocks.probe_reductions if key.device.type == "cpu" else reductions.probe_reductions
    return plain(query, key, probes)


def both_reductions(
    query: Tensor, other_query: Tensor, key: Tensor, probes: Probes, other: Probes
) -> tuple[ProbeReductions, ProbeReductions]:
    """`probe_reductions` of two sets of queries over the same keys: on CUDA one kernel reads these once for both.

    What the two say of keys and of attention, ``columns``, ``valid``, ``scaling``, ``softcap`` and ``sink_logits``,
    must be the same; ValueError if it is not.
    """
    for name in ("columns", "valid", "scaling", "softcap", "sink_logits"):
        one, two = getattr(probes, name), getattr(other, name)
        if one is not two and (isinstance(one, Tensor) or isinstance(two, Tensor) or one != two):
            raise ValueError(f"two probes of the same keys differ in their {name}; reduce them one after the other")
    if not dispatch.at_once(key):
        return probe_reductions(query, key, probes), probe_reductions(other_query, key, other)
    from refreekv.kernels.probe_launch import launch_both_reductions

    reductions.check_heads(query.shape[1], key.shape[1])
    peak, mean, other_peak, other_mean = launch_both_reductions(query, other_query, key, probes, other)
    return (
        ProbeReductions(peak, mean if probes.sums else None),
        ProbeReductions(other_peak, other_mean if other.sums else None),
    )


def asked(
    columns: Tensor, ordinals: Tensor, real: Tensor | None, *, rows: int, spread: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a prompt's queries, the last ones and some over all of it. One launch on CUDA.

    Parameters
    ----------
    columns, ordinals, real : Tensor
        Integers ``[B | 1, r]`` twice and boolean ``[B | 1, r]`` or None, as `pruning.calls.Queries` has them.
    rows, spread : int
        How many of the last ones, and at most how many over all of it; 0: none.
    count : int
        How many are given out: the last of those that are not asked stand in front where there are fewer.

    Returns
    -------
    index, columns, ordinals, real : Tensor
        ``[B | 1, count]``: which they are, of each what is known, and whether it is asked.
    """
    if dispatch.on_triton(columns):
        from refreekv.kernels.queries import launch_asked

        return launch_asked(columns, ordinals, real, rows, spread, count)
    return reference.asked(columns, ordinals, real, rows, spread, count)
