"""What a policy keeps of prompts of growing length.

    python benchmarks/budget_by_length.py MODEL --data-dir DIR --lengths 512,1024,2048,4096,8192 --out lengths.json
    python benchmarks/budget_by_length.py MODEL --data-dir DIR --lengths 16384,32768 --stretch 4

Prompts are the beginnings of one text (a book, or articles in a row). Past its context a model needs ``--stretch``:
rotary positions are scaled by YaRN without any training, so that attention stays in a range it knows.
What it then says is worth little; what its heads look at, and so the budget, is still an indication.
"""

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

import refreekv
from checkpoints import load
from refreekv.engines.transformers.naming import NAME
from refreekv.evaluation.data import families


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--family", default="pg19:chars=200000")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--stretch", type=float, help="YaRN factor")
    parser.add_argument("--policy", action="append", help="default: adaptive and refreekv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    def stretch(config: Any) -> None:
        if arguments.stretch:
            known = config.max_position_embeddings
            config.rope_parameters = {
                **(config.rope_parameters or {}),
                "rope_type": "yarn",
                "factor": arguments.stretch,
                "original_max_position_embeddings": known,
            }
            config.max_position_embeddings = int(known * arguments.stretch)

    model, tokenizer, model_name = load(arguments.model, arguments.device, arguments.dtype, stretch)
    texts = families.load(arguments.family, data_dir=arguments.data_dir, limit=arguments.texts)
    rows = []
    print("policy        text   tokens  budget      s", flush=True)
    for length in (int(part) for part in arguments.lengths.split(",")):
        for number, text in enumerate(texts):
            ids = tokenizer(text.prompt, return_tensors="pt")["input_ids"][:, :length].to(arguments.device)
            if ids.shape[1] < length:
                continue
            for spec in arguments.policy or ["adaptive", "refreekv"]:
                start = time.perf_counter()
                cache = refreekv.ReFreeKVCache(model, refreekv.policies.parse(spec))
                with torch.inference_mode():
                    model(input_ids=ids, **{NAME: cache}, logits_to_keep=1)
                budget = cache.report.budget
                seconds = time.perf_counter() - start
                rows.append({"policy": spec, "text": number, "tokens": length, "budget": budget})
                print(f"{spec:12}  {number:4}  {length:6}  {budget:6.3f}  {seconds:5.1f}", flush=True)
    if arguments.out:
        setup = {
            "model": model_name,
            "stretch": arguments.stretch,
            "family": arguments.family,
            "dtype": arguments.dtype,
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU",
            "torch": torch.__version__,
            "date": date.today().isoformat(),
        }
        arguments.out.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
