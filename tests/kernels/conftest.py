"""What the tests of the kernels share. Without a GPU they run in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'refreekv[dev]'")


@pytest.fixture
def device():
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# The interpreter keeps bfloat16 as integers and multiplies those in tl.dot: it cannot be the judge.
DTYPES = [torch.float16] + ([torch.bfloat16, torch.float32] if torch.cuda.is_available() else [])
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    """Types that kernels are checked in."""
    return request.param


@pytest.fixture
def close(dtype):
    """Checks a result against float64 by relative error, for the type under test."""

    def check(got, want):
        assert got.shape == want.shape
        assert torch.isfinite(got).all()
        error = (got.double().cpu() - want.double().cpu()).norm() / want.double().norm().clamp_min(1e-30).cpu()
        assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"

    return check
