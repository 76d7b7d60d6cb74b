"""Caches of conversations between two requests, found again by the tokens that they hold.

The least recently used go to files once they hold too many bytes in memory, and come back when their
conversation goes on.
"""

import copy
import logging
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refreekv.engines.transformers import ReFreeKVCache
from refreekv.policies import Policy
from refreekv.serving.answering import length_of
from refreekv.storage.host_store import HostStore

logger = logging.getLogger("refreekv")

LEAST_SHARED = 32
"""Tokens that another conversation has to begin with alike for its cache to be copied: fewer are read as quickly."""

UNSAID = ("verify", "keep_evicted", "host_memory")
"""Settings of a cache that its file does not say."""


@dataclass
class Held:
    """A conversation's cache: in memory, or in a file.

    Attributes
    ----------
    tokens : list of int
        What the cache has read.
    prompt : int
        How many of them were the latest request's prompt.
    floor : int
        Tokens up to which entries are as they are: going on from an earlier place needs another cache.
    """

    tokens: list[int]
    prompt: int
    floor: int
    bytes: int
    cache: ReFreeKVCache | None = None
    file: Path | None = None

    def usable(self, prompt: list[int]) -> int:
        """How many tokens of a prompt need not be read, with at least one left to read; 0: none."""
        shared = min(common_prefix(self.tokens, prompt), len(prompt) - 1)
        # What was evicted comes back where it is kept.
        floor = 0 if self.cache is not None and self.cache.remembers else self.floor
        return shared if shared >= max(floor, LEAST_SHARED if self.branches_at(shared) else 1) else 0

    def branches_at(self, length: int) -> bool:
        """Whether what goes on from there is another conversation, and not another answer or end of this one."""
        return length < self.prompt - 1


class Conversations:
    """Keeps caches within limits of bytes. Safe to be asked by several threads.

    Parameters
    ----------
    model : PreTrainedModel
        What the caches are for.
    policy : Policy
        Decides on what they keep.
    memory_limit : int
        Bytes of caches in memory that no request is using.
    disk_limit : int
        Bytes of caches in files; 0: none.
    folder : path, optional
        Where the files go; None: a folder of its own among the system's temporary files. What is written there
        can be read by its owner only, and is removed at the end.
    **settings
        Of the caches, as for `ReFreeKVCache`; ``verify`` of prompts only.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy,
        *,
        memory_limit: int,
        disk_limit: int = 0,
        folder: str | os.PathLike[str] | None = None,
        **settings: Any,
    ):
        self._model, self._policy, self._settings = model, policy, settings
        self.memory_limit, self.disk_limit = memory_limit, disk_limit
        self._parent = folder
        self._folder: Path | None = None
        self._written = 0
        self._held: list[Held] = []  # the least recently used first
        self._lock = threading.Lock()

    @property
    def keep_evicted(self) -> HostStore | None:
        """Where all that was read is kept for the next request; None: what is evicted is gone."""
        return self._settings.get("keep_evicted")

    @property
    def memory_bytes(self) -> int:
        """Bytes of caches in memory."""
        return sum(held.bytes for held in list(self._held) if held.cache is not None)

    @property
    def disk_bytes(self) -> int:
        """Bytes of caches in files."""
        return sum(held.bytes for held in list(self._held) if held.cache is None)

    def count(self, *, in_memory: bool) -> int:
        """How many conversations are in memory, or in files."""
        return sum((held.cache is not None) is in_memory for held in list(self._held))

    def take(self, prompt: list[int]) -> ReFreeKVCache:
        """The cache that has read most of a prompt's beginning, no longer kept here; a new one if none has.

        It holds nothing that the prompt does not begin with, and not all of it.
        """
        with self._lock:
            while True:
                best = max(self._held, key=lambda held: held.usable(prompt), default=None)
                length = 0 if best is None else best.usable(prompt)
                if best is None or length == 0:
                    return self.new_cache()
                branches = best.branches_at(length)
                if not branches:
                    self._held.remove(best)
                cache = self._in_memory(best, copied=branches)
                if cache is None:
                    continue
                if length < len(best.tokens):
                    cache.crop(length - len(best.tokens))
                return cache

    def put(self, cache: ReFreeKVCache, tokens: list[int], prompt: int, *, to_disk: bool = False) -> None:
        """Keep a cache that has read the first of these tokens, of which ``prompt`` were asked with.

        ``to_disk``: not in memory.
        """
        length = length_of(cache)
        if length == 0:
            return
        held = Held(tokens[:length], min(prompt, length), _floor(cache, length), _bytes(cache), cache)
        with self._lock:
            self._held.append(held)
            if to_disk:
                self._write(held)
            self._shrink(self.memory_limit)

    def free_memory(self) -> int:
        """Move all caches to files, or drop them; how many bytes of memory that was."""
        with self._lock:
            before = self.memory_bytes
            self._shrink(0)
            return before - self.memory_bytes

    def clear(self) -> None:
        """Forget all caches, and remove their files."""
        with self._lock:
            self._held.clear()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None

    def new_cache(self) -> ReFreeKVCache:
        """A cache that has read nothing."""
        return ReFreeKVCache(self._model, self._policy, **self._settings)

    def _shrink(self, limit: int) -> None:
        for held in [held for held in self._held if held.cache is not None]:
            if self.memory_bytes <= limit:
                break
            self._write(held)
        for held in [held for held in self._held if held.cache is None]:
            if self.disk_bytes <= self.disk_limit:
                break
            self._forget(held)

    def _write(self, held: Held) -> None:
        """Move a cache to a file; drop it where that cannot be."""
        assert held.cache is not None
        try:
            if held.bytes > self.disk_limit:
                raise ValueError(f"its {held.bytes:,} bytes are more than the {self.disk_limit:,} for all files")
            self._written += 1
            file = self._place() / f"{self._written}.safetensors"
            held.cache.save(file)
            held.bytes, held.file = file.stat().st_size, file
        except (ValueError, OSError) as error:
            logger.info("a conversation is dropped, and will be read again if it goes on: %s", error)
            self._forget(held)
        held.cache = None

    def _in_memory(self, held: Held, *, copied: bool) -> ReFreeKVCache | None:
        """A cache or a copy of it, read from its file where it is in one; None if the file cannot be read."""
        if held.cache is not None:
            return copy.deepcopy(held.cache) if copied else held.cache
        assert held.file is not None
        # All else is said in the file.
        unsaid: dict[str, Any] = {"keep_evicted": None}
        unsaid |= {name: self._settings[name] for name in UNSAID if name in self._settings}
        try:
            return ReFreeKVCache.load(held.file, self._model, self._policy, **unsaid)
        except (ValueError, OSError) as error:
            logger.warning("a conversation is read again: %s", error)
            if copied:
                self._forget(held)
            return None
        finally:
            if not copied:
                held.file.unlink(missing_ok=True)

    def _forget(self, held: Held) -> None:
        self._held.remove(held)
        if held.file is not None:
            held.file.unlink(missing_ok=True)

    def _place(self) -> Path:
        if self._folder is None:
            # Made by mkdtemp: nobody else may look into it.
            self._folder = Path(tempfile.mkdtemp(prefix="refreekv-", dir=self._parent))
        return self._folder


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared at the speed of C
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _floor(cache: ReFreeKVCache, length: int) -> int:
    """Tokens up to which nothing can be taken back: what was evicted by then, or fell out of a window, is missed."""
    if len(cache.pruned_layers) < len(cache.layers):
        return length
    rows = [row for layer in cache.report.prunable for row in layer.rows]
    if all(min(row.kept_heads) == row.prompt_length for row in rows):
        return 0
    return max(layer.marks["pruned"] for layer in cache.pruned_layers)


def _bytes(cache: ReFreeKVCache) -> int:
    report = cache.report
    return report.bytes_after + report.index_bytes
