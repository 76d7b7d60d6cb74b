"""What the scheduler's side knows of each unfinished request."""

from dataclasses import dataclass, field
from typing import Any

from refreekv.engines.vllm.messages import PruningOutcome


@dataclass
class Entry:
    """One request.

    Attributes
    ----------
    request : vllm Request
        vLLM's own object: its preemption count and status are always up to date.
    prompt : int
        Tokens of the prompt that it came with, which is the one that is pruned.
    outcome : PruningOutcome or None
        The last one that was applied, or is being applied.
    pending : list of int
        Groups whose tokens still wait for private blocks to be copied into.
    freed : int
        Blocks given back since the last preemption.
    coded : int
        Private blocks with coded tokens that came after the prompt, since the last preemption.
    due : int or None
        Tokens that are to be computed before another block of them is coded; None while none will be.
    """

    request: Any
    prompt: int
    outcome: PruningOutcome | None = None
    pending: list[int] = field(default_factory=list)
    freed: int = 0
    coded: int = 0
    due: int | None = None


class Ledger:
    """The unfinished requests by id."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def open(self, request: Any) -> None:
        """A request has arrived."""
        self.entries[request.request_id] = Entry(request, int(request.num_prompt_tokens))

    def close(self, request_id: str) -> Entry | None:
        """A request has ended."""
        return self.entries.pop(request_id, None)

    def current(self, outcome: PruningOutcome) -> Entry | None:
        """The entry that a outcome is about; None if the request ended or was preempted since."""
        entry = self.entries.get(outcome.request_id)
        if entry is None or entry.request.num_preemptions != outcome.epoch or entry.request.is_finished():
            return None
        return entry

    def untouched(self, request: Any, tokens: int) -> int:
        """How many of a request's first ``tokens`` tokens were computed without any eviction before them.

        Until the outcome is in, those of the prompt that the request came with: a session that goes on calls all that
        it holds its prompt. Afterwards all, if nothing was evicted, else those of that prompt.
        """
        entry = self.entries.get(request.request_id)
        if entry is None:
            return min(tokens, int(request.num_prompt_tokens))
        if entry.outcome is not None and not entry.outcome.altered:
            return tokens
        return min(tokens, entry.prompt)
