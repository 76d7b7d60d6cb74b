"""Whether a device's kernels code, decode and attend as their plain versions do: tried before anything relies on it.

Kernels are compiled for each card, by the Triton that is installed. What comes out is compared with the same in
plain torch on some made-up entries, in milliseconds; a card on which it differs, or fails, is said to be one.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from refreekv.core.quantisation import SINKS
from refreekv.storage import warm_up
from refreekv.storage.columns import Levels
from refreekv.storage.made_up import MadeUpEntries

MORE = 160
"""Entries of a head that are coded in a trial."""
CLOSE = 0.03
"""Largest difference, relative to the norm: of a few codes at ties, and of products in another order."""


def due(device: torch.device) -> bool:
    """Whether there is something to try: the plain versions are what kernels are compared with."""
    return device.type == "cuda"


@lru_cache(maxsize=64)
def fault(entries: MadeUpEntries) -> str | None:
    """What is wrong with such entries, coded on their device; None if nothing is. OutOfMemoryError is passed on."""
    try:
        if due(entries.device):
            warm_up.warm_up(entries)
        with torch.inference_mode(False), torch.no_grad():
            tried, plain = _outcome(entries), _outcome(replace(entries, device=torch.device("cpu")))
    except torch.OutOfMemoryError:  # which says nothing about kernels, and would be remembered
        raise
    except Exception as error:  # a compiler's, a driver's, whatever keeps kernels from running
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for name, one, other in zip(("keys", "values", "attention"), tried, plain, strict=False):
        off = float((one - other).norm() / other.norm())
        if not off <= CLOSE:
            return f"{name} differ by {off:.2g} of their size from what they are to be"
    return None


def _outcome(entries: MadeUpEntries) -> tuple[Tensor, ...]:
    """Decoded keys and values, and attention over them, of entries that are coded on their device: on the CPU."""
    length, rungs = SINKS + MORE + entries.ladder.recent, len(entries.ladder.rungs)
    keys, values, query = entries.drawn(length)
    rung = (torch.arange(length) % rungs).to(torch.uint8)
    counts = tuple(int((rung[SINKS : SINKS + MORE] == number).sum()) for number in range(rungs))
    storage = entries.stored(keys, values, Levels((rung.to(entries.device),), (counts,)))
    decoded = storage.full().stacked()
    attention = (storage.attend(query, None, None, None),) if entries.attends else ()
    return tuple(part.float().cpu() for part in (*decoded, *attention))
