"""What storing an entry in few bits does to a layer's output, as a share of what evicting it does.

Evicting an entry that a query gives attention ``p`` changes the output by about ``p`` times the size of a value. Its
value in codes of ``b`` bits is wrong by ``sqrt(D(b))`` of its own size, which the same attention carries over. Its key
in codes shifts the query's logit by a random ``e``, and so the attention by the factor ``exp(e)``; the variance of
``e`` is the sum over the key's channels of the mean square of the query there times the channel's error. Both come
from the model alone: of random tokens, once (`refreekv.pruning.copy_scores`).
"""

from functools import lru_cache

import torch
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat, grid_error, step

MOST = 4.0
"""The largest variance of an attention's relative error: a key that is wrong by more counts as this."""


def distortion(bits: int) -> float:
    """Mean square error of a unit Gaussian in codes of so many bits: ``D(b)``."""
    return grid_error(bits, step(bits))


def rung_damage(power: Tensor, forms: tuple[PackedFormat, ...]) -> Tensor:
    """What each rung of a ladder does to an entry of each head.

    Parameters
    ----------
    power : Tensor
        ``[..., H_kv, 4]`` float32: for each quarter of a key's channels in code space, where keys have a variance of
        1, the sum over its channels of the mean square of scaled queries.
    forms : tuple of PackedFormat
        The rungs.

    Returns
    -------
    Tensor
        ``[..., H_kv, R]`` float32.
    """
    keys, values = _errors(forms, power.device)
    # [..., H_kv, 1, 4] times [R, 4], summed
    shifts = (power[..., None, :] * keys).sum(-1)
    return (shifts.expm1().clamp_max(MOST) + values).sqrt()


def plain_damage(forms: tuple[PackedFormat, ...], heads: int, device: torch.device) -> Tensor:
    """What rungs do where nobody knows the size of queries: as if logits had a variance of 1. ``[H_kv, R]``."""
    return rung_damage(torch.full((heads, 4), 0.25, device=device), forms)


@lru_cache(maxsize=32)
def _errors(forms: tuple[PackedFormat, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Distortion of each rung's quarters of keys ``[R, 4]``, and of its values ``[R]``."""
    keys = [[distortion(width) for width in form.key_widths] for form in forms]
    values = [sum(map(distortion, form.value_widths)) / len(form.value_widths) for form in forms]
    with torch.inference_mode(False):
        return torch.tensor(keys, device=device), torch.tensor(values, device=device)
