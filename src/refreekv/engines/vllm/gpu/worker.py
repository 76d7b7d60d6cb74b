"""The worker class: wires the plugin's parts to one vLLM worker on CUDA."""

from typing import Any

from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.logger import init_logger
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec, replace_as
from vllm.v1.worker.gpu_worker import Worker

from refreekv.core.quantisation import Ladder
from refreekv.engines.vllm import refusals
from refreekv.engines.vllm.connector import RefreekvConnector
from refreekv.engines.vllm.gpu import backend
from refreekv.engines.vllm.gpu.ends import SMALLEST_TILE
from refreekv.engines.vllm.gpu.runner import KeptModelRunner
from refreekv.engines.vllm.gpu.state import KeptState
from refreekv.engines.vllm.gpu.windows import reach_of
from refreekv.engines.vllm.spec import PrivateAttentionSpec
from refreekv.engines.vllm.worker_side.calibration import measure_constants, measure_copy_scores, warm_up
from refreekv.engines.vllm.worker_side.scoring import LayerFacts
from refreekv.engines.vllm.worker_side.tracked import Layer
from refreekv.kernels.paged import MOST_QUERIES
from refreekv.policies.base import AUTO

# A child of vLLM's logger, for its format and level.
logger = init_logger(f"vllm.{__name__}")

WIDEST_PLAN = 1 << 20
"""A prompt length at which a policy's probe plan shows all it may ever ask for."""


class RefreekvGPUWorker(Worker):
    """vLLM's worker for CUDA, with private blocks for what prompts keep."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        self._options = refusals.check_config(vllm_config)
        self._policy = self._options.build()
        super().__init__(vllm_config, *args, **kwargs)

    def _make_model_runner(self) -> Any:
        """The plugin's model runner."""
        return KeptModelRunner(self.vllm_config, self.device)

    def load_model(self, **kwargs: Any) -> None:
        """As vLLM, with the plugin's attention backends."""
        backend.register()
        super().load_model(**kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """VLLM's specs; full-attention layers get the plugin's, one for all. Those with sliding windows keep theirs."""
        specs = super().get_kv_cache_spec()
        prunable = [name for name, spec in specs.items() if type(spec) is FullAttentionSpec and not spec.sliding_window]
        refusals.check_layers(specs, prunable, 1, beside=(SlidingWindowSpec,))
        refusals.check_heads(self.model_config, get_tensor_model_parallel_world_size())
        plan = self._policy.probe_plan(WIDEST_PLAN)
        ours = {
            name: replace_as(
                specs[name],
                PrivateAttentionSpec,
                probe_tail=max(1, plan.rows),
                spread_probes=plan.spread > 0 and self._options.prefix_hits is False,
            )
            for name in prunable
        }
        return {**specs, **ours}

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As vLLM, then connect state, connector, metadata builders and layers."""
        super().initialize_from_config(kv_cache_config)
        connector, runner = get_kv_transfer_group(), self.model_runner
        assert isinstance(connector, RefreekvConnector)
        groups = kv_cache_config.kv_cache_groups
        pruned = [at for at, one in enumerate(groups) if isinstance(one.kv_cache_spec, PrivateAttentionSpec)]
        refusals.check_groups(len(pruned), sum(len(groups[at].layer_names) for at in pruned))
        group = groups[pruned[0]]
        modules, names = self.vllm_config.compilation_config.static_forward_context, set(group.layer_names)
        ordered = [name for name in modules if name in names]
        layers = {
            name: Layer(modules[name], 0, LayerFacts.of(modules[name].impl, index, len(ordered)))
            for index, name in enumerate(ordered)
        }
        specs = dict.fromkeys(ordered, group.kv_cache_spec)
        refusals.check_attention(modules, specs, runner.decode_query_len, MOST_QUERIES)
        ranks = get_tensor_model_parallel_world_size()
        tables = runner.block_tables.block_tables[pruned[0]]
        builders = _builders(runner, pruned[0])
        refusals.check_backends(
            [type(builder).__name__ for builder in builders if type(builder) not in backend.BUILDERS]
        )
        state = KeptState(
            self._policy,
            layers,
            runner.max_num_reqs,
            self.model_config.max_model_len,
            self._ladder(group.kv_cache_spec.head_size),
            lambda slot: tables.gpu[slot],
            _alone if ranks == 1 else _all_gather,
            get_tensor_model_parallel_rank(),
            ranks,
            len(groups),
            runner.decode_query_len,
        )
        if state.ladder is not None and not hasattr(runner.block_tables, "has_sliding_window_groups"):
            runner.reaches = tuple(reach_of(one.kv_cache_spec) for one in groups)
        flash = any(isinstance(one, FlashAttentionMetadataBuilder) for one in _builders(runner))
        if state.ladder is not None and flash and state.block >= SMALLEST_TILE:
            runner.ends = tuple([modules[name].kv_cache for name in one.layer_names] for one in groups)
        connector.state = runner.kept = state
        for builder in builders:
            builder.state = state

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM, after measuring what the policy reads of the model, and what keys are coded by."""
        state = self.model_runner.kept
        measured = self.model_runner, state, self.vllm_config
        if state.ladder is not None:
            scores, codes = measure_constants(*measured)
            state.know_copy_scores(scores)
            state.code_by(codes)
        elif self._policy.reads_copy_scores:
            state.know_copy_scores(measure_copy_scores(*measured))
        self._try_codes(state)
        warm_up(*measured)
        state.clear()
        return super().compile_or_warm_up_model()

    def _try_codes(self, state: KeptState) -> None:
        """Go without codes, or refuse, if the GPU's kernels for them are wrong."""
        wrong = state.fault_of_any()
        if wrong is None:
            return
        said = f"K/V cannot be coded on {self.device}: {wrong}"
        if self._options.kv_dtype != AUTO:
            raise RuntimeError(f"{said}; leave --kv-dtype out, or set it to 16")
        logger.warning("%s; what is kept stays as the model computes it", said)
        state.code_nothing()

    def _ladder(self, size: int) -> Ladder | None:
        """Number formats that kept entries are stored in."""
        if self._options.kv_dtype == AUTO and size % 16:
            logger.warning("heads of %d elements cannot be coded: what is kept stays as the model computes it", size)
            return None
        return self._options.ladder()


def _builders(runner: Any, group: int | None = None) -> list[Any]:
    """Metadata builders, of all KV cache groups or of one."""
    groups = runner.attn_groups if group is None else [runner.attn_groups[group]]
    return [builder for attention in groups for one in attention for builder in one.metadata_builders]


def _alone(tensor: Tensor, dim: int) -> Tensor:
    return tensor


def _all_gather(tensor: Tensor, dim: int) -> Tensor:
    gathered: Tensor = tensor_model_parallel_all_gather(tensor.contiguous(), dim)
    return gathered
