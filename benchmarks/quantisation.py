"""Fidelity against bytes: fewer entries, coarser entries, or both. The table of lab/quantisation.md.

    python benchmarks/fidelity.py MODEL --data-dir DIR --plan benchmarks/plans/quantisation.toml --out results.jsonl
    python benchmarks/quantisation.py results.jsonl --markdown table.md

Bytes are given as shares of a full cache in 16 bits, scales included, also where the model ran
in float32: they follow from what each policy kept on each sample.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refreekv.evaluation import results as store
from refreekv.evaluation import sweeps, tables
from refreekv.evaluation.fidelity.formats import kept_bytes, ladder_of, parse
from refreekv.evaluation.fidelity.peer_formats import form_of
from refreekv.evaluation.records import FidelityRecord

HEAD_SIZES = {"SmolLM2-135M-Instruct": (64, 64), "qwen2.5-coder-1.5b": (128, 128), "gemma-3-270m": (256, 256)}


def share(record: FidelityRecord, sizes: tuple[int, int], itemsize: int = 2) -> float:
    """Bytes of a sample's prompt in full-attention layers, as a share of a full cache's in 16 bits.

    ``itemsize`` are the bytes of an element in the run: records with several formats say bytes as they were there.
    """
    policy = None if record.policy == sweeps.FULL else parse(record.policy)
    ladder = ladder_of(policy)
    assert record.kept_heads is not None
    if (form := form_of(policy)) is not None:
        return form.head_bytes(record.prompt_tokens, sizes, 2) / (record.prompt_tokens * sum(sizes) * 2)
    if ladder is not None and len(ladder.rungs) > 1:
        kv_heads, element = max(map(len, record.kept_heads)), sum(sizes) * itemsize
        # One number where heads are alike.
        shares = [part for layer in record.kept_heads for part in layer * (kv_heads // len(layer))]
        counts = [round(part * record.prompt_tokens) for part in shares]
        full = len(counts) * record.prompt_tokens * element
        # Windowed layers are in both numbers as they are; of the others, what is exact takes two bytes an element.
        held = record.bytes_kept - (record.bytes_full - full)
        exact = sum(n - ladder.coded(n) for n in counts) * element
        return (held - exact * (1 - 2 / itemsize)) / (full * 2 / itemsize)
    forms = () if ladder is None else ladder.forms(sizes)
    held = full = 0
    for layer in record.kept_heads:
        counts = [round(kept * record.prompt_tokens) for kept in layer]
        coded = [0 if ladder is None else ladder.coded(n) for n in counts]
        split = [[n - c, c][: 1 + len(forms)] for n, c in zip(counts, coded, strict=True)]
        held += kept_bytes(split, sizes, 2, forms, mixed=False)
        full += len(counts) * record.prompt_tokens * sum(sizes) * 2
    return held / full


def rows(records: Sequence[FidelityRecord], sizes: tuple[int, int], itemsize: int) -> list[tuple[str, ...]]:
    """A line of cells for each policy, the largest first."""
    table = []
    for row in tables.fidelity(records).overall.itertuples():
        own = [record for record in records if record.policy == row.policy]
        shares = [share(record, sizes, itemsize) for record in own]
        worst = max(own, key=lambda record: record.kl_mean)
        low, high = row.kl_interval or (row.kl, row.kl)
        cells = (
            row.policy if row.policy != sweeps.FULL else "full (noise floor)",
            str(row.n),
            f"{sum(shares) / len(shares):.1%}",
            f"{row.budget:.0%}",
            f"{tables.nats(row.kl)} [{tables.nats(low)}, {tables.nats(high)}]",
            f"{row.worst_family}: {tables.nats(row.worst_kl)}",
            f"{tables.nats(worst.kl_mean)} ({worst.family})",
            f"{row.same_path:.0%}",
        )
        table.append((sum(shares) / len(shares), cells))
    return [cells for _, cells in sorted(table, key=lambda pair: -pair[0])]


def table(records: Sequence[FidelityRecord], sizes: tuple[int, int], itemsize: int) -> str:
    """The table of some samples."""
    heading = ("policy", "n", "bytes", "entries", "mean KL [95%]", "worst family", "worst sample", "same path")
    return tables.markdown_table(heading, rows(records, sizes, itemsize), left=(0, 5, 6)) + "\n"


def bounds(lengths: str) -> list[float]:
    """Where stretches of lengths begin and end: ``4000,16000`` are three of them."""
    return [0, *sorted(map(int, lengths.split(","))), math.inf]


def main() -> None:
    """Read the results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a file of benchmarks/fidelity.py or refreekv eval")
    parser.add_argument(
        "--head-size", type=int, nargs=2, metavar=("KEY", "VALUE"), help="elements of a key and a value"
    )
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of an element in the run: 4 for float32")
    parser.add_argument("--min-tokens", type=int, default=0, help="only prompts of at least so many")
    parser.add_argument(
        "--by-length", metavar="N,N", help="also a table of each stretch of lengths that these tokens divide"
    )
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    options = parser.parse_args()
    results = store.read(options.results)
    complete = [record for record in _complete(results.records) if record.prompt_tokens >= options.min_tokens]
    name = next(iter(complete)).model
    known = next((sizes for known, sizes in HEAD_SIZES.items() if name.startswith(known)), None)
    sizes: Any = tuple(options.head_size) if options.head_size else known
    if sizes is None:
        parser.error(f"say the head sizes of {name} with --head-size")
    text = table(complete, sizes, options.itemsize)
    for low, high in itertools.pairwise(bounds(options.by_length)) if options.by_length else ():
        part = [record for record in complete if low <= record.prompt_tokens < high]
        if part:
            tokens = [record.prompt_tokens for record in part]
            text += f"\nPrompts of {min(tokens):,} to {max(tokens):,} tokens\n\n"
            text += table(part, sizes, options.itemsize)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


def _complete(records: Sequence[FidelityRecord]) -> list[FidelityRecord]:
    """Those of samples that every policy was measured on."""
    policies = {record.policy for record in records}
    seen: dict[tuple[str, str], set[str]] = {}
    for record in records:
        seen.setdefault((record.family, record.sample), set()).add(record.policy)
    return [record for record in records if seen[record.family, record.sample] == policies]


if __name__ == "__main__":
    main()
