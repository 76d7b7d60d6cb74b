"""What must hold of the block pool between any two steps; tests call it after every one."""

from collections import Counter
from typing import Any

from refreekv.engines.vllm.scheduler_side.manager import PrunedAttentionManager


def check(scheduler: Any) -> None:
    """Account for every block of the pool.

    Parameters
    ----------
    scheduler : vllm Scheduler
        With the plugin's connector.

    Raises
    ------
    AssertionError
        Naming the first block or request whose account does not come out even.
    """
    manager = scheduler.kv_cache_manager
    pool, managers = manager.block_pool, manager.coordinator.single_type_managers
    held: Counter[int] = Counter()
    for one in managers:
        for blocks in [*one.req_to_blocks.values(), *getattr(one, "private", {}).values()]:
            held.update(block.block_id for block in blocks if not block.is_null)
    for _, blocks in scheduler.deferred_frees:
        held.update(block.block_id for block in blocks if not block.is_null)

    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert len(free) == len(set(free)) == pool.get_num_free_blocks(), "the free queue counts or lists a block twice"
    free_ids = set(free)
    for block in pool.blocks:
        if block.is_null:
            assert block.block_id not in free_ids, "the null block is in the free queue"
            continue
        count = held[block.block_id]
        assert block.ref_cnt == count, (
            f"block {block.block_id} says it is held {block.ref_cnt} times; tables hold it {count} times"
        )
        assert (count == 0) == (block.block_id in free_ids), (
            f"block {block.block_id} is held {count} times, and {'in' if block.block_id in free_ids else 'not in'} "
            f"the free queue"
        )
    _check_requests(scheduler, managers)


def _check_requests(scheduler: Any, managers: Any) -> None:
    ledger = scheduler.connector.reclaimer.ledger
    for request_id, entry in ledger.entries.items():
        assert request_id in scheduler.requests, f"the ledger still has {request_id}, which has ended"
        lengths = {len(one.req_to_blocks.get(request_id, ())) for one in managers}
        assert len(lengths) == 1, f"{request_id}'s block tables differ in length between groups: {lengths}"
        if entry.outcome is None or ledger.current(entry.outcome) is None:
            continue
        pruned = [one for one in managers if isinstance(one, PrunedAttentionManager)]
        for index, (one, group) in enumerate(zip(pruned, entry.outcome.groups, strict=True)):
            blocks = one.req_to_blocks.get(request_id, [])
            if not blocks or index in entry.pending:
                continue
            nulls = [place for place, block in enumerate(blocks) if block.is_null]
            beside = hasattr(one, "private")
            start, stop, count = 0 if beside else group.start, group.stop, group.copies + entry.coded
            if entry.coded:
                stop = (entry.outcome.prompt + entry.coded * entry.outcome.coded_tokens) // one.block_size
            assert nulls == list(range(start, stop)), f"{request_id} has other holes than it was told"
            private = one.private.get(request_id, []) if beside else blocks[: group.copies]
            assert len(private) == count, f"{request_id} has {len(private)} private blocks, not {count}"
            assert all(block.block_hash is None and block.ref_cnt == 1 for block in private), (
                f"a private block of {request_id} is offered to the prefix cache or shared"
            )


def check_idle(scheduler: Any) -> None:
    """`check`, and after all requests have ended: every block is free again, nothing is remembered."""
    check(scheduler)
    pool = scheduler.kv_cache_manager.block_pool
    assert not scheduler.connector.reclaimer.ledger.entries, "requests have ended and are still in the ledger"
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "not every block came back"
