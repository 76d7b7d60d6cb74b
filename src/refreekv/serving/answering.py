"""An answer as it comes along: a prompt read in chunks, its tokens, their times and their text."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from refreekv.engines.transformers import ReFreeKVCache
from refreekv.engines.transformers.naming import NAME, cache_argument, logits_argument
from refreekv.serving.detokenizing import Detokenizer


@dataclass(frozen=True)
class Listener:
    """What wants to know how an answer comes along; every part may be left out."""

    # ``(read, total)``: tokens of the message read so far
    on_read: Callable[[int, int], None] = lambda read, total: None
    # ``(text, tokens, seconds)``: new text, tokens so far, seconds since the first one
    on_text: Callable[[str, int, float], None] = lambda text, tokens, seconds: None
    stopped: Callable[[], bool] = lambda: False  # whether to stop; asked after each chunk and each token


class Answering:
    """The streamer of one answer: its tokens, their times, their text as it comes together."""

    def __init__(self, tokenizer: Any, listener: Listener):
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.stopped = False
        self._text = Detokenizer(tokenizer, skip_special_tokens=True)
        self._listener = listener
        self._prompt_seen = False

    def put(self, tokens: torch.Tensor) -> None:
        """Take the prompt, which comes first and is passed over, or new tokens."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in tokens.flatten().tolist():
            self.tokens.append(token)
            self.times.append(time.perf_counter())
            self._tell(self._text.add(token))

    def end(self) -> None:
        """Give out what is left of a character that was cut off."""
        if rest := self._text.rest():
            self._tell(rest)

    def _tell(self, text: str) -> None:
        self._listener.on_text(text, len(self.tokens), self.times[-1] - self.times[0])


def read(
    model: Any, cache: ReFreeKVCache, prompt: list[int], device: torch.device, chunk: int, listener: Listener
) -> bool:
    """Feed all but the last chunk of what is new; False if it was stopped.

    Parameters
    ----------
    model : PreTrainedModel
        What reads.
    cache : ReFreeKVCache
        Holds the first tokens of the prompt already, or nothing.
    prompt : list of int
        All tokens, those that the cache holds included.
    device : device
        Where the model takes its tokens.
    chunk : int
        Tokens that are read at a time; between two chunks reading can be stopped.
    listener : Listener
        Is told of each chunk.
    """
    held = length_of(cache)
    ids = torch.tensor([prompt], device=device)
    total = len(prompt) - held
    options = cache_argument(model.forward, cache) | logits_argument(model.forward, 1)
    for start in range(held, len(prompt) - chunk, chunk):
        listener.on_read(start - held, total)
        if listener.stopped():
            return False
        with cache.prompt_until(len(prompt)):
            model(ids[:, start : start + chunk], use_cache=True, **options)
    listener.on_read(total, total)
    return not listener.stopped()


def generate(
    model: Any,
    tokenizer: Any,
    cache: ReFreeKVCache,
    prompt: list[int],
    device: torch.device,
    settings: Any,
    listener: Listener,
) -> Answering:
    """Read what is left of a prompt and generate the answer to it.

    Parameters
    ----------
    settings : GenerationConfig
        How tokens are chosen, and how many at most.
    model, tokenizer, cache, prompt, device, listener
        As for `read`.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    answering = Answering(tokenizer, listener)

    class Stop(StoppingCriteria):
        def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
            answering.stopped = answering.stopped or listener.stopped()
            return torch.full((len(ids),), answering.stopped, device=ids.device)

    model.generate(
        input_ids=torch.tensor([prompt], device=device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
        generation_config=settings,
        streamer=answering,
        stopping_criteria=StoppingCriteriaList([Stop()]),
        **{NAME: cache},
    )
    return answering


def length_of(cache: ReFreeKVCache) -> int:
    """Tokens that a cache has read."""
    return cache.get_seq_length(cache.pruned_layers[0].index)


def restored(cache: ReFreeKVCache, length: int) -> ReFreeKVCache | None:
    """The cache without what was read of an abandoned prompt; None if all must be read again.

    Nothing may have been pruned since the cache had ``length`` tokens.
    """
    if length == 0 or len(cache.pruned_layers) < len(cache.layers):
        return None  # layers with a window do not remember what fell out of it
    if length_of(cache) > length:
        cache.crop(length - length_of(cache))
    return cache
