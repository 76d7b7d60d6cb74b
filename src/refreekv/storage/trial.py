"""Whether a device's kernels code, decode and attend as their plain versions do: tried before anything relies on it.

Kernels are compiled for each card, by the Triton that is installed. What comes out is compared with the same in
plain torch on some made-up entries, in milliseconds; a card on which it differs, or fails, is said to be one.
"""

from functools import lru_cache

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.quantisation import SINKS, Ladder, centre_of
from refreekv.storage import warm_up
from refreekv.storage.columns import Columns, Levels
from refreekv.storage.leveled import LeveledKV

MORE = 160
"""Entries of a head that are coded in a trial."""
CLOSE = 0.03
"""Largest difference, relative to the norm: of a few codes at ties, and of products in another order."""


def due(device: torch.device) -> bool:
    """Whether there is something to try: the plain versions are what kernels are compared with."""
    return device.type == "cuda"


@lru_cache(maxsize=64)
def fault(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    sizes: tuple[int, int],
    ladder: Ladder,
    codes: KeyCodes | None,
    attends: bool = True,
) -> str | None:
    """What is wrong with coded entries on a device; None if nothing is. OutOfMemoryError is passed on.

    Parameters
    ----------
    device : torch.device
        Where entries will be.
    dtype : torch.dtype
        Of the entries.
    heads, sizes : int, pair of int
        KV heads, and the elements of a key and of a value.
    ladder, codes : Ladder, KeyCodes or None
        How they will be coded.
    attends : bool
        Whether a token's attention reads them as they are; else they are decoded first.
    """
    try:
        if due(device):
            warm_up.warm_up(device, dtype, heads, sizes, ladder, codes, attends=attends)
        with torch.inference_mode(False), torch.no_grad():
            tried, plain = (
                _outcome(place, dtype, heads, sizes, ladder, codes, attends) for place in (device, torch.device("cpu"))
            )
    except torch.OutOfMemoryError:  # which says nothing about kernels, and would be remembered
        raise
    except Exception as error:  # a compiler's, a driver's, whatever keeps kernels from running
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for name, one, other in zip(("keys", "values", "attention"), tried, plain, strict=False):
        off = float((one - other).norm() / other.norm())
        if not off <= CLOSE:
            return f"{name} differ by {off:.2g} of their size from what they are to be"
    return None


def _outcome(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    sizes: tuple[int, int],
    ladder: Ladder,
    codes: KeyCodes | None,
    attends: bool,
) -> tuple[Tensor, ...]:
    """Decoded keys and values, and attention over them, of made-up entries that are coded on a device: on the CPU."""
    length, rungs = SINKS + MORE + ladder.recent, len(ladder.rungs)
    keys, values, query = warm_up.made_up(device, dtype, heads, sizes, length)
    rung = (torch.arange(length) % rungs).to(torch.uint8)
    counts = tuple(int((rung[SINKS : SINKS + MORE] == number).sum()) for number in range(rungs))
    storage = LeveledKV.gathered(
        keys, values, [Columns.of_ranges((0, length))], 0, ladder, (centre_of(keys), centre_of(values)),
        [Levels((rung.to(device),), (counts,))], codes,
    )  # fmt: skip
    decoded = storage.full().stacked()
    attention = (storage.attend(query, None, None, None),) if attends else ()
    return tuple(part.float().cpu() for part in (*decoded, *attention))
