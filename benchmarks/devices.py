"""What the GPU benchmarks share: timing on the device, and the bandwidth that a copy reaches."""

import statistics
from collections.abc import Callable, Sequence
from datetime import date

import torch


def device_seconds(calls: Sequence[Callable[[], object]], repeats: int = 20, *, rounds: int = 1) -> float:
    """Median time of one call, from a CUDA graph that runs all ``calls`` one after the other.

    Calls should use input sets of their own, so that together they do not fit the L2 cache. A graph
    keeps the host's launch times out.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls) / rounds)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second that a device-to-device copy of 2 GiB moves, read and written ones counted.

    The fastest of a copy by itself, whose time does not depend on the host at this size: inside a
    CUDA graph it goes through a slower path.
    """
    source = torch.randint(-128, 127, (2**31,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / min(times[2:])


def bus_bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB from pinned host memory to the device moves: the fastest."""
    source = torch.empty(2**30, dtype=torch.int8, pin_memory=True)
    target = torch.empty(2**30, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return source.nbytes / min(times)


def header() -> str:
    """Device, software and day."""
    return f"{torch.cuda.get_device_name()}; torch {torch.__version__}; {date.today()}"
