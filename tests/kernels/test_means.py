"""Mean entries: the kernels against float64."""

import pytest
import torch

from refreekv import kernels
from refreekv.core.quantisation import centre_of
from refreekv.kernels.means import launch_centres


@pytest.mark.parametrize("n", [1, 4, 5, 68, 600, 1540])
@pytest.mark.parametrize("sizes", [(64, 64), (96, 32)])
def test_means_equal_float64(n, sizes, dtype, close, device):
    keys, values = (torch.randn(2, n, 3, size).to(device, dtype).transpose(1, 2) + 7 for size in sizes)
    for got, entries in zip(launch_centres(keys, values), (keys, values), strict=True):
        assert got.dtype == dtype
        close(got, centre_of(entries.double()))
        assert (entries[:, :, :4] != got[:, :, None]).any() or n == 1


def test_rows_do_not_know_each_other(dtype, device):
    keys = torch.randn(3, 2, 700, 64).to(device, dtype)
    together, alone = launch_centres(keys, -keys), launch_centres(keys[1:2], -keys[1:2])
    for own, other in zip(together, alone, strict=True):
        assert torch.equal(own[1:2], other)


def test_other_types_and_devices_have_the_plain_version():
    entries = torch.randn(1, 2, 40, 16, dtype=torch.float64)
    for got in kernels.centres(entries, entries):
        assert torch.equal(got, centre_of(entries))
