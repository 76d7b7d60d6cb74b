"""vLLM's scheduler with the worker's side on CUDA, on a CPU: what is read of each request is what it kept, always.

There is no model. A token's entry says which token, position, layer and head it is of, so that after any number of
preemptions, aborts, prefix hits and moves it can be told whether the right memory is read.
"""

import random
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

from helpers.vllm_engine import tiny_model
from helpers.vllm_invariants import check, check_idle
from refreekv.core.quantisation import Ladder
from refreekv.engines.vllm.config import PluginOptions
from refreekv.engines.vllm.gpu.kept import unpacked
from refreekv.engines.vllm.gpu.state import KeptState
from refreekv.engines.vllm.gpu.tracked import HostCopy
from refreekv.engines.vllm.scheduler_side.reserve import Reserve
from refreekv.engines.vllm.spec import PrivateAttentionSpec
from refreekv.engines.vllm.worker_side.scoring import LayerFacts
from refreekv.engines.vllm.worker_side.tracked import Layer
from refreekv.kernels import kept_first, paged_reference

LAYERS, HEADS, GROUP, SIZE, BLOCK, BLOCKS, RUNNING = 2, 2, 2, 16, 16, 48, 8
ADAPTIVE = "adaptive:min_length=32,constant=0.5,window=8,spread=16,follow=1,lost_mass=0.9"
NAMES = [f"layer{index}" for index in range(LAYERS)]


class Worker:
    """What vLLM's model runner does, as far as memory is concerned."""

    def __init__(self, policy, ladder=None, group=0):
        memory = torch.zeros(LAYERS, BLOCKS, BLOCK, HEADS, 2 * SIZE)
        impl = SimpleNamespace(num_heads=HEADS * GROUP, scale=SIZE**-0.5, logits_soft_cap=0, sinks=None)
        self.caches = [part.transpose(1, 2) for part in memory]
        layers = {
            name: Layer(SimpleNamespace(kv_cache=cache, impl=impl), 0, LayerFacts.of(impl, index, LAYERS))
            for index, (name, cache) in enumerate(zip(NAMES, self.caches, strict=True))
        }
        self.table = torch.zeros(RUNNING, 64, dtype=torch.int32)
        self.state = KeptState(policy, layers, RUNNING, 512, ladder, lambda at: self.table[at].clone(), _alone)
        self.requests, self.kept, self.read = {}, {}, Counter()
        self.group = group
        """Which of the scheduler's groups is pruned; blocks of the others are written to, too."""
        self.rng = random.Random(3)

    def entry(self, token, position, layer, head):
        found = torch.zeros(2 * SIZE)
        found[0], found[1], found[2], found[3] = token, position, layer, head
        found[4] = 1
        return found

    def execute(self, output):
        """One step: what vLLM's `ModelRunnerOutput` would say of it."""
        self.state.begin_step(output.kv_connector_metadata)
        for name in output.finished_req_ids | set(output.preempted_req_ids or ()):
            self.requests.pop(name, None)
        for name in output.finished_req_ids:
            self.kept.pop(name, None)
        for new in output.scheduled_new_reqs:
            slot = min(set(range(RUNNING)) - {one.slot for one in self.requests.values()})
            tables, tokens = [list(part) for part in new.block_ids], list(new.prefill_token_ids)
            blocks = tables.pop(self.group)
            self.requests[new.req_id] = SimpleNamespace(
                slot=slot, blocks=blocks, others=tables, tokens=tokens, prompt=new.prompt_len,
                computed=new.num_computed_tokens,
            )  # fmt: skip
            self.state.admit(new.req_id, slot, new.prompt_len)
        cached = output.scheduled_cached_reqs
        for name, computed, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            self.requests[name].computed = computed
            tables = [list(part) for part in blocks] if blocks else []
            self.requests[name].blocks += tables.pop(self.group) if tables else []
            for table, part in zip(self.requests[name].others, tables, strict=False):
                table += part
        for one in self.requests.values():
            self.table[one.slot, : len(one.blocks)] = torch.tensor(one.blocks, dtype=torch.int32)
        counts = dict(sorted(output.num_scheduled_tokens.items(), key=lambda item: item[1]))
        sampled = self._compute(counts) if counts else []
        meta = self.state.end_step()
        for name, tracked in self.state.requests.items():
            if tracked.decided and name not in self.kept:
                kept = tracked.kept
                self.kept[name] = None if kept is None else kept_first(unpacked(kept.bits, 1, kept.prompt).bool())
        return list(counts), sampled, meta

    def _compute(self, counts):
        rows = [self.requests[name] for name in counts]
        for one, count in zip(rows, counts.values(), strict=True):
            for position in range(one.computed, one.computed + count):
                for other in one.others:
                    assert other[position // BLOCK]
                    for cache in self.caches:
                        cache[other[position // BLOCK], :, position % BLOCK] = -1
                for layer, cache in enumerate(self.caches):
                    for head in range(HEADS):
                        # The null block is nobody's, and what is written must be one's own.
                        assert one.blocks[position // BLOCK]
                        cache[one.blocks[position // BLOCK], head, position % BLOCK] = self.entry(
                            one.tokens[position], position, layer, head
                        )
        starts = np.concatenate([[0], np.cumsum(list(counts.values()))]).astype(np.int32)
        slots = np.array([one.slot for one in rows])
        self.state.plan(
            SimpleNamespace(
                num_reqs=len(rows),
                idx_mapping_np=slots,
                idx_mapping=torch.tensor(slots),
                num_computed_tokens_np=np.array([one.computed for one in rows], dtype=np.int32),
                query_start_loc_np=starts,
                req_ids=list(counts),
            )
        )
        step, query = self.state.step, torch.randn(int(starts[-1]), HEADS * GROUP, SIZE)
        for name in NAMES:
            if step.prompts:
                self.state.look(step, name, query, self.table[torch.tensor(slots)])
        for name, one in zip(counts, rows, strict=True):
            if one.computed + counts[name] > one.prompt:
                self._check_reads(name, one, one.computed + counts[name])
        sampled = []
        for name, one in zip(counts, rows, strict=True):
            done = one.computed + counts[name] >= len(one.tokens)
            sampled.append([self.rng.randrange(400)] if done else [])
            one.tokens += sampled[-1]
        return sampled

    def _check_reads(self, name, one, length):
        state, pool = self.state, self.state.pool
        layer, head, slot = self.rng.randrange(LAYERS), self.rng.randrange(HEADS), one.slot
        table, blocks = state.table, self.table[slot]
        start = int(table.starts[slot])
        held = paged_reference._held(pool, table, layer, slot, head)
        listed = paged_reference._listed(pool, table, layer, slot, head, blocks)
        tail = paged_reference._token(pool, layer, head, blocks, torch.arange(start, length))
        read = paged_reference._read(pool, torch.cat([held, listed, tail]))
        found = [tuple(entry) for entry in read[:, :4].int().tolist()]
        if table.coded is not None:
            coded = paged_reference._decoded(pool, table, table.coded, layer, slot, head, torch.float32)
            found += [tuple(entry) for entry in coded[:, :4].tolist()]
            self.read["coded"] += len(coded)
            self.read["later"] += int(table.coded.generated[slot, 1])
        positions = list(range(one.prompt))
        if self.kept.get(name) is not None:
            where, counts, _ = self.kept[name]
            positions = where[layer, head, : int(counts[layer, head])].tolist()
        positions += range(one.prompt, length)
        wanted = [(one.tokens[position], position, layer, head) for position in positions]
        if table.coded is None:
            assert sorted(found) == sorted(wanted), name
        else:
            # Eight bits of numbers up to 400.
            for column in range(4):
                pairs = zip(
                    sorted(part[column] for part in found), sorted(part[column] for part in wanted), strict=True
                )
                assert max(abs(one - other) for one, other in pairs) < 8, name
        self.read["held"] += len(held)
        self.read["listed"] += len(listed)
        self.read["rows"] += 1


def _alone(part, _):
    return part


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"), layers=LAYERS)


def make_scheduler(folder, options, asynchronous, hybrid=False):
    """vLLM's scheduler as its engine would make it for a GPU."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = EngineArgs(
        str(folder),
        dtype="float32",
        max_model_len=512,
        block_size=BLOCK,
        max_num_seqs=RUNNING,
        max_num_batched_tokens=96,
        enable_chunked_prefill=True,
        kv_cache_memory_bytes=8 << 20,
        skip_tokenizer_init=True,
        kv_transfer_config=KVTransferConfig(**options.transfer_config()),
    ).create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    config.cache_config.num_gpu_blocks = BLOCKS
    plan = options.build().probe_plan(1 << 20)
    spec = PrivateAttentionSpec(
        block_size=BLOCK,
        num_kv_heads=HEADS,
        head_size=SIZE,
        dtype=torch.float32,
        probe_tail=max(1, plan.rows),
        # As with `PluginOptions.prefix_hits`, which is refused where there is no GPU.
        spread_probes=False,
    )
    groups = [KVCacheGroupSpec(NAMES, spec)]
    if hybrid:
        shape = {"block_size": BLOCK, "num_kv_heads": HEADS, "head_size": SIZE, "dtype": torch.float32}
        groups.insert(0, KVCacheGroupSpec(["sliding"] * LAYERS, SlidingWindowSpec(**shape, sliding_window=40)))
    cache = KVCacheConfig(BLOCKS, [], groups)
    block, hashed = resolve_kv_cache_block_sizes(cache, config)
    cls = AsyncScheduler if asynchronous else Scheduler
    scheduler = cls(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=block,
        hash_block_size=hashed,
    )
    # Preempted requests come back as new ones, as its model runner V2 has them.
    scheduler.use_v2_model_runner = True
    return scheduler


def request_maker():
    from vllm import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    function = get_hash_fn_by_name("sha256")
    init_none_hash(function)
    hasher = get_request_block_hasher(BLOCK, function)

    def make(name, ids, tokens):
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return Request(name, ids, params, None, block_hasher=hasher)

    return make


@pytest.mark.parametrize(
    ("policy", "formats", "asynchronous", "hybrid"),
    [
        pytest.param("snapkv:ratio=0.3,window=8", None, False, False, id="sync"),
        pytest.param("snapkv:ratio=0.3,window=8", None, True, False, id="async"),
        pytest.param("streaming-llm:size=40", None, True, False, id="async-cut"),
        pytest.param(ADAPTIVE, None, True, False, id="async-spread"),
        pytest.param("full", "int8:recent=4", True, False, id="async-coded"),
        pytest.param(ADAPTIVE, "k8v4+int8:recent=4", True, False, id="async-widths"),
        pytest.param("snapkv:ratio=0.3,window=8", None, True, True, id="async-hybrid"),
        pytest.param("full", "int8:recent=4", True, True, id="async-hybrid-coded"),
    ],
)
def test_random_requests(monkeypatch, folder, policy, formats, asynchronous, hybrid):
    """So that requests are preempted, nothing is kept free for what moves."""
    monkeypatch.setattr(Reserve, "admit", lambda *_: None)
    seen, worker = drive(folder, policy, formats, asynchronous, hybrid)
    # Several widths leave so much memory that nobody has to go.
    assert seen["preempted"] > 0 or (formats and "+" in formats)
    assert worker.read["listed"] > 100


def test_numbers_that_come_late(monkeypatch, folder):
    """A GPU tells how much is kept some steps after a prompt's end, or once its request has been preempted."""
    rng = random.Random(4)
    monkeypatch.setattr(Reserve, "admit", lambda *_: None)
    monkeypatch.setattr(HostCopy, "arrived", property(lambda _: rng.random() < 0.3))
    drive(folder, "full", "int8:recent=4", True, False)


def test_what_is_kept_free_spares_preemptions(monkeypatch, folder):
    """And what is kept is moved sooner."""
    told = folder, "snapkv:ratio=0.3,window=8", None, True, False
    seen, worker = drive(*told)
    monkeypatch.setattr(Reserve, "admit", lambda *_: None)
    others, without = drive(*told)
    assert seen["preemptions"] < 0.5 * others["preemptions"]
    assert worker.read["listed"] < without.read["listed"]


def drive(folder, policy, formats, asynchronous, hybrid):
    """Random requests to their ends; counts, and the worker."""
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
    from vllm.v1.request import RequestStatus

    options = PluginOptions(policy)
    scheduler = make_scheduler(folder, options, asynchronous, hybrid)
    ladder = None if formats is None else Ladder.parse(formats)
    worker, make = Worker(options.build(), ladder, group=int(hybrid)), request_maker()
    rng = random.Random(7)
    shared = [rng.randrange(400) for _ in range(120)]
    flying, finished, seen = deque(), {}, Counter()
    total, added, steps = 120, 0, 0
    while added < total or scheduler.requests or any(one.total_num_scheduled_tokens for one, _ in flying):
        steps += 1
        assert steps < 4000, "requests do not end"
        for _ in range(rng.randrange(3) if added < total else 0):
            own = [rng.randrange(400) for _ in range(rng.randrange(1, 120))]
            ids = shared[: rng.choice([0, 0, 48, 80, 120])] + own
            scheduler.add_request(make(f"r{added}", ids, rng.randrange(1, 70 if formats is None else 150)))
            added += 1
        if scheduler.requests and rng.random() < 0.04:
            gone = rng.choice(sorted(scheduler.requests))
            scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
            seen["aborted"] += 1
        output = scheduler.schedule()
        check(scheduler)
        seen["preemptions"] += len(output.preempted_req_ids or ())
        seen["hits"] += sum(new.num_computed_tokens for new in output.scheduled_new_reqs)
        flying.append((output, worker.execute(output)))
        if len(flying) <= int(asynchronous) and output.total_num_scheduled_tokens:
            continue
        done, (names, sampled, meta) = flying.popleft()
        connector = KVConnectorOutput(kv_connector_worker_meta=meta) if meta is not None else None
        result = ModelRunnerOutput(
            names, {name: at for at, name in enumerate(names)}, sampled, kv_connector_output=connector
        )
        seen["preempted"] = max(seen["preempted"], sum(r.num_preemptions for r in scheduler.requests.values()))
        for outputs in scheduler.update_from_output(done, result).values():
            for one in outputs.outputs:
                if one.finish_reason is not None:
                    finished[one.request_id] = one.kv_transfer_params
        check(scheduler)
    check_idle(scheduler)
    worker.execute(scheduler.schedule())
    assert not worker.state.requests, "the worker remembers requests that have ended"
    freed = sum(report["refreekv"]["blocks_freed"] for report in finished.values() if report)
    assert len(finished) + seen["aborted"] >= total
    assert freed > total
    assert seen["hits"] > 100
    assert worker.read["held"] > 1000
    assert formats is None or worker.read["coded"] > 500
    assert bool(worker.read["later"]) == (formats is not None)
    return seen, worker
