"""The cut of the position ranking by kernels, against the torch version."""

import pytest
import torch

from refreekv import kernels
from refreekv.core.selection import uni_metric_cut
from refreekv.kernels.cut import launch_cut


def both(rows, device, **settings):
    got = launch_cut(rows.to(device), settings["sinks"], settings["threshold"], settings["includes_sinks"])
    want = uni_metric_cut(rows, **settings)
    return [part.cpu() for part in got], want


@pytest.mark.parametrize("n", [1, 3, 127, 128, 129, 1500])
@pytest.mark.parametrize("heads", [1, 9, 32])
@pytest.mark.parametrize("includes_sinks", [False, True])
@pytest.mark.parametrize("threshold", [1e-4, 0.01, 0.3])
def test_cut_and_loss(n, heads, includes_sinks, threshold, device):
    # A sharp one, so that cuts lie anywhere.
    rows = (torch.randn(2, heads, n) * torch.tensor([1.0, 4.0])[:, None, None]).softmax(-1)
    got, want = both(rows, device, sinks=4, threshold=threshold, includes_sinks=includes_sinks)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("includes_sinks", [False, True])
def test_rows_without_a_usable_norm_keep_everything(includes_sinks, device):
    rows = torch.zeros(3, 4, 200)
    rows[1] = float("nan")
    rows[2, :, :4] = 0.25
    got, want = both(rows, device, sinks=4, threshold=0.01, includes_sinks=includes_sinks)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert got[0][:2].tolist() == [4, 4]


def test_no_sinks_and_all_on_one_position(device):
    rows = torch.zeros(1, 2, 300)
    rows[..., 17] = 1.0
    got, want = both(rows, device, sinks=0, threshold=0.01, includes_sinks=True)
    assert got[0].tolist() == want[0].tolist() == [17]


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_the_front_gives_what_torch_gives_whoever_computes_it(valid, threshold, device):
    rows = (torch.randn(2, 4, 300, device=device) * 3).softmax(-1)
    settings = {
        "sinks": 4,
        "threshold": threshold,
        "includes_sinks": False,
        "valid": (torch.arange(300, device=device) >= 7).expand(2, 300) if valid else None,
    }
    got, want = kernels.uni_metric_cut(rows, **settings), uni_metric_cut(rows, **settings)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-12, rtol=1e-9)
