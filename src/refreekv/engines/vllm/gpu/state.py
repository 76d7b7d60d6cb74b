"""What the worker on CUDA knows of its requests, and what it does before, in and after a step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.quantisation import Ladder
from refreekv.engines.vllm.gpu import deciding, trial
from refreekv.engines.vllm.gpu.held import Held
from refreekv.engines.vllm.gpu.kept import KeptPrompt, LayersKept
from refreekv.engines.vllm.gpu.moving import code_answer, move_prompt
from refreekv.engines.vllm.gpu.step import Ints, PromptPart, Step, split_rows
from refreekv.engines.vllm.gpu.tracked import HostCopy, Tracked
from refreekv.engines.vllm.messages import (
    CodeOrder,
    CopyOrder,
    GroupOutcome,
    PruningOutcome,
    StepOrders,
    WorkerOutcomes,
)
from refreekv.engines.vllm.worker_side.scoring import LayerFacts, Probes
from refreekv.engines.vllm.worker_side.tracked import Layer
from refreekv.kernels.paged import (
    Coded,
    PagedTable,
    Pool,
    Rows,
    paged_attention,
    upload,
)
from refreekv.kernels.paged_coding import Later
from refreekv.policies import Policy

EASY = 8
"""Queries of a KV head's group that the kernel of a step with one token a request has room for."""


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
    ladder : Ladder or None
        Number formats of kept entries once they are in private blocks; None: as they are.
    blocks_of : callable
        The ordinary blocks of a slot, int32 on the device, as they were in the step before.
    gather : callable
        Joins tensors of all tensor-parallel ranks along a dimension (heads).
    rank, ranks : int
        Which of how many tensor-parallel ranks this is. All decide for all heads, and agree on the blocks that the
        one needs whose heads keep most.
    groups : int
        KV cache groups that the model has; one of them is pruned.
    drafts : int
        Queries of a request in a step that graphs hold: more than one with drafts.
    """

    def __init__(
        self,
        policy: Policy,
        layers: dict[str, Layer],
        slots: int,
        longest: int,
        ladder: Ladder | None,
        blocks_of: Callable[[int], Tensor],
        gather: Callable[[Tensor, int], Tensor],
        rank: int = 0,
        ranks: int = 1,
        groups: int = 1,
        drafts: int = 1,
    ):
        self.policy, self.layers, self.gather, self._blocks_of = policy, layers, gather, blocks_of
        self._caches = [layer.module.kv_cache for layer in layers.values()]
        self.pool = Pool.of(self._caches)
        self.ladder, self.rank, self.ranks, self.groups = ladder, rank, ranks, groups
        self.heads = ranks * self.pool.heads
        """KV heads of all ranks."""
        self._own = slice(rank * self.pool.heads, (rank + 1) * self.pool.heads)
        # Single numbers in it are filled: for one that is assigned, on CUDA the host waits.
        self.table = PagedTable.empty(self.pool, slots, -(-longest // self.pool.tokens))
        self.forms: tuple[PackedFormat, ...] = ()
        self._codes: list[KeyCodes] | None = None
        self._later: Later | None = None
        self.code_by(None)
        self.block = self.pool.tokens
        self.device = self.pool.cache.device
        self.group = next(iter(layers.values())).module.impl.num_heads // self.pool.heads
        self._query_bytes = len(layers) * self.group * self.pool.heads * self.pool.size * self.pool.cache.element_size()
        """Of a token's queries in all layers, as wide as what is cached."""
        self.together = max(drafts, EASY // self.group, 1)
        """Queries of a sequence that are read together: for more the kernel would be compiled once more."""
        self.requests: dict[str, Tracked] = {}
        self.step: Step | None = None
        self.slots = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self.numbered = torch.arange(slots, dtype=torch.int32, device=self.device)
        self._prompts = np.zeros(slots, dtype=np.int32)
        self._waiting: list[tuple[str, Tracked]] = []
        self._open = False

    def code_by(self, codes: Sequence[KeyCodes] | None) -> None:
        """Code keys from now on by codes of the model's own, by layer and of all ranks' heads; None: rotated.

        Before anything is coded, and before graphs are captured: the table is made anew.
        """
        if self.ladder is None:
            return
        pool = self.pool
        self.forms = self.ladder.forms((pool.size, pool.size), sorted_keys=codes is not None)
        mine = None if codes is None else [own.of_heads(self._own) for own in codes]
        coded = Coded.empty(pool, self.table.segments.shape[1], self.forms, mine, self.ladder.generated)
        self.table, self._later = replace(self.table, coded=coded), Later(pool, coded)
        self.layers = {
            name: replace(layer, facts=replace(layer.facts, codes=None if codes is None else codes[layer.facts.index]))
            for name, layer in self.layers.items()
        }
        self._codes = mine

    def code_nothing(self) -> None:
        """Store what is kept as it is, from now on."""
        self.ladder, self.forms, self._codes = None, (), None
        self.table, self._later = replace(self.table, coded=None), None

    def fault(self) -> str | None:
        """What is wrong with coded entries on this device; None if nothing is, or nothing is to be coded."""
        if self.ladder is None:
            return None
        facts = min((layer.facts for layer in self.layers.values()), key=lambda facts: facts.index)
        codes = None if self._codes is None else self._codes[0]
        return trial.fault(self.pool, self.group, self.forms, codes, facts.scale, facts.softcap, self.ladder.generated)

    def fault_of_any(self) -> str | None:
        """`fault`, of whichever tensor-parallel rank has one: all code, or none, for they share block tables."""
        own = self.fault()
        if self.ranks == 1 or self.ladder is None:
            return own
        told = self.gather(torch.tensor([own is not None], dtype=torch.int32, device=self.device), 0)
        return own or ("another tensor-parallel rank found its own wrong" if told.any() else None)

    def know_copy_scores(self, scores: Sequence[Tensor]) -> None:
        """Show policies from now on how much each KV head of each layer copies."""
        self.layers = {
            name: replace(layer, facts=replace(layer.facts, copy_scores=scores[layer.facts.index]))
            for name, layer in self.layers.items()
        }

    def clear(self) -> None:
        """Keep nothing of anybody: graphs are captured with any slots, and lists of the plugin's prompts are gone."""
        self.table.segments.zero_()
        self.table.starts.zero_()
        if self.table.coded is not None:
            self.table.coded.segments.zero_()
            self.table.coded.generated.zero_()

    @property
    def _facts(self) -> list[LayerFacts]:
        """Of the layers, in the model's order."""
        return [layer.facts for layer in self.layers.values()]

    # Before a step

    def before_forward(self, orders: StepOrders) -> None:
        """Nothing: the model runner has begun the step before it planned it."""

    def begin_step(self, orders: StepOrders | None) -> None:
        """Before the model runner takes up a scheduler's output; None in vLLM's own warm-up."""
        self._open, self.step = orders is not None, None
        if orders is None:
            return
        for request_id in orders.finished:
            self._leave(self.requests.pop(request_id, None))
        for request_id, epoch in orders.preempted.items():
            if request_id in self.requests:
                self._leave(self.requests[request_id])
                self.requests[request_id].preempt(epoch)
        # A preempted request waits anew once its prompt is computed again: until then it has no blocks to give back.
        self._waiting = [
            one for one in self._waiting if self.requests.get(one[0]) is one[1] and one[0] not in orders.preempted
        ]
        for order in orders.copies:
            self._move(order)
        for code in orders.codes:
            self._code_later(code)

    def _leave(self, tracked: Tracked | None) -> None:
        """Follow a slot's lists no more: they will be gone, and a graph may run for no request, with any slots."""
        if tracked is not None and tracked.slot >= 0 and tracked.kept is not None and tracked.kept.lists is not None:
            self.table.segments[:, tracked.slot].zero_()

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
        if tracked.slot != slot:
            self._leave(tracked)
        before, tracked.slot = tracked.slot, slot
        self._prompts[slot] = tracked.prompt
        if before >= 0 and tracked.private:
            # A session that goes on has its private blocks still.
            self.table.copy_slot(before, slot)
            return
        if self.table.coded is not None:
            self.table.coded.segments[:, slot].zero_()
            self.table.coded.generated[slot].zero_()
        if tracked.kept is None:
            self.table.segments[:, slot].zero_()
            self.table.starts[slot].fill_(0)
        else:
            self._show_lists(tracked)

    def watches(self, slots: np.ndarray[Any, Any], computed: np.ndarray[Any, Any]) -> bool:
        """Whether prompts are read in a step of requests in these slots, of which so many tokens are computed."""
        return bool((computed < self._prompts[slots]).any())

    @property
    def reads_tiles(self) -> bool:
        """Whether vLLM's kernels read many queries of a row in the step that is planned, beside codes in the pool."""
        return self.table.coded is not None and self.step is not None and self.step.limits is not None

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
        self.step = step = Step(self.slots, self.numbered, int(counts.max()))
        step.stock = bool((computed < prompts).any())
        if not step.stock and step.longest <= self.together:
            return
        parts, limits = split_rows(computed, counts, prompts, self.together)
        step.parts, step.longest = upload(torch.from_numpy(parts), self.device), int(parts[2].max(initial=1))
        if parts.shape[1]:
            begins_at = starts[parts[0]] + parts[1]
            step.span = int(begins_at.min()), int((begins_at + parts[2]).max())
        step.limits = upload(torch.from_numpy(limits), self.device)
        for row in np.flatnonzero(computed < prompts):
            request_id = batch.req_ids[row]
            self._watch(step, request_id, int(row), int(computed[row]), int(counts[row]), int(starts[row]))

    def _watch(self, step: Step, request_id: str, row: int, start: int, count: int, at: int) -> None:
        tracked = self.requests[request_id]
        ends = start + count >= tracked.prompt
        if not tracked.decided:
            if tracked.probes is None:
                # What a prefix-cache hit brought has no queries: the policy probes what was computed.
                tracked.probes = Probes.for_prompt(self.policy, tracked.prompt).from_position(start)
            positions = tracked.probes.positions
            here = positions[(positions >= start) & (positions < start + count)]
            part = PromptPart(tracked, row, upload(here - start + at, self.device))
            step.prompts.append(part)
            if ends:
                step.waiting += len(positions) * self._query_bytes
                if step.waiting > deciding.WAITING:
                    part.spans.extend(self._spans(tracked.prompt))
        if ends:
            step.ended.append((request_id, tracked))

    # In a step

    def look(self, step: Step, name: str, query: Tensor, block_table: Tensor) -> None:
        """A layer has read prompts: collect the queries that policies probe, and decide where these are too many.

        Parameters
        ----------
        step : Step
            The step.
        name : str
            vLLM's name of the layer.
        query : Tensor
            ``[tokens, H, D]``, position-encoded; this step's keys and values are in the cache.
        block_table : Tensor
            int32 ``[R, W]``.
        """
        index = self.layers[name].facts.index
        looks = deciding.looks(self.policy, index)
        for part in step.prompts:
            tracked = part.tracked
            assert tracked.probes is not None
            if looks and len(part.index):
                tracked.probes.queries.setdefault(index, []).append(query[part.index])
            part.seen.add(index)
            for span in part.spans:
                if index in range(span.start, span.stop) and part.seen.issuperset(range(span.start, span.stop)):
                    self._choose(tracked, span, block_table[part.row])

    def _choose(self, tracked: Tracked, span: slice, blocks: Tensor) -> None:
        """Decide about some layers of a prompt that has ended; all its blocks are written."""
        assert tracked.probes is not None
        used = blocks[: -(-tracked.prompt // self.block)]
        tracked.layers[span.start] = deciding.choose(
            self.policy, tracked.probes, self._facts[span], self.pool, used, tracked.prompt, self.heads, self.gather,
            self.ladder,
        )  # fmt: skip

    def _spans(self, prompt: int) -> list[slice]:
        entry = self.heads * 2 * self.pool.size * self.pool.cache.element_size()
        return deciding.spans(self.policy, self._facts, prompt * entry)

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
        known = len(self._waiting)
        for request_id, tracked in step.ended if step is not None else ():
            if not tracked.decided:
                self._decide(tracked)
            if not tracked.announced:
                self._waiting.append((request_id, tracked))
        outcomes, waiting = [], []
        for place, (request_id, tracked) in enumerate(self._waiting):
            if tracked.announced or self.requests.get(request_id) is not tracked:
                continue
            # Several ranks have to tell in the same step: then the step says when, not the clock.
            if tracked.numbers is not None and not (place < known if self.ranks > 1 else tracked.numbers.arrived):
                waiting.append((request_id, tracked))
                continue
            outcome = self._outcome(request_id, tracked)
            outcomes.append(outcome)
            tracked.announced = True
            if tracked.kept is not None and not outcome.altered:
                # Everything stays: without lists it is read faster.
                tracked.kept = tracked.numbers = None
                self.table.segments[:, tracked.slot].zero_()
                self.table.starts[tracked.slot].fill_(0)
        self._waiting = waiting
        return WorkerOutcomes(outcomes) if outcomes else None

    def _decide(self, tracked: Tracked) -> None:
        spans = self._spans(tracked.prompt)
        for span in spans:
            if span.start not in tracked.layers:
                self._choose(tracked, span, self._blocks_of(tracked.slot))
        found = [tracked.layers[span.start] for span in spans]
        tracked.decided, tracked.probes, tracked.layers = True, None, {}
        if self.ladder is None and all(some is None for some in found):
            return
        told = (self.heads, tracked.prompt, self.device)
        layers = [
            LayersKept.everything(span.stop - span.start, *told) if some is None else some
            for span, some in zip(spans, found, strict=True)
        ]
        tracked.kept = kept = KeptPrompt.of(layers, self.ladder, self._own)
        tracked.numbers = HostCopy(kept.numbers)
        self._show_lists(tracked)

    def _show_lists(self, tracked: Tracked) -> None:
        assert tracked.kept is not None
        tracked.kept.list_again()
        self.table.segments[:, tracked.slot] = tracked.kept.segments(self.pool)
        self.table.starts[tracked.slot].fill_(tracked.prompt)

    def _outcome(self, request_id: str, tracked: Tracked) -> PruningOutcome:
        prompt, layers = tracked.prompt, len(self.layers)
        if tracked.numbers is None:
            everything = (prompt,) * layers
            group = GroupOutcome(0, 0)
            return PruningOutcome(
                request_id, tracked.epoch, prompt, everything, everything, (None,) * layers, (group,), False
            )
        held = self._held(tracked)
        pages = max(held.of_heads(rank, self.ranks).places(self.pool, self.forms)[1] for rank in range(self.ranks))
        needed, whole = -(-pages // layers), prompt // self.block
        group = GroupOutcome(needed, whole, needed) if needed < whole else GroupOutcome(0, 0)
        kept = tuple(held.counts.flatten().tolist())
        coded = self.ladder is not None and group.copies > 0
        return PruningOutcome(
            request_id, tracked.epoch, prompt, kept, kept, held.metrics, (group,), min(kept) < prompt or coded,
            held.share_of_bytes(self.pool, prompt, self.forms if coded else ()), *self._coded_later(coded),
        )  # fmt: skip

    def _coded_later(self, coded: bool) -> tuple[int, int]:
        """How many tokens after a prompt that is coded are coded together, and how many of the newest never are."""
        if not coded or self.ladder is None or self._later is None:
            return 0, 0
        return self._later.tokens, self.ladder.recent

    def _held(self, tracked: Tracked) -> "Held":
        assert tracked.numbers is not None
        return Held.of(tracked.numbers.wait(), len(self.layers), self.heads, len(self.forms))

    def _move(self, order: CopyOrder) -> None:
        """Copy what a request keeps to the private blocks that the scheduler found for it."""
        tracked = self.requests.get(order.request_id)
        if tracked is None or tracked.slot < 0:
            return
        held, blocks = self._held(tracked).of_heads(self.rank, self.ranks), self._blocks_of(tracked.slot)
        move_prompt(self.pool, self._caches, self.table, tracked, held, blocks, order.blocks)

    def _code_later(self, order: CodeOrder) -> None:
        """Code the next tokens that came after a request's prompt into one private block more."""
        tracked = self.requests.get(order.request_id)
        if tracked is None or tracked.slot < 0:
            return
        assert self._later is not None
        code_answer(self._later, self.table, tracked, self._blocks_of(tracked.slot), order.block)
