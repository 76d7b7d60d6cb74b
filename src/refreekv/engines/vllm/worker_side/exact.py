"""Attention over kept tokens where they lie, for rows whose block table cannot express it yet.

Slow and plain; it serves a request for the few steps between the end of its prompt and the
copy of its scattered tokens, and the step in which a preempted request is computed again
across its prompt's end.
"""

import torch
from torch import Tensor

from refreekv.engines.vllm.worker_side.scoring import LayerFacts


def attend(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, first: int, layer: LayerFacts) -> Tensor:
    """Outputs of a few queries.

    Parameters
    ----------
    query : Tensor
        ``[q, H, D]``, at positions ``first, first + 1, …``.
    keys, values : Tensor
        ``[t, H_kv, D]``: the tokens that exist for these queries.
    positions : Tensor
        Integer ``[t]``: where they are.
    first : int
        Position of the first query.
    layer : LayerFacts
        Scale, cap and learned sinks.

    Returns
    -------
    Tensor
        ``[q, H, D]`` in float32.
    """
    count, heads, _ = query.shape
    group = heads // keys.shape[1]
    keys, values = (part.float().repeat_interleave(group, dim=1) for part in (keys, values))
    logits = torch.einsum("qhd,thd->hqt", query.float(), keys) * layer.scale
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    seen = positions <= torch.arange(first, first + count, device=positions.device)[:, None]
    logits = logits.masked_fill(~seen, float("-inf"))
    if layer.sinks is not None:
        sinks = layer.sinks.float().view(heads, 1, 1).expand(-1, count, -1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(-1)[..., : len(positions)]
    return torch.einsum("hqt,thd->qhd", weights, values)
