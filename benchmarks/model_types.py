"""Every type of language model that transformers knows: which work, which are refused, and why.

    python benchmarks/model_types.py                          # the table on the screen
    python benchmarks/model_types.py --write docs/models.md   # and the summary

A tiny random model of each type is generated with, under the policies "full" and "streaming-llm"
(20 of 40 prompt tokens kept), with the storage of CPUs and, through Triton's interpreter, with that
of CUDA; its logits are compared with those of the model's own full cache, in which what was evicted
is masked. Then the default policy has to answer and to report. One thread, some three minutes. The same
is the test that `make test-sweep` runs.
"""

import argparse
import os
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import transformers

from helpers.outcomes import CAUSES, LENGTH, STEPS, TOLERANCE, Outcome, outcome_of
from helpers.tiny import CAUSAL, IMAGE_TEXT

MEANING = {
    "no layer that keeps all tokens": "windows, recurrent states and sparse attention with an index of its own; layers "
    "that are recurrent and attention at once (`hybrid`) are not pruned either",
    "attention of its own": "the model's code does not go through transformers' attention interface",
    "no KV cache": "its forward takes none",
    "keys and values made anew from what the cache holds": "multi-head latent attention (the cache holds latents), and "
    "heads repeated behind the cache",
    "keys or values changed after the cache": "evicting could not be done to what attention reads",
    "sparse attention by a mask of its own": "each token leaves out other entries",
    "layers that share keys and values": "pruning one layer would change others",
    "an encoder and a decoder": "decoder-only models are supported",
    "a cache class of its own": "the model takes no other",
}
"""What a cause stands for, in the summary."""


def main() -> None:
    """Run the sweep; print the table, and write the summary if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the summary, in Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    groups = {}
    for name, kinds in (("Text", CAUSAL), ("Text and images", IMAGE_TEXT)):
        groups[name] = []
        for kind in kinds:
            outcome = outcome_of(kind)
            print(f"{kind:28} {outcome.result:10} {outcome.detail}", flush=True)
            groups[name].append(outcome)
    for name, outcomes in groups.items():
        print(f"{name}: {_counts(outcomes)}")
    if arguments.write:
        arguments.write.write_text(_summary(groups))


def _counts(outcomes: Iterable[Outcome]) -> str:
    numbers: dict[str, int] = defaultdict(int)
    for outcome in outcomes:
        numbers[outcome.result] += 1
    return ", ".join(f"{number} {result}" for result, number in sorted(numbers.items()))


def _summary(groups: dict[str, list[Outcome]]) -> str:
    tried = sum(map(len, groups.values()))
    lines = [
        "# Which models work",
        "",
        *_paragraph(
            "A model works if its attention goes through transformers' attention interface and it keeps keys and "
            "values of all tokens in some layers; those layers are pruned, and all others (windows, recurrent states, "
            "the states of images) stay as they are. What does not fit is refused by a sentence that says why, at the "
            "latest while the first prompt is read. At that prompt each attention module's output is compared with "
            "what refreekv's probes and kernels would compute."
        ),
        *_paragraph(
            f"Tried on tiny random models of all {tried} types that transformers {transformers.__version__} lists for "
            f"text (`MODEL_FOR_CAUSAL_LM`) and for images and text: {STEPS} greedy tokens after {LENGTH}, float32, "
            "policies `full` and `streaming-llm`, storage of CPUs and of CUDA (interpreted); equal means that no logit "
            f"differs by more than {TOLERANCE:g} of the largest. Then the default, "
            f"which has to answer and to report. torch {torch.__version__}, "
            f"{date.today().isoformat()}, `python benchmarks/model_types.py --write docs/models.md`. Images were not "
            "given (but see tests/engines/transformers/test_cross_attention.py for Llama-3.2-Vision's)."
        ),
        "| | equal | refused | not tried |",
        "|---|---|---|---|",
    ]
    for name, outcomes in groups.items():
        count = [sum(o.result == result for o in outcomes) for result in ("equal", "refused", "not built")]
        lines.append(f"| {name} | {' | '.join(map(str, count))} |")
    everything = [outcome for outcomes in groups.values() for outcome in outcomes]
    lines += ["", "## Refused", "", "| why | types |", "|---|---|"]
    for cause in CAUSES:
        kinds = [o.kind for o in everything if o.result == "refused" and o.detail == cause]
        if kinds:
            lines.append(f"| {cause}: {MEANING[cause]} | {', '.join(kinds)} |")
    lines += ["", "## Work", "", ", ".join(o.kind for o in everything if o.result == "equal") + "."]
    lines += ["", "## Not tried", "", "No tiny model of these was made, or none that runs on text alone:", ""]
    lines += [", ".join(o.kind for o in everything if o.result == "not built") + "."]
    bad = [o for o in everything if o.result in ("wrong", "failed")]
    if bad:
        lines += ["", "## Wrong", "", *(f"- {o.kind}: {o.detail}" for o in bad)]
    lines += ["", "## Wrappers", ""]
    lines += _paragraph(
        "`compress` and `ReFreeKVCache` take what is wrapped around a model, too: PEFT's models (not those with "
        "virtual tokens), accelerate's, DistributedDataParallel, and modules of one's own with one transformers model "
        "inside. "
        "Refused are DataParallel over several devices, FullyShardedDataParallel (not `fully_shard`) and "
        "`torch.compile`'s."
    )
    return "\n".join(lines)


def _paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False), ""]


if __name__ == "__main__":
    main()
