"""What the adaptive policy's kernels choose and list, against `core.needs` and the reference in plain torch."""

import pytest
import torch

from refreekv import kernels
from refreekv.core.needs import Grading, Rules, levels, needs
from refreekv.core.reductions import ProbeReductions
from refreekv.kernels import needs as needs_kernels
from refreekv.kernels import reference
from refreekv.kernels.needs import launch_kept_first, launch_leveled, launch_needs
from refreekv.storage.members import Members

PLAIN = Rules(
    sinks=4, recent=20, unit=0.25, spread_unit=0.37, hit=0.97, follow=9, share=0.5, copying=0.1, min_length=512
)
SCORES = torch.tensor([[0.0, 0.05, 0.3], [0.2, 0.0, 0.01]])


def probes(n, device, batch=2, kv_heads=3):
    # Powers of uniform numbers: many small ones and a few large ones, as attention has them.
    peak = torch.rand(batch, kv_heads, n, device=device) ** 12
    mean = peak * torch.rand(batch, kv_heads, n, device=device) / 10
    spread = ProbeReductions(torch.rand(batch, kv_heads, n, device=device) ** 20, None)
    return ProbeReductions(peak, mean), spread


CASES = {
    "plain": {},
    "an earlier turn": {"earlier": True},
    "no sinks, none follow": {"sinks": 0, "follow": 0},
    "long answers": {"follow": 900},
    "nearly all mass": {"share": 0.99},
    "a tiny unit": {"unit": 2.5e-6, "spread_unit": 3.7e-6},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("n", [512, 1023, 1024, 1025, 2600])
def test_kernels_choose_what_torch_chooses(case, n, device):
    earlier = case.get("earlier", False)
    rules = PLAIN._replace(**{name: value for name, value in case.items() if name != "earlier"})
    window, spread = probes(n, device)
    kept = torch.rand(1, 3, n, device=device) < 0.05 if earlier else None
    got = launch_needs(window, spread, SCORES.to(device), rules, kept)
    on_cpu = [part.each(torch.Tensor.cpu) for part in (window, spread)]
    want = needs(*on_cpu, SCORES, rules, earlier=None if kept is None else kept.cpu())
    assert torch.equal(got.keep.cpu(), want.keep)
    assert not want.keep.all()
    torch.testing.assert_close(got.lost.cpu(), want.lost)
    assert list(got.shares) == list(want.shares)
    for name, share in want.shares.items():
        torch.testing.assert_close(got.shares[name].cpu(), share)


@pytest.mark.parametrize(
    "change",
    [{}, {"together": True}, {"real": True}, {"scores": None}, {"min_length": 600}],
    ids=["kernels", "together", "padding", "no scores", "short"],
)
def test_the_front_gives_what_torch_gives_whoever_computes_it(change, device):
    """What the kernels cannot do (all but the first case) is torch's also on a GPU."""
    n = 520
    window, spread = probes(n, device)
    real = (torch.arange(n, device=device) >= 5).expand(2, 3, n) if change.get("real") else None
    scores = change.get("scores", SCORES.to(device))
    rules = PLAIN._replace(**{name: value for name, value in change.items() if name in PLAIN._fields})
    got, want = (choose(window, spread, scores, rules, real=real) for choose in (kernels.needed, needs))
    assert torch.equal(got.keep, want.keep)
    # Two heads copy, one in each row: together, all heads keep everything.
    assert got.keep.all() == ("min_length" in change or "together" in change)
    if real is not None:
        assert not got.keep[..., :5].any()


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("n", [300, 1025, 2600])
def test_heads_that_hold_different_numbers(n, earlier, device):
    """Padded on the left; some of them are so short that they are kept whole, or hold nothing but the newest."""
    window, spread = probes(n, device)
    origins = torch.tensor([[0, n // 3, n - 25], [7, n - 1, n // 2]], dtype=torch.int32, device=device)
    real = torch.arange(n, device=device) >= origins[..., None]
    window, spread = (part.each(lambda x: x.masked_fill(~real, 0.0)) for part in (window, spread))
    rules = PLAIN._replace(min_length=100, unit=0.4, spread_unit=0.5, share=0.2)
    kept = torch.rand(1, 3, n, device=device) < 0.05 if earlier else None
    damage = torch.rand(1, 3, 4, device=device).sort(-1, descending=True).values
    by = rules._replace(unit=0.03, spread_unit=0.07, copying_weight=3.0, code_unit=2.0)
    got = launch_needs(window, spread, SCORES.to(device), rules, kept, Grading(by, damage), origins)
    on_cpu, padding = [part.each(torch.Tensor.cpu) for part in (window, spread)], real.cpu()
    want = needs(*on_cpu, SCORES, rules, real=padding, earlier=None if kept is None else kept.cpu())
    assert torch.equal(got.keep.cpu(), want.keep)
    assert not want.keep[real.cpu()].all()
    rungs = levels(*on_cpu, SCORES, by, damage.cpu(), real=padding)
    assert torch.equal(got.levels.cpu()[padding], rungs[padding])
    torch.testing.assert_close(got.lost.cpu(), want.lost)
    for name, share in want.shares.items():
        torch.testing.assert_close(got.shares[name].cpu(), share)


@pytest.mark.parametrize("n", [1, 31, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_kept_first(n, share, device):
    keep = torch.rand(2, 3, n, device=device) < share
    order, counts, marks = launch_kept_first(keep)
    plain, numbers, bits = reference.kept_first(keep.cpu())
    torch.testing.assert_close(marks.cpu(), bits)
    unpacked = marks.cpu()[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    assert torch.equal(unpacked.flatten(-2)[..., : keep.shape[-1]].bool(), keep.cpu())
    assert torch.equal(counts.cpu(), numbers)
    for got, want, number in zip(order.cpu().flatten(0, 1), plain.flatten(0, 1), numbers.flatten(), strict=True):
        assert torch.equal(got[:number], want[:number])


@pytest.mark.parametrize("copying_peak", [0.0, 0.2])
@pytest.mark.parametrize("damage_rows", [1, 2])
@pytest.mark.parametrize("n", [512, 1024, 2600])
def test_rungs_come_with_what_is_kept(n, damage_rows, copying_peak, device):
    window, spread = probes(n, device)
    by = PLAIN._replace(unit=0.03, spread_unit=0.07, copying_weight=3.0, code_unit=2.0, copying_peak=copying_peak)
    damage = torch.rand(damage_rows, 3, 4, device=device).sort(-1, descending=True).values
    got = launch_needs(window, spread, SCORES.to(device), PLAIN, None, Grading(by, damage))
    on_cpu = [part.each(torch.Tensor.cpu) for part in (window, spread)]
    want = levels(*on_cpu, SCORES, by, damage.cpu())
    assert torch.equal(got.levels.cpu(), want)
    assert want.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(got.keep.cpu(), needs(*on_cpu, SCORES, PLAIN).keep)
    assert launch_needs(window, spread, SCORES.to(device), PLAIN).levels is None


@pytest.mark.parametrize("groups", [(3, 3), (1, 3), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize(("n", "at_a_time"), [(1, 8192), (60, 8192), (2048, 8192), (5000, 8192), (5000, 1024)])
def test_rungs_in_the_order_of_what_is_kept(n, at_a_time, groups, device, monkeypatch):
    monkeypatch.setattr(needs_kernels, "COUNTED", at_a_time)
    order, kept, _ = launch_kept_first(torch.rand(2, groups[0], n, device=device) < 0.6)
    found = torch.randint(0, 6, (2, groups[1], n), dtype=torch.uint8, device=device)
    ordered, counts, listed, packed = launch_leveled(order, kept, found, 4, 4, 20)
    plain, numbers, by_rung, four = reference.leveled(order.cpu(), kept.cpu(), found.cpu(), 4, 4, 20)
    assert torch.equal(counts.cpu(), numbers)
    coded = (kept.cpu() - 24).clamp_min(0).expand(-1, max(groups))
    assert torch.equal(numbers.sum(1), coded)
    for row in range(2):
        for group in range(max(groups)):
            held = kept[row, min(group, groups[0] - 1)]
            assert torch.equal(ordered[row, group, :held].cpu(), plain[row, group, :held])
            chosen = order[row, min(group, groups[0] - 1), 4 : max(4, held - 20)].cpu()
            rungs = found[row, min(group, groups[1] - 1)].cpu().clamp_max(3)[chosen.long()]
            wanted = torch.cat([chosen[rungs == rung] for rung in range(4)])
            told = Members.joined([packed[row, group].cpu()], [(len(chosen),)])
            for lists, members in ((listed.cpu(), told), (by_rung, Members.joined([four[row, group]], told.counts))):
                assert torch.equal(lists[row, group, : len(chosen)], wanted)
                assert torch.equal(members.rungs(), rungs)
