"""A conversation over one pruned cache: each message feeds its own tokens only."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import refreekv
from refreekv.cli.app import UserError, one_line
from refreekv.cli.loading import Loaded, quiet_transformers
from refreekv.core.quantisation import Ladder
from refreekv.policies.base import AUTO, ladder_for
from refreekv.serving import answering, templates
from refreekv.serving.answering import Answering, Listener, length_of


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
    system : str, optional
        A system prompt.
    max_new_tokens : int
        Tokens of an answer at most.
    sampling : Sampling
        How tokens are chosen.
    chunk : int, optional
        Tokens of a message that are read at a time; between two chunks it can be stopped.
    **settings
        Of the cache, as for `refreekv.ReFreeKVCache`.

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
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling = Sampling(),
        chunk: int | None = None,
        **settings: Any,
    ):
        self.loaded = loaded
        self.policy = policy
        self._of_caches = settings
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
        with self._template():
            self._stop_tokens = templates.stop_tokens(loaded.model, loaded.tokenizer, self.messages)

    @property
    def formats(self) -> Ladder | None:
        """The number formats that what is kept is stored in; None: the model's precision."""
        return ladder_for(self.policy, self._of_caches.get("kv_dtype", AUTO))

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
        held = length_of(cache)
        begin = time.perf_counter()
        try:
            with torch.inference_mode(), quiet_transformers():
                if not self._read(cache, prompt, listener):
                    self._cache = answering.restored(cache, held)
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
        return answering.read(self.loaded.model, cache, prompt, self.loaded.device, self.chunk, listener)

    def _generate(self, cache: refreekv.ReFreeKVCache, prompt: list[int], limit: int, listener: Listener) -> Answering:
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed + len(self.turns))
        loaded, settings = self.loaded, self._settings(limit)
        return answering.generate(loaded.model, loaded.tokenizer, cache, prompt, loaded.device, settings, listener)

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
            return templates.tokens_of(tokenizer, text, special=not self.tokens)
        if not message.strip():
            return []
        said = {"role": "user", "content": message}
        if not self.tokens:
            with self._template():
                return templates.tokens_of(tokenizer, templates.render(tokenizer, [*self.messages, said]))
        with self._template():
            new = templates.after_answer(tokenizer, self.messages[:-1], said)
        # An answer that ended by itself brought its end token along.
        return new[1:] if new and new[0] == self.tokens[-1] else new

    @contextmanager
    def _template(self) -> Iterator[None]:
        """Within, what the chat template refuses is told to the user."""
        try:
            yield
        except templates.TemplateRefusal as error:
            what = "system prompt" if self.system and len(self.messages) == 1 else "conversation"
            raise UserError(
                f"the chat template of {self.loaded.name} does not take this {what}: {one_line(error)}"
            ) from error

    def _decode(self, tokens: list[int]) -> str:
        return str(self.loaded.tokenizer.decode(tokens, skip_special_tokens=True))

    def _new_cache(self) -> refreekv.ReFreeKVCache:
        try:
            return refreekv.ReFreeKVCache(self.loaded.model, self.policy, **self._of_caches)
        except (ValueError, TypeError) as error:
            raise UserError(one_line(error)) from error
