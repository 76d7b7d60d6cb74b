"""What a worker knows of its requests, and what it does before and after a step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refreekv.engines.vllm.layout import PagedLayout
from refreekv.engines.vllm.messages import CopyOrder, GroupOutcome, PruningOutcome, StepOrders, WorkerOutcomes
from refreekv.engines.vllm.worker_side.rounding import GroupSet, decide_group, keep_mask
from refreekv.engines.vllm.worker_side.runner import RunnerV1
from refreekv.engines.vllm.worker_side.scoring import Probes
from refreekv.engines.vllm.worker_side.step import Part, Step
from refreekv.engines.vllm.worker_side.tracked import Layer, Tracked
from refreekv.policies import Policy


class WorkerState:
    """Owned by the worker; the connector opens and closes steps, builders and layers ask for the step.

    Parameters
    ----------
    policy : Policy
        Decides what each layer keeps.
    layers : dict
        The prunable layers by vLLM's name, in the model's order.
    groups : int
        Number of KV cache groups.
    runner : RunnerV1
        The model runner's rows and block tables.
    gather : callable
        Joins tensors of all tensor-parallel ranks along a dimension (heads).
    """

    def __init__(
        self,
        policy: Policy,
        layers: dict[str, Layer],
        groups: int,
        runner: RunnerV1,
        gather: Callable[[Tensor, int], Tensor],
    ):
        self.policy, self.groups, self.runner, self.gather = policy, groups, runner, gather
        first = next(iter(layers.values())).module
        self.layout = PagedLayout(first.impl, first, first.kv_cache)
        self.requests: dict[str, Tracked] = {}
        self._set_layers(layers)
        self._open = False
        self._step: Step | None = None

    def know_copy_scores(self, scores: Sequence[Tensor]) -> None:
        """Show policies from now on how much each KV head of each layer copies."""
        self._set_layers(
            {
                name: replace(layer, facts=replace(layer.facts, copy_scores=scores[layer.facts.index]))
                for name, layer in self.layers.items()
            }
        )

    def _set_layers(self, layers: dict[str, Layer]) -> None:
        self.layers = layers
        self._by_group: list[list[Layer]] = [[] for _ in range(self.groups)]
        for layer in layers.values():
            self._by_group[layer.group].append(layer)

    def before_forward(self, orders: StepOrders) -> None:
        """The connector's hook: here a step begins."""
        self.begin_step(orders)

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.layout.block

    def begin_step(self, orders: StepOrders) -> None:
        """Before vLLM takes up a scheduler's output."""
        for request_id in orders.finished:
            self.requests.pop(request_id, None)
        for request_id, epoch in orders.preempted.items():
            if request_id in self.requests:
                self.requests[request_id].preempt(epoch)
        for order in orders.copies:
            self._copy(order)
        self._open, self._step = True, None

    @property
    def stepping(self) -> bool:
        """Whether a step is open (vLLM also builds metadata to warm up)."""
        return self._open

    @property
    def current(self) -> Step:
        """The current step, once it is planned."""
        assert self._step is not None
        return self._step

    def step(self, common: Any) -> Step | None:
        """The current step, planned when its metadata is first asked for; None outside of steps (warm-up)."""
        if self._open and self._step is None:
            self._step = self._plan(common)
        return self._step

    def end_step(self) -> WorkerOutcomes | None:
        """After the forward pass: decide on the prompts that ended in it, and show that in the tables."""
        step, self._open, self._step = self._step, False, None
        if step is None or not step.ended:
            return None
        return WorkerOutcomes([self._announce(request_id, tracked) for request_id, tracked in step.ended])

    def _plan(self, common: Any) -> Step:
        rows = self.runner.rows()
        at = common.query_start_loc_cpu[: len(rows) + 1].tolist()
        width = -(-common.max_seq_len // self.layout.block)
        tables = self.runner.table_rows(self.groups, len(rows), width)
        step = Step(self.policy, self.layout, self.gather, self.layers, tables, common.seq_lens[: len(rows)])
        holes = np.zeros((2, self.groups, len(rows)), dtype=np.int32)
        for index, (request_id, start, prompt) in enumerate(rows):
            tracked = self.requests.get(request_id)
            if tracked is None:
                tracked = Tracked(prompt, np.zeros((2, self.groups), dtype=np.int32))
                self.requests[request_id] = tracked
            holes[:, :, index] = tracked.holes
            stop = start + at[index + 1] - at[index]
            if tracked.outcome is None:
                if tracked.probes is None:
                    tracked.probes = Probes.for_prompt(self.policy, prompt)
                step.prompts.append(Part(index, tracked, start, min(stop, prompt), at[index]))
            elif stop > prompt and not all(tracked.expressed):
                first = max(start, prompt)
                step.masked.append(Part(index, tracked, first, stop, at[index] + first - start))
            if stop >= prompt and not tracked.announced:
                step.ended.append((request_id, tracked))
        step.close_holes(holes)
        return step

    def _announce(self, request_id: str, tracked: Tracked) -> PruningOutcome:
        if tracked.outcome is None:
            self._decide(request_id, tracked)
        outcome = tracked.outcome
        assert outcome is not None
        tracked.announced = True
        for group, decision in enumerate(tracked.decisions):
            if decision.freed and not decision.copies:
                self.runner.set_blocks(request_id, group, decision.start, [0] * decision.freed)
                tracked.express(group)
        return PruningOutcome(
            request_id,
            tracked.epoch,
            outcome.prompt,
            outcome.kept,
            outcome.selected,
            outcome.metrics,
            outcome.groups,
            outcome.altered,
        )

    def _decide(self, request_id: str, tracked: Tracked) -> None:
        """Round what the layers selected to whole blocks, group by group."""
        prompt, block, selections = tracked.prompt, self.layout.block, tracked.selections
        decisions = [
            decide_group([selections[layer.facts.index] for layer in members], prompt, block)
            for members in self._by_group
        ]
        layers = sorted(self.layers.values(), key=lambda layer: layer.facts.index)
        found = [selections[layer.facts.index] for layer in layers]
        tracked.decisions = tuple(decisions)
        tracked.expressed = [not decision.freed for decision in decisions]
        tracked.outcome = PruningOutcome(
            request_id,
            tracked.epoch,
            prompt,
            kept=tuple(prompt - decisions[layer.group].freed * block for layer in layers),
            selected=tuple(prompt if one is None else int(keep_mask(one, prompt).sum()) for one in found),
            metrics=tuple(None if one is None or one.metric is None else float(one.metric[0]) for one in found),
            groups=tuple(GroupOutcome(one.start, one.stop, one.copies) for one in decisions),
            altered=any(one.freed for one in decisions),
        )
        tracked.probes, tracked.selections = None, {}

    def _copy(self, order: CopyOrder) -> None:
        """Move kept tokens of a group into the private blocks that the scheduler found for them."""
        tracked = self.requests.get(order.request_id)
        if tracked is None:
            return
        decision = tracked.decisions[order.group]
        assert isinstance(decision, GroupSet)
        block = self.layout.block
        device = self._by_group[order.group][0].module.kv_cache.device
        table = torch.tensor(self.runner.block_ids(order.request_id, order.group)[: decision.tail], device=device)
        kept = decision.kept.to(device)
        private = torch.tensor(order.blocks, device=device)
        slots = (private[:, None] * block + torch.arange(block, device=device)).flatten()
        for layer in self._by_group[order.group]:
            cache = layer.module.kv_cache
            keys, values = self.layout.read(cache, table[kept // block], kept % block)
            self.layout.write(layer.module, cache, keys, values, slots)
        self.runner.set_blocks(order.request_id, order.group, 0, [*order.blocks, *[0] * decision.freed])
        tracked.express(order.group)
