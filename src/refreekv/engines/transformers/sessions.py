"""Whose session it is: which blocks a thread or context has opened, and which calls of `generate` run in it.

Both are kept in context variables. So a block is in force in the thread or task that opened it, in tasks that
were made inside it, and wherever a copy of that context runs; a new thread starts with an empty context.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.prompt import on_stack


class Session(Protocol):
    """Who makes the cache of a call that brings none."""

    def new_cache(self, *, nested: bool = False) -> PrunedCache:
        """Make the cache; ``nested``: for a call inside another one, whose cache the report is about."""


class Opened:
    """A block that is open on a model.

    A context lives on when a block was left, and keeps what was set in it: so this lets go of all it knows then.

    Attributes
    ----------
    attachment : object or None
        The attachment of the model; None once the block was left.
    session : Session or None
        Who makes caches; None once the block was left.
    served : bool
        Whether a call was pruned inside.
    missed : bool
        Whether the model was called meanwhile in a context that the block is not in force in.
    """

    def __init__(self, attachment: object, session: Session):
        self.attachment: object | None = attachment
        self.session: Session | None = session
        self.served = False
        self.missed = False

    def new_cache(self) -> PrunedCache:
        """Make the cache of a call that brings none."""
        assert self.session is not None
        nested = any(answer.started and self in answer.opened for answer in _alive())
        return self.session.new_cache(nested=nested)


class Answer:
    """One call of `generate`, from its begin to its end.

    Attributes
    ----------
    opened : tuple of Opened
        Blocks in force when it began: calls without a cache inside this one are no answers of theirs.
    started : bool
        Whether it has said what cache it uses.
    ran : bool
        Whether the model itself ran in it.
    frame : int or None
        Identity of the frame that it runs in, if it did not come through the model's own ``generate``; see `on_stack`.
    stack : ExitStack
        What is to end with it.
    """

    def __init__(self, attachment: object, frame: int | None = None):
        # Weak: a context may keep an answer that nobody saw the end of.
        self._attachment = weakref.ref(attachment)
        self.frame = frame
        self.opened = tuple(opened for opened in _opened.get() if opened.session is not None)
        self.started = False
        self.ran = False
        self.claimed = False
        self.done = False
        self.stack = ExitStack()

    @property
    def is_seen(self) -> bool:
        """Whether it came through the model's `generate` as it is while refreekv is attached."""
        return self.frame is None

    def is_of(self, attachment: object) -> bool:
        """Whether the model of an attachment generates."""
        return self._attachment() is attachment

    def is_running(self) -> bool:
        """Whether it has not ended; to be asked in the thread that it runs in."""
        return not self.done and (self.frame is None or on_stack(self.frame))


_opened: ContextVar[tuple[Opened, ...]] = ContextVar("refreekv_opened", default=())
_answers: ContextVar[tuple[Answer, ...]] = ContextVar("refreekv_answers", default=())


def innermost(attachment: object) -> Opened | None:
    """The block that is in force on a model in this context; of several the one that was opened last."""
    return next((opened for opened in reversed(_opened.get()) if opened.attachment is attachment), None)


def enter(opened: Opened) -> None:
    """Put a block in force in this context."""
    _opened.set((*_opened.get(), opened))


def leave(opened: Opened) -> None:
    """Take a block out of force everywhere, whatever context it is left in."""
    opened.attachment = opened.session = None
    # No token is reset: a block held open by a generator may be left in another context than it was entered in.
    _opened.set(tuple(one for one in _opened.get() if one.session is not None))


@contextmanager
def in_force(opened: Opened) -> Iterator[None]:
    """Within, a block is in force in this context, too."""
    token = _opened.set((*_opened.get(), opened))
    try:
        yield
    finally:
        _opened.reset(token)


@contextmanager
def answering(attachment: object) -> Iterator[Answer]:
    """Within, `generate` runs on a model."""
    answer = Answer(attachment)
    token = _answers.set((*_alive(), answer))
    try:
        with answer.stack:
            yield answer
    finally:
        answer.done = True
        _answers.reset(token)


def current(attachment: object) -> Answer | None:
    """The innermost call of `generate` that runs on a model in this context."""
    return next((answer for answer in reversed(_alive()) if answer.is_of(attachment)), None)


def claimed(attachment: object, frame: Any) -> Answer:
    """The call of `generate` that a frame belongs to: one that was seen to begin, or else a new one."""
    answer = current(attachment)
    if answer is None or answer.claimed:
        answer = Answer(attachment, id(frame))
        _answers.set((*_alive(), answer))
    answer.claimed = True
    return answer


def _alive() -> tuple[Answer, ...]:
    return tuple(answer for answer in _answers.get() if answer.is_running())
