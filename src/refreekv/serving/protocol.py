"""What OpenAI's API says, as far as it is spoken here: requests that are checked, and the answers' JSON.

What would change an answer and is not done here is refused; what does not change it is passed over.
"""

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from refreekv.report import CompressionReport
from refreekv.serving.worker import Choice, Finished

MOST_STOPS = 16
_SEEDS = 2**63


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _written(text: str) -> str:
    """A text as it came; ValueError for half characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text has surrogates, which are no characters") from error
    return text


class _Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = Field(None, max_length=MOST_STOPS)
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not all(value):
            raise ValueError("a stop text is empty")
        return None if value is None else [_written(text) for text in value]

    @model_validator(mode="after")
    def _supported(self) -> Any:
        if self.n not in (None, 1):
            raise ValueError("n must be 1: one answer is given")
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported; leave it out (repetition_penalty is)")
        return self

    @property
    def choice(self) -> Choice:
        """How tokens are chosen."""
        seed = None if self.seed is None else self.seed % _SEEDS
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return Choice(**{name: getattr(self, name) for name in names}, seed=seed, stop=tuple(self.stop or ()))

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class Part(BaseModel):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    @field_validator("content")
    @classmethod
    def _text(cls, value: Any) -> str:
        if isinstance(value, list):
            others = sorted({part.type for part in value if part.type != "text" or part.text is None})
            if others:
                raise ValueError(f"content has parts that are no text ({', '.join(others)}); this server reads text")
            value = "".join(part.text for part in value)
        return _written(value or "")

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        assert isinstance(self.content, str) or self.content is None
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


class ChatRequest(_Request):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _chat_supported(self) -> Any:
        if self.logprobs:
            raise ValueError("logprobs are not supported; leave them out")
        if (self.tools and self.tool_choice != "none") or self.functions:
            raise ValueError("tools are not supported; leave them out")
        if (self.response_format or {}).get("type", "text") != "text":
            raise ValueError("response_format must be text: answers are not constrained")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Request):
    """The body of ``/v1/completions``."""

    prompt: str | list[int] | list[str]
    max_tokens: int | None = Field(16, ge=1)  # OpenAI's default
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _completion_supported(self) -> Any:
        if self.logprobs is not None or self.echo or self.suffix or self.best_of not in (None, 1):
            raise ValueError("logprobs, echo, suffix and best_of are not supported; leave them out")
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str):
            if len(self.prompt) > 1:
                raise ValueError(f"one prompt at a time is taken, and these are {len(self.prompt)}")
            self.prompt = str(self.prompt[0])
        if isinstance(self.prompt, str):
            _written(self.prompt)
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer."""
        return self.max_tokens


# -- answers ---------------------------------------------------------------------------------------


class Writer:
    """The JSON of one answer, whole or in pieces.

    Parameters
    ----------
    model : str
        The model's name.
    chat : bool
        Whether this answers ``/v1/chat/completions``.
    """

    def __init__(self, model: str, *, chat: bool):
        self._chat = chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._common = {"id": self._id, "created": int(time.time()), "model": model}

    def whole(self, texts: Iterable[str], end: Finished) -> dict[str, Any]:
        """The answer in one object."""
        text = "".join(texts)
        body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": end.reason}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._common, "object": kind, "choices": [choice], "usage": usage(end), "refreekv": kept(end.report)}

    def begin(self) -> str:
        """The first event of a stream: who speaks."""
        return self._event({"role": "assistant", "content": ""}) if self._chat else ""

    def piece(self, text: str) -> str:
        """An event with new text."""
        return self._event({"content": text} if self._chat else text)

    def end(self, end: Finished, *, with_usage: bool) -> str:
        """The last events of a stream."""
        last = self._event({} if self._chat else "", end.reason)
        if with_usage:
            last += event({**self._chunk(), "choices": [], "usage": usage(end), "refreekv": kept(end.report)})
        return last + "data: [DONE]\n\n"

    def _chunk(self) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk" if self._chat else "text_completion"}

    def _event(self, new: dict[str, str] | str, reason: str | None = None) -> str:
        body = {"delta": new} if self._chat else {"text": new}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": reason}
        return event({**self._chunk(), "choices": [choice]})


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def usage(end: Finished) -> dict[str, Any]:
    """Numbers of tokens."""
    return {
        "prompt_tokens": end.prompt,
        "completion_tokens": end.answer,
        "total_tokens": end.prompt + end.answer,
        "prompt_tokens_details": {"cached_tokens": end.reused},
    }


def kept(report: CompressionReport | None) -> dict[str, Any] | None:
    """What an answer's cache holds, beside what a full one would."""
    if report is None:
        return None
    return {
        "policy": report.policy,
        "kv_dtype": report.kv_dtype,
        "kept_share": report.budget,
        "bytes": report.bytes_after,
        "host_bytes": report.host_bytes,
        "full_bytes": report.bytes_before,
        "verified": None if report.verified is None else asdict(report.verified),
        "remembered": None if report.remembered is None else asdict(report.remembered),
    }


def error(status: int, code: str, message: str) -> dict[str, Any]:
    """The object that says why a request is not answered."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
