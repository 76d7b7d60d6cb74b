"""What the tests of the fidelity bench share: policies, prompts and a bench over a small model."""

from dataclasses import dataclass

import torch

from helpers.models import VOCAB
from refreekv import policies
from refreekv.core.selection import Selection
from refreekv.evaluation.data.encoding import Encoded
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity.bench import Bench, Job
from refreekv.policies import LayerView, Policy, ProbePlan


class NumberTokenizer:
    """Text of numbers to these numbers, and back."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens, **_):
        return " ".join(str(token) for token in tokens)


@dataclass(frozen=True)
class Uneven(Policy):
    """KV head h keeps its most attended share / (h + 1), and the last two."""

    share: float = 0.6
    name = "uneven"

    def probe_plan(self, n):
        return ProbePlan(rows=4)

    def select(self, view: LayerView):
        batch, kv_heads, n, _ = view.keys.shape
        scores = view.mean_row.view(batch, kv_heads, -1, n).sum(2)
        scores[..., -2:] = torch.inf
        rank = scores.argsort(-1, descending=True).argsort(-1)
        counts = torch.tensor([max(2, int(n * self.share / (head + 1))) for head in range(kv_heads)])
        return Selection(rank < counts[:, None], levels=(rank % 4).to(torch.uint8))


POLICIES = {
    "cut": policies.create("refreekv", threshold=0.2, frozen_layers=1),
    "cut-3-rows": policies.create("refreekv", threshold=0.3, frozen_layers=0, probe_rows=3),
    "window": policies.create("streaming-llm", ratio=0.4),
    "per-head": policies.create("refreekv-heavy-hitter", threshold=0.1, frozen_layers=0),
    "uneven": Uneven(),
}


ASKED = {"full": None, **POLICIES}


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (count,), generator=generator).tolist()


def job(length=57, *, question=(), answer=(5, 9, 11), seed=0, asked=ASKED, family="numbers"):
    context = tokens(length, seed)
    encoded = Encoded(context, list(question), list(answer), " ".join(map(str, context)))
    return Job(Sample(f"s{seed}", family, encoded.text), encoded, asked)


def bench(model, **settings):
    return Bench(model, NumberTokenizer(), "tiny", **{"continuation": 12, **settings})
