"""What stands before vLLM's coordinator where there are several groups of layers."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from refreekv.engines.vllm.scheduler_side.manager import PrunedAttentionManager


class LeadingCoordinator:
    """Stands before vLLM's coordinator and asks the first group where all must answer alike.

    For every running request of every step, vLLM asks each group's manager the same questions
    with the same arguments. Tables of all groups are equally long and equally far offered to
    the prefix cache, holes or not, so the first group's answer is everybody's; only if there is
    something to do, all are told. Everything else goes to vLLM's coordinator.

    Parameters
    ----------
    inner : KVCacheCoordinator
        vLLM's; every group of it is a `PrunedAttentionManager`.
    """

    def __init__(self, inner: Any):
        self._inner = inner
        self._lead: PrunedAttentionManager = inner.single_type_managers[0]
        self._groups = len(inner.single_type_managers)
        self._block: int = self._lead.block_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _held(self, request_id: str) -> int:
        return len(self._lead.req_to_blocks.get(request_id, ()))

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> int:
        """Blocks that a request needs beyond those it holds, in all groups."""
        if new_computed_blocks[0]:
            more: int = self._inner.get_num_blocks_to_allocate(
                request_id, num_tokens, new_computed_blocks, *args, **kwargs
            )
            return more
        return self._groups * max(0, -(-num_tokens // self._block) - self._held(request_id))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        """New blocks for a request, a list for each group."""
        if -(-num_tokens // self._block) <= self._held(request_id):
            return tuple([] for _ in range(self._groups))
        new: tuple[list[KVCacheBlock], ...] = self._inner.allocate_new_blocks(request_id, num_tokens, *args, **kwargs)
        return new

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        """Offer a request's full blocks to the prefix cache."""
        if self._lead.offers(request, num_computed_tokens):
            self._inner.cache_blocks(request, num_computed_tokens)

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: holes come from outcomes, not from a window."""


class HybridCoordinator:
    """Stands before vLLM's coordinator where only one of the groups is pruned.

    What sliding-window layers compute of an answer comes from what the others kept, too: so no group offers more to the
    prefix cache than was computed without any eviction. Everything else goes to vLLM's coordinator.

    Parameters
    ----------
    inner : KVCacheCoordinator
        vLLM's.
    pruned : PrunedAttentionManager
        The manager of the group that is pruned.
    """

    def __init__(self, inner: Any, pruned: PrunedAttentionManager):
        self._inner, self._pruned = inner, pruned

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        """Offer a request's full blocks to the prefix cache, in all groups."""
        self._inner.cache_blocks(request, self._pruned.untouched(request, num_computed_tokens))
