"""In which of its number formats a policy stores what it keeps, for ``refreekv plan``: measured on real models.

    python benchmarks/width_shares.py smollm2-135m.gguf --data-dir DIR --prompts 8 --max-tokens 4100

Prompts are read by `ReFreeKVCache`, and its report says how many entries are in each format. The result of a model
takes the place of its earlier one in ``src/refreekv/planner/widths.json``, or in ``--out``.
"""

import argparse
import json
import platform
import sys
import time
import types
from collections import Counter
from datetime import date
from pathlib import Path

import torch

import refreekv
from fidelity import load
from number_formats import prompts
from refreekv.engines.transformers.naming import NAME
from refreekv.planner import measurements, widths
from refreekv.policies.base import ladder_for

DEFAULT = Path(__file__).parent.parent / "src" / "refreekv" / "planner" / "widths.json"
FAMILIES = "hotpotqa:after,qasper-e:after,kv-retrieval-75,multi-key-retrieval:tokens=2000,long-code:tokens=2000"


@torch.inference_mode()
def main() -> None:
    """Measure one model and write the file anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--families", default=FAMILIES)
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--prompts", type=int, default=10, help="of all families together")
    parser.add_argument("--max-tokens", type=int, default=4100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--time-limit", type=float, default=1e9, help="no further prompt after so many seconds")
    parser.add_argument("--out", type=Path, default=DEFAULT)
    given = parser.parse_args()
    place = types.SimpleNamespace(
        model=given.model, random=None, dtype=given.dtype, device=given.device, seed=0, packed=False
    )
    model, tokenizer, name = load(place)  # type: ignore[arg-type]
    policy = refreekv.policies.parse(given.policy)
    ladder = ladder_for(policy, "auto")
    if ladder is None or len(ladder.rungs) < 2:
        parser.error(f"policy {given.policy} does not choose among several number formats")
    counts: Counter[str] = Counter()
    lengths, begin = [], time.monotonic()
    for ids in prompts(tokenizer, given):
        cache = refreekv.ReFreeKVCache(model, policy)
        model(torch.tensor([ids], device=given.device), **{NAME: cache}, logits_to_keep=1)
        for layer in cache.report.layers:
            counts.update(layer.formats)
        lengths.append(len(ids))
        print(f"{len(ids):,} tokens: {cache.report.budget:.1%} kept, {cache.report.formats}", flush=True)
        if time.monotonic() - begin > given.time_limit:
            break
    coded = sum(counts[rung.kind] for rung in ladder.rungs)
    machine = torch.cuda.get_device_name() if given.device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    mine = widths.Measured(
        policy=policy.spec,
        ladder=str(ladder),
        model=name,
        n=len(lengths),
        tokens=(min(lengths), max(lengths)),
        shares=tuple(round(counts[rung.kind] / coded, 4) for rung in ladder.rungs),
        source={
            "command": "benchmarks/width_shares.py " + " ".join(Path(sys.argv[1]).name if at == 0 else part
                                                                for at, part in enumerate(sys.argv[1:])
                                                                if "data" not in part),
            "date": str(date.today()),
            "machine": machine,
            "dtype": given.dtype,
            "python": platform.python_version(),
        },
    )  # fmt: skip
    known = (
        measurements.read("widths", json.loads(given.out.read_text(encoding="utf-8")), widths.measured)
        if given.out.exists()
        else []
    )
    others = [one for one in known if (one.policy, one.ladder, one.model) != (mine.policy, mine.ladder, mine.model)]
    given.out.write_text(measurements.dump([*others, mine]), encoding="utf-8")
    print(mine)


if __name__ == "__main__":
    main()
