"""What was kept, what it saved, and why: the numbers a user sees."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RowReport:
    """One row of the batch in one layer.

    Attributes
    ----------
    prompt_length : int
        Real tokens seen when the layer was last pruned, over all turns; padding not counted.
    kept_heads : tuple of int
        Entries kept: one number for all KV heads together, or one for each.
    cut : int or None
        Position from which on every token was kept, if what was dropped is one range.
    metric : float or None
        The criterion's value at what was kept (the Uni-Metric's loss).
    bytes_before, bytes_after : int
        K/V bytes that a full cache would hold for this row now, later tokens included, and those that are held.
    reasons : dict
        Why entries were kept, to the share of the row's entries that stay for it; an entry may have
        several reasons. Empty for policies that give none.
    """

    prompt_length: int
    kept_heads: tuple[int, ...]
    cut: int | None = None
    metric: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    reasons: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Entries kept, averaged over KV heads and rounded where these differ."""
        return round(_mean(self.kept_heads))

    @property
    def budget(self) -> float:
        """Share of the prompt that was kept."""
        return _mean(self.kept_heads) / self.prompt_length if self.prompt_length else 1.0


@dataclass(frozen=True)
class LayerReport:
    """One layer of the cache.

    Attributes
    ----------
    index : int
        Index of the layer in the model.
    kind : str
        ``"full_attention"`` for layers that may be pruned; otherwise what the model calls
        it (``"sliding_attention"`` …), and ``rows`` is empty.
    rows : tuple of RowReport
        One for each row of the batch.
    bytes_before, bytes_after : int
        K/V bytes of a full cache and of this one, now.
    formats : dict
        Number formats to the entries that are stored in them, over all rows and KV heads; ``"exact"`` are those in
        the model's own. Empty where nothing is coded.
    host_bytes : int
        Bytes of ``bytes_after`` that are in host memory beside the GPU that reads them.
    """

    index: int
    kind: str
    rows: tuple[RowReport, ...]
    bytes_before: int
    bytes_after: int
    formats: dict[str, int] = field(default_factory=dict)
    host_bytes: int = 0

    @property
    def budget(self) -> float:
        """Mean over rows of the share kept."""
        return _mean(row.budget for row in self.rows)


@dataclass(frozen=True)
class Verified:
    """What came out when a part of the last request was read again over what was kept.

    Attributes
    ----------
    step : int
        Which step passed, from 0 on: the policy as it was asked for, then stricter ones.
    steps : int
        How many there are; the last one keeps everything.
    policy : str
        The policy of the step that passed.
    allowed : float
        Damage, in nats a token, that was allowed.
    tried : tuple of float
        Damage of the steps that were tried, in order: of the worst row of the batch, the mean over tokens. The last
        step is not tried.
    tokens : int
        Tokens that were read again.
    where : str
        ``"prompt"``: its last ones; ``"answer"``: its first ones.
    reason : str
        Why nothing could be read again, so that everything was kept; empty: it could.
    """

    step: int
    steps: int
    policy: str
    allowed: float
    tried: tuple[float, ...] = ()
    tokens: int = 0
    where: str = "prompt"
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"not verified ({self.reason}): everything is kept"
        said = f"step {self.step + 1} of {self.steps} ({self.policy})"
        if self.step == self.steps - 1:
            least = f"; damage of what was tried: {', '.join(f'{one:.2g}' for one in self.tried)}" if self.tried else ""
            return f"{said}, allowed {self.allowed:g} nats{least}"
        part = {"prompt": "the prompt's last", "answer": "the answer's first"}[self.where]
        return f"{said}, damage {self.tried[-1]:.2g} of {self.allowed:g} nats on {part} {self.tokens} tokens"


@dataclass(frozen=True)
class Remembered:
    """What ``keep_evicted`` keeps beside the cache, for the next turn.

    Attributes
    ----------
    tokens : int
        Logical length of what is kept, of all layers; 0: nothing.
    host_bytes, disk_bytes : int
        What it takes of host memory, and of files.
    restored : bool or None
        Whether the latest turn was read over everything that came before; None: there was one turn only.
    lost : str
        Why nothing is kept any more, so that turns are read over what the cache holds; empty: it is.
    """

    tokens: int
    host_bytes: int
    disk_bytes: int = 0
    restored: bool | None = None
    lost: str = ""

    def __str__(self) -> str:
        if self.lost:
            return f"nothing any more ({self.lost}): turns are read over what was kept"
        where = [f"{format_bytes(self.host_bytes)} of host memory"] if self.host_bytes or not self.disk_bytes else []
        where += [f"{format_bytes(self.disk_bytes)} of files"] if self.disk_bytes else []
        said = f"all {self.tokens} tokens, in {' and '.join(where)}"
        if self.restored is None:
            return said
        return f"{said}; the latest turn was read over {'everything' if self.restored else 'what was kept'}"


@dataclass(frozen=True)
class CompressionReport:
    """State of a compressed cache, at the time it was asked for.

    Attributes
    ----------
    policy : str
        The policy, with those of its parameters that are not the defaults.
    tokens : int
        Logical length now: prompt and generated tokens, padding included.
    layers : tuple of LayerReport
        All layers that hold keys and values, in the model's order.
    index_bytes : int
        Bytes of the position indices that the cache holds beside K/V.
    kv_dtype : str or None
        The number format of what is kept; None: the model's own.
    padded_bytes : int
        Beside what is held: the most that attention over one layer copies for the length of a call,
        because KV heads of different length are padded to the longest. 0 where heads are even, or
        read as they are by a kernel (CUDA).
    verified : Verified or None
        What ``verify=True`` found at the end of the last prompt.
    remembered : Remembered or None
        What ``keep_evicted`` keeps beside the cache.
    """

    policy: str
    tokens: int
    layers: tuple[LayerReport, ...]
    index_bytes: int = 0
    kv_dtype: str | None = None
    padded_bytes: int = 0
    verified: Verified | None = None
    remembered: Remembered | None = None

    @property
    def prunable(self) -> tuple[LayerReport, ...]:
        """The full-attention layers."""
        return tuple(layer for layer in self.layers if layer.rows)

    @property
    def budget(self) -> float:
        """Kept share of the prompt, averaged over rows and all full-attention layers, frozen ones included."""
        return _mean(layer.budget for layer in self.prunable)

    @property
    def reasons(self) -> dict[str, float]:
        """Reasons to keep, to the share of all entries kept for each, averaged over rows and full-attention layers."""
        rows = [row.reasons for layer in self.prunable for row in layer.rows]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: _mean(row.get(name, 0.0) for row in rows) for name in names}

    @property
    def formats(self) -> dict[str, float]:
        """Number formats to the share of stored entries that are in them; empty where nothing is coded."""
        counts: dict[str, int] = {}
        for layer in self.prunable:
            for name, count in layer.formats.items():
                counts[name] = counts.get(name, 0) + count
        return {name: count / max(sum(counts.values()), 1) for name, count in counts.items()}

    @property
    def has_cuts(self) -> bool:
        """Whether what some layer dropped is one range."""
        return any(row.cut is not None for layer in self.prunable for row in layer.rows[:1])

    @property
    def has_metrics(self) -> bool:
        """Whether the policy's metric tells layers apart that dropped something.

        Not where it lies just under the same bound in all of them, as that of `adaptive` does.
        """
        rows = [row for layer in self.prunable for row in layer.rows[:1] if row.budget < 1]
        found = [row.metric for row in rows if row.metric is not None]
        return bool(found) and max(found) > 2 * min(found)

    @property
    def bytes_before(self) -> int:
        """K/V bytes that a full cache would hold now."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """K/V bytes held now: the storage of all key and value tensors."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def host_bytes(self) -> int:
        """Bytes of them that are in host memory beside the GPU that reads them."""
        return sum(layer.host_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All fields and totals as plain types, ready for JSON."""
        return {
            "policy": self.policy,
            "kv_dtype": self.kv_dtype,
            "tokens": self.tokens,
            "budget": self.budget,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "host_bytes": self.host_bytes,
            "index_bytes": self.index_bytes,
            "padded_bytes": self.padded_bytes,
            "reasons": self.reasons,
            "formats": self.formats,
            "verified": None if self.verified is None else asdict(self.verified),
            "remembered": None if self.remembered is None else asdict(self.remembered),
            "layers": [
                {
                    **asdict(layer),
                    "budget": layer.budget,
                    "rows": [{**asdict(row), "kept": row.kept, "budget": row.budget} for row in layer.rows],
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        if not self.prunable:
            return f"{self.policy}: nothing in the cache yet"
        stored = f" in {self.kv_dtype}" if self.kv_dtype is not None else ""
        lines = [
            f"{self.policy}: kept {self.budget:.1%} of the prompt{stored}, K/V {format_bytes(self.bytes_before)} -> "
            f"{format_bytes(self.bytes_after)} at {self.tokens} tokens"
        ]
        if self.verified is not None:
            lines.append(f"  verified: {self.verified}")
        if self.remembered is not None:
            lines.append(f"  kept for the next turn: {self.remembered}")
        if self.host_bytes:
            count = sum(layer.host_bytes > 0 for layer in self.layers)
            lines.append(f"  in host memory: {format_bytes(self.host_bytes)}, codes of {count} layers")
        if self.padded_bytes:
            lines.append(
                f"  heads of different length are padded during attention, one layer at a time: "
                f"{format_bytes(self.padded_bytes)} for the length of a call"
            )
        if self.reasons:
            why = ", ".join(f"{name} {share:.1%}" for name, share in self.reasons.items())
            lines.append(f"  kept for: {why} (an entry may have several reasons)")
        if self.formats:
            how = ", ".join(f"{name} {share:.1%}" for name, share in self.formats.items())
            lines.append(f"  stored as: {how}")
        lines += [
            f"  layer {layer.index:3d}  {bar(layer.budget)} {layer.budget:6.1%}"
            f"  {format_bytes(layer.bytes_before)} -> {format_bytes(layer.bytes_after)}"
            for layer in self.prunable
        ]
        return "\n".join(lines)


def bar(share: float, width: int = 24) -> str:
    """A text bar for a share between 0 and 1."""
    full = round(share * width)
    return "█" * full + "·" * (width - full)


def format_bytes(count: int) -> str:
    """Bytes for people, in binary units."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return sum(items) / len(items) if items else 1.0
