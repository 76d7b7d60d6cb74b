"""Ten questions about one document: each turn's distance from the full cache's conversation, with and without the past.

    python benchmarks/ten_turns.py MODEL --data-dir DIR --tokens 3000 --out ten-MODEL.jsonl
    python benchmarks/ten_turns.py MODEL --data-dir DIR --variants snapkv:ratio=0.25 snapkv:ratio=0.25+host --out FILE
    python benchmarks/ten_turns.py --table ten-*.jsonl --markdown table.md

MODEL is a .gguf file, a folder or a hub id. The document is the beginning of a QMSum meeting (``qmsum_meetings.jsonl``
in DIR), and of those after it where one is too short; the questions are those that the data set asks about the first
(``qmsum_queries.jsonl``). The model answers them one after the other over its own full cache, greedily; that
conversation is then fed to every variant, token by token, and what each predicts is compared: KL(full || variant) in
nats, the mean over a turn's answer. A variant is a policy, or a policy and ``+host``: with ``keep_evicted="host"``;
``+host16``: the same with what is kept in the model's precision.
"""

import argparse
import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import checkpoints
import refreekv
from refreekv.engines.transformers.naming import cache_argument
from refreekv.evaluation.fidelity.runner import device_name
from refreekv.serving import templates

VARIANTS = ("adaptive", "adaptive+host", "snapkv:ratio=0.25", "snapkv:ratio=0.25+host")
TURNS = 10


@dataclass(frozen=True)
class Turn:
    """What a turn feeds, and what the full cache made of it.

    Attributes
    ----------
    ids : list of int
        Tokens up to where the answer begins; after the first turn the last answer's last token is the first.
    answer : list of int
        The answer.
    logits : Tensor
        float32 ``[answer, V]``: what each token of it was predicted from.
    """

    ids: list[int]
    answer: list[int]
    logits: Tensor


def read_meeting(folder: Path, turns: int, meeting: str | None) -> tuple[str, list[str], str]:
    """A transcript, all others behind it, so many questions about it, and which one it is.

    The first with enough questions if none is named.

    Raises
    ------
    ValueError
        There is no such meeting.
    """
    asked: dict[str, list[str]] = {}
    for line in (folder / "qmsum_queries.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked.setdefault(str(row["meeting_id"]), []).append(row["input"])
    lines = (folder / "qmsum_meetings.jsonl").read_text(encoding="utf-8").splitlines()
    meetings = {str(row["meeting_id"]): row["transcript"] for row in map(json.loads, lines)}
    for found, transcript in meetings.items():
        if (meeting is None and len(asked.get(found, ())) >= turns) or found == meeting:
            others = (text for other, text in meetings.items() if other != found)
            return "\n\n".join([transcript, *others]), asked[found][:turns], found
    raise ValueError(f"no meeting in {folder} has {turns} questions")


def opening(tokenizer: Any, document: str, question: str, tokens: int) -> tuple[list[dict[str, str]], list[int]]:
    """The first message, with as much of the document as makes about so many tokens, and its tokens."""
    offsets = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cut = document[: offsets[min(tokens, len(offsets)) - 1][1]]
    messages = [{"role": "user", "content": f"{cut}\n\n{question}"}]
    if not tokenizer.chat_template:
        return messages, templates.tokens_of(tokenizer, cut + plain(question), special=True)
    return messages, templates.tokens_of(tokenizer, templates.render(tokenizer, messages))


def plain(question: str) -> str:
    """A question to a model without a chat template."""
    return f"\n\nQuestion: {question}\nAnswer:"


@torch.no_grad()
def forward(model: Any, cache: Any, ids: Sequence[int], keep: int = 0) -> Tensor:
    """Logits float32 ``[q, V]`` of all tokens, or of the last ``keep``."""
    fed = torch.tensor([list(ids)], device=model.device)
    out = model(fed, use_cache=True, logits_to_keep=keep, **cache_argument(model.forward, cache))
    return out.logits[0].float()


def converse(model: Any, tokenizer: Any, document: str, questions: Sequence[str], tokens: int, most: int) -> list[Turn]:
    """The conversation over the full cache."""
    messages, ids = opening(tokenizer, document, questions[0], tokens)
    stop, cache, turns = templates.stop_tokens(model, tokenizer, messages), DynamicCache(config=model.config), []
    for number, question in enumerate(questions):
        if number:
            said = {"role": "user", "content": question}
            if tokenizer.chat_template:
                new = templates.after_answer(tokenizer, messages[:-1], said)
            else:
                new = templates.tokens_of(tokenizer, plain(question))
            last = turns[-1].answer[-1]
            ids = [last, *(new[1:] if new and new[0] == last else new)]
            messages.append(said)
        logits, answer = [forward(model, cache, ids, 1)], []
        while True:
            answer.append(int(logits[-1].argmax()))
            if answer[-1] in stop or len(answer) == most:
                break
            logits.append(forward(model, cache, answer[-1:]))
        turns.append(Turn(ids, answer, torch.cat(logits).cpu()))
        messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
    return turns


def follow(model: Any, variant: str, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Feed the conversation to a variant: what each turn was like."""
    spec, _, keep = variant.partition("+")
    settings: dict[str, Any] = {"keep_evicted": "host" if keep else None}
    if keep == "host16":
        settings["prompt_dtype"] = None
    cache = refreekv.ReFreeKVCache(model, spec, **settings)
    found = []
    for turn in turns:
        begin = time.perf_counter()
        # Without a word a call of several tokens is a prompt, and one of a single token is none.
        with cache.prompt_until(cache.get_seq_length() + len(turn.ids)):
            logits = [forward(model, cache, turn.ids, 1)]
        cache.state.finish()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, report = time.perf_counter() - begin, cache.report
        with cache.decoding():
            if turn.answer[:-1]:
                logits.append(forward(model, cache, turn.answer[:-1]))
        found.append(
            {**compared(turn.logits, torch.cat(logits).cpu()), **numbers(report), "seconds": round(seconds, 3)}
        )
    return found


def compared(full: Tensor, other: Tensor) -> dict[str, Any]:
    """How far predictions ``[n, V]`` are from the full cache's."""
    wanted = full.log_softmax(-1)
    kl = torch.nn.functional.kl_div(other.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
    same = full.argmax(-1) == other.argmax(-1)
    return {
        "kl": float(f"{float(kl.mean()):.4g}"),
        "kl_first": float(f"{float(kl[0]):.4g}"),
        "kl_most": float(f"{float(kl.max()):.4g}"),
        "same": round(float(same.float().mean()), 4),
        "answer": len(kl),
    }


def numbers(report: refreekv.CompressionReport) -> dict[str, Any]:
    """What a cache holds when its answer begins."""
    past = report.remembered
    return {
        "tokens": report.tokens,
        "bytes": report.bytes_after + report.index_bytes,
        "bytes_full": report.bytes_before,
        "bytes_host": 0 if past is None else past.host_bytes,
        "restored": None if past is None else past.restored,
    }


# -- the table ----------------------------------------------------------------------------


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each model and variant, as Markdown."""
    rows = [
        "| model | tokens | variant | KL, turn 1 | later turns: first token | mean | worst turn | tokens changed "
        "| device | host |",
        f"|{' --- |' * 10}",
    ]
    for line in lines:
        first, *later = line["turns"]
        answered = sum(turn["answer"] for turn in later)
        kl = sum(turn["kl"] * turn["answer"] for turn in later) / answered
        start = sum(turn["kl_first"] for turn in later) / len(later)
        changed = 1 - sum(turn["same"] * turn["answer"] for turn in later) / answered
        last = later[-1]
        held, host = (f"{last[name] / last['bytes_full']:.1%}" for name in ("bytes", "bytes_host"))
        rows.append(
            f"| {line['model']} | {first['tokens']:,} to {last['tokens']:,} | `{line['variant']}` | {first['kl']:.2g} "
            f"| {start:.2g} | {kl:.2g} | {max(turn['kl'] for turn in later):.2g} | {changed:.1%} | {held} | {host} |"
        )
    return rows


def by_turn(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The mean KL of every turn."""
    most = max(len(line["turns"]) for line in lines)
    head = [str(number + 1) for number in range(most)]
    rows = [f"| model | variant | {' | '.join(head)} |", f"| --- | --- |{' --- |' * most}"]
    for line in lines:
        found = " | ".join(f"{turn['kl']:.2g}" for turn in line["turns"])
        rows.append(f"| {line['model']} | `{line['variant']}` | {found} |")
    return rows


def main() -> None:
    """Parse the arguments; measure, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--meeting", help="its id; default: the first with enough questions")
    parser.add_argument("--tokens", type=int, default=3000, help="of the document")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer at most")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    if arguments.table:
        lines = [json.loads(line) for file in arguments.table for line in file.read_text(encoding="utf-8").splitlines()]
        text = "\n".join([*table(lines), "", "Mean KL of each turn:", "", *by_turn(lines)])
        print(text)
        if arguments.markdown:
            arguments.markdown.write_text(f"{text}\n", encoding="utf-8")
        return
    if not arguments.model or not arguments.data_dir or not arguments.out:
        parser.error("MODEL, --data-dir and --out, or --table")
    model, tokenizer, name = checkpoints.load(arguments.model, arguments.device, arguments.dtype)
    document, questions, meeting = read_meeting(arguments.data_dir, arguments.turns, arguments.meeting)
    turns = converse(model, tokenizer, document, questions, arguments.tokens, arguments.answer)
    said = f"{sum(len(turn.ids) + len(turn.answer) for turn in turns):,} tokens"
    print(f"{name}: {len(turns)} turns, {said}, document of {len(turns[0].ids):,}", flush=True)
    setup = {
        "model": name, "meeting": meeting, "dtype": arguments.dtype, "device": device_name(model.device),
        "torch": torch.__version__, "day": str(datetime.datetime.now(datetime.UTC).date()),
    }  # fmt: skip
    for variant in arguments.variants:
        begin = time.perf_counter()
        line = {**setup, "variant": variant, "turns": follow(model, variant, turns)}
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{table([line])[-1]}  {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
