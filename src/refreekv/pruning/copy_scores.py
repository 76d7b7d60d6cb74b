"""How much each KV head of a model copies: measured once a model, on random tokens said twice.

A head that copies looks, when a token comes for the second time, at what followed it the
first time (an induction head, arXiv 2209.11895; retrieval heads, arXiv 2404.15574). Such
heads are few, the same for every text, and what they may be asked to fetch is nowhere to be
seen in the prompt. That some heads need the whole cache and others only a part is used by
DuoAttention (arXiv 2410.10819), which trains for it; here one forward pass of some 500 tokens
tells them apart.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from refreekv.core.selection import Selection
from refreekv.policies import LayerView, Policy, ProbePlan

TOKENS = 256
"""Distinct random tokens that are said twice."""


@dataclass(frozen=True)
class CopyProbe(Policy):
    """Prunes nothing; takes down how much each head copies when `tokens_said_twice` are the prompt.

    Parameters
    ----------
    tokens : int
        How many distinct tokens are said twice.
    found : dict of int to Tensor
        Filled with ``[H_kv]`` by the layer's number among those that may be pruned: models may run layers
        in any order, or leave some out.
    """

    tokens: int = 0
    found: dict[int, Tensor] = field(default_factory=dict)

    def probe_plan(self, n: int) -> ProbePlan:
        """The queries of the second saying."""
        return ProbePlan(rows=self.tokens)

    def select(self, view: LayerView) -> Selection | None:
        """Take down the layer's scores; keep everything."""
        rows, kv_heads = view.probe[0], view.keys.shape[1]
        # Not the last token, whose successor nobody knows.
        asked = torch.arange(self.tokens - 1, device=rows.device)
        followed = asked + rows.shape[-1] - 2 * self.tokens + 1
        copied = rows[:, asked, followed].mean(-1)
        self.found[int(view.layer)] = copied.view(kv_heads, -1).amax(-1)
        return None

    def scores(self, layers: int) -> list[Tensor]:
        """What was found, by layer.

        Raises
        ------
        RuntimeError
            One of the ``layers`` that may be pruned took no part in the pass.
        """
        absent = sorted(set(range(layers)) - self.found.keys())
        if absent:
            raise RuntimeError(
                f"copy scores could not be measured: of {layers} layers that may be pruned, number {absent[0]} did not "
                "run on plain text; choose a policy that reads none, such as 'snapkv'"
            )
        return [self.found[layer] for layer in range(layers)]


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
    begin = getattr(config, "bos_token_id", None)  # not every text decoder's configuration has one
    first = [begin] if isinstance(begin, int) and 0 <= begin < vocabulary else []
    return [*first, *drawn, *drawn], count
