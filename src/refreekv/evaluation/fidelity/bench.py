"""Fidelity: how far compressed caches take a model from its own full-cache answer.

For each sample there is one prefill, shared by all policies. The full cache goes on
greedily, step by step; then every policy reads the same tokens over what it keeps of the
prompt, many policies as the rows of one call (`refreekv.evaluation.fidelity.masked`), and the
predictions are compared. The full cache runs a second time as a row of that batch: what it
differs by is the noise floor.

Without a question the answer's first token comes from the prefill, before anything is
evicted; comparison begins at the second. With one, the question is read by the pruned
cache (and not pruned again), and comparison begins at the first.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refreekv.core.device_memory import free_memory
from refreekv.engines.transformers.api import check_model
from refreekv.engines.transformers.attachment import attached
from refreekv.evaluation.data.encoding import Encoded
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity.decoding import Continuation, Start, continue_full, stop_tokens, until_stop
from refreekv.evaluation.fidelity.formats import stored_as
from refreekv.evaluation.fidelity.metrics import divergence, negative_log_likelihood, token_metrics
from refreekv.evaluation.fidelity.prefill import SharedPrefill, fork, forward
from refreekv.evaluation.records import FidelityRecord
from refreekv.policies import Policy
from refreekv.storage.host import available_memory


@dataclass(frozen=True)
class Job:
    """What to measure on one sample."""

    sample: Sample  # the sample
    encoded: Encoded  # its tokens
    policies: Mapping[str, Policy | None]  # names for the records to policies; None stands for the full cache


@dataclass(frozen=True)
class Bench:
    """A model under measurement."""

    # the model and what turns its tokens into text
    model: Any
    tokenizer: Any
    name: str  # the model's name in the records
    continuation: int = 48  # tokens to compare at most; an answer that ends earlier is compared to its end
    rows: int | None = None  # policies in one batch; None: as many as the free memory holds
    # samples whose full caches are decoded in one batch; None: 16 on a GPU, where a step costs the same for one and for
    # many, and 1 elsewhere
    together: int | None = None
    per_token: bool = False  # whether records have the divergence of each token, too

    def __post_init__(self) -> None:
        for name in ("continuation", "rows", "together"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def measure(self, jobs: Sequence[Job]) -> Iterator[list[FidelityRecord]]:
        """One list of records a job, in order, as soon as they are there.

        Raises
        ------
        TypeError, ValueError
            A model that refreekv does not support.
        """
        check_model(self.model)
        with attached(self.model):
            for group in self._groups(jobs):
                yield from self._measure_group(group)

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list["_Prepared"]]:
        """Prefilled jobs, as many together as one batch of the full cache's decoding takes."""
        group: list[_Prepared] = []
        for job in jobs:
            prepared = _Prepared(self, job)
            group.append(prepared)
            together = self.together or (16 if prepared.shared.device.type == "cuda" else 1)
            held = sum(one.shared.nbytes for one in group)
            # Decoding copies all of it, and holds the old and the new copy at each step.
            crowded = len(group) < together and 4 * held > free_bytes(prepared.shared.device)
            if len(group) == together or crowded or not prepared.shared.joinable:
                yield group
                group = []
        if group:
            yield group

    def _measure_group(self, group: list["_Prepared"]) -> Iterator[list[FidelityRecord]]:
        stop = stop_tokens(self.model)
        # A policy's first prediction after a prompt without a question needs one step more.
        answers = continue_full(
            self.model,
            [one.start for one in group],
            self.continuation,
            stop,
            joined=all(one.shared.joinable for one in group),
        )
        while group:
            yield group.pop(0).records(answers.pop(0), stop)


class _Prepared:
    """A job after its prefill."""

    @torch.inference_mode()
    def __init__(self, bench: Bench, job: Job):
        self.bench, self.job = bench, job
        self.shared = SharedPrefill(bench.model, job.encoded.context, job.policies, bench.tokenizer)
        cache, length, logits = self.shared.full(), self.shared.length, self.shared.logits
        question = job.encoded.question
        if question:
            logits = forward(bench.model, [question], cache, start=length, keep=1)[0, -1]
        self.start = Start(cache, length + len(question), logits)

    @torch.inference_mode()
    def records(self, answer: Continuation, stop: set[int]) -> list[FidelityRecord]:
        """Compare all policies with the full cache's answer."""
        question = self.job.encoded.question
        tokens = until_stop(answer.tokens.tolist(), stop)
        # Where the prefill predicts the first token, no policy can change that.
        first = 0 if question else 1
        compared = slice(first, min(max(len(tokens), first + 1), first + self.bench.continuation))
        reference = answer.logits[compared]
        path = answer.tokens.tolist()
        fed = question + path[: len(reference) - 1] if question else path[: len(reference)]
        gold = self._gold()
        records = []
        size = self._group_size(len(fed))
        for group in self._batches(list(self.job.policies), size):
            logits = self._feed(group, fed, keep=len(reference))
            kl, agrees = divergence(reference, logits)
            del logits
            measured = token_metrics(kl, agrees)
            if self.bench.per_token:
                measured = [{**one, "kl_tokens": row} for one, row in zip(measured, kl.tolist(), strict=True)]
            changes = self._answer_changes(group, gold)
            kept = self.shared.kept(group)
            for row, name in enumerate(group):
                record = self._record(name, kept[row], measured[row], len(reference), changes[row])
                records.append(FidelityRecord(**record))
        order = {name: index for index, name in enumerate(self.job.policies)}
        records.sort(key=lambda record: order[record.policy])
        return records

    def _feed(self, names: list[str], fed: list[int], *, keep: int) -> Tensor:
        """Logits of the last tokens of one call over what policies keep, a row each."""
        cache = self.shared.masked(names)
        return forward(self.bench.model, [fed], cache, start=self.shared.length, keep=keep, rows=len(names))

    def _gold(self) -> Tensor | None:
        """Negative log-likelihood of the gold answer with the full cache, less its first token; None without one.

        After a prompt without a question the first token's is the same for every policy.
        """
        answer = self.job.encoded.answer
        if not answer:
            return None
        target = torch.tensor(answer, device=self.start.logits.device)
        lines = self.start.logits[None]
        if len(answer) > 1:
            cache = fork(self.start.cache)
            after = forward(self.bench.model, [answer[:-1]], cache, start=self.start.length, keep=len(answer) - 1)[0]
            lines = torch.cat([lines, after])
        first = 0 if self.job.encoded.question else 1
        return negative_log_likelihood(lines[first:], target[first:]) if len(answer) > first else lines.new_zeros(())

    def _answer_changes(self, names: list[str], gold: Tensor | None) -> list[float | None]:
        """By how much the gold answer's negative log-likelihood a token changes with each policy."""
        if gold is None:
            return [None] * len(names)
        answer, question = self.job.encoded.answer, self.job.encoded.question
        if len(answer) == 1 and not question:
            return [0.0] * len(names)
        predicted = answer if question else answer[1:]
        logits = self._feed(names, question + answer[:-1], keep=len(predicted))
        target = torch.tensor(predicted, device=logits.device)
        changes: list[float | None] = ((negative_log_likelihood(logits, target) - gold) / len(answer)).tolist()
        return changes

    def _record(
        self, name: str, kept: list[list[int]], metrics: dict[str, Any], compared: int, change: float | None
    ) -> dict[str, Any]:
        shares = [[count / self.shared.length for count in layer] for layer in kept]
        full, held = self.shared.bytes(name)
        sample = self.job.sample
        return {
            "sample": sample.id,
            "family": sample.family,
            "policy": name,
            "model": self.bench.name,
            "prompt_tokens": self.shared.length,
            "continuation_tokens": compared,
            "budget": sum(sum(layer) / len(layer) for layer in shares) / len(shares),
            "bytes_full": full,
            "bytes_kept": held,
            "kept_heads": [[round(share, 6) for share in layer] for layer in shares],
            "answer_nll_change": change,
            **metrics,
        }

    def _batches(self, names: list[str], size: int) -> Iterator[list[str]]:
        """Policies in batches that store what they keep in one number format."""

        def stored(name: str) -> str:
            return stored_as(self.job.policies[name])

        for _, alike in itertools.groupby(sorted(names, key=stored), key=stored):
            group = list(alike)
            yield from (group[at : at + size] for at in range(0, len(group), size))

    def _group_size(self, fed: int) -> int:
        """Policies in one batch, equally many in each."""
        names = len(self.job.policies)
        size = self.bench.rows
        if size is None:
            device = self.shared.device
            vocabulary = self.start.logits.shape[-1] * self.start.logits.element_size()
            # Logits, what comparing them takes, and the layers' activations.
            row = 4 * fed * vocabulary
            size = max(1, min(64 if device.type == "cuda" else 16, int(0.6 * free_bytes(device)) // row))
        groups = -(-names // size)
        return -(-names // groups)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    return free_memory(device) if device.type == "cuda" else available_memory()


def skip_reason(model: Any, encoded: Encoded, *, continuation: int, max_tokens: int) -> str | None:
    """Why a sample cannot be measured; None if it can."""
    prompt = len(encoded.context)
    if prompt > max_tokens:
        return f"{prompt:,} tokens are more than the {max_tokens:,} asked for"
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    whole = prompt + len(encoded.question) + max(continuation + 1, len(encoded.answer))
    if isinstance(context, int) and 0 < context < whole:
        return f"{whole:,} tokens are more than the model's context of {context:,}"
    return None
