"""Copy scores of a transformers model, measured once a model file; see `pruning.copy_scores`."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreekv.engines.transformers import fingerprint, model_constants
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.naming import cache_argument, logits_argument
from refreekv.pruning.copy_scores import CopyProbe, tokens_said_twice

KEPT = "copy_scores."
"""What the names of scores begin with on disk; then comes the index among the full-attention layers."""

# Scores belong to a model as long as it lives, and a pass for each `compress` block would be a
# waste. The model cannot hold them itself, for it is to be exactly as before afterwards.
_KNOWN: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[object, tuple[Tensor, ...]]]" = weakref.WeakKeyDictionary()


def copy_scores(model: PreTrainedModel, weights: object = None) -> Sequence[Tensor]:
    """The copy score of each KV head, measured at the first call and remembered with the model, and on disk.

    The score is the mean attention that the second saying of a token gives to the token after its
    first saying, the largest over the query heads that share the KV head. To be called while
    refreekv is attached to the model. ``weights`` are what `fingerprint.of_contents` says of it now; None: it is asked.

    Returns
    -------
    sequence of Tensor
        By full-attention layer, ``[H_kv]`` float32 in [0, 1].
    """
    weights = fingerprint.of_contents(model) if weights is None else weights
    known = _KNOWN.get(model)
    if known is None or known[0] != weights:
        # A model that changed in this process is not what its file says.
        key = model_constants.key_of(model) if known is None else None
        known = (weights, tuple(_measure(model) if key is None else _kept(key, model)))
        _KNOWN[model] = known
    return known[1]


def at_hand(model: PreTrainedModel) -> tuple[object, Sequence[Tensor]] | None:
    """What `fingerprint.of_contents` said when scores were last measured, and these; None: they never were."""
    return _KNOWN.get(model)


def remember(model: PreTrainedModel, scores: Sequence[Tensor], key: str | None) -> None:
    """Note scores that were measured on another occasion; also on disk where the model has a ``key``."""
    _KNOWN[model] = (fingerprint.of_contents(model), tuple(scores))
    if key is not None:
        model_constants.store(key, {f"{KEPT}{layer}": part for layer, part in enumerate(scores)})


def _kept(key: str, model: PreTrainedModel) -> Sequence[Tensor]:
    """The scores on disk; measured and put there if there are none."""
    found = model_constants.load(key)
    names = sorted((name for name in found if name.startswith(KEPT)), key=lambda name: int(name.removeprefix(KEPT)))
    if names:
        return [found[name].to(model.device) for name in names]
    scores = _measure(model)
    model_constants.store(key, {f"{KEPT}{layer}": part for layer, part in enumerate(scores)})
    return scores


def _measure(model: PreTrainedModel) -> list[Tensor]:
    prompt, count = tokens_said_twice(model.config.get_text_config(decoder=True))
    return read(model, CopyProbe(tokens=count), [prompt])


@torch.no_grad()
def read(
    model: PreTrainedModel, probe: CopyProbe, prompts: Sequence[Sequence[int]], starts: Sequence[int] | None = None
) -> list[Tensor]:
    """Let a model read rows of tokens, all of one length, for a probe: the scores that it took down.

    ``starts`` are the positions of their first tokens; None: 0.
    """
    ids = torch.tensor(prompts, device=model.device)
    cache, positions = PrunedCache(model.config, probe), {}
    if starts is not None:
        first = torch.tensor(starts, device=model.device)[:, None]
        positions = {"position_ids": first + torch.arange(ids.shape[1], device=model.device)}
    with cache.prompt_until(ids.shape[1]):
        arguments = cache_argument(model.forward, cache) | logits_argument(model.forward, 1)
        model(input_ids=ids, **positions, **arguments, use_cache=True)
    return probe.scores(cache.state.layers)
