"""KVzip in the bench: what a model needs to say its context again (arXiv 2505.23416).

The context is read as usual; then it is read a second time, piece by piece, as the answer to a request to repeat it,
and what counts of an entry is the highest attention that it gets from any of these queries and any query head of its
KV head. The best of all layers and heads together stay. It costs a second prefill, which no policy of this library
can ask for: it is here to be compared with, as ``kvzip:ratio=0.3`` or ``kvzip:ratio=0.6@int4``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refreekv.core import spelling
from refreekv.core.quantisation import SINKS
from refreekv.evaluation.data.encoding import MARK, render
from refreekv.evaluation.fidelity.masked import MaskedLayer
from refreekv.policies import LayerView, Policy
from refreekv.policies.base import check_budget
from refreekv.pruning.calls import AttentionCall

NAME = "kvzip"
CHUNK = 2000
"""Tokens of the context that are asked for at once."""
OVERLAP = 8
"""Tokens before a piece, with which the request says where it begins."""
RECENT = 32
"""Newest tokens of the prompt that always stay. The paper asks its question behind the context, uncompressed; here
the newest tokens are the question, or what leads over to the answer."""
FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with "


@dataclass(frozen=True)
class KVzip(Policy):
    """Keep the pairs that saying the context again looks at most, over all layers and heads.

    The bench decides, with `kept` of `scores`; to anybody else this policy keeps everything.

    Parameters
    ----------
    ratio : float
        Share to keep, in (0, 1].
    """

    ratio: float
    name = NAME

    def __post_init__(self) -> None:
        check_budget(NAME, None, self.ratio)

    @classmethod
    def parse(cls, spec: str) -> "KVzip | None":
        """From ``kvzip:ratio=R``; None for the name of another policy.

        Raises
        ------
        ValueError
            Something else than a ratio behind the name.
        """
        name, items = spelling.parts(spec)
        if name != NAME:
            return None
        given = dict(items)
        try:
            return cls(float(given.pop("ratio") or ""), **given)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{NAME} takes a ratio and nothing else, as {NAME}:ratio=0.5, not {spec!r}") from error

    def select(self, view: LayerView) -> None:
        """Nothing yet."""


def requests(tokenizer: Any, context: Sequence[int], chunk: int = CHUNK) -> Iterator[tuple[slice, list[int]]]:
    """Pieces of a context, sinks not among them, and the tokens that ask for each, followed by the piece itself.

    What leads over to the answer is the end of the model's chat template, if it has one.
    """
    lead = "\n\n"
    if getattr(tokenizer, "chat_template", None):
        text = render(tokenizer, [{"role": "user", "content": MARK}], add_generation_prompt=True)
        lead = text.partition(MARK)[2]
    for start in range(SINKS, len(context), chunk):
        piece = list(context[start : start + chunk])
        asked = _ids(tokenizer, FIRST)
        if start > SINKS:
            asked = _ids(tokenizer, LATER) + list(context[start - OVERLAP : start])
        yield slice(start, start + len(piece)), asked + _ids(tokenizer, lead) + piece


def kept(scores: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """The share of all pairs with the highest of scores ``[H_kv, n]`` by layer, sinks and newest among them: masks."""
    sizes = [one.shape for one in scores]
    flat = []
    for one in scores:
        raised = one.clone()
        raised[:, :SINKS] = raised[:, -RECENT:] = torch.inf
        flat.append(raised.flatten())
    together = torch.cat(flat)
    count = max(int(ratio * together.numel()), int(together.isinf().sum()))
    chosen = torch.zeros_like(together, dtype=torch.bool)
    chosen[together.topk(count).indices] = True
    parts = chosen.split([size.numel() for size in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


class ScoringLayer(MaskedLayer):
    """One layer's prompt, which takes down what attention a call gives to a piece of it.

    Parameters
    ----------
    keys, values : Tensor
        ``[1, H_kv, n, D]``.
    piece : slice
        The positions that are looked at.

    Attributes
    ----------
    found : Tensor or None
        ``[H_kv, piece]``: the highest attention from any query of the call, among the sinks, the piece and the call's
        own tokens; None before the call.
    """

    def __init__(self, keys: Tensor, values: Tensor, piece: slice):
        super().__init__(keys, values, None)
        self._piece = piece
        self.found: Tensor | None = None

    def attend(self, call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
        """As `MaskedLayer` does; see `found`."""
        assert self.keys is not None
        query, scaling, softcap, sinks = call.query, call.scaling, call.softcap, call.sink_logits
        _, heads, queries, dim = query.shape
        kv_heads = key.shape[1]
        seen = torch.cat([self.keys[:, :, :SINKS], self.keys[:, :, self._piece], key], 2)[0].float()
        future = torch.ones(queries, queries, dtype=torch.bool, device=query.device).triu(1)
        rows = []
        for head in range(heads):
            # [q, sinks + piece + q], one query head at a time
            logits = query[0, head].float() @ seen[head * kv_heads // heads].T
            logits *= dim**-0.5 if scaling is None else scaling
            if softcap is not None:
                logits = (logits / softcap).tanh() * softcap
            logits[:, -queries:].masked_fill_(future, float("-inf"))
            total = logits.logsumexp(-1, keepdim=True)
            if sinks is not None:
                total = torch.logaddexp(total, sinks.float()[head])
            rows.append((logits[:, SINKS:-queries] - total).exp().amax(0))
        self.found = torch.stack(rows).unflatten(0, (kv_heads, -1)).amax(1)
        return super().attend(call, key, value)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
