"""What storing an entry in few bits does to a layer's output, as a share of what evicting it does.

Evicting an entry that a query gives attention ``p`` changes the output by about ``p`` times the size of a value. Its
value in codes is wrong by ``sqrt(D)`` of its own size, which the same attention carries over. Its key
in codes shifts the query's logit by a random ``e``, and so the attention by the factor ``exp(e)``; the variance of
``e`` is the sum over the key's channels of the mean square of the query there times the channel's error. Both come
from the model alone: of random tokens, once (`refreekv.pruning.copy_scores`).

``D`` is what the coder itself loses of Gaussian entries (`coded_errors`), not what its grid would: it tries sizes,
which saves up to four tenths at 8 bits and little at 2, and widths that share one scale are coded unlike widths alone.
"""

from functools import lru_cache

import torch
from torch import Tensor

from refreekv.core.packed_lines import PackedFormat, Side

MOST = 4.0
"""The largest variance of an attention's relative error: a key that is wrong by more counts as this."""
ENTRIES = 2048
"""Gaussian entries that errors are measured on: to a few hundredths."""
KEYS_WORTH = (8.0, 0.7, 0.2, 0.1)
"""What errors in the quarters of a key count where channels are sorted by it, as they are in code space: medians over
the heads of SmolLM2-135M and Qwen2.5-Coder-1.5B. It only decides on the entries' sizes."""


@lru_cache(maxsize=64)
def coded_errors(side: Side, worth: tuple[float, ...] | None = None) -> tuple[float, ...]:
    """Mean square error of Gaussian entries of variance 1 in the codes of a side, for each quarter of its channels.

    Measured with the coder on random entries, the same each time. ``worth`` is what an error in each quarter counts.
    """
    # Whatever type and device tensors have by default.
    entries = torch.empty(ENTRIES, side.size, dtype=torch.float32, device="cpu")
    entries.normal_(generator=torch.Generator("cpu").manual_seed(0))
    counted = None if worth is None else entries.new_tensor(worth).repeat_interleave(side.size // 4)
    codes, factors = side.encode(entries, counted)
    lost = side.levels(codes, torch.float32) * factors[:, None].float() - entries
    # [entries, channels] -> [4 quarters]
    return tuple(lost.square().mean(0).unflatten(0, (4, -1)).mean(-1).tolist())


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
    return _damage(power, _errors(forms, power.device, KEYS_WORTH))


@lru_cache(maxsize=32)
def plain_damage(forms: tuple[PackedFormat, ...], heads: int, device: torch.device) -> Tensor:
    """What rungs do where nobody knows the size of queries: as if logits had a variance of 1. ``[H_kv, R]``."""
    with torch.inference_mode(False):
        return _damage(torch.full((heads, 4), 0.25, device=device), _errors(forms, device, None))


def _damage(power: Tensor, errors: tuple[Tensor, Tensor]) -> Tensor:
    keys, values = errors
    # [..., H_kv, 1, 4] times [R, 4], summed
    shifts = (power[..., None, :] * keys).sum(-1)
    return (shifts.expm1().clamp_max(MOST) + values).sqrt()


@lru_cache(maxsize=32)
def _errors(
    forms: tuple[PackedFormat, ...], device: torch.device, worth: tuple[float, ...] | None
) -> tuple[Tensor, Tensor]:
    """Errors of each rung's quarters of keys ``[R, 4]``, and of its values ``[R]``."""
    keys = [coded_errors(form.keys, worth) for form in forms]
    values = [sum(coded_errors(form.values)) / 4 for form in forms]
    with torch.inference_mode(False):
        like = torch.empty(0, dtype=torch.float32, device=device)
        return like.new_tensor(keys), like.new_tensor(values)
