"""Tokens a second and bytes of `refreekv chat` on this machine, the full cache against ours: one long message.

    python benchmarks/chat_speed.py qwen2.5-coder-1.5b.gguf --threads 2 --out chat.jsonl
    python benchmarks/chat_speed.py --table chat.jsonl

The message is generated text of about --tokens tokens with a question about it; the answer is greedy and has --new
tokens. Caches take turns, --rounds times; medians are told. Weights are as the command takes them by itself.
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

import refreekv
from refreekv.cli.conversation import Conversation, Sampling, Turn
from refreekv.cli.loading import load
from refreekv.core.units import format_size
from refreekv.evaluation.data import families


@dataclass
class Chat:
    """What one cache took for the same message."""

    model: str
    policy: str
    kv: str
    tokens: int
    new: int
    first_token_seconds: float
    tokens_per_second: float
    kv_bytes: int
    full_bytes: int
    kept: float
    n: int
    about: str


def message(tokens: int) -> str:
    """Generated text of about so many tokens with a question."""
    (sample,) = families.load(f"multi-key-retrieval:tokens={tokens}", limit=1, seed=0)
    return sample.prompt


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, measure, print, and maybe write JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--policies", default="full@bf16;adaptive@auto", help="POLICY@KV, with semicolons between them")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--machine", default="", help="what it runs on, in words")
    parser.add_argument("--out", type=Path, help="add the results to this file, a JSON object a line")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print results as a table and end")
    given = parser.parse_args(arguments)
    if given.table:
        print(table([json.loads(one) for path in given.table for one in path.read_text().splitlines()]))
        return
    if not given.model:
        parser.error("which model?")
    torch.set_num_threads(given.threads)
    loaded = load(given.model, device=given.device)
    text = message(given.tokens)
    where = torch.cuda.get_device_name() if loaded.device.type == "cuda" else f"CPU, {given.threads} threads"
    about = f"{given.machine or where}; torch {torch.__version__}; {date.today()}"
    ways = [way.split("@") for way in given.policies.split(";")]
    turns: dict[tuple[str, str], list[Turn]] = {(policy, kv): [] for policy, kv in ways}
    for number in range(given.rounds):
        for (policy, kv), said in turns.items():
            conversation = Conversation(
                loaded, refreekv.policies.parse(policy), kv_dtype=None if kv == "bf16" else kv,
                max_new_tokens=given.new, sampling=Sampling(temperature=0),
            )  # fmt: skip
            said.append(conversation.say(text))
            print(f"{policy}: {said[-1].prefill_seconds:.1f} s to the first token", flush=True)
            if number < given.rounds - 1:
                continue
            found = result(loaded.name, policy, kv, said, about)
            print(found, flush=True)
            if given.out:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(found)) + "\n")


def result(model: str, policy: str, kv: str, said: list[Turn], about: str) -> Chat:
    """Medians over the same message, said several times."""
    report = said[-1].report
    return Chat(
        model, policy, kv, said[-1].prompt_tokens, said[-1].answer_tokens,
        statistics.median(turn.prefill_seconds for turn in said),
        statistics.median(turn.tokens_per_second or 0 for turn in said),
        report.bytes_after, report.bytes_before, report.budget, len(said), about,
    )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Results as a Markdown table under what they were measured on."""
    abouts = sorted({f"{row['about']}, n = {row['n']}" for row in rows})
    lines = [
        f"`refreekv chat` on a CPU ({'; '.join(abouts)}), one message and its answer:",
        "",
        "| model | prompt | cache | kept | K/V | first token | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cache = "full" if row["policy"] == "full" and row["kv"] == "bf16" else f"{row['policy']}, {row['kv']}"
        lines.append(
            f"| {row['model']} | {row['tokens']:,} | {cache} | {row['kept']:.0%} | {format_size(row['kv_bytes'])} | "
            f"{row['first_token_seconds']:.1f} s | {row['tokens_per_second']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
