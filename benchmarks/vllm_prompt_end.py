"""What the step in which a prompt ends costs the host and the GPU, beside vLLM's own kernels.

    python benchmarks/vllm_prompt_end.py

No model: random queries and entries of Llama-3-8B's shape. A prompt of 8,192 tokens is read, all but its last tokens in
one step, those in a second one beside running requests, as where the budget of a step is as long as the prompt. Timed,
on the host and on the device: what layers put aside (`look`), attention over what is kept (`attend`), the decision
(`end`), the copy to private blocks (`move`), and coding a block's tokens of an answer (`later`). While the host is
timed the device is busy with something else for some time: if the host waits for it anywhere, that shows as
``waited``. Medians, in milliseconds.
"""

import argparse
import json
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from refreekv import policies
from refreekv.core.key_codes import Moments
from refreekv.engines.vllm.gpu.state import KeptState
from refreekv.engines.vllm.messages import CodeOrder, CopyOrder, StepOrders
from refreekv.engines.vllm.worker_side.scoring import LayerFacts
from refreekv.engines.vllm.worker_side.tracked import Layer

BLOCK, TAIL = 16, 28
BUSY_MS = 250
"""Time for which the device has something else to do."""


class Clock:
    """Host's and device's time of named parts."""

    def __init__(self, device: torch.device):
        self.device, self.host = device, defaultdict[str, float](float)
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done within."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if self.cuda else (None, None)
        if begin is not None:
            begin.record()
        started = time.perf_counter()
        yield
        self.host[name] += 1000 * (time.perf_counter() - started)
        if end is not None:
            end.record()
            self._marks.append((name, begin, end))

    @property
    def cuda(self) -> bool:
        """Whether there is a device."""
        return self.device.type == "cuda"

    def on_device(self) -> dict[str, float]:
        """What the device took for each part."""
        found = defaultdict[str, float](float)
        for name, begin, end in self._marks:
            end.synchronize()
            found[name] += begin.elapsed_time(end)
        return found


class Prompts:
    """A state of the plugin without vLLM: prompts are read into random blocks."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        layers, heads, size = options.layers, options.kv_heads, options.head_size
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        self.options, self.device, self.query_heads = options, device, heads * options.group
        self.blocks = -(-options.prompt // BLOCK) + 8
        private = 2 * self.blocks
        caches = [
            torch.randn(1 + self.blocks + 2 * private, BLOCK, heads, 2 * size, device=device, dtype=dtype)
            for _ in range(layers)
        ]
        self.free = [list(range(1 + self.blocks + at * private, 1 + self.blocks + (at + 1) * private)) for at in (0, 1)]
        impl = SimpleNamespace(num_heads=self.query_heads, scale=size**-0.5, logits_soft_cap=0, sinks=None)
        modules = {
            f"layer{index}": Layer(
                SimpleNamespace(kv_cache=cache.transpose(1, 2), impl=impl), 0, LayerFacts.of(impl, index, layers)
            )
            for index, cache in enumerate(caches)
        }
        self.table = torch.zeros(2, self.blocks + 16, dtype=torch.int32, device=device)
        self.table[:, : self.blocks] = torch.randperm(self.blocks, device=device) + 1
        policy = policies.registry.parse(options.policy)
        self.state = KeptState(
            policy, modules, options.running + 2, options.prompt + 64, policy.default_ladder,
            lambda slot: self.table[slot], lambda part, _: part,
        )  # fmt: skip
        self.state.know_copy_scores([0.12 * torch.rand(heads, device=device) for _ in range(layers)])
        moments = (
            Moments.of(*(torch.randn(1, count, 256, size) for count in (heads, self.query_heads))) for _ in modules
        )
        self.state.code_by([own.codes() for own in moments])
        self.query = torch.randn(options.prompt, self.query_heads, size, device=device, dtype=dtype)
        self.output = torch.empty_like(self.query)

    def step(self, rows: list[tuple[str, int, int, int]], clock: Clock) -> Any:
        """A step of rows ``(name, slot, computed, count)``."""
        names, slots, computed, counts = (list(part) for part in zip(*rows, strict=True))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        there = torch.tensor(slots, device=self.device)
        told = SimpleNamespace(
            num_reqs=len(rows), idx_mapping_np=np.array(slots), idx_mapping=there, req_ids=names,
            num_computed_tokens_np=np.array(computed, dtype=np.int32), query_start_loc_np=starts,
        )  # fmt: skip
        lengths = torch.tensor([one + count for one, count in zip(computed, counts, strict=True)], device=self.device)
        common = SimpleNamespace(
            query_start_loc=torch.from_numpy(starts).to(self.device), seq_lens=lengths.int(),
        )  # fmt: skip
        tables, state, tokens = self.table[there], self.state, int(starts[-1])
        query, output = self.query[:tokens], self.output[:tokens]
        if clock.cuda:
            torch.cuda.synchronize()
            # In cycles of the device's clock, of about 1.8 GHz.
            torch.cuda._sleep(int(BUSY_MS * 1.8e6))
        begun = time.perf_counter()
        state.plan(told)
        step = state.step
        assert step is not None
        found = step.rows(common)
        for name in state.layers:
            if step.prompts:
                with clock.part("look"):
                    state.look(step, name, query, tables)
            if found is not None:
                with clock.part("attend"):
                    state.attend(name, query, tables, found, output)
        with clock.part("end"):
            message = state.end_step()
        clock.host["step"] += 1000 * (time.perf_counter() - begun)
        return message

    def read(self, name: str, slot: int, beside: int, clock: Clock) -> None:
        """Read a prompt into a slot, the last tokens beside so many decoding rows of the other slot, and move it."""
        prompt, state = self.options.prompt, self.state
        state.begin_step(StepOrders())
        state.admit(name, slot, prompt)
        self.step([(name, slot, 0, prompt - TAIL)], Clock(self.device))
        state.begin_step(StepOrders())
        others = [("other", 1 - slot, prompt + 1, 1)] * beside
        message = self.step([*others, (name, slot, prompt - TAIL, TAIL)], clock)
        while message is None:
            if clock.cuda:
                torch.cuda.synchronize()
            state.begin_step(StepOrders())
            message = state.end_step()
        (outcome,) = message.outcomes
        (group,) = outcome.groups
        self.share = outcome.bytes_share
        if not group.copies:
            raise SystemExit("this policy keeps all of it: there is nothing to be moved")
        order = CopyOrder(name, 0, tuple(self.free[slot][: group.copies]))
        with clock.part("move"):
            state.begin_step(StepOrders(copies=[order]))
        if outcome.coded_tokens and beside:
            with clock.part("later"):
                state.begin_step(StepOrders(codes=[CodeOrder(name, self.free[slot][group.copies])]))
        state.end_step()

    def repeat(self, clocks: Callable[[], Clock]) -> None:
        """Prompts one after the other; the first one is what the others decode beside."""
        self.read("other", 0, 0, Clock(self.device))
        for index in range(self.options.repeat):
            self.read(f"r{index}", 1, self.options.running, clocks())
            self.state.begin_step(StepOrders(finished=[f"r{index}"]))
            self.state.end_step()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--running", type=int, default=28, help="requests that decode beside the prompt's end")
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--out", help="where the numbers go, as JSON lines")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clocks: list[Clock] = []

    def another() -> Clock:
        clocks.append(Clock(device))
        return clocks[-1]

    with torch.inference_mode(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prompts = Prompts(options, device)
        # Has kernels compiled side by side.
        fault = prompts.state.fault()
        if fault is not None:
            raise SystemExit(fault)
        prompts.repeat(another)
        if device.type == "cuda":
            # Once more, with a warning wherever the host waits.
            seen.clear()
            torch.cuda.set_sync_debug_mode("warn")
            options.repeat = 1
            prompts.read("last", 1, options.running, Clock(device))
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in seen if "called a synchronizing" in str(one.message)]
    places = sorted({f"{Path(one.filename).name}:{one.lineno}" for one in waits})
    timed = clocks[1:] or clocks
    host = {name: round(statistics.median(one.host[name] for one in timed), 2) for name in timed[0].host}
    row = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "bytes": round(prompts.share, 3),
        "host": host,
        "waited": host["step"] > BUSY_MS / 2 if device.type == "cuda" else None,
        "waits": places,
    }
    if device.type == "cuda":
        took = [one.on_device() for one in timed]
        row["on the device"] = {name: round(statistics.median(one[name] for one in took), 2) for name in took[0]}
    print(json.dumps(row, indent=1))
    if options.out:
        with Path(options.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
