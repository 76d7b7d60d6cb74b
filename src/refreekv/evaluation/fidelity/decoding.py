"""Greedy continuations of full caches, several prompts at once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from refreekv.evaluation.fidelity.prefill import call, fork, join


@dataclass(frozen=True)
class Start:
    """A full cache with everything in it that comes before the answer."""

    cache: DynamicCache  # one row, no padding; never changed here
    length: int  # its tokens
    logits: Tensor  # ``[V]``: prediction of the answer's first token


@dataclass(frozen=True)
class Continuation:
    """What the full cache goes on with."""

    tokens: Tensor  # ``[N + 1]``: the answer, its first token included
    logits: Tensor  # ``[N + 1, V]``: what each of them was chosen from


def stop_tokens(model: Any) -> set[int]:
    """Tokens that end an answer."""
    stop = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if stop is None:
        stop = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


@torch.inference_mode()
def continue_full(
    model: Any, starts: Sequence[Start], steps: int, stop: Collection[int] = (), *, joined: bool
) -> list[Continuation]:
    """Greedy continuations of ``steps`` tokens after the first one, step by step as any user would decode.

    They end early only when all of them have met a stop token, and not before the first step.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    starts : sequence of Start
        The prompts.
    steps : int
        Forward passes.
    stop : collection of int
        Stop tokens.
    joined : bool
        Whether to decode all prompts in one left-padded batch (`SharedPrefill.joinable`), or one
        after the other, whatever their layers hold.
    """
    if not joined and len(starts) > 1:
        return [answer for one in starts for answer in continue_full(model, [one], steps, stop, joined=False)]
    mask: Tensor | None = None
    if joined:
        cache, mask = join([start.cache for start in starts], starts[0].logits.device, spare=steps)
        mask = mask if len(starts) > 1 else None
    else:
        cache = fork(starts[0].cache)
    positions = torch.tensor([[start.length] for start in starts], device=starts[0].logits.device)
    lines = [torch.stack([start.logits for start in starts])]
    tokens = [lines[0].argmax(-1)]
    ended = _Ended(stop)
    for step in range(steps):
        if step and ended.by(tokens):
            break
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(starts), 1)], dim=1)
        logits = call(model, tokens[-1][:, None], cache, positions=positions + step, mask=mask, keep=1)
        lines.append(logits[:, 0])
        tokens.append(lines[-1].argmax(-1))
    rows = zip(torch.stack(tokens, dim=1), torch.stack(lines, dim=1), strict=True)
    return [Continuation(row, logits) for row, logits in rows]


def until_stop(tokens: Sequence[int], stop: Collection[int]) -> list[int]:
    """The tokens up to the first stop token, that one included."""
    end = next((index for index, token in enumerate(tokens) if token in stop), len(tokens) - 1)
    return list(tokens[: end + 1])


class _Ended:
    """Whether every row has met a stop token; on a GPU, where asking means waiting, asked now and then."""

    def __init__(self, stop: Collection[int]):
        self._stop = stop
        self._calls = 0

    def by(self, tokens: Sequence[Tensor]) -> bool:
        if not self._stop:
            return False
        self._calls += 1
        if tokens[0].is_cuda and self._calls % 8:
            return False
        stop = torch.tensor(list(self._stop), device=tokens[0].device)
        return bool(torch.isin(torch.stack(list(tokens)), stop).any(0).all())
