"""Conversations of several turns with given answers: through a cache, and through the model's own full one."""

import torch
from transformers import DynamicCache

from helpers.equivalence import forward
from helpers.models import prompts


def turns_of(lengths, count=3, question=9, answer=0, seed=0):
    """Prompts with masks, each with the tokens ``[B, answer]`` of its answer that are fed behind it."""
    found = []
    for number in range(count):
        own = lengths if number == 0 else tuple(max(question - row, 1) for row in range(len(lengths)))
        ids, mask = prompts(own, seed=seed + number)
        said = prompts((answer,) * len(lengths), seed=100 + seed + number)[0] if answer else ids[:, :0]
        found.append((ids, mask, said))
    return found


class Talk:
    """Feeds a model turn by turn, with logical positions and masks."""

    def __init__(self, model, cache, *, padded, chunk=None):
        self.model, self.cache, self.padded, self.chunk = model, cache, padded, chunk
        self.total = None

    def ask(self, ids, mask, said):
        """Logits ``[B, 1 + answer, V]`` of a prompt's last token, and of the answer's."""
        start = 0 if self.total is None else self.total.shape[1]
        self.total = mask if self.total is None else torch.cat([self.total, mask], 1)
        logits = []
        for piece in ids.split(self.chunk or ids.shape[1], 1):
            stop = start + piece.shape[1]
            with self._prompt():
                step = forward(self.model, self.cache, piece, self.total[:, :stop], self.padded)
            start = stop
        logits.append(step)
        for token in said.split(1, 1) if said.shape[1] else ():
            self.total = torch.cat([self.total, torch.ones_like(token)], 1)
            logits.append(forward(self.model, self.cache, token, self.total, self.padded))
        return torch.stack(logits, 1)

    def _prompt(self):
        if isinstance(self.cache, DynamicCache) and not hasattr(self.cache, "prompt_until"):
            return torch.no_grad()
        return self.cache.prompt_until(self.total.shape[1])


def full(model, turns, padded):
    """Logits of each turn over the model's own cache."""
    talk = Talk(model, DynamicCache(config=model.config), padded=padded)
    return [talk.ask(*turn) for turn in turns]
