"""Stop checks read one token late, so that the device need not wait for the host.

`generate` asks after each token whether all rows are finished, and prepares the next one only when
the device has answered; meanwhile the device has nothing to do. transformers can read the answer a
token later and take the one token too many back (``DeferredStopCheck``, from 5.17 on), but does so on
Apple's devices only. Within `deferred_stop_checks` it does for CUDA, too.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.generation import utils

from refreekv.engines.transformers.cache import PrunedCache

DEVICES = {"cuda"}
"""Devices that work through a queue while the host goes on."""

Wanted = Callable[[PrunedCache], bool]

_wanted: ContextVar[Wanted | None] = ContextVar("refreekv_deferral", default=None)
_lock = threading.Lock()
_installed = contextlib.ExitStack()
_users = 0


@contextmanager
def deferred_stop_checks(wanted: Wanted) -> Iterator[None]:
    """Within, `generate` of this thread defers its stop checks for caches that ``wanted`` is true of.

    What it returns stays the same, and so does the cache's content; one forward more is run for an
    answer that ends before its length does. ``wanted`` is asked when the prompt was read.
    """
    token = _wanted.set(wanted)
    _enter()
    try:
        yield
    finally:
        _leave()
        _wanted.reset(token)


def _is_current(device: torch.device) -> bool:
    """Whether an event that is recorded now is one of this device, as that of a deferred check has to be."""
    return device.type != "cuda" or device.index in (None, torch.cuda.current_device())


def _enter() -> None:
    global _users
    with _lock:
        _users += 1
        check: Any = getattr(utils, "DeferredStopCheck", None)
        if _users > 1 or check is None:
            return
        original = check.is_supported

        @functools.wraps(original)
        def is_supported(device: torch.device, cache: Any, *args: Any, **kwargs: Any) -> bool:
            ours = _wanted.get()
            if ours is not None and isinstance(cache, PrunedCache) and device.type in DEVICES:
                return _is_current(device) and not kwargs.get("is_assistant") and ours(cache)
            return bool(original(device, cache, *args, **kwargs))

        check.is_supported = staticmethod(is_supported)
        _installed.callback(setattr, check, "is_supported", staticmethod(original))


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            _installed.close()
