"""Products with a matrix that is made some rows at a time, against the whole of it."""

import weakref

import pytest
import torch

from refreekv.core import slices


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows", [12, 25, 50])
def test_a_product_is_that_of_the_whole_matrix(shape, bias, gradients, rows):
    weight, x = torch.randn(50, 48), torch.randn(shape, requires_grad=gradients)
    added, made = torch.randn(50) if bias else None, []

    def unpack(index):
        made.append(index)
        return weight[index * rows : (index + 1) * rows]

    got = slices.product(x, 50, rows, unpack, added)
    assert made == list(range(-(-50 // rows)))
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, added))
    if gradients:
        (found,) = torch.autograd.grad(got.sum(), x)
        torch.testing.assert_close(found, weight.sum(0).expand(shape))


def test_a_bias_is_added_before_the_result_is_rounded():
    """As one product with a bias does it: what is rounded twice is further off by a factor of 1.4."""
    torch.manual_seed(0)
    weight, x, bias = (torch.randn(*shape).bfloat16() for shape in ((256, 512), (300, 512), (256,)))
    want = x.double() @ weight.double().T + 20 * bias.double()
    got = slices.product(x, 256, 64, lambda index: weight.split(64)[index], 20 * bias)
    once = torch.nn.functional.linear(x, weight, 20 * bias)
    assert (got.double() - want).norm() <= 1.1 * (once.double() - want).norm()


def test_one_slice_is_alive_at_a_time():
    made = []

    def unpack(index):
        assert not any(one() is not None for one in made)
        part = torch.randn(12, 48) if index < 4 else torch.randn(2, 48)
        made.append(weakref.ref(part))
        return part

    slices.product(torch.randn(3, 48), 50, 12, unpack)
    assert len(made) == 5


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1024, 4096), 1024),  # less than 32 MiB: all of it
        ((4096, 4096), 4096),
        ((14336, 4096), 3584),  # quarters
        ((4096, 14336), 1024),
        ((5120, 5120), 2560),
        ((27648, 5120), 5632),  # five parts of 64 MiB at most
        ((5120, 27648), 1024),
        ((28672, 8192), 4096),
        ((8192, 28672), 1024),
        ((4096, 65536), 1024),  # not fewer rows
    ],
    ids=str,
)
def test_slices_are_even_whole_tiles_of_32_to_64_mib(shape, rows):
    count, size = shape
    assert slices.slice_rows(count, size, 256) == rows
    assert rows in (count, rows // slices.TILE * slices.TILE)
    assert rows * size <= max(slices.MOST, slices.LEAST_ROWS * size)


def test_many_tokens_have_larger_slices():
    assert [slices.slice_rows(14336, 4096, tokens) for tokens in (1024, 2048, 4096)] == [3584, 7168, 14336]
    assert [slices.slice_rows(4096, 14336, tokens) for tokens in (1024, 2048, 4096)] == [1024, 2048, 4096]


def test_the_largest_slice_counts():
    shapes = [(1024, 4096), (4096, 14336), (14336, 4096)]
    assert slices.unpacked_weights(shapes, 256) == 3584 * 4096
    assert slices.unpacked_weights(shapes, 2048) == 2048 * 14336
    assert slices.unpacked_weights([(100, 64)], 2048) == 6400  # all of it
    assert slices.unpacked_weights([], 2048) == 0
