"""Ways to put K/V in few bits, on the same prompts: why `refreekv.core.quantisation` does it as it does.

    python benchmarks/number_formats.py MODEL --data-dir DIR --families 2wikimqa-e,hotpotqa --prompts 6

Each prompt's K/V is replaced by what a format gives back of it, but for the first 4 and the last 64 tokens; the
full cache's own greedy answer is then read over it, and the predictions are compared (KL in nats).
"""

import argparse
import copy
import itertools
import statistics
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fidelity import load
from refreekv.core.quantisation import SINKS, centre_of, round_trip
from refreekv.engines.transformers.naming import NAME
from refreekv.evaluation.data import families
from refreekv.evaluation.data.encoding import encode
from refreekv.evaluation.fidelity.metrics import divergence

RECENT = 64
FP8 = torch.float8_e4m3fn


def ours(bits: int, *, centred: bool = True) -> Callable[[Tensor], Tensor]:
    """Codes of the library; entries ``[H, n, D]``."""
    blank = (lambda entries: centre_of(entries)) if centred else (lambda entries: torch.zeros_like(entries[:, 0]))
    return lambda entries: round_trip(entries, bits, blank(entries))


def grouped(bits: int, group: int) -> Callable[[Tensor], Tensor]:
    """A grid from the lowest to the highest of each group of an entry's elements."""

    def round_trip(entries: Tensor) -> Tensor:
        groups = entries.unflatten(-1, (-1, group))
        low, high = groups.amin(-1, keepdim=True).half().float(), groups.amax(-1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-6).half().float()
        return ((groups - low) / scale).round().clamp(0, 2**bits - 1).mul(scale).add(low).flatten(-2)

    return round_trip


def with_exact_zero(group: int) -> Callable[[Tensor], Tensor]:
    """Four bits with a whole number for zero, as torchao's public integer formats have it."""

    def round_trip(entries: Tensor) -> Tensor:
        groups = entries.unflatten(-1, (-1, group))
        low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 15).clamp_min(1e-6).half().float()
        zero = (-low / scale).round()
        return (((groups / scale).round() + zero).clamp(0, 15) - zero).mul(scale).flatten(-2)

    return round_trip


def by_channel(tokens: int) -> Callable[[Tensor], Tensor]:
    """Four bits, groups of consecutive tokens in each channel, as KIVI (arXiv 2402.02750) has it for keys."""

    def round_trip(entries: Tensor) -> Tensor:
        whole = entries.shape[1] // tokens * tokens
        groups = entries[:, :whole].unflatten(1, (-1, tokens))
        low, high = groups.amin(2, keepdim=True).half().float(), groups.amax(2, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-6).half().float()
        found = ((groups - low) / scale).round().clamp(0, 15).mul(scale).add(low)
        return torch.cat([found.flatten(1, 2), entries[:, whole:]], dim=1)

    return round_trip


def one_scale(entries: Tensor) -> Tensor:
    """FP8 with one scale for the whole tensor, as transformers' own fp8 cache layer has it."""
    scale = entries.abs().amax() / torch.finfo(FP8).max
    return (entries / scale).to(FP8).float() * scale


WAYS: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "fp8, one scale (transformers)": ("8.0", one_scale, one_scale),
    "int8 (ours: centred, rotated, uniform grid)": ("8.25", ours(8), ours(8)),
    "int8, groups of 64": ("8.5", grouped(8, 64), grouped(8, 64)),
    "k6v4 (ours)": ("5.25", ours(6), ours(4)),
    "int4 (ours)": ("4.25", ours(4), ours(4)),
    "int4, rotated, not centred": ("4.25", ours(4, centred=False), ours(4, centred=False)),
    "int4, groups of 32": ("5.0", grouped(4, 32), grouped(4, 32)),
    "int4, groups of 32, exact zero (torchao)": ("4.6", with_exact_zero(32), with_exact_zero(32)),
    "int4, keys by channel, 32 tokens (KIVI)": ("5.0", by_channel(32), grouped(4, 32)),
    "int2 (ours)": ("2.25", ours(2), ours(2)),
}
"""Names to bits of an element with heads of 64, and what becomes of keys and values."""


@torch.inference_mode()
def main() -> None:
    """Measure all ways on all prompts and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--families", default="2wikimqa-e,hotpotqa")
    parser.add_argument("--prompts", type=int, default=6, help="of all families together")
    parser.add_argument("--max-tokens", type=int, default=1500)
    parser.add_argument("--continuation", type=int, default=24)
    arguments = parser.parse_args()
    place = types.SimpleNamespace(model=arguments.model, random=None, dtype="float32", device="cpu", seed=0)
    model, tokenizer, name = load(place)  # type: ignore[arg-type]
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    lengths = []
    for ids in prompts(tokenizer, arguments):
        lengths.append(len(ids))
        for way, kl in measure(model, ids, arguments.continuation).items():
            found[way].append(kl)
    print(f"{name}, float32, n={len(lengths)} prompts of {min(lengths):,} to {max(lengths):,} tokens\n")
    print("| format | bits | mean KL | worst prompt |\n| --- | ---: | ---: | ---: |")
    for way, values in found.items():
        print(f"| {way} | {WAYS[way][0]} | {statistics.mean(values):.2g} | {max(values):.2g} |")


def prompts(tokenizer: Any, arguments: argparse.Namespace) -> Iterator[list[int]]:
    """Prompts of all families, those first that a family has first and that are neither short nor too long."""
    names = families.split([arguments.families])
    for family in names:
        every = families.load(family, data_dir=arguments.data_dir, limit=200, seed=0)
        encoded = (encode(tokenizer, sample).context for sample in every)
        fitting = (ids for ids in encoded if 4 * RECENT < len(ids) <= arguments.max_tokens)
        yield from itertools.islice(fitting, -(-arguments.prompts // len(names)))


def measure(model: torch.nn.Module, ids: list[int], continuation: int) -> dict[str, float]:
    """Mean KL of each way on one prompt."""
    cache = DynamicCache(config=model.config)
    logits = model(torch.tensor([ids]), **{NAME: cache}, logits_to_keep=1).logits
    prompt = copy.deepcopy(cache)
    path = []
    for _ in range(continuation):
        path.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([[path[-1]]]), **{NAME: cache}).logits

    def read(*ways: Callable[[Tensor], Tensor]) -> Tensor:
        other = copy.deepcopy(prompt)
        for layer in other.layers:
            if type(layer) is DynamicLayer:  # Windows are never coded.
                for way, part in zip(ways, (layer.keys, layer.values), strict=True):
                    part[0, :, SINKS:-RECENT] = way(part[0, :, :-RECENT])[:, SINKS:]
        return model(torch.tensor([path]), **{NAME: other}).logits

    reference = read(lambda entries: entries, lambda entries: entries)[0]
    return {way: float(divergence(reference, read(*ways))[0].mean()) for way, (_, *ways) in WAYS.items()}


if __name__ == "__main__":
    main()
