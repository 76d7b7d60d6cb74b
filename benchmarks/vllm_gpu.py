"""What the plugin gains in vLLM on a GPU: requests running and tokens a second in a fixed K/V memory, against stock.

    python benchmarks/vllm_gpu.py --shape llama-3-8b --kv-gb 8 --modes "stock stock@fp8 adaptive full@int4"
    python benchmarks/vllm_gpu.py --model FOLDER --data-dir DATA --kv-gb 1 --prompt 2000-30000 --modes "stock adaptive"

A mode is `stock`, or a policy, and behind @ how K/V is stored: for stock vLLM's --kv-cache-dtype, else --kv-dtype,
whose default is that of the policy.
Each mode is an engine in a process of its own, with the same limits. Requests are always waiting; numbers are taken
from when the first ones have ended until time is up:

    running    requests that run, mean over steps
    out/s      generated tokens a second
    in/s       prompt tokens a second
    step       milliseconds of a step in which no prompt was read, median
    kept       share of the prompts' entries that stay, mean over requests
    bytes      the same of their bytes
    same       of real prompts, greedy tokens that are stock's own before the first that is not, mean of 48
    score      of samples of --tasks, all asked at once: their own metric, or F1 of the words, mean; a second table has
               the families, and by how much all are above those of the first mode, sample by sample, with the 95 %
               interval of a normal distribution
    ttft       milliseconds from a prompt of the longest length to its first token on an idle engine, median of five

Prompts are random tokens with --shape, whose weights are random, too; with --model the texts of the JSONL files in
--data-dir, or stories of tests/helpers/vllm_engine.py. A ratio needs both modes from one run.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

STOCK = "stock"

SHAPES = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
}


def engine(options: argparse.Namespace, folder: str, mode: str) -> Any:
    """The engine of a mode, in this process."""
    from vllm import EngineArgs, LLMEngine

    policy, _, kind = mode.partition("@")
    more: dict[str, Any] = {}
    if policy != STOCK:
        from refreekv.engines.vllm.config import PluginOptions
        from refreekv.engines.vllm.launch import engine_arguments

        more = engine_arguments(PluginOptions(policy, kv_dtype=kind or "auto"))
    elif kind:
        more = {"kv_cache_dtype": kind}
        if "per_token_head" in kind:
            more["attention_backend"] = "TRITON_ATTN"
        if kind.startswith("turboquant"):
            more["attention_backend"] = "TURBOQUANT"
    if options.model is None:
        more |= {"load_format": "dummy", "skip_tokenizer_init": True}
    # Prompts are read without graphs and without torch.compile in all modes: they are long, and it starts sooner.
    sizes = [1, 2, 4, *range(8, options.most + 1, 8)]
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    arguments = EngineArgs(
        folder,
        dtype="bfloat16",
        max_model_len=options.longest + options.answer[1] + 64,
        max_num_seqs=options.most,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=int(options.kv_gb * 2**30),
        gpu_memory_utilization=0.3,  # K/V has its own limit; vLLM only asks that so much is free
        compilation_config=graphs,
        enable_prefix_caching=False,
        seed=0,
        **more,
    )
    return LLMEngine.from_engine_args(arguments)


def prompts(options: argparse.Namespace, folder: str, count: int) -> list[list[int]]:
    """Prompts of lengths spread evenly over the range, the same ones in all modes."""
    first, last = options.prompt
    lengths = [first + (last - first) * (index * 7 % 16) // 15 for index in range(count)]
    if options.model is None:
        rng = random.Random(0)
        return [[rng.randrange(1000, 100_000) for _ in range(length)] for length in lengths]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if options.data_dir:
        return real_prompts(tokenizer, Path(options.data_dir), lengths)
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from helpers.vllm_engine import make_prompts

    return make_prompts(tokenizer, lengths)


TEXTS = ("pg19.jsonl", "longbench_qasper.jsonl", "longbench_2wikimqa.jsonl", "wikitext2.jsonl")
"""Files of long texts, of which there have to be some."""


def real_prompts(tokenizer: Any, folder: Path, lengths: list[int]) -> list[list[int]]:
    """Prompts of these many tokens out of texts of the files in turn; short ones are put one after the other."""
    piles: list[list[str]] = []
    for name in TEXTS:
        if (folder / name).is_file():
            rows = [json.loads(line) for line in (folder / name).read_text().splitlines()[:60]]
            texts = [row.get("text") or row.get("context") or row.get("page") or "" for row in rows]
            piles.append([text for text in texts if isinstance(text, str) and len(text) > 500])
    piles = [pile for pile in piles if pile]
    if not piles:
        raise SystemExit(f"{folder} holds none of {', '.join(TEXTS)}")
    found = []
    for index, length in enumerate(lengths):
        pile, at, ids = piles[index % len(piles)], index // len(piles), []
        while len(ids) < length:
            ids += tokenizer(pile[at % len(pile)][: 6 * length])["input_ids"]
            at += 1
        found.append(ids[:length])
    return found


def task_scores(
    options: argparse.Namespace, folder: str, answer: Callable[[list[list[int]]], list[list[int]]]
) -> dict[str, list[float]]:
    """Scores of the tasks' samples by family, each by its own metric."""
    from transformers import AutoTokenizer

    from refreekv.evaluation.data.encoding import encode
    from refreekv.evaluation.data.families import load

    tokenizer = AutoTokenizer.from_pretrained(folder)
    directory = Path(options.data_dir) if options.data_dir else None
    samples = [
        sample for name in options.tasks.split(";") for sample in load(name, data_dir=directory, limit=options.samples)
    ]
    encoded = [encode(tokenizer, sample) for sample in samples]
    told = answer([one.context + one.question for one in encoded])
    texts = [tokenizer.decode(answered(ids, tokenizer.eos_token_id), skip_special_tokens=True) for ids in told]
    found: dict[str, list[float]] = {}
    for sample, text in zip(samples, texts, strict=True):
        found.setdefault(sample.family, []).append(score_of(sample, text))
    return found


def scores_table(rows: list[dict[str, Any]]) -> str:
    """Means by family, and how far all samples are above the first row's, with an interval."""
    families = list(rows[0]["scores"])
    lines = ["| mode | " + " | ".join([*families, "above the first"]) + " |", "|---" * (len(families) + 2) + "|"]
    first = [one for scores in rows[0]["scores"].values() for one in scores]
    for row in rows:
        own = [one for scores in row["scores"].values() for one in scores]
        apart = [one - other for one, other in zip(own, first, strict=True)]
        error = 1.96 * statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
        means = [f"{statistics.mean(row['scores'][name]):.3f}" for name in families]
        above = f"{statistics.mean(apart):+.3f} ± {error:.3f} (n = {len(apart)})"
        lines.append(f"| {row['mode']} | " + " | ".join([*means, above]) + " |")
    return "\n".join(lines)


def answered(ids: list[int], end: int | None) -> list[int]:
    """An answer up to the token that ends it: engines are told to go on."""
    return ids[: ids.index(end)] if end in ids else ids


def score_of(sample: Any, text: str) -> float:
    """The sample's own metric; of families that only lm-eval scores, `word_f1`."""
    from refreekv.evaluation.tasks.scoring import score

    found = score(sample, text)
    if found:
        return found["score"]
    if not sample.answers:
        raise SystemExit(f"samples of {sample.family} have no answers: leave it out of --tasks")
    return max(word_f1(text, gold) for gold in sample.answers)


def word_f1(text: str, gold: str) -> float:
    """F1 of the words that two texts share, without articles, case and punctuation (SQuAD's)."""
    said, wanted = (
        Counter(re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s]|_", "", one.lower())).split()) for one in (text, gold)
    )
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total()) if shared else 0.0


def measure(options: argparse.Namespace, folder: str, mode: str) -> dict[str, Any]:
    """Run one mode and count."""
    import torch
    from vllm import SamplingParams

    started = time.perf_counter()
    llm = engine(options, folder, mode)
    scheduler = llm.engine_core.engine_core.scheduler
    ready = time.perf_counter()
    some = prompts(options, folder, 48)
    rng = random.Random(1)
    added = 0

    def answer(asked: list[list[int]]) -> list[list[int]]:
        """48 greedy tokens of each prompt, all asked at once."""
        first, found = added, {}
        for ids in asked:
            add(ids, 48)
        while llm.has_unfinished_requests():
            for output in llm.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
        return [found[f"r{first + index}"] for index in range(len(asked))]

    def add(ids: list[int], tokens: int) -> None:
        nonlocal added
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.add_request(f"r{added}", {"prompt_token_ids": ids}, params)
        added += 1

    longest = max(some, key=len)
    first_tokens = []
    for _ in range(6):
        # What is computed of the last one behind its first token is not this one's.
        torch.cuda.synchronize()
        begin = time.perf_counter()
        add(longest, 1)
        while llm.has_unfinished_requests():
            llm.step()
        first_tokens.append(1000 * (time.perf_counter() - begin))

    answers = []
    if options.model is not None:
        # Not the longest: stock's answers have to be there in seconds.
        answers = answer(sorted(some, key=len)[: options.compared])
    scores = task_scores(options, folder, answer) if options.tasks else {}
    running, steps, kept, held, lengths = [], [], [], [], {}
    generated = ended = read = 0
    begin = counted_from = time.perf_counter()
    counting = False
    while (now := time.perf_counter()) - begin < options.seconds:
        while len(scheduler.waiting) < 8:
            add(some[added % len(some)], rng.randint(*options.answer))
        outputs = llm.step()
        took = time.perf_counter() - now
        fresh = 0
        for output in outputs:
            count = len(output.outputs[0].token_ids)
            new = count - lengths.get(output.request_id, 0)
            fresh += output.request_id not in lengths
            lengths[output.request_id] = count
            if counting:
                generated += new
                read += len(output.prompt_token_ids) if count == new else 0
            if output.finished:
                ended += 1
                lengths.pop(output.request_id)
                report = (output.kv_transfer_params or {}).get("refreekv")
                kept.append(report["kept_share"] if report else 1.0)
                held.append(report["bytes_share"] if report else 1.0)
        if counting:
            running.append(len(scheduler.running))
            if not fresh and outputs:
                steps.append(1000 * took)
        elif ended >= 4:
            counting, counted_from = True, time.perf_counter()
    spent = time.perf_counter() - counted_from
    preempted = sum(request.num_preemptions for request in scheduler.requests.values())
    pool = scheduler.kv_cache_manager.block_pool
    if not counting:
        raise SystemExit("no request ended in time: more --seconds, or shorter answers")
    return {
        "mode": mode,
        "running": round(statistics.mean(running), 1),
        "out/s": round(generated / spent),
        "in/s": round(read / spent),
        "step": round(statistics.median(steps), 2) if steps else None,
        "kept": round(statistics.mean(kept), 3) if kept else None,
        "bytes": round(statistics.mean(held), 3) if held else None,
        "answers": answers,
        "scores": scores,
        "score": round(statistics.mean(one for some in scores.values() for one in some), 3) if scores else None,
        "ttft": round(statistics.median(first_tokens[1:]), 1),
        "ended": ended,
        "preempted": preempted,
        "blocks": pool.num_gpu_blocks,
        "seconds": round(spent, 1),
        "load": round(ready - started, 1),
    }


def same(tokens: list[int], wanted: list[int]) -> int:
    """How many tokens are the wanted ones, up to the first that is not."""
    return next((at for at, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]), len(wanted))


def device() -> str:
    """The GPU's name."""
    import torch

    return torch.cuda.get_device_name(0)


def pair(text: str) -> tuple[int, int]:
    """Two numbers, as in 100-200."""
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def main() -> None:
    """Measure all modes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with weights; else random ones of --shape")
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--data-dir", help="a folder with JSONL files of texts, for --model")
    parser.add_argument("--compared", type=int, default=16, help="prompts whose answers are compared with stock's")
    parser.add_argument("--tasks", help="families of prompts with answers, by semicolons, for --model")
    parser.add_argument("--samples", type=int, default=20, help="of each of --tasks")
    parser.add_argument("--modes", default="stock stock@fp8 stock@int4_per_token_head adaptive full@int4")
    parser.add_argument("--kv-gb", type=float, default=8.0, help="memory of the K/V pool")
    parser.add_argument("--prompt", type=pair, default=(8192, 8192), metavar="N-M", help="tokens of prompts")
    parser.add_argument("--answer", type=pair, default=(256, 768), metavar="N-M", help="tokens of answers")
    parser.add_argument("--most", type=int, default=96, help="most requests that run")
    parser.add_argument("--seconds", type=float, default=40.0, help="time of each mode, warm-up included")
    parser.add_argument("--out", help="where all numbers go, as JSON lines")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.longest = options.prompt[1]
    folder = options.model
    if folder is None:
        folder = str(Path(tempfile.gettempdir()) / options.shape)
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[options.shape]))
    if options.one:
        print("RESULT " + json.dumps({"device": device(), **measure(options, folder, options.one)}), flush=True)
        return
    found = []
    reference: list[list[int]] = []
    for mode in options.modes.split():
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        command = [sys.executable, __file__, *sys.argv[1:], "--one", mode]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(f"{mode}: failed\n{(done.stdout + done.stderr)[-2500:]}", flush=True)
            continue
        row = json.loads(lines[-1].removeprefix("RESULT "))
        answers = row.pop("answers")
        reference = reference or answers
        if reference:
            alike = [same(one, other) for one, other in zip(answers, reference, strict=True)]
            row["same"] = round(statistics.mean(alike), 1)
        found.append(row)
        print(json.dumps({name: value for name, value in row.items() if name != "scores"}), flush=True)
        if options.out:
            with Path(options.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[-1]) + "\n")
    columns = ("running", "out/s", "in/s", "step", "kept", "bytes", "same", "score", "ttft", "blocks")
    print("\n| mode | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for row in found:
        print(f"| {row['mode']} | " + " | ".join(str(row.get(name)) for name in columns) + " |")
    if options.tasks and found:
        print("\n" + scores_table(found))


if __name__ == "__main__":
    main()
