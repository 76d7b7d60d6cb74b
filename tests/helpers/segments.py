"""Attention over segments, through the kernels and in plain torch."""

import pytest


def run(which, device, kernel, plain, *arguments):
    """Either the kernel or what the CPU uses."""
    if which == "reference" and device == "cuda":
        pytest.skip("the reference works in host memory")
    return kernel(*arguments) if which == "kernel" else plain(*arguments)


LENGTHS = {
    "empty": [0, 0, 0, 0],
    "one": [1, 1],
    "31": [31] * 2,
    "32": [32] * 2,
    "33": [33] * 2,
    "mixed": [0, 1, 31, 200, 64, 65, 0, 129],
    "last empty": [70, 3, 0, 0],
    "long": [4096, 17],
}
