"""Codes of a transformers model's own, measured once a model; see `pruning.model_codes`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.copy_scores import few_logits
from refreekv.engines.transformers.naming import cache_argument
from refreekv.pruning.copy_scores import tokens_said_twice
from refreekv.pruning.model_codes import CodeProbe, LayerCodes

SHARES = (0.0, 1 / 64, 1 / 16, 1 / 4)
"""Of the longest context: where rows of the calibration stand."""


def model_codes(model: PreTrainedModel, offsets: Sequence[int] | None = None) -> list[LayerCodes]:
    """What to code the entries of each full-attention layer by; see `calibrated`."""
    return calibrated(model, offsets)[1]


@torch.no_grad()
def calibrated(model: PreTrainedModel, offsets: Sequence[int] | None = None) -> tuple[list[Tensor], list[LayerCodes]]:
    """Copy scores and codes of each full-attention layer, from one pass over random tokens said twice.

    To be called while refreekv is attached to the model.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    offsets : sequence of int, optional
        Positions at which rows of random tokens begin; left out: `SHARES` of the longest context.
    """
    config = model.config.get_text_config(decoder=True)
    prompt, count = tokens_said_twice(config)
    if offsets is None:
        longest = int(getattr(config, "max_position_embeddings", 0) or len(prompt))
        offsets = sorted({min(int(share * longest), max(0, longest - len(prompt))) for share in SHARES})
    ids = torch.tensor([prompt] * len(offsets), device=model.device)
    positions = torch.arange(len(prompt), device=model.device) + torch.tensor(offsets, device=model.device)[:, None]
    probe = CodeProbe(tokens=count)
    cache = PrunedCache(model.config, probe)
    with cache.prompt_until(ids.shape[1]):
        arguments = cache_argument(model.forward, cache) | few_logits(model)
        model(input_ids=ids, position_ids=positions, **arguments, use_cache=True)
    scores = probe.scores(cache.state.layers)
    return scores, [probe.codes[layer] for layer in range(len(scores))]
