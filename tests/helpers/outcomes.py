"""What happens to each type of model, and what it may be refused for: the sweep's cases and its words."""

import re
from dataclasses import dataclass

import torch
from transformers import DynamicCache, GenerationMixin

from helpers.sweep import hidden_columns, hidden_logits, logits_of
from helpers.tiny import CannotBuildError, tiny
from refreekv import ReFreeKVCache

LENGTH = 40
STEPS = 6
TOLERANCE = 1e-4
"""Largest difference of logits, of the largest logit."""

POLICIES = (("full", {}), ("streaming-llm", {"size": 20}))

CAUSES = {
    "no layer that keeps all tokens": r"has no full-attention layer to prune \(its layers: [a-z_, ]+\b",
    "attention of its own": r"without transformers' attention interface",
    "no KV cache": r"takes no KV cache, so that there is nothing to prune",
    "keys and values made anew from what the cache holds": r"made out of what the cache returned",
    "keys or values changed after the cache": r"attends to other (keys|values) than the cache returned",
    "sparse attention by a mask of its own": r"leaves out entries by a mask of its own",
    "layers that share keys and values": r"shares keys and values between layers",
    "an encoder and a decoder": r"is an encoder-decoder model",
    "a cache class of its own": r"uses cache of its own",
}
"""Why a type may be refused, and what its refusal says."""

_NOT_BUILT = {
    "larger than 20 million parameters at their smallest, or with settings that no rule of `tiny` finds": """
        apertus1p5 blt chameleon dbrx deepseek_ocr2 dots3_note dots3_note_text ernie4_5_vl_moe florence2
        gemma4_assistant glm5_next glmga granite4_vision janus molmo2 moshi muse_spark nemotron_h_omni pp_chart2table
        shieldgemma2""",
    "with parts from the timm library": "fast_vlm gemma3n perception_lm",
    "made for images, sounds, actions or the states of another model: text alone is no input": """
        blip blip-2 diffusion_gemma evolla gemma4_unified_assistant hunyuan_vl idefics instructblip instructblipvideo
        musicgen musicgen_melody pi0 pix2struct pp_formulanet qwen2_5_omni_thinker qwen3_omni_moe_thinker udop
        vision-encoder-decoder""",
    "failing by itself on a prompt of that length": "xlstm",
}
NOT_BUILT = {kind for kinds in _NOT_BUILT.values() for kind in kinds.split()}
"""Types of which no tiny model is made, or none that runs by itself."""


@dataclass(frozen=True)
class Outcome:
    """What happened to one type.

    ``result`` is ``"equal"``, ``"refused"``, ``"not built"`` (no tiny model, or one that does not run by
    itself), ``"wrong"`` or ``"failed"``; ``detail`` the cause, the reason or the difference.
    """

    kind: str
    result: str
    detail: str


def outcome_of(kind: str) -> Outcome:
    """Build a type's tiny model, prune it in each way, and compare."""
    try:
        model = tiny(kind)
    except CannotBuildError as reason:
        return Outcome(kind, "not built", str(reason))
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(2, 100, (1, LENGTH), generator=generator)}
    try:
        plain = logits_of(model, inputs, STEPS)
    except Exception as error:
        return Outcome(kind, "not built", f"does not run on text alone: {_line(error)}")
    worst, refusals = 0.0, set()
    for policy, parameters in POLICIES:
        for arena in (None, True):
            try:
                cache = ReFreeKVCache(model, policy, **parameters)
                cache.state.arena = arena
                got = logits_of(model, inputs, STEPS, cache)
            except Exception as error:
                refusals.add(_cause(error) or f"unknown: {_line(error)}")
                continue
            hidden = hidden_columns(cache, LENGTH)
            del cache  # while it lives, attention goes through refreekv
            wanted = plain
            if policy != "full":
                given = logits_of(model, inputs, STEPS, DynamicCache(config=model.config))
                if float((given - plain).abs().max()) > 1e-3:
                    return Outcome(kind, "not built", "computes something else with a cache of transformers' own")
                wanted = hidden_logits(model, inputs, STEPS, hidden)[0]
                if torch.equal(wanted, plain):
                    return Outcome(kind, "failed", "nothing was evicted")
            worst = max(worst, float((got - wanted).abs().max() / plain.abs().max()))
    if refusals:
        (first, *others) = sorted(refusals)
        failed = bool(others) or worst > 0 or first.startswith("unknown")
        return Outcome(kind, "failed" if failed else "refused", "; ".join([first, *others]))
    if worst >= TOLERANCE:
        return Outcome(kind, "wrong", f"{worst:.1e}")
    try:
        inner = getattr(model, "text_model", None)  # Kosmos-2 has that generate
        generating = inner if isinstance(inner, GenerationMixin) else model
        cache = ReFreeKVCache(generating, min_length=0)  # the default policy, which measures the model first
        got, report = logits_of(model, inputs, STEPS, cache), cache.report
    except Exception as error:
        return Outcome(kind, "failed", f"by default: {_line(error)}")
    if not got.isfinite().all() or not report.prunable:
        return Outcome(kind, "failed", "no answer, or no report, by default")
    return Outcome(kind, "equal", f"{worst:.1e}")


def _cause(error: Exception) -> str | None:
    if not isinstance(error, (ValueError, RuntimeError)):
        return None
    found = [cause for cause, words in CAUSES.items() if re.search(words, str(error))]
    return found[0] if len(found) == 1 else None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}" if str(error) else type(error).__name__
