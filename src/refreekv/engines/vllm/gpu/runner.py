"""vLLM's model runner V2 with the hooks that the plugin needs."""

from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from refreekv.engines.vllm.gpu.ends import clear_behind
from refreekv.engines.vllm.gpu.state import KeptState
from refreekv.engines.vllm.gpu.windows import hide_left


class KeptModelRunner(GPUModelRunner):
    """As vLLM's; without a state it is vLLM's."""

    kept: KeptState | None = None
    """Set by the worker."""

    reaches: tuple[int, ...] = ()
    """Of each KV cache group, `windows.reach_of`; set by the worker where blocks left behind have to be hidden."""

    ends: tuple[list[Tensor], ...] = ()
    """Of each KV cache group its layers' caches; set by the worker where what is behind sequences may be loaded."""

    shift = 0
    """What is added to the positions that the model is told; slots are where they are. While constants are measured."""

    def finish_requests(self, scheduler_output: Any) -> None:
        """First to see a scheduler's output: entries are moved before their ordinary blocks are written anew."""
        if self.kept is not None:
            self.kept.begin_step(scheduler_output.kv_connector_metadata)
        super().finish_requests(scheduler_output)

    def add_requests(self, scheduler_output: Any) -> None:
        """As vLLM, then tell the state which slots the requests have."""
        super().add_requests(scheduler_output)
        if self.kept is not None:
            for request in scheduler_output.scheduled_new_reqs:
                slot = self.req_states.req_id_to_index[request.req_id]
                self.kept.admit(request.req_id, slot, request.prompt_len)

    def gather_batch_req_state(self, scheduler_output: Any, dummy_run: bool) -> tuple[Any, int | None]:
        """As vLLM, but a step in which prompts are read is not uniform: it must not run as a full graph."""
        batch, uniform = super().gather_batch_req_state(scheduler_output, dummy_run)
        if self.kept is None or batch is None:
            return batch, uniform
        slots = batch.idx_mapping_np
        if self.kept.watches(slots, self.req_states.num_computed_tokens_np[slots]):
            return batch._replace(has_prefill=True, decode_graph_eligible=False), None
        return batch, uniform

    def prepare_attn(self, input_batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        """As vLLM, without blocks that windows have left or what is behind sequences, and plan the step."""
        found: tuple[tuple[Tensor, ...], Tensor] = super().prepare_attn(input_batch)
        if any(self.reaches):
            computed = self.req_states.num_computed_tokens.gpu[input_batch.idx_mapping]
            hide_left(found[0], self.reaches, self.block_tables.block_sizes, computed)
        if self.kept is not None:
            self.kept.plan(input_batch)
            if self.ends and self.kept.reads_tiles:
                for caches, table in zip(self.ends, found[0], strict=True):
                    clear_behind(caches, table, input_batch.seq_lens[: input_batch.num_reqs])
        if self.shift:
            input_batch.positions += self.shift
        return found

    def prepare_dummy_attn(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        """As vLLM: no request's step."""
        if self.kept is not None:
            self.kept.step = None
        found: tuple[tuple[Tensor, ...], Tensor] = super().prepare_dummy_attn(*args, **kwargs)
        return found
