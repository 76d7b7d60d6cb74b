"""A compressed model for EleutherAI's lm-evaluation-harness, registered there as ``refreekv``.

A log-likelihood request is normally scored in one forward pass over context and
continuation. Compression acts after the prompt, so such a pass would measure the full
cache and flatter every policy. Here the context is prefilled and pruned first, and the
continuation is scored on what is left.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"lm-eval tasks need lm-eval ({error}); run: pip install 'refreekv[eval]'") from error

import refreekv
from refreekv.engines import DEFAULT_POLICY
from refreekv.engines.transformers.naming import cache_argument
from refreekv.evaluation.data.encoding import MARK, render
from refreekv.evaluation.sweeps import FULL
from refreekv.evaluation.tasks.generation import Answer, Prompt, answer, held
from refreekv.policies import Policy, parse

Request = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True)
class Asked:
    """A generation request as tokens."""

    prompt: Prompt  # what is compressed, and what comes after that
    limit: int  # new tokens at most
    stop: tuple[str, ...]  # texts that end the answer

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.context) + len(self.prompt.question)


@dataclass(frozen=True)
class Measured:
    """What answering one request took."""

    # length of what was compressed, and of what came after it
    prompt_tokens: int
    new_tokens: int
    budget: float  # kept share of the prompt, over all full-attention layers
    # K/V bytes at the end, over the full-attention layers: of a full cache, and held
    bytes_full: int
    bytes_kept: int


@register_model("refreekv")
class CompressedLM(HFLM):
    """lm-eval's Hugging Face model, with a pruned cache. Generation is greedy.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As for lm-eval's ``hf`` model; decoder-only.
    policy : str or Policy
        A policy or its specification, such as ``"snapkv:ratio=0.5"``; ``"full"`` is the plain
        full cache of transformers.
    **options
        What ``hf`` takes.

    Attributes
    ----------
    measured : list of Measured
        One for each request of the last call.
    budgets : list of float
        Kept share of each prompt that was compressed so far.
    """

    def __init__(self, pretrained: Any, policy: str | Policy = DEFAULT_POLICY, **options: Any):
        self.policy = parse(policy) if isinstance(policy, str) else policy
        self.budgets: list[float] = []
        self.measured: list[Measured] = []
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise ValueError("refreekv compresses the cache of decoder-only models; this one is not")
        if not isinstance(self.batch_size, int):
            raise ValueError(f"refreekv needs a number as batch size, got {self.batch_size!r}")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; a template without system role gets it within the user's message."""
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return render(self.tokenizer, chat_history, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids; as in lm-eval, which however needs a tokenizer to have a first or last token."""
        if add_special_tokens is None and self.prefix_token_id is None:
            add_special_tokens = True
        return list(super().tok_encode(string, add_special_tokens=add_special_tokens, **options))

    def ask(self, request: Any) -> Asked:
        """A generation request as tokens, nothing cut off.

        Raises
        ------
        ValueError
            The request wants something else than a greedy answer.
        """
        text, options = request.args
        if options.get("do_sample") or options.get("num_beams", 1) > 1:
            raise ValueError(f"{request.task_name} asks for sampling or beams; refreekv answers greedily only")
        until = options.get("until") or ()
        limit = options.get("max_gen_toks") or options.get("max_new_tokens") or self.max_gen_toks
        context, _, question = text.partition(MARK)
        prompt = Prompt(self.tok_encode(context), self.tok_encode(question, add_special_tokens=False))
        stop = tuple(end for end in ([until] if isinstance(until, str) else until) if end)
        return Asked(prompt, int(limit), stop)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers in batches of like requests, each prompt pruned as it ends."""
        from tqdm import tqdm

        asked = [self._fitted_prompt(self.ask(request)) for request in requests]
        texts = [""] * len(requests)
        measured: list[Measured | None] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Answering")
        for indices in self._batches(asked):
            first = asked[indices[0]]
            policy = None if self.policy.name == FULL else self.policy
            given = answer(
                self.model,
                self.tokenizer,
                [asked[index].prompt for index in indices],
                policy,
                max_new_tokens=first.limit,
                stop=first.stop,
            )
            for index, one in zip(indices, given, strict=True):
                texts[index] = self._text(one, first.stop)
                measured[index] = Measured(
                    len(asked[index].prompt.context), len(one.tokens), one.budget, one.bytes_full, one.bytes_kept
                )
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
            bar.update(len(indices))
        bar.close()
        self.measured = [one for one in measured if one is not None]
        self.budgets += [one.budget for one in self.measured]
        return texts

    def _batches(self, asked: Sequence[Asked]) -> Iterator[list[int]]:
        """Indices of requests that can share a batch, long prompts first; those with a later question alone."""
        order = sorted(range(len(asked)), key=lambda index: -asked[index].length)
        groups: dict[Any, list[int]] = {}
        for index in order:
            one = asked[index]
            groups.setdefault(index if one.prompt.question else (one.limit, one.stop), []).append(index)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _fitted_prompt(self, asked: Asked) -> Asked:
        """The prompt, cut on the left to fit with the answer."""
        excess = asked.length + asked.limit - self.max_length
        if excess <= 0:
            return asked
        if excess >= len(asked.prompt.context):
            raise ValueError(f"an answer of {asked.limit} tokens does not fit the model's context of {self.max_length}")
        return Asked(Prompt(asked.prompt.context[excess:], asked.prompt.question), asked.limit, asked.stop)

    def _text(self, given: Answer, stop: Sequence[str]) -> str:
        text = str(self.tokenizer.decode(given.tokens, skip_special_tokens=True))
        for end in stop:
            text = text.partition(end)[0]
        return text

    def _model_call(self, *args: Any, **options: Any) -> Any:
        """Refuse: a single pass over context and continuation leaves nothing to measure."""
        raise NotImplementedError(
            "refreekv scores a continuation in two stages only: prefill and prune the context, then score"
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refuse: rolling likelihoods have no prompt after which a cache could be pruned."""
        tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise NotImplementedError(
            f"{tasks or 'this task'} asks for rolling log-likelihoods, which run in one pass where compression never "
            "acts; use a generation or multiple-choice task, or refreekv eval for fidelity"
        )

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation on the pruned cache of its context, and whether it is the greedy one."""
        del override_bs  # rows of a batch would have to be pruned apart from each other anyway
        from tqdm import tqdm

        results: list[tuple[float, bool] | None] = [None] * len(requests)
        measured: list[Measured | None] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring in two stages")
        # The choices of a question share its context: prefilled once.
        order = sorted(range(len(requests)), key=lambda index: (len(requests[index][1]), requests[index][1]))
        for _, group in itertools.groupby(order, key=lambda index: self._fitted(requests[index])):
            indices = list(group)
            context = self._fitted(requests[indices[0]])
            scores = self._score(list(context), [requests[index][2] for index in indices])
            for index, (result, cost) in zip(indices, scores, strict=True):
                results[index], measured[index] = result, cost
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
                bar.update(1)
        bar.close()
        self.measured = [one for one in measured if one is not None]
        return [result for result in results if result is not None]

    def _fitted(self, request: Request) -> tuple[int, ...]:
        """The context, cut on the left to fit with the continuation."""
        _, context, continuation = request
        longest = self.max_length + 1 - len(continuation)
        if longest < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit the model's context of {self.max_length}"
            )
        return tuple(context[-longest:])

    def _score(
        self, context: list[int], continuations: list[list[int]]
    ) -> Iterator[tuple[tuple[float, bool], Measured]]:
        """Scores of continuations of one context, and what each took."""
        cache: refreekv.ReFreeKVCache | None = None
        first: Tensor | None = None
        for continuation in continuations:
            if cache is None or first is None:
                cache = refreekv.ReFreeKVCache(self.model, self.policy)
                with cache.prompt_until(len(context)):
                    first = self._forward(context, cache, keep=1)
                if continuation is continuations[0]:
                    self.budgets.append(cache.report.budget)
            logits = first
            if len(continuation) > 1:
                with cache.decoding():
                    logits = torch.cat([first, self._forward(continuation[:-1], cache, keep=0)])
            target = torch.tensor(continuation, device=logits.device)
            chosen = logits.log_softmax(-1, dtype=torch.float32).gather(-1, target[:, None]).sum()
            cost = Measured(len(context), len(continuation), *held(cache, 0))
            yield (float(chosen), bool((logits.argmax(-1) == target).all())), cost
            if len(continuation) > 1:
                if len(cache.pruned_layers) == len(cache.layers):
                    cache.crop(1 - len(continuation))
                else:  # sliding windows cannot go back
                    cache = None

    def _forward(self, tokens: list[int], cache: refreekv.ReFreeKVCache, *, keep: int) -> Tensor:
        """Logits ``[q, V]`` of new tokens; ``keep`` as ``logits_to_keep``."""
        ids = torch.tensor([tokens], device=self.device)
        output = self.model(ids, **cache_argument(self.model.forward, cache), use_cache=True, logits_to_keep=keep)
        logits: Tensor = output.logits[0]
        return logits
