"""Mean entries: the kernels against float64."""

import pytest
import torch

from refreekv import kernels
from refreekv.core.quantisation import centre_of
from refreekv.kernels.means import launch_centres, launch_mapped_means


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


@pytest.mark.parametrize("sizes", [(64, 64), (96, 32)])
def test_means_in_code_space(sizes, dtype, device):
    means = tuple((torch.randn(2, 3, size) * 30).to(device, dtype) for size in sizes)
    matrices = tuple(torch.randn(1, 3, size, size, device=device) for size in sizes)
    found = launch_mapped_means(means, matrices)
    wanted = [mean.double() for mean in means]
    both = zip(matrices, means, strict=True)
    wanted += [torch.einsum("ohij,bhj->bhi", matrix.double(), mean.double()) for matrix, mean in both]
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-3)
    for own, other in zip(kernels.mapped_means(means, matrices), wanted, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-3)
