"""What number formats do to the output of attention: as `refreekv.core.damage` predicts it, and in truth.

    python benchmarks/damage.py MODEL --data-dir DIR --families wikitext2,hotpotqa:after --samples 1 --out FILE
    python benchmarks/damage.py --table FILE

At the end of a prompt the entries of every KV head but sinks and the newest are coded, keys, values and both, and the
attention of the last 64 queries and of 96 others is taken over them. What its output changes by is divided by what
it would change by if each entry were evicted, all of these independent: the root of the sum over entries of the
square of ``p / (1 - p) * |value - output|``. That is what `rung_damage` predicts.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoints
from refreekv.core.damage import rung_damage
from refreekv.core.quantisation import RECENT, SINKS, KVDtype, centre_of
from refreekv.engines.transformers.attachment import Attachment
from refreekv.engines.transformers.copy_scores import copy_scores, read
from refreekv.engines.transformers.key_codes import key_codes
from refreekv.evaluation.data import families, stress
from refreekv.evaluation.data.encoding import encode
from refreekv.evaluation.fidelity.formats import stored_entries
from refreekv.policies import LayerView, ProbePlan
from refreekv.policies.adaptive import Adaptive
from refreekv.pruning.copy_scores import CopyProbe
from refreekv.storage.coding import maps_of

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class DamageProbe(CopyProbe):
    """Prunes nothing; takes down what coding does to each layer's attention.

    Parameters
    ----------
    kinds : tuple of KVDtype
        The number formats.
    codes : sequence of KeyCodes
        The model's own, by layer.
    lines : list of dict
        Filled: a line for each layer, KV head and format.
    """

    kinds: tuple[KVDtype, ...] = ()
    codes: Any = ()
    lines: list[dict[str, Any]] = field(default_factory=list)

    def probe_plan(self, n: int) -> ProbePlan:
        """The last queries, and some of all others."""
        del n
        return ProbePlan(rows=64, spread=96, queries=True)

    def select(self, view: LayerView) -> None:
        """Code the layer's entries and compare; keep everything."""
        assert view.rows is not None
        assert view.queries is not None
        layer, heads, n = int(view.layer), view.keys.shape[1], view.keys.shape[2]
        self.found[layer] = view.rows.new_zeros(heads)  # as if it copied nothing: nobody asks
        asked = view.rows[0].sum(-1)[0] > 0.5  # rows of zeros stand for probes that there are not
        # [1, H, r, ...] -> [H_kv, group r, ...]
        rows, queries = (p[0][:, asked].unflatten(0, (heads, -1)).flatten(1, 2) for p in (view.rows, view.queries))
        keys, values = view.keys, view.values
        coded = torch.zeros(n, 1, dtype=torch.bool, device=keys.device)
        coded[SINKS : n - RECENT] = True
        maps = maps_of((centre_of(keys), centre_of(values)), keys.dtype, self.codes[layer])
        sizes = keys.shape[-1], values.shape[-1]
        forms = tuple(kind.form(sizes, sorted_keys=True) for kind in self.kinds)
        predicted = rung_damage(self.codes[layer].power_on(keys.device), forms)
        output = rows @ values[0].float()
        evicted = _evicting(rows * coded[:, 0], values[0].float(), output)
        for at, kind in enumerate(self.kinds):
            new_keys, new_values = stored_entries((keys, values), kind, maps, True)
            shift = (queries @ ((new_keys - keys)[0].float() * coded).mT).masked_fill(rows == 0, 0)
            # What softmax makes of logits with a shift each.
            weights = rows * (shift - shift.amax(-1, keepdim=True)).exp()
            weights = weights / weights.sum(-1, keepdim=True)
            mixed = torch.where(coded, new_values[0].float(), values[0].float())
            results = {"keys": weights @ values[0].float(), "values": rows @ mixed, "both": weights @ mixed}
            for head in range(heads):
                found = {"layer": layer, "head": head, "kind": str(kind), "predicted": float(predicted[head, at])}
                for name, result in results.items():
                    changed = (result - output)[head].square().sum()
                    found[name] = float((changed / evicted[head]).sqrt())
                self.lines.append(found)


def _evicting(weights: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """Sum of squares of what evicting each entry alone does to ``[H_kv, r, Dv]``: ``[H_kv]``."""
    odds = (weights / (1 - weights).clamp_min(1e-3)).square()
    # |v - o|^2 = |v|^2 - 2 v o + |o|^2, weighted
    own = odds @ values.square().sum(-1, keepdim=True)
    both = (output * (odds @ values)).sum(-1, keepdim=True)
    whole = output.square().sum(-1, keepdim=True) * odds.sum(-1, keepdim=True)
    return (own - 2 * both + whole).sum((1, 2))


def prompts(tokenizer: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, str, list[int]]]:
    """Family, sample and tokens of prompts that are neither too short nor too long."""
    for name in arguments.families.split(","):
        made = {"limit": arguments.samples} if families.parse(name)[0] in stress.FAMILIES else {}
        count = 0
        for sample in families.load(name, data_dir=arguments.data_dir, seed=0, **made):
            if count == arguments.samples:
                break
            if len(sample.prompt) > 20 * arguments.max_tokens:
                continue
            context = encode(tokenizer, sample).context
            if 8 * RECENT < len(context) <= arguments.max_tokens:
                count += 1
                yield name, sample.id, context


@torch.no_grad()
def run(arguments: argparse.Namespace) -> None:
    """Measure prompts that the results do not have."""
    model, tokenizer, name = checkpoints.load(arguments.model, arguments.device, arguments.dtype)
    done = set()
    if arguments.out.exists():
        done = {tuple(json.loads(line)[key] for key in ("model", "sample")) for line in arguments.out.open()}
    kinds = tuple(map(KVDtype, arguments.formats.split(",")))
    attached = Attachment.attach(model)
    codes, scores = key_codes(model), copy_scores(model)
    if codes is None:
        raise SystemExit(f"{name}: no codes of its own can be measured")
    begin = time.monotonic()
    for family, sample, context in prompts(tokenizer, arguments):
        if (name, sample) in done:
            continue
        if arguments.time_limit and time.monotonic() - begin > arguments.time_limit:
            print("time is up: run the same command again to go on")
            break
        probe = DamageProbe(tokens=1, kinds=kinds, codes=codes)
        read(model, probe, [context])
        about = {"model": name, "dtype": arguments.dtype, "family": family, "sample": sample, "tokens": len(context)}
        with arguments.out.open("a", encoding="utf-8") as file:
            for line in probe.lines:
                copies = float(scores[line["layer"]][line["head"]]) >= Adaptive.copying
                file.write(json.dumps(about | {"copies": copies} | line) + "\n")
        print(f"{time.monotonic() - begin:6.0f} s  {family}, {len(context)} tokens", flush=True)
    attached.detach()


def table(path: Path) -> str:
    """Quantiles over heads of the prediction and of the truth, for each model, format and kind of head."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    text = []
    for model in sorted({line["model"] for line in lines}):
        own = [line for line in lines if line["model"] == model]
        tokens = [line["tokens"] for line in own]
        text.append(f"\n{model}, n = {len({x['sample'] for x in own})} prompts of {min(tokens):,} to {max(tokens):,}\n")
        text.append("| format | heads | predicted | true | true / predicted | by keys alone | by values alone |")
        text.append("|---|---|---:|---:|---:|---:|---:|")
        for kind in dict.fromkeys(line["kind"] for line in own):
            for copies in (False, True):
                part = [x for x in own if x["kind"] == kind and x["copies"] == copies]
                if part:
                    ratio = [x["both"] / x["predicted"] for x in part]
                    cells = [_spread([x[key] for x in part]) for key in ("predicted", "both", "keys", "values")]
                    cells.insert(2, _spread(ratio))
                    heads = len({(x["layer"], x["head"]) for x in part})
                    text.append(f"| {kind} | {heads}{' that copy' if copies else ''} | {' | '.join(cells)} |")
    return "\n".join(text)


def _spread(numbers: list[float]) -> str:
    low, middle, high = torch.tensor(numbers).quantile(torch.tensor(QUANTILES)).tolist()
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a .gguf file, a folder, or a hub id")
    parser.add_argument("--table", type=Path, help="print the tables of a file of results; no model is read")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument(
        "--families",
        default="hotpotqa:after,2wikimqa-e,wikitext2,multi-key-retrieval:tokens=1200,question-after:tokens=1200,"
        "long-code:tokens=1000",
    )
    parser.add_argument("--formats", default="k4v2,k5v4,k6v4,k7v6,int8")
    parser.add_argument("--samples", type=int, default=1, help="of each family")
    parser.add_argument("--max-tokens", type=int, default=2300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds after which no sample is begun")
    parser.add_argument("--out", type=Path, default=Path("damage.jsonl"))
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
    elif arguments.model is None:
        parser.error("say which model, or which --table")
    else:
        run(arguments)


if __name__ == "__main__":
    main()
