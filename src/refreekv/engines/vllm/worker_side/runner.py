"""The one place that knows vLLM's model runner: whose rows a batch has, and their block tables."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

if TYPE_CHECKING:
    from refreekv.engines.vllm.worker_side.state import WorkerState


class Row(NamedTuple):
    """One request of a batch.

    Attributes
    ----------
    request_id : str
        vLLM's id.
    start : int
        Position of the first token that is computed in this step.
    prompt : int
        Prompt tokens of the request.
    """

    request_id: str
    start: int
    prompt: int


class PrunedCPUModelRunner(CPUModelRunner):
    """vLLM's CPU model runner (V1), which builds the metadata of the first group only.

    Those of the other groups differ in table, lengths, slots and the kernel's own plan; they are
    copied from the first, instead of going through vLLM's loop over groups once each.
    """

    state: "WorkerState | None" = None
    """Set by the worker."""

    kv_cache_config: Any
    _first_only: Any = None

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        config = self.kv_cache_config
        groups, state = config.kv_cache_groups, self.state
        if state is None or not state.stepping or len(groups) == 1:
            built: tuple[dict[str, Any], Any] = super()._build_attention_metadata(*args, **kwargs)
            return built
        if self._first_only is None:
            self._first_only = replace(config, kv_cache_groups=groups[:1])
        self.kv_cache_config = self._first_only
        try:
            metadata, for_drafts = super()._build_attention_metadata(*args, **kwargs)
        finally:
            self.kv_cache_config = config
        first = metadata[groups[0].layer_names[0]]
        builder = self.attn_groups[0][0].get_metadata_builder(0)
        others = builder.for_groups(first, state.current, kwargs["slot_mappings"])
        for group, of_group in zip(groups[1:], others, strict=True):
            for name in group.layer_names:
                metadata[name] = of_group
        return metadata, for_drafts


class RunnerV1:
    """What the plugin asks of vLLM's V1 model runner."""

    def __init__(self, runner: Any):
        self._runner = runner

    def rows(self) -> list[Row]:
        """The requests of the current batch, in its order."""
        batch = self._runner.input_batch
        count = batch.num_reqs
        starts = batch.num_computed_tokens_cpu[:count].tolist()
        prompts = batch.num_prompt_tokens[:count].tolist()
        return list(map(Row._make, zip(batch.req_ids[:count], starts, prompts, strict=True)))

    def table_rows(self, groups: int, rows: int, width: int) -> Tensor:
        """The block tables of the current batch as the scheduler sees them: int32 ``[G, R, W]``."""
        tables = self._runner.input_batch.block_table.block_tables
        # On the host, where vLLM keeps them too: slicing arrays costs a tenth of slicing tensors.
        return torch.from_numpy(np.stack([table.block_table.np[:rows, :width] for table in tables[:groups]]))

    def set_blocks(self, request_id: str, group: int, first: int, blocks: Sequence[int]) -> None:
        """Overwrite entries of a request's block table, in the batch and for when it rejoins one."""
        state = self._runner.requests[request_id]
        state.block_ids[group][first : first + len(blocks)] = blocks
        batch = self._runner.input_batch
        index = batch.req_id_to_index.get(request_id)
        if index is not None:
            table = batch.block_table[group].block_table.np
            table[index, first : first + len(blocks)] = np.asarray(blocks, dtype=table.dtype)

    def block_ids(self, request_id: str, group: int) -> list[int]:
        """A request's block table."""
        blocks: list[int] = self._runner.requests[request_id].block_ids[group]
        return blocks
