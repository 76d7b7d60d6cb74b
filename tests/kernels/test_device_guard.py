"""Kernels run on the device of what they are given; no GPU is needed to see where they would."""

import contextlib
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from refreekv import kernels
from refreekv.kernels.device_guard import on_its_device


@pytest.fixture
def entered(monkeypatch):
    """Devices that were made the current one; it is the first."""
    devices = []

    def device(which):
        devices.append(which)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        pytest.param(
            "cuda:1",
            [torch.device("cuda:1")],
            marks=pytest.mark.skipif(torch.cuda.device_count() == 1, reason="this machine's second GPU is missing"),
        ),
        ("cuda:0", []),
        ("cpu", []),
    ],
)
def test_the_device_of_the_first_tensor_is_the_current_one(device, expected, entered):
    @on_its_device
    def launch(number, tensor, *, other):
        return number + other

    with FakeTensorMode():
        tensor = torch.empty(3, device=device)
    assert launch(1, tensor, other=2) == 3
    assert entered == expected
    assert launch(1, (None, 5, tensor), other=2) == 3, "arguments that come as one object"
    assert entered == 2 * expected


def test_every_launch_is_guarded():
    launches = []
    for module in pkgutil.iter_modules(kernels.__path__):
        found = importlib.import_module(f"refreekv.kernels.{module.name}")
        launches += [
            function
            for name, function in inspect.getmembers(found, inspect.isfunction)
            if name.startswith("launch_") and function.__module__ == found.__name__
        ]
    assert len(launches) >= 9
    for launch in launches:
        assert launch.__code__ is on_its_device(launch.__wrapped__).__code__, launch.__name__
