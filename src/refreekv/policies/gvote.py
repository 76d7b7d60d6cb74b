"""GVote: what queries to come would look at, each as many entries as the last one needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv.core.budget import keep_best, newest, smallest_mass
from refreekv.core.probes import wide_product
from refreekv.core.scores import query_distribution
from refreekv.core.selection import Selection
from refreekv.policies.base import LayerView, Policy, ProbePlan, check_count
from refreekv.policies.registry import register


@register("gvote")
@dataclass(frozen=True)
class GVote(Policy):
    """The union of what sampled future queries look at; no budget to set.

    arXiv 2509.03136: a step's budget ``b`` is the fewest entries that hold a share ``p`` of the last
    query's attention, per query head. Future queries are drawn from a normal distribution; each votes for
    its ``b`` largest attention logits, and what got a vote stays. Query heads that share a KV head
    share the union.

    Differs on purpose in where the queries are drawn from. The paper fits mean and variance of the
    layer's input over the prompt, draws from that, projects and rotates to the next positions.
    Projecting is linear, so that drawing queries themselves is the same; but which rotation (or norm)
    a model applies is nothing a policy can know. So mean and covariance here, the whole one, are those
    of the last ``window`` queries, rotated as they are: the queries to come are next to them.
    This was written from the paper's abstract and published summaries of its method; there is no code of its
    authors to compare with, and other details may differ, too. The newest token stays in any case.

    Parameters
    ----------
    p : float
        Share of the attention that sets a step's budget, in (0, 1]. 1 evicts nothing.
    samples : int
        Queries that vote.
    window : int
        Last queries that the distribution is fitted to.
    seed : int
        Of the draws, which are the same for all layers, heads and prompts.
    """

    p: float = 0.95
    samples: int = 8
    window: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not 0.0 < self.p <= 1.0:
            raise ValueError(f"p is the share of attention a step needs and must lie in (0, 1], got {self.p!r}")
        check_count("samples", self.samples, minimum=1)
        check_count("window", self.window, minimum=1)
        check_count("seed", self.seed)

    def probe_plan(self, n: int) -> ProbePlan:
        return ProbePlan() if self.p == 1 else ProbePlan(rows=self.window, queries=True)

    def select(self, view: LayerView) -> Selection | None:
        if self.p == 1:
            return None
        batch, kv_heads, length, _ = view.keys.shape
        group = view.probe.shape[1] // kv_heads
        real = view.real_heads
        every = real.repeat_interleave(group, 1)
        last = view.probe[:, :, -1]
        needed = smallest_mass(last, self.p, every).sum(-1)
        voters = self._drawn(view).view(batch, kv_heads, group * self.samples, -1)
        logits = wide_product(voters, view.keys).view(batch, -1, length)
        votes = keep_best(logits, needed.repeat_interleave(self.samples, 1), every.repeat_interleave(self.samples, 1))
        keep = votes.view(batch, kv_heads, -1, length).any(2) | newest(real, 1)
        kept = last.view(batch, kv_heads, group, length).masked_fill(~keep[:, :, None], 0.0).sum((1, 2, 3))
        return Selection(keep, metric=1.0 - (kept / last.sum((1, 2))).nan_to_num(1.0))

    def _drawn(self, view: LayerView) -> Tensor:
        """Queries ``[B, H, samples, D]``: the mean, and sums of what queries are beside it with normal weights.

        Such sums have exactly the queries' covariance, of any rank.
        """
        if view.queries is None:
            raise ValueError("gvote asks for queries in its probe_plan, and the view has none")
        # A query that sees nothing stands for padding.
        asked = None if view.visible is None else view.visible.any(-1)
        mean, centred, number = query_distribution(view.queries, asked)
        # On the CPU, where the numbers are the same for every device.
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.randn(self.samples, self.window, generator=generator, device="cpu", dtype=torch.float32)
        weights = weights[:, self.window - centred.shape[2] :].to(centred.device)
        drawn: Tensor = mean + weights @ centred / number.sqrt()
        return drawn
