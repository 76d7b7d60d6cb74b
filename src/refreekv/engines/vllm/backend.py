"""The CPU attention backend, with block tables made dense and layers watched."""

import copy
from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from refreekv.engines.vllm.state import WorkerState


class PrunedMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds a group's metadata from its dense block table."""

    state: WorkerState | None = None
    """Set by the worker; without it (and in warm-up) the builder is vLLM's own."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As vLLM's, over the entries that are not holes."""
        step = self.state.step(common_attn_metadata) if self.state is not None else None
        dense = step.dense(self.kv_cache_spec.group) if step is not None else None
        if dense is not None:
            common_attn_metadata = copy.copy(common_attn_metadata)
            common_attn_metadata.block_table_tensor, common_attn_metadata.seq_lens = dense
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.pruning_step = step if step is not None and step.watches else None
        return metadata


class PrunedAttentionImpl(CPUAttentionBackendImpl):
    """Attends as vLLM does, then lets the step look."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Same parameters and result as the base class."""
        super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        step = getattr(attn_metadata, "pruning_step", None)
        if step is not None:
            step.after_attention(layer.layer_name, query, kv_cache, output)
        return output


class PrunedCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend with the two classes above; without a worker state it behaves like vLLM's."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The watched implementation."""
        return PrunedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The builder of dense tables."""
        return PrunedMetadataBuilder


def register() -> None:
    """Have vLLM choose this backend where it would choose its own, in this process."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{PrunedCPUBackend.__name__}")
