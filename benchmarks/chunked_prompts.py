r"""What it does to answers that a prompt is read over its own codes, chunk by chunk.

    python benchmarks/chunked_prompts.py MODEL --data-dir DIR --plan benchmarks/plans/chunked.toml \
        --chunk 512 --prompt-dtype int8,int6,k6v4,int4 --out results.jsonl

The full cache reads a prompt in one call and goes on with it greedily. Then the same prompt is read in chunks, each
coded in a format when it has been read (`compress(prompt_dtype=...)`), and the full cache's answer is fed behind it: KL
of each token's prediction. Row ``full`` is the prompt in chunks that are not coded, the noise floor. ``int8:means`` is
int8 with the means of the whole prompt taken out in place of the first chunk's. ``int4:end`` is coded only at the
prompt's end. Bytes are those of 16-bit elements, at the prompt's end.

Stopped and started again it goes on, as benchmarks/fidelity.py, whose plans it takes; their policies are not used. With
--policy the prompt is pruned at its end, too.
"""

import argparse
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import checkpoints
import fidelity
from refreekv import KVDtype, ReFreeKVCache, policies
from refreekv.core.footprint import LayerKV
from refreekv.core.quantisation import centre_of
from refreekv.evaluation import sweeps, tables
from refreekv.evaluation.data.encoding import encode
from refreekv.evaluation.fidelity import runner
from refreekv.evaluation.fidelity.bench import Bench
from refreekv.evaluation.fidelity.metrics import divergence, token_metrics
from refreekv.evaluation.records import FidelityRecord
from refreekv.evaluation.results import RecordFile
from refreekv.storage.unfinished import UnfinishedKV

MEANS, END = ":means", ":end"


@torch.inference_mode()
def feed(model: Any, tokens: Tensor, cache: Any, start: int, keep: int) -> Tensor:
    """Logits ``[keep, V]`` of the last tokens of ``[1, q]``."""
    extra = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
    output = model(tokens, position_ids=positions, past_key_values=cache, use_cache=True, **extra)
    return output.logits[0, -keep:]


def answer(model: Any, prompt: Tensor, steps: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """The full cache's greedy tokens ``[steps]``, what each was chosen from, and its prompt's means by layer."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    logits = [feed(model, prompt, cache, 0, 1)[0]]
    means = [(centre_of(layer.keys), centre_of(layer.values)) for layer in cache.layers]
    tokens = [logits[0].argmax()]
    for step in range(steps - 1):
        logits.append(feed(model, tokens[-1].view(1, 1), cache, prompt.shape[1] + step, 1)[0])
        tokens.append(logits[-1].argmax())
    return torch.stack(tokens), torch.stack(logits), means


@contextmanager
def given_means(cache: Any, means: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within, what is coded has these means taken out, whatever the first chunk's are."""
    own = UnfinishedKV._fix_means
    layers = cache.pruned_layers

    def fixed(prompt: UnfinishedKV, real: Tensor | None) -> None:
        index = next(layer.index for layer in layers if layer.reading is not None and layer.reading.prompt is prompt)
        tail, prompt._tail = prompt._tail, tuple(part[:, :, None] for part in means[index])
        try:
            own(prompt, real)
        finally:
            prompt._tail = tail

    UnfinishedKV._fix_means = fixed
    try:
        yield
    finally:
        UnfinishedKV._fix_means = own


def read(model: Any, prompt: Tensor, tokens: Tensor, kind: str | None, chunk: int, policy: str, means: Any) -> Tensor:
    """Predictions ``[steps, V]`` of the answer's tokens over a prompt that was read in chunks."""
    settings: dict[str, Any] = {"prompt_dtype": kind}
    if kind is not None and kind.endswith(END):
        settings = {"prompt_dtype": None, "kv_dtype": kind.removesuffix(END)}
    elif kind is not None:
        settings = {"prompt_dtype": kind.removesuffix(MEANS)}
    cache = ReFreeKVCache(model, policies.parse(policy), decode="eager", **settings)
    with cache.prompt_until(prompt.shape[1]):

        def whole() -> Tensor:
            for start in range(0, prompt.shape[1], chunk):
                logits = feed(model, prompt[:, start : start + chunk], cache, start, 1)
            return logits

        if kind is not None and kind.endswith(MEANS):
            with given_means(cache, means):
                first = whole()
        else:
            first = whole()
    with cache.decoding():
        return torch.cat([first, feed(model, tokens[None, :-1], cache, prompt.shape[1], len(tokens) - 1)])


def held_bytes(cache_layers: Any, length: int, kind: str | None) -> tuple[int, int]:
    """Bytes of a prompt in full and as it is held at its end."""
    number = None if kind is None else KVDtype.parse(kind.partition(MEANS)[0].removesuffix(END))
    full = held = 0.0
    for layer in cache_layers:
        window = getattr(layer, "sliding_window", None)
        shape = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
        one = LayerKV("full" if window is None else "window", *shape, window=window)
        full += one.bytes(length)
        held += one.unfinished_bytes(length, number)
    return int(full), int(held)


def table(records: list[FidelityRecord]) -> str:
    """A line for each format, of the samples that all of them were measured on."""
    kinds = {record.policy for record in records}
    seen: dict[tuple[str, str], set[str]] = {}
    for record in records:
        seen.setdefault((record.family, record.sample), set()).add(record.policy)
    common = [record for record in records if seen[record.family, record.sample] == kinds]
    lines = []
    for row in tables.fidelity(common).overall.itertuples():
        own = [record for record in common if record.policy == row.policy]
        worst = max(own, key=lambda record: record.kl_mean)
        low, high = row.kl_interval or (row.kl, row.kl)
        lines.append(
            (
                "in chunks, not coded" if row.policy == sweeps.FULL else row.policy,
                str(row.n),
                f"{row.bytes_kept / row.bytes_full:.1%}",
                f"{tables.nats(row.kl)} [{tables.nats(low)}, {tables.nats(high)}]",
                f"{row.worst_family}: {tables.nats(row.worst_kl)}",
                f"{tables.nats(worst.kl_mean)} ({worst.prompt_tokens:,} tokens)",
                f"{row.top1:.1%}",
                f"{row.same_path:.0%}",
            )
        )
    heading = ("held as", "n", "bytes", "mean KL [95%]", "worst family", "worst sample", "same tokens", "same path")
    return tables.markdown_table(heading, lines, left=(0, 4, 5))


def main() -> None:
    """Parse the arguments, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .gguf file, a folder or a hub id")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--plan", type=Path, help="families, max_tokens, continuation and seed, as TOML")
    parser.add_argument("--families", help="comma-separated, in place of a plan")
    parser.add_argument("--limit", type=int, default=3, help="samples of each family, without a plan")
    parser.add_argument("--max-tokens", type=int, default=runner.MAX_TOKENS)
    parser.add_argument("--min-tokens", type=int, default=0)
    parser.add_argument("--continuation", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--prompt-dtype", default="int8,int6,k6v4,int4")
    parser.add_argument("--policy", default="full", help="what prunes the prompt at its end")
    parser.add_argument("--time-limit", type=float, metavar="S")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.policy_of_prompt, arguments.policy, arguments.suite, arguments.random = arguments.policy, [], [], None
    plan = fidelity.Plan.of(arguments)
    model, tokenizer, name = checkpoints.load(arguments.model, arguments.device, arguments.dtype)
    bench = Bench(model, tokenizer, name, plan.continuation)
    samples = fidelity.samples_of(arguments, plan, tokenizer)
    kinds = {sweeps.FULL: None, **{kind: kind for kind in arguments.prompt_dtype.split(",")}}
    setup = runner.setup_of(
        bench, max_tokens=plan.max_tokens, min_tokens=arguments.min_tokens, seed=plan.seed, chunk=arguments.chunk,
        prompt_policy=arguments.policy_of_prompt,
    )  # fmt: skip
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", plan.max_tokens)
    begin = time.perf_counter()
    with RecordFile(arguments.out, setup, {kind: kind for kind in kinds}, FidelityRecord) as results:
        for count, sample in enumerate(samples):
            measured = results.results.keys
            missing = [kind for kind in kinds if (sample.family, sample.id, kind) not in measured]
            prompt = torch.tensor([encode(tokenizer, sample).context], device=model.device)
            shortest, longest = max(arguments.min_tokens, arguments.chunk + 1), most - plan.continuation
            if not missing or not shortest <= prompt.shape[1] <= longest:
                continue
            tokens, wanted, means = answer(model, prompt, plan.continuation)
            shapes = DynamicCache(config=model.config.get_text_config(decoder=True))
            feed(model, prompt[:, :8], shapes, 0, 1)
            records = []
            for kind in missing:
                got = read(
                    model, prompt, tokens, kinds[kind], arguments.chunk, arguments.policy_of_prompt, means
                )  # fmt: skip
                (numbers,) = token_metrics(*divergence(wanted, got[None]))
                full, held = held_bytes(shapes.layers, prompt.shape[1], kinds[kind])
                records.append(
                    FidelityRecord(
                        sample.id, sample.family, kind, name, prompt_tokens=prompt.shape[1],
                        continuation_tokens=len(tokens), budget=1.0, bytes_full=full, bytes_kept=held, **numbers,
                    )
                )  # fmt: skip
            results.append(records)
            seconds = time.perf_counter() - begin
            print(f"{count + 1}/{len(samples)}: {prompt.shape[1]:,} tokens, {seconds:.0f} s so far", flush=True)
            if arguments.time_limit and seconds > arguments.time_limit:
                print("out of time: run the same command again to go on")
                break
        everything = results.results.records
    if everything:
        print(table(everything))


if __name__ == "__main__":
    main()
