"""Tables of what codes of keys cost, by scheme, of files in `benchmarks/runs/formats`.

    python benchmarks/codes.py gemma-codes.jsonl

A file has a line for each sample and scheme: the KL of the question and of the full cache's own greedy answer, read
over a prompt whose entries, but for the first 4 and the newest 64, were replaced by what codes give back of them.

Schemes: `tq` rotation, Gaussian codebook, the prompt's means; `tq-m` the same with the model's means; `bh` keys in
codes of the model's own but for the prompt's means; `bh-m` the model's means, too; `bh-k` of these the mean keys
alone; `bh-0` as `bh`, measured at offset 0 alone; `bh-f` as `bh-m` with one layout of widths for all heads of the
model; `int8` groups of 64, not centred. They were measured before `core.key_codes` was made of `bh`.
"""

import argparse
import json
import statistics
from pathlib import Path

from refreekv.evaluation import tables


def share(name: str, key_bits: int, value_bits: int, sizes: tuple[int, int]) -> float:
    """Bytes of a coded entry, scales included, as a share of 16 bits."""
    if name == "int8":
        coded = sum(size + 4 * size // _group(size) for size in sizes)
    else:
        coded = sum(-(-size * bits // 8) + 2 for size, bits in zip(sizes, (key_bits, value_bits), strict=True))
    return coded / (2 * sum(sizes))


def _group(size: int) -> int:
    return next(group for group in range(min(64, size), 0, -1) if size % group == 0)


def table(path: Path, low: int, high: int) -> str:
    """Mean over families, worst family and worst sample of each scheme, by bytes; a table for each model."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if low <= line["tokens"] <= high]
    text = []
    for model in sorted({line["model"] for line in lines}):
        own = [line for line in lines if line["model"] == model]
        names = {line["scheme"] for line in own}
        whole = {s for s in {line["sample"] for line in own} if {x["scheme"] for x in own if x["sample"] == s} == names}
        own = [line for line in own if line["sample"] in whole]
        tokens = [line["tokens"] for line in own]
        text.append(
            f"\n{model}, {own[0]['dtype']}, {own[0]['device']}, n = {len(whole)} samples of "
            f"{len({line['family'] for line in own})} families, {min(tokens):,} to {max(tokens):,} tokens\n\n"
            "| codes | bytes | KL mean [95%] | worst family | worst token | same next token |\n"
            "|---|---:|---:|---|---:|---:|"
        )
        rows = []
        for scheme in names:
            part = [line for line in own if line["scheme"] == scheme]
            by_family: dict[str, list[float]] = {}
            for line in part:
                by_family.setdefault(line["family"], []).append(line["kl"])
            means = {family: statistics.mean(values) for family, values in by_family.items()}
            between = tables.bootstrap_families(by_family)
            spread = f" [{between[0]:.2g}, {between[1]:.2g}]" if between else ""
            worst = max(means, key=lambda family: means[family])
            first = part[0]
            size = share(scheme, first["key_bits"], first["value_bits"], tuple(first["sizes"]))
            rows.append(
                (
                    -size,
                    statistics.mean(means.values()),
                    f"| {scheme} | {size:.1%} | {statistics.mean(means.values()):.2g}{spread} "
                    f"| {worst}: {means[worst]:.2g} | {max(line['kl_max'] for line in part):.2g} "
                    f"| {statistics.mean(line['top1'] for line in part):.1%} |",
                )
            )
        text += [row for _, _, row in sorted(rows)]
    return "\n".join(text)


def main() -> None:
    """Print the tables of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="results, unpacked")
    parser.add_argument("--min-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=6000)
    arguments = parser.parse_args()
    print(table(arguments.file, arguments.min_tokens, arguments.max_tokens))


if __name__ == "__main__":
    main()
