"""Two turns through a cache, and the same through the model alone."""

from functools import cache

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from helpers.models import build, prompts
from helpers.reference import Turn, positions_of
from refreekv import ReFreeKVCache

STEPS = 8


CHUNK = 13


TOLERANCE = 1e-4


@cache
def model_of(name: str, attention: str) -> PreTrainedModel:
    return build(name, attention=attention)


@cache
def turns_of(lengths: tuple[int, ...], second: tuple[int, ...]) -> list[tuple[Tensor, Tensor | None]]:
    turns = [prompts(lengths, seed=1), prompts(second, seed=2)]
    return [(ids, mask if len(lengths) > 1 else None) for ids, mask in turns]


def loop(model, kv_cache, turns, chunk=None) -> tuple[list[Turn], list]:
    """Loops of one's own around the model; ``chunk`` feeds each prompt in pieces."""
    results, reports, total, last = [], [], None, None
    for ids, mask in turns:
        if last is not None:
            ids = torch.cat([last, ids], 1)
            mask = None if mask is None else torch.cat([torch.ones_like(last), mask], 1)
        padded = mask is not None
        mask = torch.ones_like(ids) if mask is None else mask
        total = mask if total is None else torch.cat([total, mask], 1)
        start = total.shape[1] - ids.shape[1]
        with kv_cache.prompt_until(total.shape[1]):
            for piece in ids.split(chunk or ids.shape[1], 1):
                stop = start + piece.shape[1]
                step = forward(model, kv_cache, piece, total[:, :stop], padded)
                start = stop
        reports.append(kv_cache.report)
        tokens, logits = [step.argmax(-1, keepdim=True)], [step]
        while len(tokens) < STEPS:
            total = torch.cat([total, torch.ones_like(tokens[-1])], 1)
            step = forward(model, kv_cache, tokens[-1], total, padded)
            logits.append(step)
            tokens.append(step.argmax(-1, keepdim=True))
        last = tokens[-1]
        results.append(Turn(torch.cat(tokens, 1), torch.stack(logits, 1)))
    return results, reports


@torch.no_grad()
def forward(model, kv_cache, ids, total, padded) -> Tensor:
    # Without padding the model must find its positions by the cache's logical length alone.
    extra = {"attention_mask": total, "position_ids": positions_of(total)[:, -ids.shape[1] :]} if padded else {}
    return model(ids, past_key_values=kv_cache, **extra).logits[:, -1]


@cache
def generate_chunks_later_turns() -> bool:
    """Whether this transformers can: older ones feed a later turn's chunks at positions and masks from 0 on."""
    model = build("llama")  # one of its own: the others are being compressed
    lengths = []
    for chunk in (None, CHUNK):
        own = DynamicCache(config=model.config)
        model.generate(prompts((20,))[0], past_key_values=own, max_new_tokens=2, min_new_tokens=2)
        settings = {"max_new_tokens": 2, "min_new_tokens": 2, "prefill_chunk_size": chunk}
        model.generate(prompts((40,))[0], past_key_values=own, **settings)
        lengths.append(own.get_seq_length())
    return lengths[0] == lengths[1]


def generate(model, kv_cache, turns, chunk=None) -> tuple[list[Turn], list]:
    """`generate`, turn by turn with all ids so far, as a chat does; the first call may make the cache."""
    results, reports, sequence, total = [], [], None, None
    for ids, mask in turns:
        mask = torch.ones_like(ids) if mask is None else mask
        sequence = ids if sequence is None else torch.cat([sequence, ids], 1)
        if total is not None:
            mask = torch.cat([total, torch.ones(len(ids), STEPS, dtype=torch.long), mask], 1)
        total = mask
        output = model.generate(
            sequence,
            attention_mask=total,
            past_key_values=kv_cache,
            max_new_tokens=STEPS,
            do_sample=False,
            prefill_chunk_size=chunk if not results or (chunk and generate_chunks_later_turns()) else None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        kv_cache = output.past_key_values
        reports.append(kv_cache.report)
        results.append(Turn(output.sequences[:, sequence.shape[1] :], torch.stack(output.logits, 1)))
        sequence = output.sequences
    return results, reports


def assert_same(got: list[Turn], wanted: list[Turn]) -> None:
    for turn, (left, right) in enumerate(zip(got, wanted, strict=True)):
        torch.testing.assert_close(left.logits, right.logits, rtol=0, atol=TOLERANCE, msg=lambda m, t=turn: f"{t}: {m}")
        assert torch.equal(left.tokens, right.tokens), f"turn {turn}"


def same_steps(one, other, start: int, close: float) -> int:
    """How many tokens from column ``start`` on two answers of one prompt share, checking the logits that gave them.

    Steps are compared as long as the tokens before them are the same: near-ties may fall to either side.
    """
    same = int((one.sequences == other.sequences)[0, start:].long().cumprod(0).sum())
    for mine, theirs in list(zip(one.logits, other.logits, strict=True))[: same + 1]:
        assert torch.isfinite(theirs).all()
        assert (mine - theirs).norm() <= close * mine.norm()
    return same


def check_nothing_evicted(name, attention, lengths, second, policy, parameters):
    model = model_of(name, attention)
    turns = turns_of(lengths, second)
    wanted = plain(name, attention, lengths, second)
    got, reports = generate(model, ReFreeKVCache(model, policy, **parameters), turns)
    for left, right in zip(got, wanted, strict=True):
        assert torch.equal(left.tokens, right.tokens)
        assert torch.equal(left.logits, right.logits)
    assert all(report.budget == 1.0 for report in reports)
    assert all(report.bytes_after == report.bytes_before for report in reports)


@cache
def plain(name, attention, lengths, second) -> list[Turn]:
    """The model untouched, with its own cache."""
    model = model_of(name, attention)
    results, sequence, total = [], None, None
    kv_cache = DynamicCache(config=model.config)
    for ids, mask in turns_of(lengths, second):
        mask = torch.ones_like(ids) if mask is None else mask
        sequence = ids if sequence is None else torch.cat([sequence, ids], 1)
        if total is not None:
            mask = torch.cat([total, torch.ones(len(ids), STEPS, dtype=torch.long), mask], 1)
        total = mask
        output = model.generate(
            sequence,
            attention_mask=total,
            past_key_values=kv_cache,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        results.append(Turn(output.sequences[:, sequence.shape[1] :], torch.stack(output.logits, 1)))
        sequence = output.sequences
    return results
