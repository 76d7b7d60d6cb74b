"""The KV connector: vLLM's channel between its scheduler and its workers."""

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.logger import init_logger
from vllm.platforms import current_platform

from refreekv.engines.vllm import metrics, refusals
from refreekv.engines.vllm.messages import StepOrders, WorkerOutcomes
from refreekv.engines.vllm.scheduler_side.coordinator import HybridCoordinator, LeadingCoordinator
from refreekv.engines.vllm.scheduler_side.reclaim import Reclaimer

if TYPE_CHECKING:
    from refreekv.engines.vllm.gpu.state import KeptState
    from refreekv.engines.vllm.worker_side.state import WorkerState

# A child of vLLM's logger, for its format and level.
logger = init_logger(f"vllm.{__name__}")


class RefreekvConnector(KVConnectorBase_V1, SupportsHMA):
    """Carries outcomes to the scheduler and orders to the workers; transfers no keys or values.

    vLLM makes one instance beside the scheduler and one in every worker. The first owns a
    `Reclaimer`, the others hand over to the worker's `WorkerState`.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        options = refusals.check_config(vllm_config)
        self._log_requests = options.log_requests
        super().__init__(vllm_config, role, kv_cache_config)
        self.reclaimer = Reclaimer(options.coded_answers) if role is KVConnectorRole.SCHEDULER else None
        self.state: WorkerState | KeptState | None = None

    # Beside the scheduler

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed off, so a preempted request may finish as it would without a connector."""
        return False

    def _scheduler_side(self) -> Reclaimer:
        assert self.reclaimer is not None, "this is the workers' side"
        return self.reclaimer

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Take hold of the block managers, and stand before the coordinator of several groups."""
        super().bind_kv_cache_manager(kv_cache_manager)
        inner = kv_cache_manager.coordinator
        managers = inner.single_type_managers
        pruned = self._scheduler_side().bind(managers, kv_cache_manager.block_pool, kv_cache_manager)
        if len(pruned) < len(managers):
            kv_cache_manager.coordinator = HybridCoordinator(inner, pruned[0])
        elif len(managers) > 1:
            kv_cache_manager.coordinator = LeadingCoordinator(inner)

    def on_new_request(self, request: Any) -> None:
        """Open its account."""
        self._scheduler_side().ledger.open(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Nothing is ever loaded from outside. Asked right before vLLM looks for a request's blocks."""
        self._scheduler_side().admit(request)
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing to load."""

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        """The orders that go with a step."""
        return self._scheduler_side().orders(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Apply the outcomes of a step."""
        message = connector_output.kv_connector_worker_meta
        self._scheduler_side().receive(message.outcomes if isinstance(message, WorkerOutcomes) else [])

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks may be freed at once; the response (and the log, if asked for) tells what was kept."""
        report = self._scheduler_side().finish(request.request_id)
        if self._log_requests and report is not None:
            logger.info("Request %s: %s", request.request_id, report)
        return False, report and {"refreekv": report}

    def get_kv_connector_stats(self) -> metrics.PruningStats | None:
        """Counts since the last call (the scheduler's side keeps them)."""
        return self.reclaimer.take_stats() if self.reclaimer else None

    def reset_cache(self) -> bool:
        """There is no cache to reset."""
        return True

    # In the workers

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Before anything of a step is computed."""
        if self.state is not None:
            self.state.before_forward(kv_connector_metadata)

    def build_connector_worker_meta(self) -> WorkerOutcomes | None:
        """After the step's forward pass."""
        return self.state.end_step() if self.state is not None else None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to load."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save."""

    def wait_for_save(self) -> None:
        """Nothing to save."""

    # For vLLM's configuration and metrics

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """On CPUs: probing runs Python inside attention layers. On CUDA no step that probes runs as a full graph."""
        return bool(current_platform.is_cpu())

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> metrics.PruningStats:
        """Rebuild stats that came from another process."""
        return metrics.PruningStats(data=data) if data else metrics.PruningStats()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> metrics.PruningMetrics:
        """The series on /metrics."""
        return metrics.PruningMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
