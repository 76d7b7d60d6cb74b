"""The KV cache spec that gives layers block tables of their own, and its registration."""

from dataclasses import dataclass
from typing import Self

from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from refreekv.engines.vllm.scheduler_side.manager import PrivateAttentionManager, PrunedAttentionManager


@dataclass(frozen=True, kw_only=True)
class PrunedAttentionSpec(FullAttentionSpec):
    """Full attention whose layers share a block table only within their group.

    Attributes
    ----------
    group : int
        Which group; layers of different groups never merge.
    probe_tail : int
        Last prompt tokens whose queries the policy probes. They must be computed, so a
        prefix-cache hit ends before them.
    spread_probes : bool
        Whether the policy probes queries all over the prompt: then there are no hits.
    """

    group: int = 0
    probe_tail: int = 1
    spread_probes: bool = False

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for the layers of one group; AssertionError (as vLLM expects) for several groups."""
        assert all(spec == specs[0] for spec in specs), "layers of different groups keep block tables of their own"
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers may share one block table."""
        return all(spec == self for spec in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class PrivateAttentionSpec(PrunedAttentionSpec):
    """All layers share ordinary block tables; what is kept of a prompt lies in private blocks beside these."""


def register_spec() -> None:
    """Make the specs known to vLLM in this process; may be called repeatedly."""
    # vLLM registers its own specs lazily, and only while the registry is empty.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(
        PrunedAttentionSpec, PrunedAttentionManager, uniform_type_base_spec=PrunedAttentionSpec
    )
    KVCacheSpecRegistry.register(
        PrivateAttentionSpec, PrivateAttentionManager, uniform_type_base_spec=PrivateAttentionSpec
    )


# A spec reaches the scheduler's process by unpickling, which imports this module: there is no other hook before
# vLLM asks its registry for the manager.
register_spec()
