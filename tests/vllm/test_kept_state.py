"""The worker's side on CUDA with plain kernels: a batch of random requests against dense attention over what is kept.

There is no model: queries, keys and values are random, and what vLLM's own kernel would read is left out.
"""

import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

from helpers.counting import KERNELS, counting
from refreekv import policies
from refreekv.core.key_codes import Moments
from refreekv.core.quantisation import SINKS, Ladder, centre_of
from refreekv.engines.vllm.gpu import coding, deciding, trial
from refreekv.engines.vllm.gpu.state import KeptState
from refreekv.engines.vllm.gpu.tracked import HostCopy
from refreekv.engines.vllm.messages import CodeOrder, CopyOrder, StepOrders
from refreekv.engines.vllm.worker_side import scoring
from refreekv.engines.vllm.worker_side.scoring import LayerFacts, Probes, alike, select
from refreekv.engines.vllm.worker_side.tracked import Layer
from refreekv.storage.columns import Columns, Levels
from refreekv.storage.leveled import LeveledKV

LAYERS, HEADS, GROUP, SIZE, BLOCK, BLOCKS, SLOTS = 3, 2, 2, 16, 16, 96, 4
ADAPTIVE = "adaptive:min_length=32,constant=0.4,window=4,spread=16,follow=1,lost_mass=0.9"
POLICIES = [ADAPTIVE, "snapkv:ratio=0.3", "refreekv:probe_rows=8,threshold=0.85", "streaming-llm:size=20"]


@dataclass
class Sequence:
    """One request: all it will ever ask and hold, and its ordinary blocks."""

    name: str
    prompt: int
    tokens: torch.Tensor  # [layers, n, (query heads + 2 * KV heads), D]
    blocks: list[int] = field(default_factory=list)
    slot: int = -1
    computed: int = 0
    epoch: int = 0

    def queries(self, layer):
        return self.tokens[layer, :, : HEADS * GROUP]

    def entries(self, layer):
        """``[n, H_kv, 2 * D]``."""
        keys, values = self.tokens[layer, :, HEADS * GROUP :].split(HEADS, 1)
        return torch.cat([keys, values], -1)


class Driver:
    """Plays vLLM's scheduler and model runner."""

    def __init__(self, policy, seed=0, ladder=None, ranks=1):
        self.generator = torch.Generator().manual_seed(seed)
        self.policy = policies.registry.parse(policy)
        memory = torch.zeros(LAYERS, BLOCKS, BLOCK, HEADS, 2 * SIZE)
        impl = SimpleNamespace(num_heads=HEADS * GROUP, scale=SIZE**-0.5, logits_soft_cap=0, sinks=None)
        layers = {}
        for index in range(LAYERS):
            module = SimpleNamespace(kv_cache=memory[index].transpose(1, 2), impl=impl)
            layers[f"layer{index}"] = Layer(module, 0, LayerFacts.of(impl, index, LAYERS))
        self.caches = [layer.module.kv_cache for layer in layers.values()]
        self.table = torch.zeros(SLOTS, 32, dtype=torch.int32)
        self.gathered = []

        def gather(part, dim):
            """Other ranks hold what this one does, doubled rank by rank."""
            self.gathered.append(part.shape)
            return torch.cat([part * (1 + rank) for rank in range(ranks)], dim)

        self.state = KeptState(
            self.policy, layers, SLOTS, 512, ladder, lambda slot: self.table[slot], gather, ranks=ranks
        )
        self.state.know_copy_scores([torch.tensor([0.0, 0.5] * ranks), *[torch.zeros(HEADS * ranks)] * (LAYERS - 1)])
        self.free = (torch.randperm(BLOCKS - 1, generator=self.generator) + 1).tolist()
        self.sequences, self.outcomes, self.orders, self.checked = {}, {}, StepOrders(), 0
        self.error, self.longest = 2e-5, []
        self.ladder, self.coded = ladder, set()
        """Requests whose codes are compared with those of transformers."""
        self.later = Counter()
        """Private blocks with tokens that were coded later."""

    def add(self, name, prompt, answer=60):
        shape = (LAYERS, prompt + answer, HEADS * (GROUP + 2), SIZE)
        self.sequences[name] = Sequence(name, prompt, torch.randn(shape, generator=self.generator) * 1.5)

    def preempt(self, name):
        sequence = self.sequences[name]
        sequence.epoch, sequence.computed, sequence.slot = sequence.epoch + 1, 0, -1
        self.give_back(sequence.blocks)
        sequence.blocks = []
        self.later.pop(name, None)
        self.orders.preempted[name] = sequence.epoch

    def give_back(self, blocks):
        """Blocks of nobody hold nonsense."""
        for block in blocks:
            if block:
                self.free.append(block)
                for cache in self.caches:
                    cache[block] = float("nan")

    def step(self, **counts):
        """Compute so many tokens of each named request; check what comes after prompts."""
        orders, self.orders = self.orders, StepOrders()
        rows = [self.sequences[name] for name in counts]
        fresh = [one for one in rows if one.slot < 0]
        taken = {one.slot for one in self.sequences.values()}
        self.state.begin_step(orders)
        # After the copies, as the scheduler hands out freed blocks with the same step.
        for one in getattr(self, "leaving", ()):
            self.give_back(one)
        self.leaving = []
        for one in fresh:
            one.slot = next(slot for slot in range(SLOTS) if slot not in taken)
            taken.add(one.slot)
            self.state.admit(one.name, one.slot, one.prompt)
        number = list(counts.values())
        for one, count in zip(rows, number, strict=True):
            while len(one.blocks) * BLOCK < one.computed + count:
                one.blocks.append(self.free.pop())
            self.table[one.slot, : len(one.blocks)] = torch.tensor(one.blocks)
            for layer in range(LAYERS):
                for at in range(one.computed, one.computed + count):
                    self.caches[layer][one.blocks[at // BLOCK], :, at % BLOCK] = one.entries(layer)[at]
        starts = np.concatenate([[0], np.cumsum(number)]).astype(np.int32)
        slots = np.array([one.slot for one in rows])
        computed = np.array([one.computed for one in rows], dtype=np.int32)
        watched = self.state.watches(slots, computed)
        assert watched == any(one.computed < one.prompt for one in rows)
        self.state.plan(
            SimpleNamespace(
                num_reqs=len(rows),
                idx_mapping_np=slots,
                idx_mapping=torch.tensor(slots),
                num_computed_tokens_np=computed,
                query_start_loc_np=starts,
                req_ids=[one.name for one in rows],
            )
        )
        lengths = torch.tensor([one.computed + count for one, count in zip(rows, number, strict=True)]).int()
        common = SimpleNamespace(query_start_loc=torch.from_numpy(starts), seq_lens=lengths)
        step, block_table = self.state.step, self.table[torch.tensor(slots)]
        found_rows = step.rows(common)
        self.longest.append(0 if found_rows is None else found_rows.longest)
        assert step.stock == watched
        for layer in range(LAYERS):
            name = f"layer{layer}"
            parts = [one.queries(layer)[one.computed :][:count] for one, count in zip(rows, number, strict=True)]
            query = torch.cat(parts)
            if step.prompts:
                self.state.look(step, name, query, block_table)
            output = torch.full_like(query, float("nan"))
            if found_rows is not None:
                self.state.attend(name, query, block_table, found_rows, output)
            for one, count, at in zip(rows, number, starts, strict=False):
                self._check(one, layer, count, output[at : at + count])
        for one, count in zip(rows, number, strict=True):
            one.computed += count
        message = self.state.end_step()
        for outcome in message.outcomes if message else ():
            self.outcomes[outcome.request_id] = outcome

    def move(self, name):
        """Find private blocks for what a request keeps; the copy goes with the next step."""
        sequence, (group,) = self.sequences[name], self.outcomes[name].groups
        assert group.copies, "nothing is to be moved"
        assert self.outcomes[name].epoch == sequence.epoch
        private = tuple(self.free.pop() for _ in range(group.copies))
        self.orders.copies.append(CopyOrder(name, 0, private))
        self.leaving = [*getattr(self, "leaving", ()), sequence.blocks[: group.stop]]
        sequence.blocks[: group.stop] = [0] * group.stop

    def code_later(self, name):
        """Have the next tokens after a prompt coded; the block that they go to may be one that they leave."""
        sequence, outcome = self.sequences[name], self.outcomes[name]
        tokens = outcome.coded_tokens
        start, self.later[name] = sequence.prompt + self.later[name] * tokens, self.later[name] + 1
        assert sequence.computed >= start + tokens + outcome.recent
        own = slice(start // BLOCK, (start + tokens) // BLOCK)
        left = sequence.blocks[own]
        assert all(left)
        sequence.blocks[own] = [0] * len(left)
        self.orders.codes.append(CodeOrder(name, left.pop(0)))
        self.leaving = [*getattr(self, "leaving", ()), left]

    def after(self, one, layer, stop):
        """Entries ``[t, H_kv, 2 * D]`` that came after a prompt, up to a position: those that were coded as coded."""
        entries = one.entries(layer)[one.prompt : stop]
        count = self.later[one.name] * self.outcomes[one.name].coded_tokens if self.later[one.name] else 0
        if not count:
            return entries
        centres = [centre_of(part[None]) for part in one.entries(layer)[: one.prompt].transpose(0, 1).split(SIZE, -1)]
        around = torch.zeros(SINKS + count + self.ladder.recent, HEADS, 2 * SIZE)
        around[SINKS:][:count] = entries[:count]
        keys, values = around.transpose(0, 1)[None].split(SIZE, -1)
        columns = Columns(heads=(torch.arange(len(around), dtype=torch.int32),) * HEADS)
        codes = self.state.layers[f"layer{layer}"].facts.codes
        stored = LeveledKV.gathered(keys, values, [columns], 0, self.ladder, tuple(centres), None, codes).full()
        keys, values = stored.segments(0)
        coded = torch.stack([torch.cat(pair, -1) for pair in zip(keys, values, strict=True)], 1)
        return torch.cat([coded[SINKS:][:count], entries[count:]])

    def kept(self, one, layer):
        """By head, entries ``[t, 2 * D]`` that the policy keeps, given all queries of the prompt at once."""
        heads, keeps, levels = self._kept(one, layer)
        if one.name not in self.coded:
            return heads
        # What transformers' storage makes of them
        ladder, codes = self.ladder, self.state.layers[f"layer{layer}"].facts.codes
        entries = one.entries(layer)[: one.prompt].transpose(0, 1)[None]
        keys, values = entries.split(SIZE, -1)
        columns = Columns(heads=tuple(keep.nonzero()[:, 0].int() for keep in keeps))
        rows = None
        if levels is not None:
            own = [level[keep] for level, keep in zip(levels, keeps, strict=True)]
            coded = [part[SINKS : len(part) - ladder.recent] for part in own]
            counts = tuple(tuple(int((part == rung).sum()) for rung in range(len(ladder.rungs))) for part in coded)
            rows = [Levels(tuple(own), counts)]
        stored = LeveledKV.gathered(
            keys, values, [columns], 0, ladder, (centre_of(keys), centre_of(values)), rows, codes
        ).full()
        keys, values = stored.segments(0)
        return [torch.cat([key, value], -1) for key, value in zip(keys, values, strict=True)]

    def _kept(self, one, layer):
        """By head, what is kept as it is, where that is among the prompt, and everybody's rung."""
        probes = Probes.for_prompt(self.policy, one.prompt)
        probes.queries = {layer: [one.queries(layer)[probes.positions]]}
        entries = one.entries(layer)[: one.prompt]
        keys, values = entries.split(SIZE, -1)
        facts = self.state.layers[f"layer{layer}"].facts
        found = select(
            self.policy, probes, facts, keys, values, lambda part, _: part, surrogates=True, ladder=self.ladder
        )
        heads, keeps = [], []
        for head in range(HEADS):
            own = entries[:, head].clone()
            if found is None:
                keep = torch.ones(one.prompt, dtype=torch.bool)
            elif hasattr(found, "cut"):
                keep = found.mask(torch.ones(1, one.prompt, dtype=torch.bool))[0, 0]
            else:
                keep = found.keep[0, head % found.keep.shape[1]].clone()
                if found.surrogates is not None:
                    for column, key, value, real in zip(*(part[0, head] for part in found.surrogates), strict=True):
                        if real:
                            own[column], keep[column] = torch.cat([key, value]), True
            heads.append(own[keep])
            keeps.append(keep)
        levels = getattr(found, "levels", None)
        return heads, keeps, None if levels is None else levels[0].expand(HEADS, -1)

    def _check(self, one, layer, count, output):
        """Queries after the prompt see what is kept and what came after it."""
        if one.computed + count <= one.prompt:
            return
        kept, after = self.kept(one, layer), self.after(one, layer, one.computed + count)
        for index in range(max(0, one.prompt - one.computed), count):
            position = one.computed + index
            for head in range(HEADS):
                entries = torch.cat([kept[head], after[: position + 1 - one.prompt, head]])
                for query_head in range(head * GROUP, (head + 1) * GROUP):
                    logits = entries[:, :SIZE] @ one.queries(layer)[position, query_head] * SIZE**-0.5
                    want = logits.softmax(0) @ entries[:, SIZE:]
                    torch.testing.assert_close(output[index, query_head], want, atol=self.error, rtol=1e-4)
                    self.checked += 1


def random_codes(driver):
    """Codes of keys for each layer."""
    codes = []
    for _ in range(LAYERS):
        size = torch.rand(SIZE, generator=driver.generator) + 0.1
        keys = torch.randn(1, HEADS, 100, SIZE, generator=driver.generator) * size
        asked = torch.randn(1, HEADS * GROUP, 50, SIZE, generator=driver.generator)
        codes.append(Moments.of(keys, asked).codes())
    return codes


@pytest.mark.parametrize("policy", POLICIES)
def test_prompts_in_chunks_then_lists_then_private_blocks(policy):
    driver = Driver(policy)
    driver.add("long", 133)
    driver.add("short", 75)
    driver.step(long=50)
    driver.step(long=50, short=75)
    driver.step(short=1, long=33)
    for _ in range(2):
        driver.step(short=1, long=1)
    assert driver.outcomes.keys() == {"long", "short"}
    driver.move("long")
    for _ in range(2):
        driver.step(short=1, long=1)
    if driver.outcomes["short"].groups[0].copies:
        driver.move("short")
    driver.step(long=1, short=1)
    # Drafts: several queries a request, not as many for each.
    driver.step(long=4, short=2)
    assert driver.checked > 100
    long = driver.outcomes["long"]
    assert long.prompt == 133
    assert 0 < sum(long.kept) < LAYERS * HEADS * 133
    assert len(long.metrics) == LAYERS


ALL_AT_ONCE = {"together": (1 << 28, 1 << 28), "in two": (2 * 133 * HEADS * 2 * SIZE * 4, 1 << 28)}
"""Bytes of entries that are decided about at once, and of queries that wait for the step's end."""
IN_THE_STEP = {"one by one": (1, 1 << 28), "in the step": (1 << 28, 0), "one by one in the step": (1, 0)}


@pytest.mark.parametrize("chunks", [(133,), (60, 72, 1)], ids=["whole", "in chunks"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("policy", [f"{ADAPTIVE},code_unit=0.3", f"{ADAPTIVE},bits=16", POLICIES[1], POLICIES[2]])
def test_layers_are_decided_about_together(monkeypatch, policy, ranks, chunks):
    """However many at once and when: bit by bit what each of them keeps by itself."""
    ladder = Ladder.parse("k4v2+k4v4+k6v4+k7v6:recent=4") if "bits" not in policy else None
    found, gathered = {}, {}
    for name, (at_once, waiting) in {**ALL_AT_ONCE, **IN_THE_STEP}.items():
        monkeypatch.setattr(deciding, "AT_ONCE", at_once)
        monkeypatch.setattr(deciding, "WAITING", waiting)
        driver = Driver(policy, ladder=ladder, ranks=ranks)
        driver.add("a", 133)
        driver.add("b", 90)
        for count in chunks:
            driver.step(a=count, **({"b": 90} if count == chunks[-1] else {}))
        assert all(one.probes is None for one in driver.state.requests.values())
        found[name] = [driver.state.requests[one].kept for one in "ab"]
        gathered[name] = len(driver.gathered)
    first = found["together"]
    assert any(0 < int(kept.counts.min()) < kept.prompt for kept in first)
    for kepts in found.values():
        for kept, want in zip(kepts, first, strict=True):
            for part in ("bits", "levels", "columns", "real", "lines", "counts", "numbers"):
                one, other = getattr(kept, part), getattr(want, part)
                assert (one is None) == (other is None), part
                assert one is None or torch.equal(one, other) or (one.isnan() & other.isnan() | (one == other)).all()
    if policy.startswith("adaptive"):
        assert gathered["one by one"] == LAYERS * gathered["together"]


def counted(monkeypatch, owner, name):
    """What a method launches from now on."""
    real, found = getattr(owner, name), Counter()

    def call(*told):
        with counting() as counts:
            result = real(*told)
        found.update(counts.launches)
        return result

    monkeypatch.setattr(owner, name, call)
    return found


def test_a_prompt_s_end_takes_few_launches(monkeypatch):
    """As many for any number of layers, beside one for each that puts its queries aside."""
    driver = Driver(ADAPTIVE, ladder=Ladder.parse("k4v2+k4v4+k6v4+k7v6:recent=4"))
    look, end = (counted(monkeypatch, driver.state, name) for name in ("look", "end_step"))
    for name in "ab":
        # What is measured once a process is measured with the first one.
        look.clear()
        end.clear()
        driver.add(name, 133)
        driver.step(**{name: 133})
        assert driver.state.requests[name].kept is not None
    assert look == {"index": LAYERS}
    assert end["kernels.both_reductions"] == KERNELS["both_reductions"]
    assert end["kernels.needed"] == KERNELS["needed"]
    # The copy out of blocks, which is one launch on CUDA, is some of them here.
    assert sum(end.values()) < 105


def test_the_host_does_not_wait_for_a_copy(monkeypatch):
    """Memory that is not pinned is copied by waiting for all that the device has to do: a long prompt."""
    sent, device = [], torch.device("cpu")
    monkeypatch.setattr(scoring, "upload", lambda numbers, device: (sent.append(numbers), numbers.to(device))[1])
    probes = Probes.for_prompt(policies.registry.parse(ADAPTIVE), 133)
    assert torch.equal(probes.positions_on(device), probes.positions)
    probes.positions_on(device)
    assert sent == [probes.positions]


class SingleNumbers(TorchDispatchMode):
    """Where single numbers were copied: on CUDA the host waits for it, as their memory is not pinned."""

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and not args[0].dim():
            self.places |= {
                f"{one.name}, line {one.lineno}" for one in traceback.extract_stack() if "/vllm/gpu/" in one.filename
            }
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait_to_tell_of_a_slot():
    driver = Driver("full", ladder=Ladder.parse("int4:recent=4"))
    whole = Driver("snapkv:ratio=1.0")
    with SingleNumbers() as found:
        for one in (driver, whole):
            one.add("a", 133, answer=120)
            for count in (133, 1, 1):
                one.step(a=count)
        driver.move("a")
        driver.coded = {"a"}
        driver.step(a=110)
        driver.code_later("a")
        driver.step(a=1)
        driver.preempt("a")
        driver.coded = set()
        driver.step(a=240)
    assert not found.places


def test_layers_that_differ_are_decided_about_apart():
    facts = [LayerFacts(index, 8, 0.2, None, None) for index in range(8)]
    adaptive, snapkv = (policies.registry.parse(name) for name in (ADAPTIVE, "snapkv:ratio=0.3"))
    assert alike(adaptive, facts) == [slice(0, 8)]
    assert alike(snapkv, facts) == [slice(at, at + 1) for at in range(8)]
    frozen = policies.registry.parse(f"{ADAPTIVE},frozen_layers=2")
    assert alike(frozen, facts) == [slice(0, 2), slice(2, 8)]
    facts[3] = replace(facts[3], scale=0.1)
    facts[5] = replace(facts[5], sinks=torch.zeros(4))
    facts[6] = replace(facts[6], sinks=torch.zeros(4))
    facts[7] = replace(facts[7], softcap=30.0)
    assert alike(adaptive, facts) == [slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6), slice(6, 7), slice(7, 8)]


@pytest.mark.parametrize("policy", ["full", ADAPTIVE])
def test_private_entries_may_be_coded(policy):
    driver = Driver(policy, ladder=Ladder.of("int8", recent=4))
    driver.add("a", 133)
    driver.add("b", 90)
    driver.step(a=133)
    driver.step(a=1, b=90)
    driver.step(a=1, b=1)
    assert driver.outcomes["a"].altered
    driver.move("a")
    driver.error = 0.1
    driver.step(a=2, b=1)
    found = driver.state.table.coded.segments[:, driver.sequences["a"].slot, :, 0, 1]
    kept = torch.tensor(driver.outcomes["a"].kept).view(LAYERS, HEADS)
    assert torch.equal(found, kept - 8)
    # A quarter of float32, and factors.
    assert driver.outcomes["a"].groups[0].copies <= (6 if policy == "full" else 4)
    driver.move("b")
    driver.step(a=1, b=1)
    driver.step(a=1, b=3)
    driver.preempt("a")
    driver.outcomes.clear()
    driver.step(a=137, b=1)
    driver.error = 2e-5
    driver.step(a=1)
    driver.move("a")
    driver.error = 0.1
    driver.step(a=1, b=1)


@pytest.mark.parametrize("formats", ["int4", "k4v2+k6v4"])
@pytest.mark.parametrize("at_once", [1 << 20, 133 * HEADS])
def test_layers_are_coded_together(monkeypatch, formats, at_once):
    """One launch a rung for all of them, or for as many as there is memory for; the codes are the same."""
    monkeypatch.setattr(coding, "AT_ONCE", at_once)
    driver = Driver(f"{ADAPTIVE},code_unit=0.3", ladder=Ladder.parse(f"{formats}:recent=4"))
    driver.add("a", 133)
    driver.step(a=133)
    driver.step(a=1)
    driver.move("a")
    orders, driver.orders = driver.orders, StepOrders()
    with counting() as counts:
        driver.state.begin_step(orders)
    driver.coded = {"a"}
    driver.step(a=1)
    packs = sum(number for name, number in counts.launches.items() if name.startswith("kernels.pack_"))
    assert 0 < packs <= len(driver.state.forms) * (1 if at_once > 1000 else LAYERS)


@pytest.mark.parametrize("policy", [f"{ADAPTIVE},code_unit=0.3", "snapkv:ratio=0.7"], ids=["adaptive", "snapkv"])
@pytest.mark.parametrize("own", [False, True], ids=["rotated", "model's"])
@pytest.mark.parametrize("formats", ["k4v2+k4v4+k6v4+k7v6", "k4v2+int8:generated=0", "int4"])
def test_codes_are_those_of_transformers(policy, own, formats):
    ladder = Ladder.parse(f"{formats}{',' if ':' in formats else ':'}recent=4")
    driver = Driver(policy, ladder=ladder)
    if own:
        driver.state.code_by(random_codes(driver))
    driver.add("a", 133)
    driver.add("b", 90)
    driver.step(a=133)
    driver.step(a=1, b=90)
    driver.step(a=1, b=1)
    driver.move("a")
    driver.coded = {"a"}
    driver.step(a=2, b=1)
    driver.move("b")
    driver.coded = {"a", "b"}
    driver.step(a=1, b=3)
    segments = driver.state.table.coded.segments
    held = segments[:, [driver.sequences[name].slot for name in "ab"], ..., 1].sum((0, 1, 2))
    if policy.startswith("adaptive") and "+" in formats:
        assert (held > 0).sum() > 1
    kept = torch.tensor(driver.outcomes["a"].kept).view(LAYERS, HEADS)
    assert torch.equal(segments[:, driver.sequences["a"].slot, ..., 1].sum(-1), (kept - 8).clamp(min=0))
    assert driver.outcomes["a"].bytes_share < kept.sum() / (LAYERS * HEADS * 133)
    # All is gone, and comes back as it was.
    driver.preempt("a")
    driver.outcomes.pop("a")
    driver.coded = {"b"}
    driver.step(a=137, b=1)
    driver.step(a=1)
    driver.move("a")
    driver.coded = {"a", "b"}
    driver.step(a=1, b=1)


@pytest.mark.parametrize("own", [False, True], ids=["rotated", "model's"])
@pytest.mark.parametrize("formats", ["k4v2+k4v4+k6v4+k7v6", "k4v2+int8:generated=0", "int4"])
def test_an_answer_s_older_tokens_are_coded(formats, own):
    """As transformers codes them; beside drafts and other requests, and again after a preemption."""
    ladder = Ladder.parse(f"{formats}{',' if ':' in formats else ':'}recent=4")
    driver = Driver(f"{ADAPTIVE},code_unit=0.3", ladder=ladder)
    if own:
        driver.state.code_by(random_codes(driver))
    driver.add("a", 133, answer=240)
    driver.add("b", 90, answer=240)
    driver.step(a=133, b=90)
    driver.step(a=1, b=1)
    driver.move("a")
    driver.coded = {"a"}
    driver.step(a=1, b=1)
    tokens = driver.outcomes["a"].coded_tokens
    form = driver.state.forms[ladder.generated]
    assert tokens == BLOCK * 2 * SIZE * 4 // form.entry_bytes
    assert driver.outcomes["a"].recent == 4
    while driver.sequences["a"].computed < 133 + 4 + tokens:
        driver.step(a=7, b=1)
    held = len([block for block in driver.sequences["a"].blocks if block])
    driver.code_later("a")
    assert len([block for block in driver.sequences["a"].blocks if block]) < held
    driver.move("b")
    driver.coded = {"a", "b"}
    driver.step(a=1, b=3)
    while driver.sequences["a"].computed < 133 + 4 + 2 * tokens:
        driver.step(a=7)
    driver.code_later("a")
    driver.step(a=4, b=1)
    slot = driver.sequences["a"].slot
    assert driver.state.table.coded.generated[slot, 1] == 2
    assert driver.state.table.starts[slot] == 133 + 2 * tokens
    # All is gone; the same tokens go the same way again, two blocks at once.
    computed = driver.sequences["a"].computed
    driver.preempt("a")
    driver.outcomes.pop("a")
    driver.coded = {"b"}
    driver.step(a=computed, b=1)
    driver.step(a=1)
    driver.move("a")
    driver.code_later("a")
    driver.code_later("a")
    driver.coded = {"a", "b"}
    driver.step(a=3, b=1)
    assert driver.state.table.coded.generated[driver.sequences["a"].slot, 1] == 2
    # Whoever has the slot next has nothing of it.
    slot = driver.sequences.pop("a").slot
    driver.orders.finished.append("a")
    driver.later.clear()
    driver.add("c", 60)
    driver.step(c=60, b=1)
    assert driver.sequences["c"].slot == slot
    assert not driver.state.table.coded.generated[slot].any()
    driver.step(c=1, b=1)


@pytest.mark.parametrize("formats", [None, "int4"])
def test_a_session_that_goes_on_sees_what_it_saw(formats):
    """vLLM takes it out of its slot and gives it one, with the blocks that it has."""
    driver = Driver("snapkv:ratio=0.7", ladder=formats and Ladder.parse(f"{formats}:recent=4"))
    driver.add("a", 133, answer=240)
    driver.add("b", 133, answer=240)
    driver.step(a=133, b=133)
    driver.step(a=1, b=1)
    driver.move("b")
    driver.coded = {"b"} if formats else set()
    driver.step(a=1, b=120)
    if formats:
        driver.code_later("b")
    for gone in ("a", None):
        if gone:
            driver.sequences.pop(gone)
            driver.orders.finished.append(gone)
        old, driver.sequences["b"].slot = driver.sequences["b"].slot, -1
        driver.step(b=30)
        assert (driver.sequences["b"].slot != old) == bool(gone)
        driver.step(b=1)


def test_where_nothing_is_coded_answers_are_not():
    whole = Driver("streaming-llm:size=20")
    short = Driver("full", ladder=Ladder.parse("int8:recent=64"))
    for driver, prompt in ((whole, 90), (short, 40)):
        driver.add("a", prompt)
        driver.step(a=prompt)
        driver.step(a=1)
        assert driver.outcomes["a"].coded_tokens == 0


def test_wrong_kernels_are_found(monkeypatch):
    state = Driver("full", ladder=Ladder.parse("k4v2+k4v4+k6v4+k7v6")).state
    assert state.fault() is None
    attention, calls = trial.paged_attention, []

    def wrong(*arguments, **more):
        attention(*arguments, **more)
        calls.append(0)
        if len(calls) == 1:  # that of the device
            arguments[6].mul_(1.1)

    monkeypatch.setattr(trial, "paged_attention", wrong)
    assert "attention differs by 0.1" in state.fault()

    def failing(*arguments, **more):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(trial, "paged_attention", failing)
    assert state.fault() == "RuntimeError: out of registers"
    state.code_nothing()
    assert state.fault() is None
    assert state.table.coded is None


@pytest.mark.parametrize(("own", "other"), [(None, 0), (None, 1), ("out of registers", 0)])
def test_ranks_code_together_or_not_at_all(monkeypatch, own, other):
    state = Driver("full", ladder=Ladder.parse("int4"), ranks=2).state
    monkeypatch.setattr(trial, "fault", lambda *_: own)
    monkeypatch.setattr(state, "gather", lambda part, dim: torch.cat([part, torch.full_like(part, other)], dim))
    said = state.fault_of_any()
    assert said == own if own else ("another" in said if other else said is None)


def test_preempted_requests_see_the_same_again():
    driver = Driver(ADAPTIVE)
    driver.add("a", 90)
    driver.add("b", 70)
    driver.step(a=90)
    driver.step(a=1, b=70)
    driver.move("a")
    driver.step(a=3, b=1)
    before = driver.outcomes["a"].kept
    # Back into another slot, across the prompt's end in one chunk, more answer than a program takes at once.
    for _ in range(40):
        driver.step(a=1)
    driver.preempt("a")
    driver.step(b=1)
    driver.add("c", 40)
    driver.step(c=10, b=1)
    driver.outcomes.clear()
    driver.step(a=60, b=1)
    assert "a" not in driver.outcomes
    driver.step(a=90 + 44 - 60, b=1)
    assert driver.outcomes["a"].epoch == 1
    assert driver.outcomes["a"].kept == before
    driver.move("a")
    driver.step(a=1, b=1, c=30)
    driver.step(a=1, b=1, c=1)


def test_an_answer_is_computed_again_by_the_kernel_of_single_tokens():
    """However many of its tokens a step has: for more queries at once the kernel would be compiled meanwhile."""
    driver = Driver("snapkv:ratio=0.4")
    driver.add("a", 80)
    driver.add("b", 50)
    driver.step(a=80, b=50)
    for _ in range(20):
        driver.step(a=1, b=1)
    driver.preempt("a")
    checked = driver.checked
    driver.step(a=97, b=1)
    assert driver.state.step is None
    assert driver.checked == checked + LAYERS * HEADS * GROUP * 18
    assert driver.longest[-1] == 4
    driver.step(a=3, b=1)
    assert driver.longest[-1] <= 4
    assert all(longest * GROUP <= 8 for longest in driver.longest)


def test_preempted_before_the_prompt_has_ended():
    driver = Driver(ADAPTIVE)
    driver.add("a", 90)
    driver.step(a=60)
    driver.preempt("a")
    driver.add("b", 40)
    driver.step(b=40)
    driver.step(a=90, b=1)
    driver.step(a=1, b=1)
    assert driver.outcomes["a"].epoch == 1


def test_preempted_before_its_numbers_have_come_to_the_host(monkeypatch):
    """It has no blocks then: the scheduler is told once the prompt is computed again, and once."""
    driver = Driver(ADAPTIVE)
    driver.add("a", 90)
    driver.add("b", 40)
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "arrived", False)
        driver.step(a=90)
        driver.step(a=1, b=40)
        assert not driver.outcomes
        driver.preempt("a")
    driver.step(b=1)
    assert set(driver.outcomes) == {"b"}
    driver.step(a=50, b=1)
    assert set(driver.outcomes) == {"b"}
    driver.step(a=41, b=1)
    driver.step(a=1, b=1)
    assert driver.outcomes["a"].epoch == 1
    driver.move("a")
    driver.step(a=1, b=1)
    assert not driver.state.end_step()


def test_whole_prompts_stay_as_they_are():
    driver = Driver(ADAPTIVE)
    driver.add("tiny", 20)
    driver.step(tiny=20)
    driver.step(tiny=1)
    outcome = driver.outcomes["tiny"]
    assert outcome.kept == (20,) * LAYERS
    assert not outcome.groups[0].freed
    assert not driver.state.table.starts.any()


def test_what_keeps_everything_is_read_as_it_is():
    driver = Driver("snapkv:ratio=1.0")
    driver.add("a", 80)
    for count in (80, 1, 1):
        driver.step(a=count)
    assert driver.outcomes["a"].kept == (80,) * LAYERS * HEADS
    assert not driver.outcomes["a"].altered
    assert not driver.state.table.segments.any()


def test_a_slot_is_clean_for_the_next_request():
    driver = Driver("snapkv:ratio=0.3")
    driver.add("a", 80)
    driver.step(a=80)
    driver.step(a=1)
    driver.move("a")
    driver.step(a=1)
    slot = driver.sequences.pop("a").slot
    driver.orders.finished.append("a")
    driver.add("b", 50)
    driver.step(b=50)
    assert driver.sequences["b"].slot == slot
    driver.step(b=1)
    driver.step(b=1)


@pytest.mark.parametrize("how", ["ends", "preempted", "goes on"])
def test_lists_of_a_slot_that_was_left_are_not_followed(how):
    """They will be gone, and data-parallel ranks without a request replay graphs with any slots."""
    driver = Driver("snapkv:ratio=0.3")
    driver.add("a", 80)
    driver.add("b", 60)
    driver.step(a=80, b=60)
    slot = driver.sequences["b"].slot
    segments = driver.state.table.segments
    assert segments[:, slot].any()
    assert slot
    if how == "preempted":
        driver.preempt("b")
    elif how == "ends":
        driver.sequences.pop("b")
        driver.orders.finished.append("b")
    else:
        driver.sequences.pop("a")
        driver.orders.finished.append("a")
        driver.sequences["b"].slot = -1
    driver.step(**{"b" if how == "goes on" else "a": 1})
    assert not segments[:, slot].any()


def test_of_the_plugin_s_own_prompts_nothing_is_left():
    """Their lists are freed, and graphs are captured with any slot: nobody may follow their addresses."""
    driver = Driver(ADAPTIVE, ladder=Ladder.of("int8", recent=4))
    driver.add("own", 133)
    driver.step(own=133)
    table = driver.state.table
    assert table.segments.any()
    assert table.starts.any()
    driver.orders.finished.append("own")
    driver.sequences.clear()
    driver.state.begin_step(driver.orders)
    driver.state.clear()
    assert not table.segments.any()
    assert not table.starts.any()
    assert not table.coded.segments.any()


def test_vllm_s_own_warm_up_is_not_pruned():
    driver = Driver("snapkv:ratio=0.3")
    state = driver.state
    state.begin_step(None)
    state.admit("warm", 1, 40)
    assert not state.watches(np.array([1]), np.array([0]))
    assert not state.requests
    assert state.step is None
