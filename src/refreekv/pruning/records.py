"""What is known of each row's last pruning, and how it changes with the next one or a crop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from refreekv.pruning.decide import KeptRow
from refreekv.storage.columns import Columns


@dataclass(frozen=True)
class RowRecord:
    """What was decided for one row of one layer when its prompt ended.

    Attributes
    ----------
    tokens : int
        Real tokens seen up to there, over all turns; padding not counted.
    kept : tuple of int
        Entries kept of them: one number for all KV heads together, or one for each.
    cut : int or None
        Position from which on every token is kept, for selections that have one.
    metric : float or None
        The criterion's value at what was kept.
    reasons : dict
        Why entries stay, to the share of the row's entries that do for it.
    """

    tokens: int
    kept: tuple[int, ...]
    cut: int | None = None
    metric: float | None = None
    reasons: Mapping[str, float] = field(default_factory=dict)


def after_pruning(earlier: Sequence[RowRecord], chosen: Sequence[KeptRow]) -> list[RowRecord]:
    """Records of what was decided, given those of the pruning before, if there was one."""
    # Counted on the first KV head: all of them have seen the same tokens.
    evicted = [record.tokens - record.kept[0] for record in earlier] or [0] * len(chosen)
    return [
        RowRecord(
            tokens=row.entries[0] + gone,
            kept=row.columns.counts,
            cut=None if row.cut is None else row.cut + gone,
            metric=row.metric,
            reasons=row.reasons,
        )
        for row, gone in zip(chosen, evicted, strict=True)
    ]


def after_crop(records: Sequence[RowRecord], left: Sequence[Columns], removed: int) -> list[RowRecord]:
    """Records once the last ``removed`` tokens of the pruned prompt are gone and ``left`` is what stays of it."""
    return [
        replace(
            record,
            tokens=max(record.tokens - removed, *columns.counts),
            kept=columns.counts,
            cut=None if record.cut is None else min(record.cut, max(record.tokens - removed, 0)),
        )
        for record, columns in zip(records, left, strict=True)
    ]
