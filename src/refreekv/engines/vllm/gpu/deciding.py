"""What a prompt's layers keep, once it has been read: decided about together, as many as there is memory for.

The host sets the time of small steps, and a decision takes it as long for many layers as for one.
"""

from collections.abc import Sequence

from torch import Tensor

from refreekv.core.quantisation import Ladder
from refreekv.engines.vllm.gpu.kept import LayersKept, layers_kept
from refreekv.engines.vllm.worker_side.scoring import Gather, LayerFacts, Probes, alike, select_together
from refreekv.kernels.paged import Pool
from refreekv.kernels.paged_coding import prompt_in_blocks
from refreekv.policies import Policy
from refreekv.policies.full import Full

AT_ONCE = 1 << 28
"""Bytes of a prompt's entries, of all ranks' heads, that are copied beside the pool at once."""

WAITING = 1 << 28
"""Bytes of queries that wait for a step's end; prompts that end with more are decided about while it runs."""


def looks(policy: Policy, layer: int) -> bool:
    """Whether a policy needs to see anything of a layer: whoever keeps everything does not."""
    return not isinstance(policy, Full) and not policy.freezes(layer)


def spans(policy: Policy, layers: Sequence[LayerFacts], layer_bytes: int) -> list[slice]:
    """Which layers are decided about together.

    Parameters
    ----------
    policy, layers : Policy, sequence of LayerFacts
        Who decides, about what; in the model's order.
    layer_bytes : int
        What the prompt holds in a layer, in all ranks' heads.
    """
    most = max(1, AT_ONCE // max(1, layer_bytes))
    return [
        slice(at, min(at + most, run.stop)) for run in alike(policy, layers) for at in range(run.start, run.stop, most)
    ]


def choose(
    policy: Policy,
    probes: Probes,
    layers: Sequence[LayerFacts],
    pool: Pool,
    blocks: Tensor,
    prompt: int,
    heads: int,
    gather: Gather,
    ladder: Ladder | None,
) -> LayersKept | None:
    """What a policy keeps of layers of one of the `spans`; None: everything. Their queries are gone afterwards.

    Parameters
    ----------
    policy, probes, gather, ladder
        As in `worker_side.scoring.select`.
    layers : sequence of LayerFacts
        Those of the span.
    pool, blocks : Pool, Tensor
        The cache, and int32 ``[.]``: the prompt's ordinary blocks.
    prompt, heads : int, int
        Its tokens, and KV heads of all ranks.
    """
    first, stop = layers[0].index, layers[-1].index + 1
    if not looks(policy, first):
        return None
    entries = prompt_in_blocks(pool, blocks, slice(first, stop), prompt)
    keys, values = entries.split(pool.size, -1)
    found = select_together(policy, probes, layers, keys, values, gather, surrogates=True, ladder=ladder)
    for layer in layers:
        probes.queries.pop(layer.index, None)
    if found is None:
        return None
    return layers_kept(found, heads, prompt, pool.cache.dtype, ladder)
