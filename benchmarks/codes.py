"""What codes of so many bits do to answers: plain rotated ones and the model's own, at many widths of keys and values.

    python benchmarks/codes.py MODEL --data-dir DIR --out codes.jsonl
    python benchmarks/codes.py MODEL --data-dir DIR --out codes.jsonl --device cuda --dtype bfloat16 \
        --samples 4 --max-tokens 32000 --families musique:after,question-after:tokens=16000,pg19:chars=72000
    python benchmarks/codes.py --table codes.jsonl

A prompt is read once. In each scheme its entries, but for the first 4 and the newest 64, are replaced
by what codes give back of them; the question, where there is one apart from the prompt, and the
full cache's own greedy answer are then read over that, and the predictions are compared with the full
cache's (KL in nats, mean over these tokens). The file has a line for each sample and scheme; a run that was
stopped goes on where it stopped.

Schemes: `tq` rotation, Gaussian codebook, the prompt's means; `tq-m` the same with the model's means; `bh` keys in
codes of the model's own (`model_codes`) but for the prompt's means; `bh-m` the model's means, too; `bh-k`
of these the mean keys alone; `bh-0` as `bh`, measured at offset 0 alone; `bh-f` as `bh-m` with one layout of widths
for all heads of the model; `int8` groups of 64, not centred.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import checkpoints
from codebooks import coded_bytes, round_trip
from model_codes import LayerCodes, model_codes, shared_widths
from refreekv import ReFreeKVCache
from refreekv.core.quantisation import SINKS, centre_of
from refreekv.engines.transformers.naming import NAME
from refreekv.evaluation.data import families
from refreekv.evaluation.data.encoding import encode
from refreekv.evaluation.fidelity.metrics import divergence

RECENT = 64
WIDTHS = ((8, 8), (6, 6), (6, 4), (5, 4), (4, 4), (4, 3), (3, 3), (4, 2), (2, 2))
CHECKED = ((6, 4), (4, 4), (3, 3))
"""Widths at which variants of a scheme are told apart."""
FAMILIES = (
    "musique:after,hotpotqa:after,2wikimqa-e:after,qasper-e:after,qmsum:after,kv-retrieval-75:after,wikitext2,gsm8k,"
    "multi-key-retrieval:tokens=1500,question-after:tokens=1500"
)
Way = Callable[[Tensor, Tensor, LayerCodes, LayerCodes], tuple[Tensor, Tensor]]
"""From a layer's keys and values ``[H_kv, n, D]``, codes of all offsets and of offset 0, to what is read."""


def rotated(key_bits: int, value_bits: int, *, model_means: bool) -> Way:
    """Keys and values centred, rotated and coded."""

    def way(keys: Tensor, values: Tensor, codes: LayerCodes, first: LayerCodes) -> tuple[Tensor, Tensor]:
        del first
        means = (codes.keys.centre, codes.value_centre) if model_means else (centre_of(keys), centre_of(values))
        return round_trip(keys, key_bits, means[0]), round_trip(values, value_bits, means[1])

    return way


def of_model(
    key_bits: int, value_bits: int, *, model_keys: bool = False, model_values: bool = False, at_zero: bool = False
) -> Way:
    """Keys in codes of the model's own; values centred, rotated and coded. The prompt's means, or the model's."""

    def way(keys: Tensor, values: Tensor, codes: LayerCodes, first: LayerCodes) -> tuple[Tensor, Tensor]:
        known = first if at_zero else codes
        key_mean = None if model_keys else centre_of(keys)
        value_mean = known.value_centre if model_values else centre_of(values)
        return known.keys.round_trip(keys, key_bits, key_mean), round_trip(values, value_bits, value_mean)

    return way


def one_layout(key_bits: int, value_bits: int, every: Sequence[LayerCodes]) -> Way:
    """As `of_model` with all means the model's, and widths that all heads share."""
    widths = shared_widths([layer.keys for layer in every], key_bits)

    def way(keys: Tensor, values: Tensor, codes: LayerCodes, first: LayerCodes) -> tuple[Tensor, Tensor]:
        del first
        return codes.keys.round_trip(keys, key_bits, None, widths), round_trip(values, value_bits, codes.value_centre)

    return way


def in_groups(keys: Tensor, values: Tensor, codes: LayerCodes, first: LayerCodes) -> tuple[Tensor, Tensor]:
    """int8 in groups of 64 elements at most, between each group's lowest and highest value."""
    del codes, first
    found = []
    for entries in (keys, values):
        groups = entries.float().unflatten(-1, (-1, _group(entries.shape[-1])))
        low = groups.amin(-1, keepdim=True)
        scale = ((groups.amax(-1, keepdim=True) - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        found.append((((groups - low) / scale).round() * scale + low).flatten(-2).to(entries.dtype))
    return found[0], found[1]


def _group(size: int) -> int:
    return next(group for group in range(min(64, size), 0, -1) if size % group == 0)


def schemes(every: Sequence[LayerCodes]) -> dict[str, tuple[int, int, Way]]:
    """Names to widths and ways."""
    found: dict[str, tuple[int, int, Way]] = {"int8": (8, 8, in_groups)}
    for key, value in WIDTHS:
        found[f"tq k{key}v{value}"] = key, value, rotated(key, value, model_means=False)
        found[f"bh k{key}v{value}"] = key, value, of_model(key, value)
        if (key, value) in CHECKED:
            found[f"tq-m k{key}v{value}"] = key, value, rotated(key, value, model_means=True)
            found[f"bh-0 k{key}v{value}"] = key, value, of_model(key, value, at_zero=True)
            found[f"bh-k k{key}v{value}"] = key, value, of_model(key, value, model_keys=True)
            found[f"bh-f k{key}v{value}"] = key, value, one_layout(key, value, every)
            found[f"bh-m k{key}v{value}"] = key, value, of_model(key, value, model_keys=True, model_values=True)
    return found


def share(name: str, key_bits: int, value_bits: int, sizes: tuple[int, int]) -> float:
    """Bytes of a coded entry, scales included, as a share of 16 bits."""
    if name == "int8":
        return sum(size + 4 * size // _group(size) for size in sizes) / (2 * sum(sizes))
    return (coded_bytes(sizes[0], key_bits) + coded_bytes(sizes[1], value_bits)) / (2 * sum(sizes))


def samples(tokenizer: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, str, list[int], list[int]]]:
    """Family, name, prompt and question of each sample; families take turns."""
    found = []
    for family in families.split([arguments.families]):
        try:
            every = families.load(family, data_dir=arguments.data_dir, limit=40 * arguments.samples, seed=0)
        except families.DataMissing as error:
            print(f"not run: {family}: {error}")
            continue
        own = []
        for sample in every:
            # Long texts are not worth encoding only to be passed over.
            if len(own) == arguments.samples or len(sample.prompt) > 12 * arguments.max_tokens:
                continue
            encoded = encode(tokenizer, sample)
            if arguments.min_tokens <= len(encoded.context) <= arguments.max_tokens:
                own.append((family, sample.id, encoded.context, encoded.question))
        found.append(own)
    for turn in range(arguments.samples):
        yield from (own[turn] for own in found if turn < len(own))


@torch.inference_mode()
def measure(
    model: Any,
    context: list[int],
    question: list[int],
    continuation: int,
    ways: dict[str, tuple[int, int, Way]],
    codes: Sequence[LayerCodes],
    first: Sequence[LayerCodes],
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each scheme the KL of every token fed, and whether both would go on alike."""
    device = model.device
    prompt = DynamicCache(config=model.config)
    logits = model(torch.tensor([context], device=device), **{NAME: prompt}, logits_to_keep=1).logits
    cache, fed = copy.deepcopy(prompt), list(question)
    if question:
        logits = model(torch.tensor([question], device=device), **{NAME: cache}, logits_to_keep=1).logits
    for _ in range(continuation):
        fed.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([fed[-1:]], device=device), **{NAME: cache}, logits_to_keep=1).logits
    del cache

    def read(way: Way | None) -> Tensor:
        other, at = copy.deepcopy(prompt), 0
        for layer in other.layers:
            if type(layer) is not DynamicLayer:  # Windows are never coded.
                continue
            if way is not None:
                # Means are of all entries but sinks: the newest are left out of nothing but the replacing.
                pair = way(layer.keys[0], layer.values[0], codes[at], first[at])
                for held, coded in zip((layer.keys, layer.values), pair, strict=True):
                    held[0, :, SINKS:-RECENT] = coded[:, SINKS:-RECENT]
            at += 1
        return model(torch.tensor([fed], device=device), **{NAME: other}).logits

    reference = read(None)[0]
    for name, (_, _, way) in ways.items():
        kl, same = divergence(reference, read(way))
        yield name, kl[0], same[0]


def run(arguments: argparse.Namespace) -> None:
    """Measure what the file lacks."""
    started = time.monotonic()
    model, tokenizer, name = checkpoints.load(arguments.model, arguments.device, arguments.dtype)
    done = set()
    if arguments.out.is_file():
        lines = map(json.loads, arguments.out.read_text(encoding="utf-8").splitlines())
        done = {(line["model"], line["sample"], line["scheme"]) for line in lines}
    attached = ReFreeKVCache(model, "full")  # attention goes through refreekv while this lives
    codes, first = model_codes(model), model_codes(model, [0])
    print("widths that heads share:", {bits: shared_widths([one.keys for one in codes], bits) for bits in range(2, 9)})
    del attached
    layers = [codes[0].keys.centre.shape[-1], codes[0].value_centre.shape[-1]]
    print(f"{name}: heads of {layers}; calibrated in {time.monotonic() - started:.0f} s with loading", flush=True)
    for family, sample, context, question in samples(tokenizer, arguments):
        missing = {scheme: way for scheme, way in schemes(codes).items() if (name, sample, scheme) not in done}
        if not missing:
            continue
        if arguments.time_limit and time.monotonic() - started > arguments.time_limit:
            print("time is up")
            return
        about = {"model": name, "dtype": arguments.dtype, "device": arguments.device, "family": family}
        about |= {"sample": sample, "tokens": len(context), "sizes": layers}
        found = []
        for scheme, kl, same in measure(model, context, question, arguments.continuation, missing, codes, first):
            key, value, _ = missing[scheme]
            bits = {"scheme": scheme, "key_bits": key, "value_bits": value}
            numbers = {"kl": float(kl.mean()), "kl_max": float(kl.max()), "top1": float(same.float().mean())}
            found.append(json.dumps(about | bits | numbers | {"fed": len(kl)}))
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in found))
        print(f"{time.monotonic() - started:6.0f} s  {family}, {len(context)} tokens", flush=True)


def table(path: Path, low: int, high: int) -> str:
    """Mean over families, worst family and worst sample of each scheme, by bytes; a table for each model."""
    from refreekv.evaluation import tables  # needs pandas, which measuring does not

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if low <= line["tokens"] <= high]
    text = []
    for model in sorted({line["model"] for line in lines}):
        own = [line for line in lines if line["model"] == model]
        names = {line["scheme"] for line in own}
        whole = {s for s in {line["sample"] for line in own} if {x["scheme"] for x in own if x["sample"] == s} == names}
        own = [line for line in own if line["sample"] in whole]
        tokens = [line["tokens"] for line in own]
        text.append(
            f"\n{model}, {own[0]['dtype']}, {own[0]['device']}, n = {len(whole)} samples of "
            f"{len({line['family'] for line in own})} families, {min(tokens):,} to {max(tokens):,} tokens\n\n"
            "| codes | bytes | KL mean [95%] | worst family | worst token | same next token |\n"
            "|---|---:|---:|---|---:|---:|"
        )
        rows = []
        for scheme in names:
            part = [line for line in own if line["scheme"] == scheme]
            by_family: dict[str, list[float]] = {}
            for line in part:
                by_family.setdefault(line["family"], []).append(line["kl"])
            means = {family: statistics.mean(values) for family, values in by_family.items()}
            between = tables.bootstrap_families(by_family)
            spread = f" [{between[0]:.2g}, {between[1]:.2g}]" if between else ""
            worst = max(means, key=lambda family: means[family])
            first = part[0]
            size = share(scheme, first["key_bits"], first["value_bits"], tuple(first["sizes"]))
            rows.append(
                (
                    -size,
                    statistics.mean(means.values()),
                    f"| {scheme} | {size:.1%} | {statistics.mean(means.values()):.2g}{spread} "
                    f"| {worst}: {means[worst]:.2g} | {max(line['kl_max'] for line in part):.2g} "
                    f"| {statistics.mean(line['top1'] for line in part):.1%} |",
                )
            )
        text += [row for _, _, row in sorted(rows)]
    return "\n".join(text)


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a .gguf file, a folder, or a hub id")
    parser.add_argument("--table", type=Path, help="print the tables of a file of results; no model is read")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--families", default=FAMILIES)
    parser.add_argument("--samples", type=int, default=1, help="of each family")
    parser.add_argument("--min-tokens", type=int, default=4 * RECENT)
    parser.add_argument("--max-tokens", type=int, default=6000)
    parser.add_argument("--continuation", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds after which no sample is begun")
    parser.add_argument("--out", type=Path, default=Path("codes.jsonl"))
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table, arguments.min_tokens, arguments.max_tokens))
    elif arguments.model is None:
        parser.error("say which model, or which --table")
    else:
        run(arguments)


if __name__ == "__main__":
    main()
