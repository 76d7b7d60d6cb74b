"""How far two runs over the same tokens are apart: pure tensor functions."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 2**24
"""Logits that are widened to float32 at once. Bounds the transient copies (64 MiB each)."""


def divergence(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || row) of every token of every row, and whether both have the same argmax.

    Both distributions are taken in float32. A divergence is never negative; what rounding
    makes of a zero is put back to zero.

    Parameters
    ----------
    reference : Tensor
        ``[N, V]`` logits of the full cache.
    logits : Tensor
        ``[P, N, V]`` logits of the rows to compare.

    Returns
    -------
    kl : Tensor
        ``[P, N]``, float32, in nats.
    agrees : Tensor
        ``[P, N]``, boolean.
    """
    rows, tokens, vocabulary = logits.shape
    kl = torch.empty(rows, tokens, dtype=torch.float32, device=logits.device)
    step = max(1, CHUNK // vocabulary)
    together = max(1, step // tokens)
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        expected = reference[part].float().log_softmax(-1)
        weight = expected.exp()
        impossible = weight == 0
        for row in range(0, rows, together):
            some = slice(row, row + together)
            difference = expected - logits[some, part].float().log_softmax(-1)
            # A token ruled out on both sides (-inf) would be 0 * nan.
            kl[some, part] = difference.masked_fill_(impossible, 0.0).mul_(weight).sum(-1)
    return kl.clamp_min_(0.0), logits.argmax(-1) == reference.argmax(-1)


def token_metrics(kl: Tensor, agrees: Tensor) -> list[dict[str, Any]]:
    """What `divergence` gave, summed up for each row as fields of a `FidelityRecord`; waits for the device once.

    The 99th percentile is interpolated linearly.

    Raises
    ------
    ValueError
        If a divergence is not a number: some logits were not.
    """
    numbers = torch.stack([kl.mean(1), torch.quantile(kl, 0.99, dim=1), kl.amax(1)], dim=1)
    return [_of_row(row[:3], row[3:]) for row in torch.cat([numbers, agrees.float()], dim=1).tolist()]


def _of_row(numbers: list[float], agrees: list[float]) -> dict[str, Any]:
    if any(number != number for number in numbers):
        raise ValueError(
            "the model's logits are not numbers (overflow?): fidelity cannot be measured; try bfloat16 or float32"
        )
    first = agrees.index(0.0) if 0.0 in agrees else None
    found = dict(zip(("kl_mean", "kl_p99", "kl_max"), numbers, strict=True))
    return {**found, "top1": sum(agrees) / len(agrees), "same_path": first is None, "first_divergence": first}


def negative_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum over tokens of ``-log p(token)``, in nats.

    Parameters
    ----------
    logits : Tensor
        ``[..., N, V]``.
    tokens : Tensor
        ``[N]``, integer: the token that each line of logits should predict.

    Returns
    -------
    Tensor
        ``[...]``, float32.
    """
    index = tokens.expand(logits.shape[:-1])[..., None]
    picked = logits.gather(-1, index)[..., 0].float()
    rows = logits.flatten(0, -2)
    step = max(1, CHUNK // logits.shape[-1])
    total = torch.cat([part.float().logsumexp(-1) for part in rows.split(step)])
    return (total.view(picked.shape) - picked).sum(-1)
