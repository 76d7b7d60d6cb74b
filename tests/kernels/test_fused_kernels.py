"""Normalisation, gated activation and rotary embedding against float64."""

import pytest
import torch

from refreekv.kernels import fused


@pytest.mark.parametrize("size", [64, 576, 4096])
@pytest.mark.parametrize("one_added", [False, True])
def test_rms_norm(size, one_added, dtype, close, device):
    x = torch.randn(3, 1, size, device=device).to(dtype) * 3
    weight = torch.randn(size, device=device).to(dtype)
    got = fused.rms_norm(x, weight, 1e-5, one_added)
    wide = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(got, wide * (weight.double() + one_added))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("halves", [False, True], ids=["apart", "halves of one"])
def test_gated(gelu, halves, dtype, close, device):
    both = torch.randn(2, 1, 3000, device=device).to(dtype) * 2
    gate, up = both.chunk(2, dim=-1) if halves else (both, both.flip(-1))
    function = torch.nn.functional.gelu if gelu else torch.nn.functional.silu
    kind = {"approximate": "tanh"} if gelu else {}
    close(fused.gated(gate, up, gelu), function(gate.double(), **kind) * up.double())


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("shared", [False, True])
def test_rotary(size, shared, dtype, close, device):
    # Views of what one projection writes.
    both = torch.randn(3, 1, 6, size, device=device).to(dtype).transpose(1, 2)
    query, key = both[:, :4], both[:, 4:]
    angle = torch.rand(1 if shared else 3, 1, size // 2, device=device).repeat(1, 1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for got, x in zip(fused.rotary(query, key, cos, sin), (query, key), strict=True):
        low, high = x.double().chunk(2, -1)
        turned = torch.cat([-high, low], -1)
        close(got, x.double() * cos.double()[:, None] + turned * sin.double()[:, None])


@pytest.mark.parametrize("one_added", [False, True])
def test_add_rms_norm(one_added, dtype, close, device):
    both = torch.randn(3, 1, 2 * 576, device=device).to(dtype) * 3
    x, more = both.chunk(2, -1)
    weight = torch.randn(576, device=device).to(dtype)
    total, got = fused.add_rms_norm(x, more, weight, 1e-5, one_added)
    assert torch.equal(total, x + more)
    assert torch.equal(got, fused.rms_norm(x + more, weight, 1e-5, one_added))


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "gated"])
def test_numbers_of_a_row_may_lie_apart(name, dtype, device):
    """As those of modules that compute with channels in front."""
    x, more = (torch.randn(576, 3, device=device).to(dtype).T[:, None] for _ in range(2))  # [3, 1, 576]
    weight = torch.randn(576, device=device).to(dtype)
    call = {
        "rms_norm": lambda x, _: (fused.rms_norm(x, weight, 1e-5, False),),
        "add_rms_norm": lambda x, more: fused.add_rms_norm(x, more, weight, 1e-5, False),
        "gated": lambda x, more: (fused.gated(x, more, False),),
    }[name]
    for left, right in ((x, more), (x, more.contiguous()), (x.contiguous(), more)):
        for got, want in zip(call(left, right), call(x.contiguous(), more.contiguous()), strict=True):
            assert torch.equal(got, want)
