"""What the adaptive policy's kernels choose and list: the policy's torch version and the reference are the judges."""

import pytest
import torch

from refreekv import policies
from refreekv.core.reductions import ProbeReductions
from refreekv.kernels import reference
from refreekv.kernels.needs import launch_kept_first
from refreekv.policies import LayerView


def a_view(n, scores, device, *, batch=2, heads=6, settled=False):
    kv_heads = scores.shape[1]
    # Powers of uniform numbers: many small ones and a few large ones, as attention has them.
    peak = torch.rand(batch, kv_heads, n, device=device) ** 12
    mean = peak * torch.rand(batch, kv_heads, n, device=device) / 10
    spread = ProbeReductions(torch.rand(batch, kv_heads, n, device=device) ** 20, None, None)
    keys = torch.zeros(batch, kv_heads, n, 4, device=device)
    earlier = torch.rand(1, kv_heads, n, device=device) < 0.05 if settled else None
    return LayerView(
        keys, keys, None, None, 0, 1, window=ProbeReductions(peak, mean, None), spread=spread, heads=heads,
        copy_scores=scores.to(device), settled=earlier,
    )  # fmt: skip


CASES = {
    "plain": {},
    "an earlier turn": {"settled": True},
    "no sinks, none follow": {"sinks": 0, "follow": 0},
    "long answers": {"follow": 900},
    "nearly all mass": {"lost_mass": 0.01},
    "a tiny unit": {"constant": 1e-6},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("n", [512, 1023, 1024, 1025, 2600])
def test_the_fused_choice_is_the_policys_own(case, n, device):
    case = dict(case)
    settled = case.pop("settled", False)
    setting = {"constant": 0.1, "hit": 0.97, "lost_mass": 0.5, "spread_factor": 1.5, "follow": 9, "window": 20, **case}
    policy = policies.create("adaptive", **setting)
    scores = torch.tensor([[0.0, 0.05, 0.3], [0.2, 0.0, 0.01]])
    view = a_view(n, scores, device, settled=settled)
    judge = LayerView(**{name: _on_cpu(getattr(view, name)) for name in view.__dataclass_fields__ if name[0] != "_"})
    want, got = policy.select(judge), policy.select_fused(view)
    assert torch.equal(got.keep.cpu(), want.keep)
    torch.testing.assert_close(got.metric.cpu(), want.metric)
    assert list(got.reasons) == list(want.reasons)
    for name, share in want.reasons.items():
        torch.testing.assert_close(got.reasons[name].cpu(), share)


def _on_cpu(value):
    if isinstance(value, ProbeReductions):
        return value.each(lambda part: part.cpu())
    return value.cpu() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("n", [1, 31, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_kept_first(n, share, device):
    keep = torch.rand(2, 3, n, device=device) < share
    order, counts = launch_kept_first(keep)
    judge, numbers = reference.kept_first(keep.cpu())
    assert torch.equal(counts.cpu(), numbers)
    for got, want, number in zip(order.cpu().flatten(0, 1), judge.flatten(0, 1), numbers.flatten(), strict=True):
        assert torch.equal(got[:number], want[:number])
