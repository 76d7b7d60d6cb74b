"""Recheck some tokens of a request again: over what a cache holds before them, with nothing added to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from refreekv.core import spelling
from refreekv.core.probes import attention_rows
from refreekv.engines.transformers.handout import hand_out
from refreekv.policies.base import check_count
from refreekv.pruning.calls import AttentionCall

if TYPE_CHECKING:
    from refreekv.engines.transformers.cache import PrunedCache
    from refreekv.engines.transformers.layer import ReFreeKVLayer

PROMPT, ANSWER = "prompt", "answer"
TOKENS = {PROMPT: 32, ANSWER: 16}
"""Where to read again, and how many tokens: at the end of the prompt, or at the beginning of the answer."""

DAMAGE = 0.02
"""Nats a token that are allowed where nobody says: as `refreekv calibrate` takes for damage."""


@dataclass(frozen=True)
class Recheck:
    """What is read again, and what it may differ by.

    Attributes
    ----------
    where : str
        ``"prompt"``: its last tokens, at once; ``"answer"``: its first tokens, when they were generated.
    tokens : int
        How many.
    damage : float or None
        Mean divergence over these tokens, in nats, that the worst row of a batch may have; None: `DAMAGE`.

    Raises
    ------
    ValueError
        Another place, or a number out of range.
    """

    where: str = PROMPT
    tokens: int = 0
    damage: float | None = None

    def __post_init__(self) -> None:
        if self.where not in TOKENS:
            raise ValueError(f"verify reads {' or '.join(TOKENS)} again, got {self.where!r}")
        if not self.tokens:
            object.__setattr__(self, "tokens", TOKENS[self.where])
        check_count("tokens", self.tokens, minimum=1)
        if self.damage is not None and not 0.0 < self.damage < float("inf"):
            raise ValueError(f"verify takes a damage in nats above 0, got {self.damage!r}")

    @classmethod
    def parse(cls, value: "bool | float | str | Recheck") -> "Recheck | None":
        """From True, a damage, or ``where`` with parameters as in ``answer:damage=0.05,tokens=8``; False is None.

        Raises
        ------
        ValueError
            Something else, or a number out of range.
        """
        if isinstance(value, Recheck):
            return value
        if isinstance(value, bool):
            return cls() if value else None
        if not isinstance(value, str):
            return cls(damage=float(value))
        where, items = spelling.parts(value)
        given: dict[str, Any] = {}
        for name, text in items:
            if name not in ("damage", "tokens"):
                raise ValueError(f"verify has no parameter {name!r}; it has damage and tokens")
            try:
                given[name] = (int if name == "tokens" else float)(text or "")
            except ValueError:
                raise ValueError(f"{name} of verify is to be a number, got {text!r}") from None
        if given.get("tokens", 1) < 1:
            raise ValueError(f"tokens must be an integer >= 1, got {given['tokens']}")
        return cls(where, **given)

    @property
    def allowed(self) -> float:
        """The damage, `DAMAGE` where nobody said."""
        return DAMAGE if self.damage is None else self.damage


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) of each token ``[B, q]``, in nats, of ``[B, q, V]``.

    As a sum of ``p log(p/q) - p + q``, which is the same, as both add up to 1, and of which no term is negative:
    roundings of large terms that cancel would be larger than a small divergence, and hide it.
    """
    expected, found = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    weight, apart = expected.exp(), expected - found
    # A token ruled out on both sides (-inf) would be 0 * nan.
    return torch.where(weight == 0, found.exp(), (apart + torch.expm1(-apart)) * weight).sum(-1).clamp_min(0.0)


class ReadingCache(DynamicCache):
    """What the end of a prompt is read over: stored layers, to which nothing is added."""


class _ReadingLayer(DynamicLayer):
    """One layer's entries before the tokens that are read again, attended to in plain operations."""

    def __init__(
        self, start: int, rows: Sequence[tuple[Tensor, Tensor, Tensor]], real: Tensor | None, window: int | None = None
    ):
        super().__init__()
        self._start, self._rows, self._real, self._window = start, rows, real, window

    def get_seq_length(self) -> int:
        return self._start

    def get_mask_sizes(self, query_length: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self._start + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the tokens' own entries back, marked so that attention comes here."""
        hand_out(self, key_states, value_states)
        return key_states, value_states

    def attend(self, call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
        """Attention ``[B, q, H, Dv]`` over what each row holds and, causally, over the tokens' own entries."""
        query, outputs = call.query, []
        for row, (keys, values, visible) in enumerate(self._rows):
            heads, queries = query.shape[1:3]
            every = torch.cat([keys.to(key.dtype), key[row]], dim=1)[None]  # [1, H_kv, m + q, D]
            seen = torch.cat([visible.expand(-1, queries, -1), self._own(row, queries, query.device)], dim=-1)
            # [G, q, m + q] to one for each query head
            seen = seen.repeat_interleave(heads // len(seen), dim=0)[None]
            weights = attention_rows(
                query[row : row + 1],
                every,
                scaling=call.scaling,
                visible=seen,
                softcap=call.softcap,
                sink_logits=call.sink_logits,
            )
            told = torch.cat([values.to(value.dtype), value[row]], dim=1).float()  # [H_kv, m + q, Dv]
            grouped = weights.view(len(told), -1, weights.shape[-1]) @ told  # [H_kv, H / H_kv * q, Dv]
            outputs.append(grouped.view(heads, queries, -1).transpose(0, 1))
        return torch.stack(outputs).to(query.dtype)

    def _own(self, row: int, queries: int, device: torch.device) -> Tensor:
        """Which of the tokens' own entries each of them sees, ``[G, q, q]``: real ones up to itself."""
        own = torch.ones(queries, queries, dtype=torch.bool, device=device).tril()
        if self._window is not None:
            own = own.triu(1 - self._window)
        if self._real is not None:
            own = own & (self._real[row] | torch.eye(queries, dtype=torch.bool, device=device))
        return own.expand(len(self._rows[row][2]), -1, -1)


class _ReadingWindow(_ReadingLayer):
    """One layer with a sliding window, of which what fell out of it before is gone on both sides."""

    is_sliding = True


def reading_cache(
    cache: "PrunedCache", start: int, tokens: int, real: Tensor | None, every: Tensor | None
) -> ReadingCache:
    """A cache for one call that feeds ``tokens`` tokens from logical length ``start`` on.

    Parameters
    ----------
    cache : PrunedCache
        What is read; it stays as it is.
    start, tokens : int
        Where the tokens are.
    real : Tensor or None
        Boolean ``[B, tokens]``, False where they are padding; None: nowhere.
    every : Tensor or None
        Boolean ``[B, n]``, False where the prompt is padding; None: nowhere.
    """
    reading = ReadingCache()
    reading.layers = [
        _window(layer, start, tokens, real, every)
        if isinstance(layer, DynamicSlidingWindowLayer)
        else _stored(layer, start, real)  # type: ignore[arg-type]
        for layer in cache.layers
    ]
    return reading


def _stored(layer: "ReFreeKVLayer", start: int, real: Tensor | None) -> _ReadingLayer:
    """A full-attention layer up to logical length ``start``, as it is stored."""
    rows = []
    if layer.ragged is None:
        keys, values = layer.dense
        padding = layer.padding
        for row in range(keys.shape[0]):
            visible = torch.ones(1, 1, start, dtype=torch.bool, device=keys.device)
            if padding is not None:
                visible[0, 0, : padding.shape[1]] = ~padding[row, :start]  # what is behind it is none
            rows.append((keys[row, :, :start], values[row, :, :start], visible))
        return _ReadingLayer(start, rows, real)
    for row, (keys, values) in enumerate(layer.ragged.rows()):
        visible = layer.columns(row).padded(keys.device) < start  # [G, L]
        uneven = layer.ragged.visible(row)
        if uneven is not None:
            visible = visible & uneven
        rows.append((keys, values, visible[:, None]))
    return _ReadingLayer(start, rows, real)


def _window(
    layer: DynamicSlidingWindowLayer, start: int, tokens: int, real: Tensor | None, every: Tensor | None
) -> _ReadingLayer:
    """A sliding-window layer up to logical length ``start``; ``every`` is boolean ``[B, n]``, False at padding."""
    assert layer.keys is not None
    assert layer.values is not None
    first = layer.get_seq_length() - layer.keys.shape[2]
    columns = torch.arange(min(first, start), start, device=layer.keys.device)
    asked = torch.arange(start, start + tokens, device=columns.device)
    visible = (columns > asked[:, None] - layer.sliding_window)[None]  # [1, q, m]
    rows = []
    for row in range(layer.keys.shape[0]):
        own = visible if every is None else visible & every[row, columns]
        rows.append((layer.keys[row, :, : len(columns)], layer.values[row, :, : len(columns)], own))
    return _ReadingWindow(start, rows, real, layer.sliding_window)
