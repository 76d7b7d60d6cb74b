"""The worker class: wires the plugin's parts to one vLLM worker."""

from typing import Any

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, replace_as
from vllm.v1.worker.cpu_worker import CPUWorker

from refreekv.engines.vllm import refusals
from refreekv.engines.vllm.connector import RefreekvConnector
from refreekv.engines.vllm.spec import PrunedAttentionSpec
from refreekv.engines.vllm.worker_side import backend
from refreekv.engines.vllm.worker_side.calibration import measure_copy_scores
from refreekv.engines.vllm.worker_side.runner import PrunedCPUModelRunner, RunnerV1
from refreekv.engines.vllm.worker_side.scoring import LayerFacts
from refreekv.engines.vllm.worker_side.state import WorkerState
from refreekv.engines.vllm.worker_side.tracked import Layer

WIDEST_PLAN = 1 << 20
"""A prompt length at which a policy's probe plan shows all it may ever ask for."""


class RefreekvCPUWorker(CPUWorker):
    """vLLM's CPU worker, with per-group block tables and a state that prunes."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        self._options = refusals.check_config(vllm_config)
        self._policy = self._options.build()
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        """As vLLM, with the plugin's model runner."""
        super().init_device()
        self.model_runner = PrunedCPUModelRunner(self.vllm_config, self.device)

    def load_model(self, **kwargs: Any) -> None:
        """As vLLM, with the plugin's attention backend."""
        backend.register()
        super().load_model(**kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """VLLM's specs; full-attention layers get the plugin's, ``layers_per_group`` to a group."""
        specs = super().get_kv_cache_spec()
        prunable = [name for name, spec in specs.items() if type(spec) is FullAttentionSpec and not spec.sliding_window]
        refusals.check_layers(specs, prunable, self._options.layers_per_group)
        refusals.check_heads(self.model_config, get_tensor_model_parallel_world_size())
        plan = self._policy.probe_plan(WIDEST_PLAN)
        return {
            name: replace_as(
                specs[name],
                PrunedAttentionSpec,
                group=index // self._options.layers_per_group,
                probe_tail=max(1, plan.rows),
                spread_probes=plan.spread > 0,
            )
            for index, name in enumerate(prunable)
        }

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As vLLM, then connect state, connector, metadata builders and layers."""
        super().initialize_from_config(kv_cache_config)
        connector = get_kv_transfer_group()
        assert isinstance(connector, RefreekvConnector)
        names = [name for group in kv_cache_config.kv_cache_groups for name in group.layer_names]
        modules = self.vllm_config.compilation_config.static_forward_context
        order = {name: index for index, name in enumerate(name for name in modules if name in set(names))}
        layers = {
            name: Layer(modules[name], group, LayerFacts.of(modules[name].impl, order[name], len(names)))
            for group, members in enumerate(kv_cache_config.kv_cache_groups)
            for name in members.layer_names
        }
        gather = _all_gather if get_tensor_model_parallel_world_size() > 1 else _alone
        state = WorkerState(
            self._policy, layers, len(kv_cache_config.kv_cache_groups), RunnerV1(self.model_runner), gather
        )
        connector.state = self.model_runner.state = state
        for groups in self.model_runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    assert isinstance(builder, backend.PrunedMetadataBuilder)
                    builder.state = state

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM, after measuring the model's copy scores if the policy reads them."""
        if self._policy.reads_copy_scores:
            state = self.model_runner.state
            assert state is not None
            state.know_copy_scores(measure_copy_scores(self.model_runner, state, self.vllm_config))
        return super().compile_or_warm_up_model()


def _alone(tensor: Tensor, dim: int) -> Tensor:
    return tensor


def _all_gather(tensor: Tensor, dim: int) -> Tensor:
    gathered: Tensor = tensor_model_parallel_all_gather(tensor.contiguous(), dim)
    return gathered
