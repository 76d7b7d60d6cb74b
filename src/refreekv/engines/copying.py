"""How much each KV head of a model copies: measured once a model, on random tokens said twice.

A head that copies looks, when a token comes for the second time, at what followed it the
first time (an induction head, arXiv 2209.11895; retrieval heads, arXiv 2404.15574). Such
heads are few, the same for every text, and what they may be asked to fetch is nowhere to be
seen in the prompt. That some heads need the whole cache and others only a part is used by
DuoAttention (arXiv 2410.10819), which trains for it; here one forward pass of some 500 tokens
tells them apart.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreekv.cache import PrunedCache
from refreekv.cache.naming import cache_argument
from refreekv.core.selection import Selection
from refreekv.engines import fingerprint
from refreekv.policies import LayerView, Policy, ProbePlan

TOKENS = 256
"""Distinct random tokens that are said twice."""

# Scores belong to a model as long as it lives, and a pass for each `compress` block would be a
# waste. The model cannot hold them itself, for it is to be exactly as before afterwards.
_KNOWN: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[object, tuple[Tensor, ...]]]" = weakref.WeakKeyDictionary()


def copy_scores(model: PreTrainedModel) -> Sequence[Tensor]:
    """The copy score of each KV head, measured at the first call and remembered with the model.

    The score is the mean attention that the second saying of a token gives to the token after its
    first saying, the largest over the query heads that share the KV head. To be called while
    refreekv is attached to the model.

    Returns
    -------
    sequence of Tensor
        By full-attention layer, ``[H_kv]`` float32 in [0, 1].
    """
    weights = fingerprint.of_contents(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != weights:
        known = (weights, tuple(_measure(model)))
        _KNOWN[model] = known
    return known[1]


@dataclass(frozen=True)
class CopyProbe(Policy):
    """Prunes nothing; takes down how much each head copies when `tokens_said_twice` are the prompt.

    Parameters
    ----------
    tokens : int
        How many distinct tokens are said twice.
    scores : list of Tensor
        Filled layer by layer with ``[H_kv]``.
    """

    tokens: int = 0
    scores: list[Tensor] = field(default_factory=list)

    def probe_plan(self, n: int) -> ProbePlan:
        """The queries of the second saying."""
        del n
        return ProbePlan(rows=self.tokens)

    def select(self, view: LayerView) -> Selection | None:
        """Take down the layer's scores; keep everything."""
        rows, kv_heads = view.probe[0], view.keys.shape[1]
        # Not the last token, whose successor nobody knows.
        asked = torch.arange(self.tokens - 1, device=rows.device)
        followed = asked + rows.shape[-1] - 2 * self.tokens + 1
        copied = rows[:, asked, followed].mean(-1)
        self.scores.append(copied.view(kv_heads, -1).amax(-1))
        return None


def tokens_said_twice(config: Any, most: int = TOKENS) -> tuple[list[int], int]:
    """A prompt of random tokens that are said twice, after the model's first token if it has one.

    Parameters
    ----------
    config : transformers configuration
        Of the model's text decoder.
    most : int
        Most distinct tokens.

    Returns
    -------
    list of int
        The prompt, the same on every machine.
    int
        How many distinct tokens it says twice.
    """
    vocabulary = int(config.vocab_size)
    count = min(most, vocabulary // 2)
    # Drawn on the CPU with a seed of their own.
    drawn = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[:count].tolist()
    begin = config.bos_token_id
    first = [begin] if isinstance(begin, int) and 0 <= begin < vocabulary else []
    return [*first, *drawn, *drawn], count


@torch.no_grad()
def _measure(model: PreTrainedModel) -> list[Tensor]:
    prompt, count = tokens_said_twice(model.config.get_text_config(decoder=True))
    ids = torch.tensor([prompt], device=model.device)
    probe = CopyProbe(tokens=count)
    cache = PrunedCache(model.config, probe)
    with cache.prompt_until(ids.shape[1]):
        model(input_ids=ids, **cache_argument(model.forward, cache), use_cache=True)
    return probe.scores
