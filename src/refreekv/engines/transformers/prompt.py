"""Where the prompt ends, and which layers still have to be compacted: what a cache's layers share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from refreekv.policies import Policy
from refreekv.pruning.joint import JointPruning


@dataclass
class PromptState:
    """Tells a layer, after each attention call, whether the prompt ended in that call.

    A cache sees calls, not prompts: a call of many tokens may be a whole prompt, one
    chunk of it, or draft tokens to verify. Whoever drives the cache and knows says so
    with `until`.

    Attributes
    ----------
    policy : Policy
        Decides what each layer keeps.
    layers : int
        Number of layers that may be pruned.
    end : int or None
        Logical length at which the current prompt ends; 0 while decoding. None: nobody
        said, so the first call and any call of several tokens is a prompt of its own.
    awaiting : int or None
        The layer whose keys were handed out and whose attention has not reported back.
    copy_scores : sequence of Tensor or None
        By layer that may be pruned, ``[H_kv]``; None until somebody measures them for a policy that reads them.
    decode_interval : int or None
        Generated tokens after which the policy looks again; None: only prompts are pruned.
    news : bool
        Whether a layer was pruned since `take_news` was last asked.
    joint : JointPruning
        Layers that wait for the last one, under a policy that decides about all together.
    generating : bool
        Whether `generate` drives the cache: what it feeds behind the prompt are real tokens, one
        a row, which masks would say again.
    arena : bool or None
        Whether layers go to storage with room to grow; None: on CUDA they do.
    """

    policy: Policy
    layers: int = 0
    end: int | None = None
    awaiting: int | None = None
    copy_scores: Sequence[Tensor] | None = None
    decode_interval: int | None = None
    news: bool = False
    joint: JointPruning = field(default_factory=JointPruning)
    generating: bool = False
    arena: bool | None = None
    _unsettled: list[Callable[[], None]] = field(default_factory=list)

    @contextmanager
    def until(self, end: int, *, generating: bool = False) -> Iterator[None]:
        """Within, the prompt ends at logical length ``end`` and what follows is decoding."""
        before = self.end, self.generating
        self.end, self.generating = end, generating
        try:
            yield
        finally:
            self.end, self.generating = before

    def decodes(self, before: int) -> bool:
        """Whether the token at logical length ``before`` is one that `generate` made."""
        return self.generating and self.end is not None and before >= self.end

    def tokens_behind(self, before: int, after: int) -> int | None:
        """Tokens of a call that lie behind the prompt's end; None if it does not end in this call.

        ``before`` and ``after`` are the logical lengths around the call.
        """
        if self.end is None:
            return 0 if before == 0 or after - before > 1 else None
        return after - self.end if before < self.end <= after else None

    def continues(self, after: int) -> bool:
        """Whether more of the current prompt is to come at logical length ``after``."""
        return self.end is not None and after < self.end

    def scores_of(self, layer: int) -> Tensor | None:
        """Copy scores ``[1, H_kv]`` of a layer that may be pruned; None if nobody measured any."""
        return None if self.copy_scores is None else self.copy_scores[layer][None]

    def lacks_scores(self, length: int) -> bool:
        """Whether a prompt of ``length`` tokens would be pruned by a policy that misses its copy scores."""
        reads = self.policy.reads_copy_scores and self.policy.frozen_layers != "all"
        return reads and self.copy_scores is None and self.policy.probe_plan(length).count > 0

    def later(self, settle: Callable[[], None]) -> None:
        """Compact a layer when the next one was decided on: by then its numbers are on the host."""
        self.settle()
        self._unsettled.append(settle)

    def settle(self) -> None:
        """Compact what was decided on and not compacted yet."""
        while self._unsettled:
            self._unsettled.pop()()

    def clear(self) -> None:
        """Forget what is under way."""
        self.awaiting = None
        self.joint.clear()
        self._unsettled.clear()

    def take_news(self) -> bool:
        """Whether a layer was pruned since this was last asked."""
        news, self.news = self.news, False
        return news

    def check_reported(self) -> None:
        """Raise RuntimeError if some layer's attention never came back to refreekv."""
        if self.awaiting is not None:
            raise RuntimeError(
                f"the attention of layer {self.awaiting} never reported back to refreekv. Either the model computes "
                "attention without transformers' attention interface (unsupported: nothing could be pruned), or the "
                "cache was made for another model, or a forward pass was interrupted; then call reset() on the cache"
            )
