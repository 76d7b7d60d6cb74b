"""Products with a matrix that is made some rows at a time, against the whole of it."""

import pytest
import torch

from refreekv.core import slices


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(slices, "slice_rows", lambda size, tokens: 12)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_product_is_that_of_the_whole_matrix(shape, bias, gradients, few_rows):
    weight, x = torch.randn(50, 48), torch.randn(shape, requires_grad=gradients)
    added, made = torch.randn(50) if bias else None, []

    def unpack(start, stop):
        made.append((start, stop))
        return weight[start:stop]

    got = slices.product(x, 50, unpack, added)
    assert made == [(0, 12), (12, 24), (24, 36), (36, 48), (48, 50)]
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, added))
    if gradients:
        (found,) = torch.autograd.grad(got.sum(), x)
        torch.testing.assert_close(found, weight.sum(0).expand(shape))


def test_only_one_slice_is_there_at_a_time(few_rows):
    import weakref

    alive = []

    def unpack(start, stop):
        assert not any(one() is not None for one in alive)
        rows = torch.randn(stop - start, 48)
        alive.append(weakref.ref(rows))
        return rows

    with torch.no_grad():
        slices.product(torch.randn(3, 48), 50, unpack)
    assert len(alive) == 5


def test_slices_are_whole_tiles_of_about_32_mib():
    assert [slices.slice_rows(size, 256) for size in (1024, 4096, 5120, 14336, 27648)] == [
        16384,
        4096,
        3072,
        1024,
        1024,
    ]
    assert [slices.slice_rows(size, 2048) for size in (1024, 4096, 5120, 14336, 27648)] == [
        16384,
        4096,
        3072,
        2048,
        2048,
    ]
    shapes = [(1024, 4096), (4096, 14336), (14336, 4096)]
    assert slices.unpacked_weights(shapes, 256) == 4096 * 4096
    assert slices.unpacked_weights(shapes, 2048) == 2048 * 14336
    assert slices.unpacked_weights([(100, 64)], 2048) == 6400  # all of it
    assert slices.unpacked_weights([], 2048) == 0
