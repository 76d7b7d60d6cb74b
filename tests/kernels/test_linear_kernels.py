"""Products of a few rows with weights against float64."""

import pytest
import torch

from refreekv.kernels import linear


@pytest.mark.parametrize("rows", [(64,), (64, 10), (33, 16, 5)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_linears(rows, bias, batch, dtype, close, device):
    size = 1304
    x = torch.randn(batch, 1, size, device=device).to(dtype)
    weights = [torch.randn(n, size, device=device).to(dtype) for n in rows]
    biases = [torch.randn(n, device=device).to(dtype) if bias else None for n in rows]
    for got, w, b in zip(linear.linears(x, weights, biases), weights, biases, strict=True):
        want = x.double() @ w.double().T
        close(got, want if b is None else want + b.double())


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_gated_linear(gelu, batch, dtype, close, device):
    x = torch.randn(batch, 1, 96, device=device).to(dtype) / 5
    gate, up = (torch.randn(70, 96, device=device).to(dtype) for _ in range(2))
    function = torch.nn.functional.gelu if gelu else torch.nn.functional.silu
    kind = {"approximate": "tanh"} if gelu else {}
    want = function(x.double() @ gate.double().T, **kind) * (x.double() @ up.double().T)
    close(linear.gated_linear(x, gate, up, gelu), want)
