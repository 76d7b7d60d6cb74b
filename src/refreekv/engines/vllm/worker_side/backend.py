"""The CPU attention backend, with block tables made dense and layers watched."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from refreekv.engines.vllm.worker_side.state import WorkerState
from refreekv.engines.vllm.worker_side.step import Step


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

    def for_groups(self, first: CPUAttentionMetadata, step: Step, slots: Any) -> Iterator[CPUAttentionMetadata]:
        """Metadata of groups 1, 2, … of a step, given that of group 0: only what differs is made anew.

        Parameters
        ----------
        first : CPUAttentionMetadata
            Group 0's, as `build` made it.
        step : Step
            The step.
        slots : mapping of int to Tensor
            Each group's slot mapping.
        """
        plan = functools.partial(
            ops.cpu_attn_get_scheduler_metadata,
            num_reqs=step.requests,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            query_start_loc=first.query_start_loc,
            causal=first.causal,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        shared = first.__dict__
        for group in range(1, len(step.tables)):
            # As copy.copy, at a fifth of its cost.
            metadata = object.__new__(CPUAttentionMetadata)
            metadata.__dict__.update(shared)
            dense = step.dense(group)
            if dense is None:
                metadata.block_table = step.tables[group]
            else:
                metadata.block_table, seq_lens = dense
                metadata.seq_lens, metadata.scheduler_metadata = seq_lens, plan(seq_lens=seq_lens)
            metadata.slot_mapping = slots[group]
            yield metadata


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
