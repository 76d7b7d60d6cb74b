"""Fidelity over long answers: what pruning generated tokens does to what comes after.

    python benchmarks/long_answers.py MODEL --data-dir DIR --samples 8 --out long.json

Each sample is the beginning of a book (``pg19``) as the prompt and what follows as if it were
being generated: the model reads it over a full cache, over one whose prompt was pruned, and over
ones that are pruned again every so many tokens. Reported for each stretch of tokens: mean
KL(full‖pruned) in nats, agreement of the first choice, and entries held against the full cache.
The text is the book's, not the model's own: a small model's own 2,000 tokens repeat themselves.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import refreekv
from checkpoints import load
from refreekv.engines.transformers.naming import NAME
from refreekv.evaluation.data import families

STEP = 64
"""Tokens in one call; intervals are multiples."""


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor, prompt: int, cache: Any) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities after each token behind the prompt, and K/V bytes held after each call."""
    pruned = type(cache) is not DynamicCache
    with cache.prompt_until(prompt) if pruned else torch.no_grad():
        model(input_ids=ids[:, :prompt], **{NAME: cache}, logits_to_keep=1)
        lines, held = [], []
        for start in range(prompt, ids.shape[1], STEP):
            logits = model(input_ids=ids[:, start : start + STEP], **{NAME: cache}).logits[0]
            lines.append(logits.float().log_softmax(-1))
            if pruned:
                held.append(cache.report.bytes_after)
            else:
                held.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    return torch.cat(lines), held


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--answer", type=int, default=2560, help="tokens after it")
    parser.add_argument("--intervals", default="256,512", help="decode_interval of each run")
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    model, tokenizer, model_name = load(arguments.model, arguments.device, arguments.dtype)
    policy = refreekv.policies.parse(arguments.policy)
    size = arguments.prompt + arguments.answer
    runs: dict[str, int | None] = {"prompt only": None}
    runs |= {f"every {interval}": interval for interval in map(int, arguments.intervals.split(","))}
    stretch = max(STEP, arguments.answer // 5 // STEP * STEP)
    rows = []
    for sample in families.load(f"pg19:chars={7 * size}", data_dir=arguments.data_dir, limit=arguments.samples):
        ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"][:, :size].to(arguments.device)
        if ids.shape[1] < size:
            continue
        full, full_bytes = read(model, ids, arguments.prompt, DynamicCache(config=model.config))
        for name, interval in runs.items():
            cache = refreekv.ReFreeKVCache(model, policy, decode_interval=interval)
            lines, held = read(model, ids, arguments.prompt, cache)
            kl = (full.exp() * (full - lines)).sum(-1)
            same = full.argmax(-1) == lines.argmax(-1)
            for start in range(0, arguments.answer, stretch):
                part, call = slice(start, start + stretch), min(start + stretch, arguments.answer) // STEP - 1
                rows.append(
                    {
                        "sample": sample.id,
                        "run": name,
                        "from": start,
                        "kl": kl[part].mean().item(),
                        "same": same[part].float().mean().item(),
                        "held": held[call] / full_bytes[call],
                    }
                )
    header = {
        "policy": str(policy),
        "model": model_name,
        "samples": len({row["sample"] for row in rows}),
        "prompt": arguments.prompt,
        "answer": arguments.answer,
        "dtype": arguments.dtype,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(json.dumps(header))
    print("run           tokens        mean KL  worst sample  same choice  bytes / full")
    for name in runs:
        for start in sorted({row["from"] for row in rows}):
            part = [row for row in rows if row["run"] == name and row["from"] == start]
            mean = {key: sum(row[key] for row in part) / len(part) for key in ("kl", "same", "held")}
            worst = max(row["kl"] for row in part)
            print(
                f"{name:12}  {start:5}–{start + stretch:5}  {mean['kl']:8.4f}  {worst:12.4f}  {mean['same']:11.3f}  "
                f"{mean['held']:12.3f}"
            )
    if arguments.out:
        arguments.out.write_text(json.dumps({"setup": header, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
