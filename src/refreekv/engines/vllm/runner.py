"""The one place that knows vLLM's model runner: whose rows a batch has, and their block tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


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


class RunnerV1:
    """vLLM's V1 model runner (`GPUModelRunner` and its CPU subclass)."""

    def __init__(self, runner: Any):
        self._runner = runner

    def rows(self) -> list[Row]:
        """The requests of the current batch, in its order."""
        batch = self._runner.input_batch
        count = batch.num_reqs
        starts = batch.num_computed_tokens_cpu[:count].tolist()
        prompts = batch.num_prompt_tokens[:count].tolist()
        return [Row(*row) for row in zip(batch.req_ids[:count], starts, prompts, strict=True)]

    def table_rows(self, groups: int, rows: int, width: int) -> Tensor:
        """The block tables of the current batch as the scheduler sees them: int32 ``[G, R, W]``."""
        tables = self._runner.input_batch.block_table.block_tables
        return torch.stack([tables[group].block_table.gpu[:rows, :width] for group in range(groups)])

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
