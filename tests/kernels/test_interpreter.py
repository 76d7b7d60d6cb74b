"""What tests make faster of Triton's interpreter gives what Triton's own gives, bit by bit."""

import pytest
import torch

from helpers import interpreter
from kernels.test_packed_kernels import Exact, Packed, form_of, maps_of, on
from refreekv.kernels.packed_calls import PackedKV
from refreekv.kernels.packed_launch import launch_packed_attention


def test_results_are_those_of_tritons_own(device, monkeypatch):
    if device != "cpu":
        pytest.skip("kernels run on the GPU")
    form, sizes = form_of("6442", "4422"), (64, 64)
    packed, kept = Packed([70, 33], form, device).fill(), Exact([20, 9], sizes, torch.float16, device)
    held = PackedKV(kept.table, [packed.table], [form], on(maps_of(sizes, torch.float16), device))
    query = torch.randn(1, 6, 1, 64).half()
    found = launch_packed_attention(query, held, 0.125, 5.0, None, programs=3, least=16)
    assert len(interpreter.OWN) == 6
    for where, name, own in interpreter.OWN:
        monkeypatch.setattr(where, name, own)
    assert torch.equal(launch_packed_attention(query, held, 0.125, 5.0, None, programs=3, least=16), found)
