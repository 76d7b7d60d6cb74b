"""What the scheduler's side knows of each unfinished request."""

from dataclasses import dataclass, field
from typing import Any

from refreekv.engines.vllm.messages import Verdict


@dataclass
class Entry:
    """One request.

    Attributes
    ----------
    request : vllm Request
        vLLM's own object: its preemption count and status are always up to date.
    verdict : Verdict or None
        The last one that was applied, or is being applied.
    pending : list of int
        Groups whose tokens still wait for private blocks to be copied into.
    freed : int
        Blocks given back since the last preemption.
    """

    request: Any
    verdict: Verdict | None = None
    pending: list[int] = field(default_factory=list)
    freed: int = 0


class Ledger:
    """The unfinished requests by id."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def open(self, request: Any) -> None:
        """A request has arrived."""
        self.entries[request.request_id] = Entry(request)

    def close(self, request_id: str) -> Entry | None:
        """A request has ended."""
        return self.entries.pop(request_id, None)

    def current(self, verdict: Verdict) -> Entry | None:
        """The entry that a verdict is about; None if the request ended or was preempted since."""
        entry = self.entries.get(verdict.request_id)
        if entry is None or entry.request.num_preemptions != verdict.epoch or entry.request.is_finished():
            return None
        return entry

    def untouched(self, request: Any, tokens: int) -> int:
        """How many of a request's first ``tokens`` tokens were computed without any eviction before them.

        Until the verdict is in, the prompt's. Afterwards all, if nothing was evicted, else those of
        the prompt that the verdict was about: a session that goes on calls all that it holds its prompt.
        """
        entry = self.entries.get(request.request_id)
        verdict = entry.verdict if entry is not None else None
        if verdict is None:
            return min(tokens, int(request.num_prompt_tokens))
        return min(tokens, verdict.prompt) if any(group.freed for group in verdict.groups) else tokens
