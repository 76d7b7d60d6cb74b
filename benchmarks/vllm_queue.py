"""What vLLM's admission does to requests whose prompts shrink when they have been read: a model of it, without a GPU.

    python benchmarks/vllm_queue.py --share 0.27 --step 6 0.307

Requests are always waiting. As vLLM's scheduler does, each step gives those that run their next token, and a block if
they need one; where there is none, the one that came last is preempted. Then the next prompt is admitted if all of it
fits, and ``reserve`` blocks are left. ``--delay`` steps after a prompt has been read its blocks are given back, once
there are private blocks for what is kept of it. With ``--coded`` an answer's older tokens go to private blocks, too.

    reserve    blocks that an admitted prompt must leave free, times what is kept of it
    running    requests that run, mean over steps
    preempted  preemptions a request
    waits      steps in which what is kept of a request waits for private blocks, a request
    out/s      generated tokens a second, given --prefill and --step
"""

import argparse
import random
import statistics
from dataclasses import dataclass, field
from typing import Any

BLOCK = 16


@dataclass
class Asked:
    """One request: tokens of its answer, tokens computed and generated, and blocks."""

    prompt: int
    answer: int
    computed: int = 0
    generated: int = 0
    columns: int = 0
    held: int = 0
    private: int = 0
    coded: int = 0
    read: int | None = None

    def leave(self) -> int:
        """All blocks go; how many there were."""
        blocks = self.held + self.private
        self.computed = self.columns = self.held = self.private = self.coded = 0
        self.read = None
        return blocks

    def grow(self, tokens: int) -> int:
        """Blocks that are lacking for so many more tokens."""
        return max(0, -(-(self.computed + tokens) // BLOCK) - self.columns)


@dataclass
class Queue:
    """The pool, who runs and who waits, and counts after the first steps."""

    options: argparse.Namespace
    reserve: int
    free: int = 0
    running: list[Asked] = field(default_factory=list)
    waiting: list[Asked] = field(default_factory=list)
    preempted: int = 0
    ended: int = 0
    waits: int = 0
    generated: int = 0
    milliseconds: float = 0.0
    counts: list[int] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Take all steps."""
        options, rng = self.options, random.Random(0)
        self.free, whole = options.blocks - 1, options.prompt // BLOCK
        copies = round(options.share * whole)
        for step in range(options.steps):
            counting = step > options.steps // 5
            while len(self.waiting) < 8:
                self.waiting.append(Asked(options.prompt, rng.randint(*options.answer)))
            planned = self.schedule(counting)
            tokens = sum(planned.values())
            read = sum(count for count in planned.values() if count > 1)
            first, each = options.step
            if counting:
                self.milliseconds += first + each * len(self.running) + read * options.prefill / options.prompt
                self.counts.append(len(self.running))
            for asked in [one for one in self.running if id(one) in planned]:
                self.compute(asked, planned[id(asked)], step, counting)
            for asked in self.running:
                if asked.read is None or asked.private or copies >= whole or step - asked.read < options.delay:
                    continue
                if self.free >= copies:
                    asked.private, asked.held = copies, asked.held - whole
                    self.free += whole - copies
                else:
                    self.waits += counting
            for asked in self.running:
                self.code(asked)
            assert tokens <= options.budget
        ended = max(1, self.ended)
        return {
            "running": round(statistics.mean(self.counts), 1),
            "preempted": round(self.preempted / ended, 3),
            "waits": round(self.waits / ended, 1),
            "out/s": round(1000 * self.generated / self.milliseconds),
        }

    def code(self, asked: Asked) -> None:
        """What is no longer among the newest tokens of an answer goes to one private block at a time."""
        tokens, recent = self.options.coded
        while tokens and asked.private and asked.computed >= asked.prompt + asked.coded + tokens + recent:
            first = (asked.prompt + asked.coded) // BLOCK
            asked.coded += tokens
            left = (asked.prompt + asked.coded) // BLOCK - first
            asked.held, asked.private, self.free = asked.held - left, asked.private + 1, self.free + left - 1

    def schedule(self, counting: bool) -> dict[int, int]:
        """Tokens of each request that this step computes, by the object's number."""
        left, planned, preempted = self.options.budget, {}, False
        for asked in list(self.running):
            if asked not in self.running:
                break
            tokens = min(max(1, asked.prompt + asked.generated - asked.computed), left)
            if not tokens:
                continue
            while (more := asked.grow(tokens)) > self.free and asked in self.running:
                last = self.running.pop()
                self.free += last.leave()
                planned.pop(id(last), None)
                self.waiting.insert(0, last)
                self.preempted += counting
                preempted = True
            if asked not in self.running:
                break
            left -= self.take(asked, more, tokens, planned)
        while self.waiting and left and not preempted and len(self.running) < self.options.most:
            asked = self.waiting[0]
            total = asked.prompt + asked.generated
            if -(-total // BLOCK) + (self.reserve if self.running else 0) > self.free:
                break
            self.running.append(self.waiting.pop(0))
            tokens = min(total, left)
            left -= self.take(asked, asked.grow(tokens), tokens, planned)
        return planned

    def take(self, asked: Asked, blocks: int, tokens: int, planned: dict[int, int]) -> int:
        """Hand out blocks and plan tokens; the tokens."""
        self.free -= blocks
        asked.held += blocks
        asked.columns += blocks
        planned[id(asked)] = tokens
        return tokens

    def compute(self, asked: Asked, tokens: int, step: int, counting: bool) -> None:
        """A step's tokens of one request are there."""
        asked.computed += tokens
        if asked.computed < asked.prompt + asked.generated:
            return
        asked.read = step if asked.read is None else asked.read
        asked.generated += 1
        self.generated += counting
        if asked.generated >= asked.answer:
            self.running.remove(asked)
            self.free += asked.leave()
            self.ended += counting


def main() -> None:
    """Print a line for each reserve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4096, help="blocks of the pool")
    parser.add_argument("--share", type=float, default=0.27, help="what is kept of a prompt's bytes; 1: stock")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, nargs=2, default=(256, 768), help="tokens of answers")
    parser.add_argument("--prefill", type=float, default=215.0, help="milliseconds that reading a prompt takes")
    parser.add_argument(
        "--step", type=float, nargs=2, default=(6.0, 0.307), help="of a step, and of each request in it"
    )
    parser.add_argument("--delay", type=int, default=3, help="steps until what is kept may be moved")
    parser.add_argument(
        "--coded", type=int, nargs=2, default=(0, 64), help="tokens of an answer in a private block; newest that stay"
    )
    parser.add_argument("--budget", type=int, default=8192, help="most tokens of a step")
    parser.add_argument("--most", type=int, default=96, help="most requests that run")
    parser.add_argument("--steps", type=int, default=20_000)
    options = parser.parse_args()
    copies = round(options.share * (options.prompt // BLOCK))
    print("| reserve | running | preempted | waits | out/s |\n|---|---|---|---|---|")
    for part in (0.0, 0.25, 0.5, 1.0, 1.25):
        found = Queue(options, round(part * copies)).run()
        print(f"| {part:g} | " + " | ".join(str(number) for number in found.values()) + " |")


if __name__ == "__main__":
    main()
