"""vLLM's attention backends for CUDA, with prompts watched and later queries read by the kernel over kept entries."""

import copy
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from refreekv.engines.vllm.gpu.state import KeptState
from refreekv.engines.vllm.gpu.step import Step, whole_rows
from refreekv.kernels.paged import Rows


class KeptMetadata:
    """What layers do beside, or instead of, vLLM's attention in a step.

    Parameters
    ----------
    state : KeptState
        The worker's.
    step : Step or None
        The step's plan; None while a graph is captured.
    rows : Rows or None
        Those of the kernel over kept entries, if any.
    block_table : Tensor
        vLLM's, ``[R, W]``.
    """

    def __init__(self, state: KeptState, step: Step | None, rows: Rows | None, block_table: Tensor):
        self._state, self._step, self._rows, self._block_table = state, step, rows, block_table
        self.stock = step is not None and step.stock
        """Whether vLLM's kernel has rows to read."""

    def after(self, name: str, query: Tensor, output: Tensor) -> None:
        """A layer's keys and values are written, and vLLM's kernel has read its rows."""
        if self._step is not None and self._step.prompts:
            self._state.look(self._step, name, query, self._block_table)
        if self._rows is not None:
            self._state.attend(name, query, self._block_table, self._rows, output)


class _KeptBuilder:
    """Of a metadata builder: plans both kernels' rows. Without a state it is vLLM's own."""

    state: KeptState | None = None
    """Set by the worker."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As vLLM's, for the rows that it reads."""
        common, state = common_attn_metadata, self.state
        step = state.step if state is not None else None
        if state is None or step is None:
            return super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        kept = KeptMetadata(state, step, step.rows(common), common.block_table_tensor)
        if step.limits is not None:
            common = copy.copy(common)
            common.seq_lens = torch.minimum(common.seq_lens, step.limits)
        # A fast build plans nothing for the kernel, which is not needed where nothing is read.
        metadata = super().build(common_prefix_len, common, fast_build or not kept.stock)  # type: ignore[misc]
        metadata.kept = kept
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Full graphs hold steps in which no prompt is read: the kernel over kept entries reads all rows."""
        common = common_attn_metadata
        metadata = super().build_for_cudagraph_capture(common)  # type: ignore[misc]
        state = self.state
        if state is not None:
            rows = whole_rows(
                common.query_start_loc, common.seq_lens, state.slots, state.numbered, common.max_query_len
            )
            metadata.kept = KeptMetadata(state, None, rows, common.block_table_tensor)
        return metadata


class _KeptImpl:
    """Of an attention implementation: reads with both kernels."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Same parameters and result as the base class."""
        kept: KeptMetadata | None = getattr(attn_metadata, "kept", None)
        if kept is None or kept.stock:
            super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if kept is not None:
            kept.after(layer.layer_name, query, output)
        return output


class KeptFlashBuilder(_KeptBuilder, FlashAttentionMetadataBuilder):
    """`_KeptBuilder` for FlashAttention."""


class KeptFlashImpl(_KeptImpl, FlashAttentionImpl):
    """`_KeptImpl` for FlashAttention."""


class KeptFlashBackend(FlashAttentionBackend):
    """vLLM's FlashAttention backend with the two classes above."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The implementation."""
        return KeptFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """The metadata builder."""
        return KeptFlashBuilder


class KeptTritonBuilder(_KeptBuilder, TritonAttentionMetadataBuilder):
    """`_KeptBuilder` for vLLM's Triton kernel."""


class KeptTritonImpl(_KeptImpl, TritonAttentionImpl):
    """`_KeptImpl` for vLLM's Triton kernel."""


class KeptTritonBackend(TritonAttentionBackend):
    """vLLM's Triton backend with the two classes above."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """The implementation."""
        return KeptTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        """The metadata builder."""
        return KeptTritonBuilder


BUILDERS = (KeptFlashBuilder, KeptTritonBuilder)


def register() -> None:
    """Have vLLM choose these backends where it would choose its own, in this process."""
    register_backend(AttentionBackendEnum.FLASH_ATTN, f"{__name__}.{KeptFlashBackend.__name__}")
    register_backend(AttentionBackendEnum.TRITON_ATTN, f"{__name__}.{KeptTritonBackend.__name__}")
