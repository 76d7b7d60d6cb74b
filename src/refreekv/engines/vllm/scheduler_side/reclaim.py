"""The scheduler's side: blocks of evicted tokens go back to the pool."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import RequestStatus

from refreekv.engines.vllm.messages import CodeOrder, CopyOrder, PruningOutcome, StepOrders
from refreekv.engines.vllm.metrics import PruningStats
from refreekv.engines.vllm.scheduler_side.ledger import Entry, Ledger
from refreekv.engines.vllm.scheduler_side.manager import PrivateAttentionManager, PrunedAttentionManager
from refreekv.engines.vllm.scheduler_side.reserve import Reserve


class Reclaimer:
    """Applies outcomes to the block managers.

    A cut is applied at once: the workers read around it from the step after the one that
    decided. Scattered tokens are first copied into private blocks, allocated here and filled
    by the workers at the start of the next step; the old blocks may be handed out with the
    same step, because its own writes come after the copies. Until there are blocks to copy
    into, the workers attend to the kept tokens where they are: memory decides when blocks
    come back, never what is computed.

    Tokens that came after a prompt are coded by the block, once so many of them are no longer among the newest: the
    blocks that they leave are free at once, and the one that they go to may be one of those.

    Parameters
    ----------
    coded_answers : bool
        Whether they are; else they stay as they are.
    """

    def __init__(self, coded_answers: bool = True) -> None:
        self.ledger = Ledger()
        self._coded_answers = coded_answers
        self._managers: tuple[PrunedAttentionManager, ...] = ()
        self._pool: BlockPool | None = None
        self._reserve: Reserve | None = None
        self._copies: list[tuple[PruningOutcome, CopyOrder]] = []
        self._stats = PruningStats()

    def bind(self, managers: Sequence[Any], pool: BlockPool, whole: Any = None) -> tuple[PrunedAttentionManager, ...]:
        """Take hold of those of the managers, one a group, that prune, and of the pool they share with all others.

        ``whole`` is vLLM's KV cache manager.

        Raises
        ------
        ValueError
            None of them does.
        """
        pruned = tuple(manager for manager in managers if isinstance(manager, PrunedAttentionManager))
        if not pruned:
            raise ValueError(
                f"the workers report KV caches that refreekv does not prune ({type(managers[0]).__name__}): start vLLM "
                f"through `refreekv serve`, or with --worker-cls as it prints it"
            )
        for manager in pruned:
            manager.ledger = self.ledger
        self._managers, self._pool = pruned, pool
        self._reserve = Reserve(whole, pruned[0].block_size)
        return pruned

    def receive(self, outcomes: list[PruningOutcome]) -> None:
        """Apply new outcomes, and go on with those that wait for blocks."""
        for outcome in outcomes:
            entry = self.ledger.current(outcome)
            if entry is None:
                continue
            self._stats.count_outcome(outcome, first=entry.outcome is None)
            if self._reserve is not None:
                self._reserve.learn(outcome)
            entry.outcome, entry.freed, entry.coded, entry.due = outcome, 0, 0, None
            entry.pending = [index for index, group in enumerate(outcome.groups) if group.copies]
            for index, group in enumerate(outcome.groups):
                if group.freed and not group.copies:
                    self._freed(entry, self._managers[index].free_range(outcome.request_id, group.start, group.stop))
        for entry in self.ledger.entries.values():
            if entry.pending:
                self._copy(entry)

    def admit(self, request: Any) -> None:
        """Called when vLLM is about to see whether there is room for a request."""
        if self._reserve is not None:
            self._reserve.admit(int(request.num_prompt_tokens), self.ledger.entries.values())

    def _copy(self, entry: Entry) -> None:
        """Order copies group by group, as far as there are free blocks."""
        outcome, pool = entry.outcome, self._pool
        assert outcome is not None
        assert pool is not None
        if self.ledger.current(outcome) is None:
            entry.pending = []
            return
        while entry.pending:
            index = entry.pending[0]
            group = outcome.groups[index]
            if pool.get_num_free_blocks() < group.copies:
                return
            private = pool.get_new_blocks(group.copies)
            self._freed(entry, self._managers[index].move_into(outcome.request_id, private, group.stop))
            order = CopyOrder(outcome.request_id, index, tuple(block.block_id for block in private))
            self._copies.append((outcome, order))
            entry.pending.pop(0)
            if outcome.coded_tokens and self._coded_answers:
                entry.due = outcome.prompt + outcome.coded_tokens + outcome.recent

    def _code_later(self) -> list[CodeOrder]:
        """Have tokens coded that are no longer among the newest of their requests."""
        found = []
        for request_id, entry in self.ledger.entries.items():
            request, outcome = entry.request, entry.outcome
            if entry.due is None or request.num_computed_tokens < entry.due or outcome is None:
                continue
            if self.ledger.current(outcome) is None or request.status != RequestStatus.RUNNING:
                continue
            manager = self._managers[0]
            assert isinstance(manager, PrivateAttentionManager)
            # Drafts that are not taken are computed anew, as another token.
            certain = min(request.num_computed_tokens, request.num_tokens)
            while certain >= entry.due:
                start = outcome.prompt + entry.coded * outcome.coded_tokens
                told = manager.code_range(
                    request_id, start // manager.block_size, (start + outcome.coded_tokens) // manager.block_size
                )
                if told is None:
                    break
                block, freed = told
                found.append(CodeOrder(request_id, block))
                entry.coded, entry.due = entry.coded + 1, entry.due + outcome.coded_tokens
                self._freed(entry, freed)
        return found

    def _freed(self, entry: Entry, blocks: int) -> None:
        entry.freed += blocks
        self._stats.count_blocks(blocks)

    def orders(self, scheduler_output: Any) -> StepOrders:
        """What the workers must know before the step of a scheduler's output."""
        preempted = {
            request_id: self.ledger.entries[request_id].request.num_preemptions
            for request_id in scheduler_output.preempted_req_ids or ()
            if request_id in self.ledger.entries
        }
        # Of a request that was preempted or ended meanwhile, the blocks belong to others.
        copies = [order for outcome, order in self._copies if self.ledger.current(outcome) is not None]
        self._copies = []
        return StepOrders(list(scheduler_output.finished_req_ids), preempted, copies, self._code_later())

    def finish(self, request_id: str) -> dict[str, Any] | None:
        """Close a request's account; what its response says, if its prompt has ended."""
        entry = self.ledger.close(request_id)
        if entry is None:
            return None
        outcome = entry.outcome
        if outcome is None:
            self._stats.count_refusal("ended")
            return None
        metrics = [metric for metric in outcome.metrics if metric is not None]
        kept = sum(outcome.kept) / (len(outcome.kept) * outcome.prompt)
        return {
            "prompt_tokens": outcome.prompt,
            "kept_share": kept,
            "bytes_share": kept if outcome.bytes_share is None else outcome.bytes_share,
            "selected_share": sum(outcome.selected) / (len(outcome.selected) * outcome.prompt),
            "blocks_freed": entry.freed,
            "metric": max(metrics) if metrics else None,
        }

    def take_stats(self) -> PruningStats | None:
        """Counts since the last call; None if there were none."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, PruningStats()
        return stats
