"""Greedy answers with a physically pruned cache, as a user's ``generate`` gives them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer

from refreekv import ReFreeKVCache
from refreekv.engines.transformers.attachment import attached
from refreekv.engines.transformers.naming import NAME, cache_argument
from refreekv.evaluation.fidelity.decoding import stop_tokens, until_stop
from refreekv.policies import Policy


@dataclass(frozen=True)
class Prompt:
    """What is compressed, and what comes after that and before the answer."""

    context: list[int]  # compressed when its last token was read
    question: list[int]  # read after that and not compressed; may be empty


@dataclass(frozen=True)
class Answer:
    """One greedy answer."""

    tokens: list[int]  # new tokens, a stop token included
    budget: float  # kept share of the context, over all full-attention layers
    # K/V bytes at the end, over the full-attention layers: of a full cache, and held
    bytes_full: int
    bytes_kept: int


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    policy: Policy | None,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> list[Answer]:
    """Answer some prompts greedily, in one batch.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    prompts : sequence of Prompt
        Several of them only if none has a question.
    policy : Policy or None
        What prunes the cache; None: a plain full cache, without refreekv.
    max_new_tokens : int
        Tokens at most.
    stop : sequence of str
        Texts that end an answer.

    Raises
    ------
    ValueError
        Several prompts with questions.
    """
    asked = any(prompt.question for prompt in prompts)
    if asked and len(prompts) > 1:
        raise ValueError("prompts with a question that comes later are answered one by one")
    cache: Any = DynamicCache(config=model.config) if policy is None else ReFreeKVCache(model, policy)
    settings = greedy(model, tokenizer, max_new_tokens)
    options: dict[str, Any] = {"generation_config": settings, NAME: cache}
    ids, mask = _padded([prompt.context + prompt.question for prompt in prompts], settings.pad_token_id, model.device)
    if stop:
        options["stopping_criteria"] = StoppingCriteriaList([_Stop(tokenizer, ids.shape[1], stop)])
    # The class's own, which leaves it to us to say where the prompt ends.
    generate = type(model).generate
    if policy is None:
        output = generate(model, ids, attention_mask=mask, **options)
    else:
        end = ids.shape[1]
        if asked:
            with cache.prompt_until(len(prompts[0].context)):
                context = ids[:, : len(prompts[0].context)]
                model(context, **cache_argument(model.forward, cache), use_cache=True, logits_to_keep=1)
            end = 0  # the question is no prompt: it is not compressed
        with attached(model) as attachment, attachment.captured_steps(), cache.state.until(end, generating=True):
            output = generate(model, ids, attention_mask=mask, **options)
    stops = stop_tokens(model)
    rows = [until_stop(row, stops) for row in output[:, ids.shape[1] :].tolist()]
    padding = (ids.shape[1] - mask.sum(-1)).tolist()
    return [Answer(row, *held(cache, index, padding[index])) for index, row in enumerate(rows)]


class _Stop(StoppingCriteria):
    """Ends a row whose answer has one of some texts in it; works with any tokenizer that can decode."""

    def __init__(self, tokenizer: Any, start: int, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._start = start
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        ended = [any(end in text for end in self._stop) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    """The model's generation configuration without everything that changes the most likely token."""
    settings = copy.deepcopy(model.generation_config)
    settings.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, min_p=None)
    # Said outright: what is None, generate takes from the model's configuration after all.
    settings.update(repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0)
    settings.update(use_cache=True, cache_implementation=None)
    settings.update(max_length=None, max_new_tokens=max_new_tokens, return_dict_in_generate=False)
    if settings.pad_token_id is None:
        # Any token will do: the mask hides it.
        settings.pad_token_id = next((i for i in (tokenizer.pad_token_id, *stop_tokens(model)) if i is not None), 0)
    return settings


def _padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def held(cache: Any, row: int, padding: int = 0) -> tuple[float, int, int]:
    """Budget, and bytes of a full cache and of this one, for one row of whose columns ``padding`` are none."""
    if isinstance(cache, ReFreeKVCache):
        report = cache.report
        rows = [layer.rows[row] for layer in report.prunable]
        budget = sum(one.budget for one in rows) / len(rows)
        full = sum(one.bytes_before for one in rows) * (report.tokens - padding) // report.tokens
        return budget, full, sum(one.bytes_after for one in rows)
    # Layers with a window hold no more than that, and are none of a policy's.
    layers = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    parts = [part for layer in layers for part in (layer.keys, layer.values) if part is not None]
    full = sum(part[row, :, padding:].nbytes for part in parts)
    return 1.0, full, full
