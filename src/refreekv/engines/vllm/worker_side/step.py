"""One engine step in a worker: dense block tables, probes on the way, exact attention where needed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refreekv.engines.vllm.layout import PagedLayout
from refreekv.engines.vllm.worker_side.exact import attend
from refreekv.engines.vllm.worker_side.scoring import select
from refreekv.engines.vllm.worker_side.tables import compact_tables
from refreekv.engines.vllm.worker_side.tracked import Layer, Tracked
from refreekv.policies import Policy


@dataclass(frozen=True)
class Part:
    """Consecutive queries of one request in a step.

    Attributes
    ----------
    row : int
        Row of the batch.
    tracked : Tracked
        The request.
    start, stop : int
        Positions of the queries.
    at : int
        Where the first of them is among the step's tokens.
    """

    row: int
    tracked: Tracked
    start: int
    stop: int
    at: int

    def of(self, tokens: Tensor) -> Tensor:
        """Its slice of a tensor whose first dimension is the step's tokens."""
        return tokens[self.at : self.at + self.stop - self.start]


@dataclass
class Step:
    """The plan of a step, and what its layers find.

    Attributes
    ----------
    tables : Tensor
        int32 ``[G, R, W]``: block tables as the scheduler sees them, null blocks in the holes.
    seq_lens : Tensor
        int32 ``[R]``: tokens of each request, this step's included.
    prompts : list of Part
        Prompt tokens that are computed for the first time.
    masked : list of Part
        Generated tokens of requests some of whose tables do not show their decision yet.
    ended : list of (str, Tracked)
        Requests whose prompts end in this step, or end again after a preemption.
    """

    policy: Policy
    layout: PagedLayout
    gather: Callable[[Tensor, int], Tensor]
    layers: Mapping[str, Layer]
    tables: Tensor
    seq_lens: Tensor
    prompts: list[Part] = field(default_factory=list)
    masked: list[Part] = field(default_factory=list)
    ended: list[tuple[str, Tracked]] = field(default_factory=list)
    _dense: list[tuple[Tensor, Tensor]] | None = None

    def close_holes(self, holes: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Make the dense tables of all groups; ``holes`` is ``[2, G, R]``, as in `Tracked`."""
        if not holes[1].any():
            return
        starts, lengths = torch.from_numpy(holes).to(self.tables.device).unbind()
        tables = compact_tables(self.tables, starts, lengths)
        seq_lens = self.seq_lens - lengths * self.layout.block
        self._dense = list(zip(tables.unbind(), seq_lens.unbind(), strict=True))

    def dense(self, group: int) -> tuple[Tensor, Tensor] | None:
        """A group's block table ``[R, W]`` and lengths ``[R]`` without holes; None if there are no holes at all."""
        return None if self._dense is None else self._dense[group]

    @property
    def requests(self) -> int:
        """Requests in the batch."""
        return self.tables.shape[1]

    @property
    def watches(self) -> bool:
        """Whether layers have anything to do beside attention."""
        return bool(self.prompts or self.masked)

    def after_attention(self, name: str, query: Tensor, cache: Tensor, output: Tensor) -> None:
        """A layer has attended: probe prompts, put right what its tables could not express.

        Parameters
        ----------
        name : str
            vLLM's name of the layer.
        query : Tensor
            ``[tokens, H, D]``, position-encoded.
        cache : Tensor
            The layer's paged cache, this step's keys and values written.
        output : Tensor
            ``[tokens, H, D]``; rows of masked parts are overwritten.
        """
        layer = self.layers[name]
        for part in self.prompts:
            self._probe(part, layer, query, cache)
        for part in self.masked:
            if not part.tracked.expressed[layer.group]:
                self._mask(part, layer, query, cache, output)

    def _probe(self, part: Part, layer: Layer, query: Tensor, cache: Tensor) -> None:
        probes, prompt, index = part.tracked.probes, part.tracked.prompt, layer.facts.index
        assert probes is not None
        if not self.policy.freezes(index):
            probes.collect(index, part.of(query), part.start)
        if part.stop < prompt:
            return
        selection = None
        if not self.policy.freezes(index):
            blocks = self.tables[layer.group, part.row, : -(-prompt // self.layout.block)]
            keys, values = self.layout.read_blocks(cache, blocks.long(), prompt)
            selection = select(self.policy, probes, layer.facts, keys, values, self.gather)
        part.tracked.selections[index] = selection

    def _mask(self, part: Part, layer: Layer, query: Tensor, cache: Tensor, output: Tensor) -> None:
        prompt, block = part.tracked.prompt, self.layout.block
        kept = part.tracked.decisions[layer.group].positions(prompt, block)
        positions = torch.cat([kept, torch.arange(prompt, part.stop)]).to(query.device)
        blocks = self.tables[layer.group, part.row].long()[positions // block]
        keys, values = self.layout.read(cache, blocks, positions % block)
        found = attend(part.of(query), keys, values, positions, part.start, layer.facts)
        part.of(output).copy_(found)
