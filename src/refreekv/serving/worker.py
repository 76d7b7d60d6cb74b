"""The one thread that answers: requests one after the other, each over the cache of its conversation."""

import asyncio
import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from refreekv.core.device_memory import free_memory
from refreekv.engines.transformers import ReFreeKVCache
from refreekv.engines.transformers.attachment import attached
from refreekv.report import CompressionReport
from refreekv.serving.answering import Answering, Listener, generate, length_of, read, restored
from refreekv.serving.conversations import Conversations
from refreekv.serving.stopping import StopTexts
from refreekv.serving.templates import stop_tokens
from refreekv.storage.host import available_memory

logger = logging.getLogger("refreekv")

MOST_WAITING = 64
"""Requests that may wait for their turn."""


class RefusedError(Exception):
    """Why a request is not answered, and the HTTP status that says so.

    Attributes
    ----------
    status : int
        Of HTTP.
    code : str
        The word that OpenAI's API, or a server like it, has for the cause.
    """

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Choice:
    """How the tokens of an answer are chosen; what is None is as the model's own settings say."""

    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def settings(self, model: Any, limit: int, stop: list[int], pad: int) -> Any:
        """A generation configuration for one row of text, with ``limit`` tokens at most."""
        settings = copy.deepcopy(model.generation_config)
        settings.update(num_beams=1, num_return_sequences=1, max_length=None, max_new_tokens=limit)
        settings.update(use_cache=True, cache_implementation=None, return_dict_in_generate=False)
        settings.update(eos_token_id=stop or None)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            if getattr(self, name) is not None:
                settings.update(**{name: getattr(self, name)})
        if self.temperature == 0:
            settings.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None)
        elif any(value is not None for value in (self.temperature, self.top_p, self.top_k, self.min_p)):
            settings.update(do_sample=True)
        if settings.pad_token_id is None:
            settings.pad_token_id = pad  # one row: nothing is padded
        return settings


@dataclass(frozen=True)
class Piece:
    """New text of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes
    ----------
    reason : str
        ``"stop"`` or ``"length"``, or ``"cancelled"``: nobody waits for it any more.
    prompt, reused, answer : int
        Tokens of the prompt, those of them that were in a cache already, and tokens generated.
    report : CompressionReport or None
        The cache at the end.
    """

    reason: str
    prompt: int = 0
    reused: int = 0
    answer: int = 0
    report: CompressionReport | None = None


Event = Piece | Finished | RefusedError


@dataclass(eq=False)
class Job:
    """One request on its way: what it asks for, and where its answer goes."""

    prompt: list[int]
    limit: int
    choice: Choice
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    begun: bool = False  # whether its turn has come
    told: bool = False  # whether some text has gone out
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def tell(self, event: Event) -> None:
        """Hand an event to whoever waits for it; from any thread."""
        self.told = self.told or isinstance(event, Piece)
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and with it everybody who waited
            self.cancel()

    def cancel(self) -> None:
        """Stop: nobody waits for the answer."""
        self._cancelled.set()

    def is_cancelled(self) -> bool:
        """Whether it was stopped."""
        return self._cancelled.is_set()


@dataclass
class Counts:
    """What was done so far."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)  # reasons and codes, to how many
    tokens_per_second: float = 0.0  # of the latest answer that was longer than one token
    latest: CompressionReport | None = None


class Worker:
    """Answers requests in one thread, in the order in which they came.

    Parameters
    ----------
    model, tokenizer
        What answers.
    conversations : Conversations
        Caches between requests.
    device : device
        Where the model takes its tokens.
    context : int or None
        The most tokens of prompt and answer together.
    chunk : int, optional
        Tokens of a prompt that are read at a time; between two chunks a request can be stopped.

    Attributes
    ----------
    broken : str
        Why nothing can be answered any more; empty as long as all is well.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        conversations: Conversations,
        *,
        device: torch.device,
        context: int | None,
        chunk: int | None = None,
    ):
        self.model, self.tokenizer, self.conversations = model, tokenizer, conversations
        self.device, self.context = device, context
        self.counts = Counts()
        self.broken = ""
        self._chunk = chunk or (512 if device.type == "cpu" else 4096)
        self._stop = stop_tokens(model, tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="refreekv")
        self._jobs: set[Job] = set()
        self._attached = ExitStack()
        # For as long as the server runs, so that captured steps outlive the caches they were made for.
        self._attached.enter_context(attached(model))

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return sum(job.begun for job in list(self._jobs))

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return len(self._jobs) - self.running

    def submit(self, prompt: list[int], limit: int | None, choice: Choice) -> Job:
        """Begin to answer; to be called in the event loop that waits for the answer.

        ``limit`` is the most tokens of the answer; None: as many as the context takes.

        Raises
        ------
        RefusedError
            The prompt is empty, has other tokens than the model's, or does not fit into the context; or too many
            requests wait.
        """
        if self.broken:
            raise RefusedError(503, "server_broken", self.broken)
        if not prompt:
            raise RefusedError(400, "invalid_value", "the prompt is empty: the tokenizer makes no token of it")
        size = _vocabulary(self.model)
        if size is not None and not all(0 <= token < size for token in prompt):
            raise RefusedError(400, "invalid_value", f"the prompt has tokens outside of the model's {size:,}")
        if self.context is not None:
            left = self.context - len(prompt)
            if left < 1:
                raise RefusedError(
                    400,
                    "context_length_exceeded",
                    f"the prompt has {len(prompt):,} tokens, and prompt and answer together may have "
                    f"{self.context:,}; shorten it",
                )
            limit = left if limit is None else min(limit, left)
        if self.waiting >= MOST_WAITING:
            raise RefusedError(429, "too_many_requests", f"{self.waiting} requests wait already; try again later")
        job = Job(prompt, limit or _ANSWER, choice, asyncio.get_running_loop())
        self._jobs.add(job)
        self._thread.submit(self._run, job)
        return job

    def stop(self) -> None:
        """Stop all answers, without waiting for that."""
        for job in list(self._jobs):
            job.cancel()

    def close(self) -> None:
        """Stop all answers, wait for that, and forget all conversations."""
        self.stop()
        self._thread.shutdown(wait=True)
        self.conversations.clear()
        self._attached.close()

    # -- in the thread ------------------------------------------------------------------------

    def _run(self, job: Job) -> None:
        job.begun = True
        event = self._answered(job)
        self._jobs.discard(job)
        outcome = event.code if isinstance(event, RefusedError) else event.reason
        self.counts.outcomes[outcome] = self.counts.outcomes.get(outcome, 0) + 1
        job.tell(event)

    def _answered(self, job: Job) -> Finished | RefusedError:
        if self.broken:
            return RefusedError(503, "server_broken", self.broken)
        event = self._tried(job)
        if isinstance(event, RefusedError) and event.code == "out_of_memory":
            # The frames that held tensors are gone by now.
            freed = self.conversations.free_memory()
            _return_memory(self.device)
            if freed and not job.told and not job.is_cancelled():
                event = self._tried(job)
                _return_memory(self.device)
        return event

    def _tried(self, job: Job) -> Finished | RefusedError:
        """Answer, or say why not; whatever goes wrong, the next request finds everything as it should be."""
        try:
            with torch.inference_mode():
                return self._answer(job)
        except Exception as error:
            if _is_out_of_memory(error):
                return RefusedError(
                    413,
                    "out_of_memory",
                    f"the memory of {self.device} is not enough for a conversation of {len(job.prompt):,} tokens: "
                    "shorten it, or serve with a smaller --kv-dtype, fewer weights or a policy that keeps less",
                )
            logger.exception("a request of %d tokens failed", len(job.prompt))
            if isinstance(error, torch.AcceleratorError):
                self.broken = f"the device failed, and only a new start helps: {_first_line(error)}"
                return RefusedError(503, "server_broken", self.broken)
            return RefusedError(500, "internal_error", f"{type(error).__name__}: {_first_line(error)}")

    def _answer(self, job: Job) -> Finished:
        if job.is_cancelled():
            return Finished("cancelled")
        prompt, stop = job.prompt, StopTexts(job.choice.stop)
        cache = self.conversations.take(prompt)
        reused = length_of(cache)

        def on_text(text: str, tokens: int, seconds: float) -> None:
            if shown := stop.add(text):
                job.tell(Piece(shown))

        listener = Listener(on_text=on_text, stopped=lambda: job.is_cancelled() or stop.found)
        if not read(self.model, cache, prompt, self.device, self._chunk, listener):
            before = restored(cache, reused)
            if before is not None:
                self.conversations.put(before, prompt, len(prompt))
            return Finished("cancelled")
        if job.choice.seed is not None:
            torch.manual_seed(job.choice.seed)
        pad = self.tokenizer.pad_token_id or 0
        settings = job.choice.settings(self.model, job.limit, self._stop, pad)
        answer = generate(self.model, self.tokenizer, cache, prompt, self.device, settings, listener)
        if not stop.found and (rest := stop.rest()):
            job.tell(Piece(rest))
        ended = answer.tokens[-1] in self._stop
        reason = "stop" if ended or stop.found else "cancelled" if job.is_cancelled() else "length"
        return self._finished(job, cache, answer, reused, reason)

    def _finished(self, job: Job, cache: ReFreeKVCache, answer: Answering, reused: int, reason: str) -> Finished:
        """Keep the cache for the next turn, and count.

        The memory of an answer that nobody waits for is free at once; who stops an answer and goes on later finds
        its conversation in a file.
        """
        report, tokens = cache.report, len(answer.tokens)
        self.conversations.put(cache, [*job.prompt, *answer.tokens], len(job.prompt), to_disk=reason == "cancelled")
        counts = self.counts
        counts.prompt_tokens += len(job.prompt)
        counts.reused_tokens += reused
        counts.answer_tokens += tokens
        counts.latest = report
        if tokens > 1 and answer.times[-1] > answer.times[0]:
            counts.tokens_per_second = (tokens - 1) / (answer.times[-1] - answer.times[0])
        return Finished(reason, len(job.prompt), reused, tokens, report)


_ANSWER = 4096
"""Tokens of an answer at most, where neither the request nor the model sets a limit."""


def memory_for_caches(device: torch.device) -> int:
    """A quarter of the memory that is free on a device now, in bytes; 1 GiB where that cannot be told."""
    return (free_memory(device) if device.type == "cuda" else available_memory()) // 4


def _vocabulary(model: Any) -> int | None:
    """Tokens that have an embedding."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return size if isinstance(size, int) else None


def _is_out_of_memory(error: BaseException) -> bool:
    # On CPUs torch has no class for it.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _return_memory(device: torch.device) -> None:
    """Give what is free back to the device, so that it is there in one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
