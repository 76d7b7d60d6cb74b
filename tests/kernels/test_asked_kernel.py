"""Which queries are asked: the kernel against plain torch."""

import pytest
import torch

from refreekv.kernels import reference
from refreekv.kernels.queries import launch_asked


@pytest.mark.parametrize(("rows", "spread"), [(0, 16), (8, 0), (8, 16), (64, 256), (5000, 0)])
@pytest.mark.parametrize("padding", [None, 1, 3])
@pytest.mark.parametrize("n", [1, 7, 90, 1024, 2500])
def test_it_gives_what_plain_torch_gives(rows, spread, padding, n, device):
    torch.manual_seed(n)
    real, first = None, 100
    ordinals = torch.arange(first, first + n)[None]
    if padding is not None:
        real = torch.rand(padding, n) < 0.7
        real[:, -1] = True
        ordinals = first + real.cumsum(1) - 1
    columns = torch.arange(7, 7 + n)[None]
    given = [None if part is None else part.to(device) for part in (columns, ordinals, real)]
    wanted = reference.asked(columns, ordinals, real, rows, spread, rows + spread)
    found = launch_asked(*given, rows, spread, rows + spread)
    for own, other in zip(found, wanted, strict=True):
        assert torch.equal(own.cpu(), other)
    assert wanted[3].any() or n == 1
