"""A conversation over one pruned cache: each message feeds its own tokens only."""

import copy
import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch

import refreekv
from refreekv.cli.answering import Answering, Listener
from refreekv.cli.app import UserError, one_line
from refreekv.cli.loading import Loaded, quiet_transformers
from refreekv.core.quantisation import Ladder
from refreekv.policies.base import ladder_for

_ANSWER = "\x02refreekv-answer\x03"
"""Stands for an answer while the text that follows it is looked for."""


class MessageError(UserError):
    """A message that cannot be answered; the conversation stays as it was."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float | None = None  # 0 is greedy; None takes the model's own settings
    seed: int | None = None  # makes sampling repeatable


@dataclass(frozen=True)
class Turn:
    """One message and its answer."""

    # what was said
    message: str
    answer: str
    prompt_tokens: int  # tokens of the whole conversation when the answer began
    read_tokens: int  # those of them that were new to the cache
    answer_tokens: int  # tokens generated, an end token included
    # ``"end"``: by itself; ``"stopped"``: by the user; ``"length"``: at the most tokens asked for; ``"context"``: where
    # the model's context ends
    ended: str
    # from the message to the first token, and from there to the last
    prefill_seconds: float
    decode_seconds: float
    report: refreekv.CompressionReport  # the cache at the end of the answer

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding; None for an answer of one token."""
        return (self.answer_tokens - 1) / self.decode_seconds if self.answer_tokens > 1 else None


class Conversation:
    """Messages and answers, their tokens, and the cache that has read them.

    What is in the cache stays there: a next message adds what the chat template writes after
    the last answer, whatever the template would make of the earlier turns now.

    Parameters
    ----------
    loaded : Loaded
        The model and its tokenizer. Without a chat template, messages are plain text that the
        model continues.
    policy : Policy
        Decides what is kept, at the end of each message.
    kv_dtype : str, optional
        How what is kept is stored, as for `compress`.
    system : str, optional
        A system prompt.
    max_new_tokens : int
        Tokens of an answer at most.
    sampling : Sampling
        How tokens are chosen.
    chunk : int, optional
        Tokens of a message that are read at a time; between two chunks it can be stopped.

    Raises
    ------
    UserError
        A model that cannot be pruned, or a system prompt that its template does not take.
    """

    def __init__(
        self,
        loaded: Loaded,
        policy: refreekv.policies.Policy,
        *,
        kv_dtype: str | None = "auto",
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling = Sampling(),
        chunk: int | None = None,
    ):
        self.loaded = loaded
        self.policy = policy
        self.kv_dtype = kv_dtype
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.chunk = chunk or (512 if loaded.device.type == "cpu" else 4096)
        self.has_template = bool(loaded.tokenizer.chat_template)
        self._new_cache()  # refuse here what cannot be pruned
        if system and not self.has_template:
            raise UserError(f"{loaded.name} has no chat template, so there is no place for a system prompt")
        self.reset()
        self._encode("hello")  # and here a template that does not work
        self._stop_tokens = self._find_stop_tokens()

    @property
    def formats(self) -> Ladder | None:
        """The number formats that what is kept is stored in; None: the model's precision."""
        return ladder_for(self.policy, self.kv_dtype)

    def reset(self) -> None:
        """Start a new conversation."""
        self.turns: list[Turn] = []
        self.messages: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        self.tokens: list[int] = []
        self._cache: refreekv.ReFreeKVCache | None = None
        self._under_way: refreekv.ReFreeKVCache | None = None

    def use(self, policy: refreekv.policies.Policy) -> None:
        """Prune by another policy from now on; what was said is read again with the next message."""
        self.policy = policy
        self._cache = None

    @property
    def report(self) -> refreekv.CompressionReport | None:
        """The cache as it is now; None before the first answer, and until all is read again."""
        return self._cache.report if self._cache is not None and self.turns else None

    @property
    def live_report(self) -> refreekv.CompressionReport | None:
        """The cache of the answer that is under way; None before its first token."""
        return self._under_way.report if self._under_way is not None and not self._under_way.is_unused else None

    # -- a turn -----------------------------------------------------------------------------

    def say(self, message: str, listener: Listener = Listener()) -> Turn:
        """Add a message and generate the answer.

        Raises
        ------
        MessageError
            It is empty, does not fit into the model's context, or was stopped before the first
            token of the answer; the conversation is as before.
        """
        new = self._encode(message)
        if not new:
            raise MessageError("the message is empty: the tokenizer makes no token of it")
        prompt = [*self.tokens, *new]
        limit = self.max_new_tokens
        if self.loaded.context is not None:
            limit = min(limit, self.loaded.context - len(prompt))
            if limit < 1:
                raise MessageError(
                    f"with this message the conversation has {len(prompt):,} tokens, but the context of "
                    f"{self.loaded.name} is {self.loaded.context:,}; /reset starts a new one"
                )
        # Whatever goes wrong below, a cache in an unknown state is not used again.
        cache, self._cache = self._cache or self._new_cache(), None
        self._under_way = cache
        held = _length(cache)
        begin = time.perf_counter()
        try:
            with torch.inference_mode(), quiet_transformers():
                if not self._read(cache, prompt, listener):
                    self._cache = _restored(cache, held)
                    raise MessageError("stopped while reading; the message is not part of the conversation")
                answer = self._generate(cache, prompt, limit, listener)
        except torch.OutOfMemoryError as error:
            raise MessageError(f"out of memory at {len(prompt):,} tokens; /reset starts a new conversation") from error
        finally:
            self._under_way = None
        self._cache = cache
        turn = Turn(
            message=message,
            answer=self._decode(answer.tokens),
            prompt_tokens=len(prompt),
            read_tokens=len(prompt) - held,
            answer_tokens=len(answer.tokens),
            ended=self._ended(answer, limit),
            prefill_seconds=answer.times[0] - begin,
            decode_seconds=answer.times[-1] - answer.times[0],
            report=cache.report,
        )
        self.tokens = [*prompt, *answer.tokens]
        self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": turn.answer}]
        self.turns.append(turn)
        return turn

    def _read(self, cache: refreekv.ReFreeKVCache, prompt: list[int], listener: Listener) -> bool:
        """Feed all but the last chunk of what is new; False if it was stopped."""
        from refreekv.engines.transformers.naming import cache_argument

        model: Any = self.loaded.model
        held = _length(cache)
        ids = torch.tensor([prompt], device=self.loaded.device)
        total = len(prompt) - held
        options = cache_argument(model.forward, cache)
        limit = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        for start in range(held, len(prompt) - self.chunk, self.chunk):
            listener.on_read(start - held, total)
            if listener.stopped():
                return False
            with cache.prompt_until(len(prompt)):
                model(ids[:, start : start + self.chunk], use_cache=True, **options, **limit)
        listener.on_read(total, total)
        return not listener.stopped()

    def _generate(self, cache: refreekv.ReFreeKVCache, prompt: list[int], limit: int, listener: Listener) -> Answering:
        from transformers import StoppingCriteria, StoppingCriteriaList

        from refreekv.engines.transformers.naming import NAME

        answering = Answering(self.loaded.tokenizer, listener)

        class Stop(StoppingCriteria):
            def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
                answering.stopped = answering.stopped or listener.stopped()
                return torch.full((len(ids),), answering.stopped, device=ids.device)

        model: Any = self.loaded.model
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed + len(self.turns))
        model.generate(
            input_ids=torch.tensor([prompt], device=self.loaded.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=self.loaded.device),
            generation_config=self._settings(limit),
            streamer=answering,
            stopping_criteria=StoppingCriteriaList([Stop()]),
            **{NAME: cache},
        )
        return answering

    def _settings(self, limit: int) -> Any:
        model: Any = self.loaded.model
        settings = copy.deepcopy(model.generation_config)
        settings.update(num_beams=1, max_length=None, max_new_tokens=limit, eos_token_id=self._stop_tokens or None)
        settings.update(use_cache=True, cache_implementation=None)
        if self.sampling.temperature == 0:
            settings.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        elif self.sampling.temperature is not None:
            settings.update(do_sample=True, temperature=self.sampling.temperature)
        if settings.pad_token_id is None:
            settings.pad_token_id = self.loaded.tokenizer.pad_token_id or 0  # one row: nothing is padded
        return settings

    def _ended(self, answer: Answering, limit: int) -> str:
        if answer.tokens[-1] in self._stop_tokens:
            return "end"
        if answer.stopped:
            return "stopped"
        return "length" if limit == self.max_new_tokens else "context"

    # -- tokens -----------------------------------------------------------------------------

    def _encode(self, message: str) -> list[int]:
        """The tokens that a message adds, up to where the answer begins."""
        tokenizer: Any = self.loaded.tokenizer
        if not self.has_template:
            # Plain text goes on where the last one ended.
            text = f"\n{message}\n" if self.tokens else message
            return list(tokenizer(text, add_special_tokens=not self.tokens, verbose=False)["input_ids"])
        if not message.strip():
            return []
        said = {"role": "user", "content": message}
        if not self.tokens:
            text = self._render([*self.messages, said])
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        new = self._after_answer(self.messages[:-1], said)
        # An answer that ended by itself brought its end token along.
        return new[1:] if new and new[0] == self.tokens[-1] else new

    def _after_answer(self, before: list[dict[str, str]], said: dict[str, str]) -> list[int]:
        """What the template writes after an answer: its end, the message, the next answer's beginning."""
        text = self._render([*before, {"role": "assistant", "content": _ANSWER}, said])
        _, found, after = text.rpartition(_ANSWER)
        if not found:
            raise UserError(f"the chat template of {self.loaded.name} does not show answers, so no message can follow")
        tokenizer: Any = self.loaded.tokenizer
        return list(tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError  # chat templates need it anyway

        try:
            return str(self.loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            what = "system prompt" if self.system and len(messages) == 2 else "conversation"
            raise UserError(
                f"the chat template of {self.loaded.name} does not take this {what}: {one_line(error)}"
            ) from error

    def _find_stop_tokens(self) -> list[int]:
        """Tokens that end an answer: the model's, and what its template writes behind one."""
        model: Any = self.loaded.model
        found = model.generation_config.eos_token_id
        stop = list(found) if isinstance(found, list | tuple) else [found] if found is not None else []
        tokenizer: Any = self.loaded.tokenizer
        if tokenizer.eos_token_id is not None:
            stop.append(tokenizer.eos_token_id)
        if self.has_template:
            said = {"role": "user", "content": "hello"}
            after = self._after_answer([*self.messages, said], said)
            if after and after[0] in tokenizer.all_special_ids:
                stop.append(after[0])
        return sorted(set(map(int, stop)))

    def _decode(self, tokens: list[int]) -> str:
        return str(self.loaded.tokenizer.decode(tokens, skip_special_tokens=True))

    def _new_cache(self) -> refreekv.ReFreeKVCache:
        try:
            return refreekv.ReFreeKVCache(self.loaded.model, self.policy, kv_dtype=self.kv_dtype)
        except (ValueError, TypeError) as error:
            raise UserError(one_line(error)) from error


def _length(cache: refreekv.ReFreeKVCache) -> int:
    return cache.get_seq_length(cache.pruned_layers[0].index)


def _restored(cache: refreekv.ReFreeKVCache, length: int) -> refreekv.ReFreeKVCache | None:
    """The cache without what was read of an abandoned message; None if all must be read again."""
    if length == 0 or len(cache.pruned_layers) < len(cache.layers):
        return None  # layers with a window do not remember what fell out of it
    if _length(cache) > length:
        cache.crop(length - _length(cache))
    return cache
