"""What a prefix-cache hit costs `adaptive` in vLLM, whose spread probes are then those of the prompt's rest alone.

    python benchmarks/prefix_hits.py MODEL_FOLDER [--tokens 1800] [--prompts 6]

A prompt is read whole, and the policy asked twice: with all queries that it plans to probe, and with those alone that a
hit of so much of the prompt leaves to be computed. Then the text goes on for 48 tokens, over what each of them keeps:

    kept      share of the entries that stay
    KL        of the predictions from those over the whole prompt, nats a token, mean (worst prompt)

Texts are pages of this repository's documentation and made-up stories, in turn.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.vllm_engine import story
from refreekv.core.selection import CutSelection
from refreekv.engines.vllm.config import PluginOptions
from refreekv.engines.vllm.worker_side.scoring import LayerFacts, Probes, select
from refreekv.pruning.copy_scores import CopyProbe, tokens_said_twice

ROOT = Path(__file__).parent.parent
AFTER = 48
HITS = (0.0, 0.5, 0.9, 0.97)


class Reader:
    """A model whose queries are taken down, and whose attention leaves out what is evicted."""

    def __init__(self, folder: str):
        self.queries: dict[int, list[torch.Tensor]] | None = None
        self.keep: dict[int, torch.Tensor] = {}
        AttentionInterface.register("prefix_hits", self._attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="prefix_hits"
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.scores = self._copy_scores()

    def _attend(self, module, query, key, value, attention_mask, scaling, **_):
        layer, group = module.layer_idx, query.shape[1] // key.shape[1]
        if self.queries is not None:
            self.queries.setdefault(layer, []).append(query[0].transpose(0, 1))
        hidden = torch.arange(key.shape[2]) > torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        hidden = hidden[None].expand(key.shape[1], -1, -1)
        if layer in self.keep:
            gone = torch.zeros(key.shape[1], key.shape[2], dtype=torch.bool)
            gone[:, : self.keep[layer].shape[1]] = ~self.keep[layer]
            hidden = hidden | gone[:, None]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = (query @ key.mT * scaling).masked_fill(hidden.repeat_interleave(group, 0), float("-inf"))
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    def _copy_scores(self) -> list[torch.Tensor]:
        ids, count = tokens_said_twice(self.model.config)
        probe = CopyProbe(tokens=count)
        cache, queries = self.read(ids)
        for layer in range(len(cache.layers)):
            self.decide(probe, cache, queries, layer, len(ids), 0)
        return probe.scores(len(cache.layers))

    @torch.inference_mode()
    def read(self, ids: list[int]) -> tuple[DynamicCache, dict[int, torch.Tensor]]:
        """A prompt's cache, and each layer's queries ``[n, H, D]``."""
        self.queries, self.keep, cache = {}, {}, DynamicCache()
        for start in range(0, len(ids), 256):
            part = torch.tensor([ids[start : start + 256]])
            self.model(part, past_key_values=cache, logits_to_keep=1)
        queries = {layer: torch.cat(parts) for layer, parts in self.queries.items()}
        self.queries = None
        return cache, queries

    def decide(self, policy, cache, queries, layer, prompt, first):
        """What a policy selects of a layer, of which queries from ``first`` on were computed."""
        probes = Probes.for_prompt(policy, prompt).from_position(first)
        probes.queries = {layer: [queries[layer][probes.positions]]}
        scores = self.scores[layer] if policy.name == "adaptive" else None
        scale = self.model.model.layers[layer].self_attn.scaling
        facts = LayerFacts(layer, len(cache.layers), scale, None, None, scores)
        keys, values = (part[0].transpose(0, 1) for part in (cache.layers[layer].keys, cache.layers[layer].values))
        return select(policy, probes, facts, keys, values, lambda part, _: part, surrogates=True)

    @torch.inference_mode()
    def go_on(self, cache: DynamicCache, after: list[int]) -> torch.Tensor:
        """Log-probabilities of what follows ``after``, without changing the cache."""
        copy = DynamicCache()
        for layer, held in enumerate(cache.layers):
            copy.update(held.keys.clone(), held.values.clone(), layer)
        return self.model(torch.tensor([after]), past_key_values=copy).logits[0].log_softmax(-1)


def texts(reader: Reader, count: int, tokens: int) -> list[list[int]]:
    """Token ids of prompts and what follows them."""
    pages = " ".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    pages = reader.tokenizer(pages)["input_ids"]
    found = []
    for index in range(count):
        if index % 2:
            found.append(reader.tokenizer(story(index, tokens // 20))["input_ids"][: tokens + AFTER])
        else:
            start = index * (len(pages) - tokens - AFTER) // max(count, 1)
            found.append(pages[start : start + tokens + AFTER])
    return found


@torch.inference_mode()
def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1800)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--policy", default="adaptive")
    options = parser.parse_args()
    reader, policy = Reader(options.model), PluginOptions(options.policy).build()
    kept: dict[float, list[float]] = {hit: [] for hit in HITS}
    losses: dict[float, list[float]] = {hit: [] for hit in HITS}
    for ids in texts(reader, options.prompts, options.tokens):
        prompt, after = ids[: options.tokens], ids[options.tokens :]
        cache, queries = reader.read(prompt)
        full = reader.go_on(cache, after)
        whole = [(held.keys.clone(), held.values.clone()) for held in cache.layers]
        for hit in HITS:
            shares = []
            for layer, held in enumerate(cache.layers):
                held.keys, held.values = (part.clone() for part in whole[layer])
                found = reader.decide(policy, cache, queries, layer, len(prompt), int(hit * len(prompt)))
                assert found is not None
                assert not isinstance(found, CutSelection)
                keep = found.keep[0].expand(held.keys.shape[1], -1).clone()
                if found.surrogates is not None:
                    columns, keys, values, real = found.surrogates
                    index = columns[..., None].expand_as(keys)
                    held.keys.scatter_(2, index, torch.where(real[..., None], keys, held.keys.gather(2, index)))
                    held.values.scatter_(2, index, torch.where(real[..., None], values, held.values.gather(2, index)))
                    keep = keep.scatter(-1, columns[0], keep.gather(-1, columns[0]) | real[0])
                reader.keep[layer] = keep
                shares.append(float(keep.float().mean()))
            pruned = reader.go_on(cache, after)
            reader.keep = {}
            kept[hit].append(statistics.mean(shares))
            losses[hit].append(float((full.exp() * (full - pruned)).sum(-1).mean()))
    print(f"{options.prompts} prompts of {options.tokens} tokens, {policy}\n")
    print("| hit | kept | KL, mean (worst) |\n|---|---|---|")
    for hit in HITS:
        loss = f"{statistics.mean(losses[hit]):.6f} ({max(losses[hit]):.6f})"
        print(f"| {hit:.0%} | {statistics.mean(kept[hit]):.3f} | {loss} |")


if __name__ == "__main__":
    main()
