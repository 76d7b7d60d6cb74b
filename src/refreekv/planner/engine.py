"""One engine, simulated: continuous batching over a pool of K/V blocks, step by step.

The scheduler is that of current serving engines, reduced to what decides on memory:

- Each step has a budget of tokens. Requests that run come first: one token for those that
  generate, a chunk of the prompt for those that still read it.
- Blocks are taken as tokens come. If there are none left, the request that was admitted
  last gives back all it holds, waits in front of the others, and reads its prompt and what
  it had generated again (recompute).
- With tokens to spare, waiting requests are admitted in order of arrival, if all that they
  have to read would fit into the free blocks; none in a step in which one had to give back.
- While a prompt is read it holds blocks for all of its tokens. At its end it keeps its
  share and gives the rest back.

Not simulated: prefix caching, speculative decoding, swapping to the host, requests of
different priority, block tables of their own for each layer (a request's blocks are those
of its mean layer), tensor parallelism inside a replica, the network, the tokenizer.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from refreekv.planner.trace import Request


@dataclass(frozen=True)
class Engine:
    """How one engine schedules."""

    blocks: int  # blocks in its pool
    # prompt tokens read, output tokens held and whether the prompt is complete, to blocks
    blocks_for: Callable[[int, int, bool], int]
    step_seconds: Callable[[int, int], float]  # tokens computed in a step and blocks read in it, to seconds
    step_tokens: int = 2048  # tokens in one step at most
    running: int = 256  # requests in one step at most


@dataclass
class Job:
    """A request under way."""

    request: Request  # what was asked
    read: int = 0  # tokens of the present prompt that are computed
    generated: int = 0  # tokens generated so far, over all attempts
    again: int = 0  # tokens generated before the last time it gave back, which are read like a prompt
    blocks: int = 0  # blocks it holds
    # when its first and its last token came
    first: float | None = None
    done: float | None = None

    @property
    def reading(self) -> int:
        """Tokens still to be read before the next one is generated."""
        return self.request.prompt + self.again - self.read


@dataclass
class Totals:
    """Sums over steps, to take means of."""

    # steps run, and times a request gave back
    steps: int = 0
    preemptions: int = 0
    busy: float = 0.0  # seconds in steps
    # requests that ran, that waited, and blocks in use, times seconds
    running_seconds: float = 0.0
    waiting_seconds: float = 0.0
    block_seconds: float = 0.0
    running_steps: int = 0  # requests that ran, summed over steps
    most_running: int = 0  # requests in one step at most


@dataclass
class Replica:
    """One engine and its queue."""

    engine: Engine  # how it schedules
    now: float = 0.0  # its time: when its last step ended
    # requests in line, and those that run, in the order in which they were admitted
    waiting: deque[Job] = field(default_factory=deque)
    active: list[Job] = field(default_factory=list)
    # requests with all their tokens, and those that the pool can never hold
    finished: list[Job] = field(default_factory=list)
    refused: list[Job] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)  # sums over its steps
    outstanding: int = 0
    _free: int = -1

    def __post_init__(self) -> None:
        self._free = self.engine.blocks

    def add(self, request: Request) -> None:
        """Put a request in line."""
        job = Job(request)
        # All of it, unpruned: what it would read again if it had to give back just before its end.
        if self.engine.blocks_for(request.prompt + request.output, 0, False) > self.engine.blocks:
            self.refused.append(job)
            return
        self.waiting.append(job)
        self.outstanding += request.prompt + request.output

    def advance(self, until: float) -> None:
        """Run steps that begin before ``until``."""
        while self.now < until and (self.active or self.waiting):
            self._step()
        if not self.active and not self.waiting:
            self.now = max(self.now, until) if until < float("inf") else self.now

    def _step(self) -> None:
        engine, budget = self.engine, self.engine.step_tokens
        planned: list[tuple[Job, int]] = []
        preempted = False
        index = 0
        while index < len(self.active) and budget:
            job = self.active[index]
            tokens = min(max(job.reading, 1), budget)
            while not self._take(job, tokens):
                preempted = True
                last = self.active.pop()
                self._give_back(last)
                if last is job:
                    break
            else:
                planned.append((job, tokens))
                budget -= tokens
                index += 1
        while not preempted and self.waiting and budget and len(self.active) < engine.running:
            job = self.waiting[0]
            tokens = min(job.reading, budget)
            if engine.blocks_for(job.reading, 0, False) > self._free:
                break
            self._take(job, tokens)
            self.active.append(self.waiting.popleft())
            planned.append((job, tokens))
            budget -= tokens
        self._account(planned)
        for job, tokens in planned:
            self._compute(job, tokens)

    def _account(self, planned: list[tuple[Job, int]]) -> None:
        used = self.engine.blocks - self._free
        read = sum(job.blocks for job, _ in planned)
        seconds = self.engine.step_seconds(sum(tokens for _, tokens in planned), read)
        self.now += seconds
        totals = self.totals
        totals.steps += 1
        totals.busy += seconds
        totals.running_seconds += seconds * len(self.active)
        totals.waiting_seconds += seconds * len(self.waiting)
        totals.block_seconds += seconds * used
        totals.running_steps += len(self.active)
        totals.most_running = max(totals.most_running, len(self.active))

    def _take(self, job: Job, tokens: int) -> bool:
        """Blocks for more tokens of a job; False if there are not enough."""
        if job.reading > 0:
            wanted = self.engine.blocks_for(job.read + tokens, 0, False)
        else:
            wanted = self.engine.blocks_for(job.request.prompt, job.generated, True)
        more = max(wanted - job.blocks, 0)
        if more > self._free:
            return False
        self._free -= more
        job.blocks += more
        return True

    def _give_back(self, job: Job) -> None:
        self._free += job.blocks
        self.totals.preemptions += 1
        job.blocks, job.read, job.again = 0, 0, job.generated
        self.waiting.appendleft(job)

    def _compute(self, job: Job, tokens: int) -> None:
        if job.reading > 0:
            job.read += tokens
            if job.reading > 0:
                return
            # The prompt is complete: what is not kept goes back to the pool.
            kept = self.engine.blocks_for(job.request.prompt, job.again, True)
            self._free += max(job.blocks - kept, 0)
            job.blocks = min(job.blocks, kept)
        job.generated += 1
        if job.first is None:
            job.first = self.now
        if job.generated == job.request.output:
            job.done = self.now
            self._free += job.blocks
            job.blocks = 0
            self.active.remove(job)
            self.finished.append(job)
            self.outstanding -= job.request.prompt + job.request.output
