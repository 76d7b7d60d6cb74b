"""What the worker on CUDA knows of its requests, and what it does before, in and after a step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refreekv.engines.vllm.gpu.kept import KeptPrompt, layer_kept
from refreekv.engines.vllm.gpu.step import Ints, PromptPart, Step, split_rows
from refreekv.engines.vllm.gpu.tracked import HostCopy, Tracked
from refreekv.engines.vllm.messages import CopyOrder, GroupOutcome, PruningOutcome, StepOrders, WorkerOutcomes
from refreekv.engines.vllm.worker_side.scoring import Probes, select
from refreekv.engines.vllm.worker_side.tracked import Layer
from refreekv.kernels.paged import FIRST, HELD, MOST_QUERIES, PagedTable, Pool, Rows, move_to_pages, paged_attention
from refreekv.policies import Policy


class KeptState:
    """Owned by the model runner, which opens steps and plans them; builders and layers read the plan.

    From the step after its prompt's end on a request's queries see what is kept and nothing else: first through
    lists of positions in its ordinary blocks, later, when the scheduler has found private blocks for it, there.
    Memory decides when blocks come back, never what is computed.

    Parameters
    ----------
    policy : Policy
        Decides what each layer keeps.
    layers : dict
        The layers by vLLM's name, in the model's order.
    slots : int
        Requests that the model runner has room for.
    longest : int
        Tokens of the longest sequence.
    blocks_of : callable
        The ordinary blocks of a slot, int32 on the device, as they were in the step before.
    gather : callable
        Joins tensors of all tensor-parallel ranks along a dimension (heads).
    """

    groups = 1
    """KV cache groups that are pruned."""

    def __init__(
        self,
        policy: Policy,
        layers: dict[str, Layer],
        slots: int,
        longest: int,
        blocks_of: Callable[[int], Tensor],
        gather: Callable[[Tensor, int], Tensor],
    ):
        self.policy, self.layers, self.gather, self._blocks_of = policy, layers, gather, blocks_of
        self.pool = Pool.of([layer.module.kv_cache for layer in layers.values()])
        self.table = PagedTable.empty(self.pool, slots, -(-longest // self.pool.tokens))
        self.block = self.pool.tokens
        self.device = self.pool.cache.device
        self.group = next(iter(layers.values())).module.impl.num_heads // self.pool.heads
        self.requests: dict[str, Tracked] = {}
        self.step: Step | None = None
        self.slots = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self.numbered = torch.arange(slots, dtype=torch.int32, device=self.device)
        self._prompts = np.zeros(slots, dtype=np.int32)
        self._waiting: list[tuple[str, Tracked]] = []
        self._open = False

    def know_copy_scores(self, scores: Sequence[Tensor]) -> None:
        """Show policies from now on how much each KV head of each layer copies."""
        self.layers = {
            name: replace(layer, facts=replace(layer.facts, copy_scores=scores[layer.facts.index]))
            for name, layer in self.layers.items()
        }

    # Before a step

    def before_forward(self, orders: StepOrders) -> None:
        """Nothing: the model runner has begun the step before it planned it."""

    def begin_step(self, orders: StepOrders | None) -> None:
        """Before the model runner takes up a scheduler's output; None in vLLM's own warm-up."""
        self._open, self.step = orders is not None, None
        if orders is None:
            return
        for request_id in orders.finished:
            self.requests.pop(request_id, None)
        for request_id, epoch in orders.preempted.items():
            if request_id in self.requests:
                self.requests[request_id].preempt(epoch)
        self._waiting = [one for one in self._waiting if self.requests.get(one[0]) is one[1] and not one[1].announced]
        for order in orders.copies:
            self._move(order)

    def admit(self, request_id: str, slot: int, prompt: int) -> None:
        """A request has got a slot: it is new, comes back after a preemption, or goes on with a session."""
        tracked = self.requests.get(request_id)
        if tracked is None:
            tracked = Tracked(prompt)
            if self._open:
                self.requests[request_id] = tracked
            else:
                # vLLM's own warm-up: nothing is pruned, as if all that comes were an answer.
                tracked.prompt = 0
        tracked.slot = slot
        self._prompts[slot] = tracked.prompt
        if tracked.kept is None:
            self.table.segments[:, slot].zero_()
            self.table.starts[slot] = 0
        else:
            self._show_lists(tracked)

    def watches(self, slots: np.ndarray[Any, Any], computed: np.ndarray[Any, Any]) -> bool:
        """Whether prompts are read in a step of requests in these slots, of which so many tokens are computed."""
        return bool((computed < self._prompts[slots]).any())

    def plan(self, batch: Any) -> None:
        """Plan a step: vLLM's `InputBatch` says whose tokens it has."""
        count = batch.num_reqs
        slots, computed = batch.idx_mapping_np[:count], batch.num_computed_tokens_np[:count]
        self.slots[:count] = batch.idx_mapping[:count]
        if not self._open:
            return
        starts: Ints = batch.query_start_loc_np[: count + 1]
        counts = np.diff(starts)
        prompts = self._prompts[slots]
        most = MOST_QUERIES // self.group
        self.step = step = Step(self.slots, self.numbered, int(counts.max()))
        step.stock = bool((computed < prompts).any())
        if not step.stock and step.longest <= most:
            return
        parts, limits = split_rows(computed, counts, prompts, most)
        step.parts, step.longest = _upload(parts, self.device), int(parts[2].max(initial=1))
        step.limits = _upload(limits, self.device)
        for row in np.flatnonzero(computed < prompts):
            request_id = batch.req_ids[row]
            self._watch(step, request_id, int(row), int(computed[row]), int(counts[row]), int(starts[row]))

    def _watch(self, step: Step, request_id: str, row: int, start: int, count: int, at: int) -> None:
        tracked = self.requests[request_id]
        ends = start + count >= tracked.prompt
        if not tracked.decided:
            if tracked.probes is None:
                tracked.probes = Probes.for_prompt(self.policy, tracked.prompt)
            positions = tracked.probes.positions
            here = positions[(positions >= start) & (positions < start + count)]
            step.prompts.append(PromptPart(tracked, row, _upload((here - start + at).numpy(), self.device), ends))
        if ends:
            step.ended.append((request_id, tracked))

    # In a step

    def look(self, step: Step, name: str, query: Tensor, cache: Tensor, block_table: Tensor) -> None:
        """A layer has read prompts: collect the queries that policies probe, and decide where a prompt ends.

        Parameters
        ----------
        step : Step
            The step.
        name : str
            vLLM's name of the layer.
        query : Tensor
            ``[tokens, H, D]``, position-encoded.
        cache : Tensor
            The layer's paged cache, this step's keys and values written.
        block_table : Tensor
            int32 ``[R, W]``.
        """
        layer = self.layers[name]
        index = layer.facts.index
        for part in step.prompts:
            tracked = part.tracked
            assert tracked.probes is not None
            frozen = self.policy.freezes(index)
            if not frozen and len(part.index):
                tracked.probes.queries.setdefault(index, []).append(query[part.index])
            if not part.ends:
                continue
            tracked.layers[index] = None
            if not frozen:
                blocks = block_table[part.row, : -(-tracked.prompt // self.block)]
                # [blocks, N, H_kv, 2 * D]
                entries = cache.transpose(1, 2)[blocks.long()].flatten(0, 1)[: tracked.prompt]
                keys, values = entries.split(self.pool.size, -1)
                found = select(self.policy, tracked.probes, layer.facts, keys, values, self.gather, surrogates=True)
                tracked.probes.queries.pop(index, None)
                if found is not None:
                    tracked.layers[index] = layer_kept(found, self.pool.heads, tracked.prompt, cache.dtype)

    def attend(self, name: str, query: Tensor, block_table: Tensor, rows: Rows, output: Tensor) -> None:
        """Attend to what is kept and to all that came later, for the queries of some rows."""
        facts = self.layers[name].facts
        paged_attention(
            query, self.pool, facts.index, block_table, rows, self.table, output,
            scaling=facts.scale, softcap=facts.softcap, sinks=facts.sinks,
        )  # fmt: skip

    # After a step

    def end_step(self) -> WorkerOutcomes | None:
        """After the forward pass: show what was decided, and tell the scheduler what has come to the host."""
        step, self.step, self._open = self.step, None, False
        for request_id, tracked in step.ended if step is not None else ():
            if not tracked.decided:
                self._decide(tracked)
            if not tracked.announced:
                self._waiting.append((request_id, tracked))
        outcomes, waiting = [], []
        for request_id, tracked in self._waiting:
            if tracked.announced or self.requests.get(request_id) is not tracked:
                continue
            if tracked.numbers is not None and not tracked.numbers.arrived:
                waiting.append((request_id, tracked))
                continue
            outcomes.append(self._outcome(request_id, tracked))
            tracked.announced = True
        self._waiting = waiting
        return WorkerOutcomes(outcomes) if outcomes else None

    def _decide(self, tracked: Tracked) -> None:
        layers = [tracked.layers[index] for index in range(len(self.layers))]
        tracked.decided, tracked.probes, tracked.layers = True, None, {}
        if all(one is None for one in layers):
            return
        tracked.kept = kept = KeptPrompt.of(layers, self.pool.heads, tracked.prompt, self.device)
        tracked.numbers = HostCopy(torch.cat([kept.counts.double().flatten(), kept.metrics]))
        self._show_lists(tracked)

    def _show_lists(self, tracked: Tracked) -> None:
        assert tracked.kept is not None
        tracked.kept.list_again()
        self.table.segments[:, tracked.slot] = tracked.kept.segments(self.pool)
        self.table.starts[tracked.slot] = tracked.prompt

    def _outcome(self, request_id: str, tracked: Tracked) -> PruningOutcome:
        prompt, layers, heads = tracked.prompt, len(self.layers), self.pool.heads
        if tracked.numbers is None:
            everything = (prompt,) * layers
            group = GroupOutcome(0, 0)
            return PruningOutcome(request_id, tracked.epoch, prompt, everything, everything, (None,) * layers, (group,))
        numbers = tracked.numbers.wait()
        kept = tuple(int(number) for number in numbers[: layers * heads].tolist())
        metrics = tuple(None if number != number else number for number in numbers[layers * heads :].tolist())
        needed, whole = self.pool.blocks_for(sum(kept)), prompt // self.block
        group = GroupOutcome(needed, whole, needed) if needed < whole else GroupOutcome(0, 0)
        return PruningOutcome(request_id, tracked.epoch, prompt, kept, kept, metrics, (group,))

    def _move(self, order: CopyOrder) -> None:
        """Copy what a request keeps to the private blocks that the scheduler found for it."""
        tracked = self.requests.get(order.request_id)
        if tracked is None or tracked.slot < 0:
            return
        kept = tracked.kept
        assert kept is not None
        assert tracked.numbers is not None
        shape = kept.counts.shape
        counts = tracked.numbers.wait()[: kept.counts.numel()].long()
        firsts = (counts.cumsum(0) - counts).view(shape)
        segments = torch.zeros(2, *shape, dtype=torch.int64)
        segments[0], segments[1] = firsts, counts.view(shape)
        there = _upload(segments.numpy(), self.device)
        pages = _upload(np.array(order.blocks, dtype=np.int32), self.device)
        blocks = self._blocks_of(tracked.slot)
        move_to_pages(self.pool, self.table, tracked.slot, blocks, there[0], pages, int(counts.max()))
        line = torch.zeros_like(self.table.segments[:, tracked.slot])
        line[..., FIRST], line[..., HELD] = there[0], there[1]
        self.table.segments[:, tracked.slot] = line
        self.table.pages[tracked.slot, : len(pages)] = pages
        # What was decided stays in bits, should the request be preempted.
        kept.lists = None


def _upload(numbers: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Copy to the device; the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone()
