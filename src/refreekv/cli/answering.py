"""An answer as it comes along: who wants to know of it, and its tokens, times and text."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from refreekv.cli.detokenizing import Detokenizer


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
