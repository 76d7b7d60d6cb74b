"""What sharing block tables between layers costs: the share of a prompt that groups of layers keep.

    python benchmarks/vllm_groups.py MODEL_FOLDER --data-dir DIR

Needs no vLLM: `tests/vllm/plain_reference.py` computes in transformers what the plugin's tests
compare with. Every fifth row of LongBench's Qasper and 2WikiMQA that is long enough, cut to one length.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.vllm_reference import PlainModel
from refreekv.policies.registry import parse


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--policy", nargs="+", default=["refreekv", "adaptive"])
    parser.add_argument("--layers-per-group", type=int, nargs="+", default=[1, 2, 3, 5])
    arguments = parser.parse_args()
    model = PlainModel(arguments.model)
    files = [Path(arguments.data_dir) / f"longbench_{name}.jsonl" for name in ("qasper", "2wikimqa")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    prompts = []
    for row in rows[::5]:
        question = model.tokenizer(f"\n\nQuestion: {row['input']}\nAnswer:")["input_ids"]
        ids = model.tokenizer(row["context"])["input_ids"][: arguments.tokens - len(question)] + question
        if len(ids) == arguments.tokens and len(prompts) < arguments.prompts:
            prompts.append(ids)
    for text in arguments.policy:
        for group in arguments.layers_per_group:
            kept = [model.kept(ids, parse(text), 32, group) for ids in prompts]
            shares = [sum(map(len, layers)) / (len(layers) * arguments.tokens) for layers in kept]
            mean, worst = sum(shares) / len(shares), max(shares)
            print(f"{text}  {group} a group  kept {mean:.3f}, worst {worst:.3f}  n={len(prompts)}", flush=True)


if __name__ == "__main__":
    main()
