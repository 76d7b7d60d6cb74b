"""Fidelity of many policies on one model, without the command line's extras.

    python benchmarks/fidelity.py MODEL --data-dir DIR --suite peers --limit 10 --out results.jsonl
    python benchmarks/fidelity.py MODEL --data-dir DIR --plan benchmarks/plans/results.toml --out results.jsonl
    python benchmarks/fidelity.py --random llama-1.5b --text-tokens 6500 --limit 300 --suite peers --out speed.jsonl

The first two forms measure a model (a .gguf file, a folder with one or with a checkpoint, or a
hub id) on task families; a plan file says how many samples of which, and which policies. The
last one measures speed alone: random weights of a named shape and random tokens, whose fidelity
means nothing. All can be stopped and started again, also by ``--time-limit``; families take
turns, so that a run cut short has seen all of them.
"""

import argparse
import itertools
import json
import random
import time
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import checkpoints
from refreekv.evaluation import results as store
from refreekv.evaluation import sweeps, tables
from refreekv.evaluation.data.encoding import encode
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity import runner
from refreekv.evaluation.fidelity.bench import Bench

SHAPES: dict[str, dict[str, int]] = {
    # A 1.5B of Qwen2's proportions, a 135M of SmolLM2's, and one to try things with.
    "llama-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "llama-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}


class NumberTokenizer:
    """Text of numbers in a row to these numbers, and back: all that random weights need."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Token ids of a text."""
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens: list[int], **_: Any) -> str:
        """Text of token ids."""
        return " ".join(str(token) for token in tokens)


def load(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    """Model, tokenizer and name."""
    if not arguments.random:
        return checkpoints.load(arguments.model, arguments.device, arguments.dtype, packed=arguments.packed)
    config = LlamaConfig(**SHAPES[arguments.random], max_position_embeddings=32768, tie_word_embeddings=True)
    config.eos_token_id = None
    torch.manual_seed(arguments.seed)
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model, NumberTokenizer(), f"{arguments.random}, random weights"


def samples_of(arguments: argparse.Namespace, plan: "Plan", tokenizer: Any) -> list[Sample]:
    """Random ones of lengths up to the limit, or those of the families, which take turns."""
    if arguments.random:
        rng = random.Random(arguments.seed)
        lengths = [rng.randint(arguments.text_tokens // 4, arguments.text_tokens) for _ in range(arguments.limit)]
        vocabulary = SHAPES[arguments.random]["vocab_size"]
        texts = [" ".join(str(rng.randrange(vocabulary)) for _ in range(length)) for length in lengths]
        return [Sample(str(index), "random", text) for index, text in enumerate(texts)]
    from refreekv.evaluation.data import families

    found: list[list[Sample]] = []
    for name, count in plan.families.items():
        try:
            every = families.load(name, data_dir=arguments.data_dir, seed=plan.seed, **_limit(name, count))
        except families.DataMissing as error:
            print(f"not run: {name}: {error}")
            continue
        # The same samples for any count: more are added behind. Too long ones are passed over.
        random.Random(f"{name}/{plan.seed}").shuffle(every)
        fitting = (sample for sample in every if _fits(tokenizer, sample, plan.max_tokens))
        found.append(list(itertools.islice(fitting, count)))
        if len(found[-1]) < count:
            print(f"{name}: {len(found[-1])} samples of at most {plan.max_tokens:,} tokens, not {count}")
    return [sample for turn in itertools.zip_longest(*found) for sample in turn if sample is not None]


def _limit(name: str, count: int) -> dict[str, int]:
    """Generated families are made to length, and say how many; of data all is looked through."""
    from refreekv.evaluation.data import families, stress

    return {"limit": count} if families.parse(name)[0] in stress.FAMILIES else {}


def _fits(tokenizer: Any, sample: Sample, max_tokens: int) -> bool:
    # A token has more than one character: far longer texts need not be tokenized.
    return len(sample.prompt) < 20 * max_tokens and len(encode(tokenizer, sample).context) <= max_tokens


@dataclass(frozen=True)
class Plan:
    """What to measure: the contents of a plan file, or what the arguments say.

    Attributes
    ----------
    families : dict
        Samples of each family.
    policies, suites : list of str
        As for ``refreekv eval``.
    max_tokens, continuation, seed : int
        As for ``refreekv eval``.
    """

    families: dict[str, int] = field(default_factory=dict)
    policies: list[str] = field(default_factory=list)
    suites: list[str] = field(default_factory=list)
    max_tokens: int = runner.MAX_TOKENS
    continuation: int = 48
    seed: int = 0

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Plan":
        """The plan file with what the arguments add, or the arguments alone."""
        if arguments.plan is not None:
            plan = cls(**tomllib.loads(arguments.plan.read_text(encoding="utf-8")))
            return replace(plan, policies=[*plan.policies, *arguments.policy], suites=[*plan.suites, *arguments.suite])
        from refreekv.evaluation.data import families

        names = families.split([arguments.families]) if arguments.families else families.names()
        return cls(
            dict.fromkeys(names, arguments.limit),
            arguments.policy or ([] if arguments.suite else ["refreekv"]),
            arguments.suite,
            arguments.max_tokens,
            arguments.continuation,
            arguments.seed,
        )


def main() -> None:
    """Parse the arguments, measure, print and maybe write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder or a hub id")
    parser.add_argument("--packed", action="store_true", help="keep the weights of a .gguf file as they are")
    parser.add_argument("--random", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--text-tokens", type=int, default=runner.MAX_TOKENS, help="longest random prompt")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--families", help="comma-separated; default: all")
    parser.add_argument("--policy", action="append", default=[])
    parser.add_argument("--suite", action="append", default=[], choices=sweeps.SUITES)
    parser.add_argument("--limit", type=int, default=10, help="samples of each family")
    parser.add_argument("--max-tokens", type=int, default=runner.MAX_TOKENS)
    parser.add_argument("--continuation", type=int, default=48)
    parser.add_argument("--plan", type=Path, help="a TOML file with the fields of Plan, in place of the five above")
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop after so many seconds")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--together", type=int)
    parser.add_argument("--seed", type=int, default=0)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--out", type=Path, required=True, help="results; an interrupted run goes on")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--json", type=Path, help="write the tables to this file")
    arguments = parser.parse_args()
    if bool(arguments.model) == bool(arguments.random):
        parser.error("give a model, or --random")
    plan = Plan.of(arguments)
    policies = sweeps.choose(plan.policies, plan.suites)
    model, tokenizer, name = load(arguments)
    bench = Bench(model, tokenizer, name, plan.continuation, arguments.rows, arguments.together)
    samples = samples_of(arguments, plan, tokenizer)
    common = {"max_tokens": plan.max_tokens, "seed": plan.seed, "plan": arguments.plan.name if arguments.plan else None}
    begin, count = time.perf_counter(), 0

    def on_sample() -> None:
        nonlocal count
        count += 1
        seconds = time.perf_counter() - begin
        print(f"{count}/{len(samples)} samples, {seconds / count:.2f} s each", flush=True)
        if arguments.time_limit and seconds > arguments.time_limit:
            raise TimeoutError

    try:
        records = runner.run(bench, samples, policies, arguments.out, on_sample=on_sample, **common)
    except TimeoutError:
        print("out of time: run the same command again to go on")
        records = store.read(arguments.out).records
    seconds = time.perf_counter() - begin
    print(f"\n{count} samples, {len(policies)} policies and the full cache: {seconds:.1f} s")
    if cuda:
        print(f"most memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if not records:
        return
    made = tables.fidelity(records, seed=plan.seed)
    setup = runner.setup_of(bench, **common)
    text = tables.markdown(made, setup=setup)
    print(text.partition("\n## ")[0] if arguments.markdown else text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps({"setup": setup, **made.to_dict()}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
