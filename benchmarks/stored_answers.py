"""Answers token by token over caches that really store few bits, generated entries among them.

    python benchmarks/stored_answers.py MODEL --data-dir DIR --families 2wikimqa-e,hotpotqa --formats "auto;int8"

The full cache's own greedy answer is fed to each cache one token at a time, as `generate` feeds it, and the
predictions are compared with the full cache's (KL in nats; whether each most likely token stays). The full cache is
read a second time, in one call, as the noise floor. With ``--out`` a run may be stopped, also by ``--time-limit``, and
started again.
"""

import argparse
import hashlib
import json
import statistics
import time
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

FLOOR = ("full", "in one call")


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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds after which no prompt is begun")
    parser.add_argument("--out", type=Path, help="results; an interrupted run goes on")
    arguments = parser.parse_args()
    place = types.SimpleNamespace(
        model=arguments.model, random=None, dtype=arguments.dtype, device=arguments.device, seed=0, packed=False
    )
    model, tokenizer, name = load(place)  # type: ignore[arg-type]
    formats = {"as computed": None, **{spec: spec for spec in arguments.formats.split(";")}}
    # "auto" means nothing to a policy without number formats of its own
    ways = [(p, kind) for p in arguments.policies.split(";") for kind in formats if (p, kind) != ("full", "auto")]
    lines: list[dict[str, Any]] = []
    if arguments.out is not None and arguments.out.exists():
        lines = [json.loads(line) for line in arguments.out.read_text(encoding="utf-8").splitlines()]
    begin = time.monotonic()
    for ids in prompts(tokenizer, arguments):
        about = {"model": name, "dtype": arguments.dtype, "prompt": hashlib.blake2b(str(ids).encode()).hexdigest()[:16]}
        done = {(x["policy"], x["stored"]) for x in lines if about.items() <= x.items()}
        missing = [way for way in (FLOOR, *ways) if way not in done]
        if not missing:
            continue
        if arguments.time_limit and time.monotonic() - begin > arguments.time_limit:
            print("time is up: run the same command again to go on")
            break
        path, reference = greedy(model, ids, arguments.continuation)
        found = []
        for policy, kind in missing:
            one = again(model, ids, path), 1.0
            if (policy, kind) != FLOOR:
                one = measure(model, ids, path, policy, formats[kind])
            kl, agrees = divergence(reference, one[0][None])
            numbers = {"kl": float(kl.mean()), "same": bool(agrees.all()), "held": one[1], "tokens": len(ids)}
            found.append(about | {"policy": policy, "stored": kind} | numbers)
        lines += found
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in found))
        print(f"{time.monotonic() - begin:6.0f} s  {len(ids)} tokens", flush=True)
    print(table([line for line in lines if line["model"] == name and line["dtype"] == arguments.dtype]))


def table(lines: list[dict[str, Any]]) -> str:
    """A line for each way of storing."""
    if not lines:
        return "nothing measured"
    tokens = {line["prompt"]: line["tokens"] for line in lines}.values()
    text = [
        f"{lines[0]['model']}, {lines[0]['dtype']}, n={len(tokens)} prompts of {min(tokens):,} to {max(tokens):,}\n"
    ]
    text.append(
        "| policy | stored | entries | mean KL | worst prompt | same path |\n| --- | --- | ---: | ---: | ---: | ---: |"
    )
    for way in dict.fromkeys((line["policy"], line["stored"]) for line in lines):
        own = [line for line in lines if (line["policy"], line["stored"]) == way]
        kl, held, same = ([line[key] for line in own] for key in ("kl", "held", "same"))
        text.append(
            f"| {way[0]} | {way[1]} | {statistics.mean(held):.0%} | {statistics.mean(kl):.2g} | {max(kl):.2g} "
            f"| {statistics.mean(same):.0%} |"
        )
    return "\n".join(text)


def greedy(model: Any, ids: list[int], tokens: int) -> tuple[list[int], Tensor]:
    """The full cache's answer, and the logits ``[tokens, V]`` after each of its tokens."""
    cache = DynamicCache(config=model.config)
    logits = read(model, ids, cache, logits_to_keep=1)[-1]
    path, found = [], []
    for _ in range(tokens):
        path.append(int(logits.argmax()))
        logits = read(model, path[-1:], cache)[-1]
        found.append(logits)
    return path, torch.stack(found)


def again(model: Any, ids: list[int], path: list[int]) -> Tensor:
    """The full cache's logits ``[tokens, V]`` of the same answer, read in one call."""
    cache = DynamicCache(config=model.config)
    read(model, ids, cache, logits_to_keep=1)
    return read(model, path, cache)


def measure(model: Any, ids: list[int], path: list[int], policy: str, kv_dtype: str | None) -> tuple[Tensor, float]:
    """Logits ``[tokens, V]`` of an answer, and the share of the prompt's entries that is kept."""
    cache = refreekv.ReFreeKVCache(model, policy, kv_dtype=kv_dtype)
    read(model, ids, cache, logits_to_keep=1)
    with cache.decoding():
        logits = [read(model, [token], cache)[-1] for token in path]
    return torch.stack(logits), cache.report.budget


def read(model: Any, ids: list[int], cache: Any, **options: Any) -> Tensor:
    """Feed tokens to a cache: logits ``[tokens, V]``."""
    logits: Tensor = model(torch.tensor([ids], device=model.device), **{NAME: cache}, **options).logits[0]
    return logits


if __name__ == "__main__":
    main()
