"""The block manager of a pruned group: some of a request's table entries are the null block."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from refreekv.engines.vllm.scheduler_side.ledger import Ledger


class PrunedAttentionManager(FullAttentionManager):
    """Full attention's manager, with holes in the tables of requests whose prompt has ended.

    Invariants, checked by `invariants.check`:

    - An entry is the null block or a block that this request holds a reference to.
    - A block with a hash (offered to the prefix cache) holds the keys and values of exactly
      the tokens that the hash stands for, computed without any eviction. So blocks from the
      prompt's end on are offered only if nothing of the prompt was evicted, and private
      blocks (copies of scattered tokens) never are.
    """

    ledger: Ledger | None = None
    """Shared by all groups; set by the connector once vLLM has made the managers."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        **more: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """As full attention, but the queries that the policy probes are left to be computed."""
        # vLLM looks groups up one after the other, each within what the last one found.
        if kv_cache_spec.group == 0:
            max_length = 0 if kv_cache_spec.spread_probes else max(0, max_length + 1 - kv_cache_spec.probe_tail)
        hit: tuple[tuple[list[KVCacheBlock], ...], int] = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **more
        )
        return hit

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer full blocks to the prefix cache, those of generated tokens only if nothing was evicted."""
        super().cache_blocks(request, self.untouched(request, num_tokens), *args, **kwargs)

    def offers(self, request: Any, num_tokens: int) -> bool:
        """Whether `cache_blocks` would offer a block that is not offered yet."""
        cached: int = self.num_cached_block.get(request.request_id, 0)
        if num_tokens // self.block_size <= cached:
            return False
        return bool(self.untouched(request, num_tokens) // self.block_size > cached)

    def untouched(self, request: Any, num_tokens: int) -> int:
        """How many of a request's first tokens were computed without any eviction before them."""
        assert self.ledger is not None, "the connector has not bound the block managers yet"
        return self.ledger.untouched(request, num_tokens)

    def free_range(self, request_id: str, start: int, stop: int) -> int:
        """Give table entries ``start … stop - 1`` back to the pool; how many were."""
        blocks = self.req_to_blocks[request_id]
        gone = [block for block in blocks[start:stop] if not block.is_null]
        blocks[start:stop] = [self._null_block] * (stop - start)
        # Later blocks of a prefix are of no use without the earlier ones: they are reused first.
        self.block_pool.free_blocks(reversed(gone))
        return len(gone)

    def move_into(self, request_id: str, private: Sequence[KVCacheBlock], stop: int) -> int:
        """Put private blocks in the first places and free all others before ``stop``; blocks held fewer."""
        freed = self.free_range(request_id, 0, stop)
        self.req_to_blocks[request_id][: len(private)] = private
        return freed - len(private)


class PrivateAttentionManager(PrunedAttentionManager):
    """The manager where what is kept of a prompt lies in private blocks, which no block table has.

    The table keeps its columns: null blocks where the prompt's full blocks were, ordinary blocks from the prompt's
    last, partly filled one on. So slots, positions and further blocks are what they would be without pruning.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.private: dict[str, list[KVCacheBlock]] = {}

    def move_into(self, request_id: str, private: Sequence[KVCacheBlock], stop: int) -> int:
        """Hold private blocks for a request and free all others before table entry ``stop``; blocks held fewer."""
        assert request_id not in self.private, f"{request_id} has private blocks already"
        self.private[request_id] = list(private)
        return self.free_range(request_id, 0, stop) - len(private)

    def code_range(self, request_id: str, start: int, stop: int) -> tuple[int, int] | None:
        """Hold one more private block instead of those in table entries ``start … stop - 1``, of which it may be one.

        Returns
        -------
        block, freed : int
            The block's id, and blocks held fewer. None if no block is free, not even one of those.
        """
        blocks, pool = self.req_to_blocks[request_id], self.block_pool
        if not pool.get_num_free_blocks() and all(block.ref_cnt > 1 for block in blocks[start:stop]):
            return None
        freed = self.free_range(request_id, start, stop)
        (block,) = pool.get_new_blocks(1)
        self.private[request_id].append(block)
        return block.block_id, freed - 1

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """All blocks that a request holds, which are no longer its own: whoever calls this frees them."""
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        # In front, so that they are freed last and reused last; nobody finds anything in them.
        return [*self.private.pop(request_id, ()), *blocks]
