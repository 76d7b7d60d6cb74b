"""What is reported of each row's last pruning, and how that changes with the next one or a crop."""

from collections.abc import Sequence
from dataclasses import replace

from refreekv.pruning.decide import KeptRow
from refreekv.report import RowReport
from refreekv.storage.columns import Columns


def after_pruning(earlier: Sequence[RowReport], chosen: Sequence[KeptRow]) -> list[RowReport]:
    """Reports on what was decided, given those on the pruning before, if there was one."""
    # Counted on the first KV head: all of them have seen the same tokens.
    evicted = [row.prompt_length - row.kept_heads[0] for row in earlier] or [0] * len(chosen)
    return [
        replace(
            row.report,
            prompt_length=row.report.prompt_length + gone,
            cut=None if row.report.cut is None else row.report.cut + gone,
        )
        for row, gone in zip(chosen, evicted, strict=True)
    ]


def after_crop(reports: Sequence[RowReport], left: Sequence[Columns], removed: int) -> list[RowReport]:
    """Reports once the last ``removed`` tokens of the pruned prompt are gone and ``left`` is what stays of it."""
    return [
        replace(
            row,
            prompt_length=max(row.prompt_length - removed, *columns.counts),
            kept_heads=columns.counts,
            cut=None if row.cut is None else min(row.cut, max(row.prompt_length - removed, 0)),
        )
        for row, columns in zip(reports, left, strict=True)
    ]
