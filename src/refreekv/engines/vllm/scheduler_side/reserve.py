"""Blocks that stay free when a prompt is admitted, for what is kept of it to be moved into."""

from collections import deque
from collections.abc import Collection
from typing import Any

from refreekv.engines.vllm.messages import PruningOutcome
from refreekv.engines.vllm.scheduler_side.ledger import Entry

RECENT = 16
"""Prompts by which the next one is judged."""

GIVEN_BACK = 2
"""Blocks that moving gives back for each that is kept free, at least: else a request fewer runs for too little."""


class Reserve:
    """Says how many blocks a prompt must leave free to be admitted, and has vLLM's block manager see to it.

    vLLM admits a prompt once it fits. If nothing is free then, what is kept of it finds no private blocks when the
    prompt has been read: the prompt's own blocks stay taken, until a request ends or one is preempted, most likely
    the one that was read last, which is then read again (`benchmarks/vllm_queue.py` has a model of it).

    Parameters
    ----------
    manager : KVCacheManager or None
        vLLM's, whose ``watermark_blocks`` it heeds when it admits requests beside others that run; None where it has
        no such number.
    block : int
        Tokens of a block.
    """

    def __init__(self, manager: Any, block: int):
        self._manager = manager if hasattr(manager, "watermark_blocks") else None
        self._least: int = self._manager.watermark_blocks if self._manager is not None else 0
        self._block = block
        self._shares: deque[float] = deque(maxlen=RECENT)

    def learn(self, outcome: PruningOutcome) -> None:
        """Take note of what moving a prompt took, as a share of its blocks; 0 where nothing moved."""
        taken = max(group.copies for group in outcome.groups)
        self._shares.append(taken / max(1, outcome.prompt // self._block))

    def foresee(self, prompt: int, entries: Collection[Entry]) -> int:
        """How many blocks to leave free beside a prompt of so many tokens, given the requests that are there."""
        whole = prompt // self._block
        copies = round(max(self._shares, default=0.0) * whole)
        decided = [entry for entry in entries if entry.outcome is not None]
        waiting = max((_needed(entry) for entry in decided), default=0)
        # In the few steps that it takes, some of those that run go on to another block.
        growing = len(decided) // 2 if copies else 0
        return max(min(copies, (whole - copies) // GIVEN_BACK), waiting) + growing

    def admit(self, prompt: int, entries: Collection[Entry]) -> None:
        """Set it for the request that vLLM is about to admit."""
        if self._manager is not None:
            self._manager.watermark_blocks = max(self._least, self.foresee(prompt, entries))


def _needed(entry: Entry) -> int:
    """Blocks that an outcome still waits for."""
    if entry.outcome is None or not entry.pending:
        return 0
    return entry.outcome.groups[entry.pending[0]].copies
