"""Answers token by token over caches that store int8: what the newest entries in full precision are worth.

    python benchmarks/stored_answers.py MODEL --data-dir DIR --families 2wikimqa-e,hotpotqa --prompts 6

The full cache's own greedy answer is fed to each cache one token at a time, as `generate` feeds it, and the
predictions are compared with the full cache's (KL in nats). "in place": storage that encodes entries as they
are written, as on CUDA, here through the kernels' plain versions.
"""

import argparse
import statistics
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import refreekv
from fidelity import load
from number_formats import prompts
from refreekv.engines.transformers.naming import NAME
from refreekv.evaluation.fidelity.metrics import divergence


@torch.inference_mode()
def main() -> None:
    """Measure all formats under all policies on all prompts and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--families", default="2wikimqa-e,hotpotqa")
    parser.add_argument("--policies", default="full;adaptive")
    parser.add_argument("--formats", default="int8;k6v4;int4", help="besides entries as they are computed")
    parser.add_argument("--prompts", type=int, default=6, help="of all families together")
    parser.add_argument("--max-tokens", type=int, default=1900)
    parser.add_argument("--continuation", type=int, default=48)
    arguments = parser.parse_args()
    place = types.SimpleNamespace(model=arguments.model, random=None, dtype="float32", device="cpu", seed=0)
    model, tokenizer, name = load(place)  # type: ignore[arg-type]
    formats = {"as computed": None, **{spec: spec for spec in arguments.formats.split(";")}}
    ways = [(policy, kind) for policy in arguments.policies.split(";") for kind in formats]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in ways}
    lengths = []
    for ids in prompts(tokenizer, arguments):
        lengths.append(len(ids))
        path, reference = greedy(model, ids, arguments.continuation)
        for policy, kind in ways:
            found[policy, kind].append(measure(model, ids, path, reference, policy, formats[kind]))
    print(f"{name}, float32, n={len(lengths)} prompts of {min(lengths):,} to {max(lengths):,} tokens\n")
    print("| policy | stored | entries | mean KL | worst prompt |\n| --- | --- | ---: | ---: | ---: |")
    for (policy, kind), results in found.items():
        divergences, held = zip(*results, strict=True)
        print(
            f"| {policy} | {kind} | {statistics.mean(held):.0%} | {statistics.mean(divergences):.2g} "
            f"| {max(divergences):.2g} |"
        )


def greedy(model: Any, ids: list[int], tokens: int) -> tuple[list[int], Tensor]:
    """The full cache's answer, and the logits ``[tokens, V]`` after each of its tokens."""
    cache = DynamicCache(config=model.config)
    logits = model(torch.tensor([ids]), **{NAME: cache}, logits_to_keep=1).logits[:, -1]
    path, found = [], []
    for _ in range(tokens):
        path.append(int(logits.argmax()))
        logits = model(torch.tensor([path[-1:]]), **{NAME: cache}).logits[:, -1]
        found.append(logits)
    return path, torch.cat(found)


def measure(
    model: Any, ids: list[int], path: list[int], reference: Tensor, policy: str, kv_dtype: str | None
) -> tuple[float, float]:
    """Mean KL of an answer, and the share of the prompt's entries that is kept."""
    cache = refreekv.ReFreeKVCache(model, policy, kv_dtype=kv_dtype)
    model(torch.tensor([ids]), **{NAME: cache}, logits_to_keep=1)
    with cache.decoding():
        logits = [model(torch.tensor([[token]]), **{NAME: cache}).logits[:, -1] for token in path]
    return float(divergence(reference, torch.cat(logits)[None])[0].mean()), cache.report.budget


if __name__ == "__main__":
    main()
