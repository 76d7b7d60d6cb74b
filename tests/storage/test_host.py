"""Host memory for what leaves a device: what comes back is what went, limits hold, and memory is given back."""

import contextlib
import copy
import gc
import random
import sys
import threading

import pytest
import torch

from refreekv.storage import host
from refreekv.storage.host import HostMemory, NoRoomError, Parked
from refreekv.storage.told import Told

CPU = torch.device("cpu")
PAGED = False
"""Whether memory is handed out in pages, as pinned memory is."""


@pytest.fixture(params=["cpu", "in pages", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(sys.modules[__name__], "PAGED", request.param != "cpu")
    if request.param == "in pages":
        real = host._allocated
        monkeypatch.setattr(host, "_allocated", lambda size, pinned: real(size, pinned=False))
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def memory(device, limit=2**30):
    return HostMemory(limit, pinned=PAGED)


def some_tensors(device, seed=0):
    torch.manual_seed(seed)
    lines = torch.randint(0, 255, (2, 3, 50, 24), dtype=torch.uint8)
    return {
        "contiguous": torch.randn(3, 5),
        "half": torch.randn(2, 3, 7, 16).bfloat16(),
        "strided": lines[:, :, 5:45],
        "one of a dimension": torch.randn(4, 6)[:, 2:3],
        "transposed": torch.randn(4, 1, 6).transpose(0, 1),
        "numbers": torch.arange(9),
        "scalar": torch.tensor(3.0),
        "flags": torch.rand(4, 3) > 0.5,
        "empty": torch.empty(2, 0, 4),
    }


@pytest.mark.parametrize("page", [host.PAGE, 48])
def test_what_comes_back_is_what_went(device, page, monkeypatch):
    monkeypatch.setattr(host, "PAGE", page)  # also where tensors lie across pieces
    monkeypatch.setattr(host, "SLAB", max(10 * page, 480))
    tensors = {name: part.to(device) for name, part in some_tensors(device).items()}
    tensors["strided"] = some_tensors(device)["strided"].to(device).repeat(1, 1, 2, 1)[:, :, 3:43]
    parked = Parked.put(memory(device), tensors)
    for back in (parked.fetch(device).tensors(), parked.on_host()):
        assert back.keys() == tensors.keys()
        for name, part in tensors.items():
            assert back[name].dtype == part.dtype
            assert back[name].shape == part.shape
            assert torch.equal(back[name].cpu(), part.cpu()), name


def test_small_tensors_travel_together(device, monkeypatch):
    """Those that are large and without gaps have a copy of their own, and what comes back is one copy."""
    copies, real = [], host._copy
    monkeypatch.setattr(host, "_copy", lambda *args, **kwargs: (copies.append(args[2].shape), real(*args, **kwargs)))
    large = torch.randint(0, 255, (2, host.APART), dtype=torch.uint8).to(device)
    tensors = {"large": large, **{name: part.to(device) for name, part in some_tensors(device).items()}}
    parked = Parked.put(memory(device), tensors)
    assert next(shape for shape in copies if shape.numel()) == large.shape
    assert sum(shape.numel() > 0 for shape in copies) == 2
    copies.clear()
    found = parked.fetch(device).tensors()
    assert len(copies) == 1
    for name, part in tensors.items():
        assert torch.equal(found[name], part), name
        assert found[name].data_ptr() % host.ALIGNED == 0 or not part.numel()


def test_what_goes_may_be_changed_once_the_device_waited(device):
    size = 2**22
    for seed in range(5):
        tensor = torch.full((size,), seed, device=device)
        parked = Parked.put(memory(device), {"all": tensor})
        parked.until_read(device)
        tensor.zero_()
        assert torch.equal(parked.on_host()["all"], torch.full((size,), seed))


def test_memory_that_is_used_again_waits_for_copies(device):
    pool = memory(device)
    for seed in range(8):
        parked = Parked.put(pool, {"all": torch.full((2**22,), seed, device=device)})
        coming = parked.fetch(device)
        del parked  # its pieces go to the next one, while copies from there may be under way
        assert bool((coming.tensors()["all"] == seed).all())


def test_the_limit_holds_and_memory_is_given_back(device):
    unit = host.PAGE if PAGED else 1000
    pool = memory(device, limit=3 * unit)
    first, second = pool.take(unit), pool.take(2 * unit)
    assert pool.used == 3 * unit
    with pytest.raises(NoRoomError, match="are in use"):
        pool.take(1)
    del second
    gc.collect()
    assert pool.used == unit
    again = pool.take(unit)
    assert pool.used == 2 * unit
    assert first.size == again.size == unit


def fill(buffer, value):
    for part in buffer.spans(0, buffer.size):
        part.fill_(value)


def is_filled(buffer, value):
    parts = list(buffer.spans(0, buffer.size))
    return sum(map(len, parts)) == buffer.size and all(bool((part == value).all()) for part in parts)


def test_buffers_never_share_bytes(device, monkeypatch):
    """Many of any size, given back in any order: each has its own, and nothing is pinned that need not be."""
    monkeypatch.setattr(host, "PAGE", 64)
    monkeypatch.setattr(host, "SLAB", 1024)
    pool, held, chance = memory(device, limit=20_000), {}, random.Random(0)
    most = 0
    for number in range(1, 400):
        if held and chance.random() < 0.45:
            del held[chance.choice(list(held))]
        else:
            with contextlib.suppress(NoRoomError):
                held[number] = pool.take(chance.randrange(0, 3000))
                fill(held[number], number % 251)
        most = max(most, pool.used)
        assert all(is_filled(buffer, key % 251) for key, buffer in held.items())
        assert pool.used == sum(map(pool.size_of, [held[key].size for key in held])) <= pool.limit
    assert most > 15_000
    if PAGED:
        assert pool.held <= most + 1024
    held.clear()
    assert pool.used == 0


def test_where_the_system_has_none_nothing_is_counted(device, monkeypatch):
    pool, real = memory(device), torch.empty

    def full(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(NoRoomError, match="the system gives no"):
        pool.take(100)
    monkeypatch.setattr(torch, "empty", real)
    assert pool.used == 0
    pool.take(100)


def test_copies_of_what_is_parked_share_it(device):
    pool = memory(device)
    parked = Parked.put(pool, {"all": torch.arange(10, device=device)})
    used, twin = pool.used, copy.deepcopy(parked)
    assert pool.used == used
    del parked
    assert pool.used == used
    assert torch.equal(twin.on_host()["all"], torch.arange(10))
    del twin
    assert pool.used == 0


def test_several_threads(device):
    pool, wrong = memory(device), []

    def work(seed):
        for _ in range(20):
            tensors = {name: part.to(device) for name, part in some_tensors(device, seed).items()}
            back = Parked.put(pool, tensors).on_host()
            wrong.extend(name for name in back if not torch.equal(back[name], tensors[name].cpu()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.used == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_computes_does_not_wait_for_copies():
    """Numbers are told while much is copied: what is launched behind them runs before that is done."""
    device = torch.device("cuda")
    pool, numbers = HostMemory(2**30, pinned=True), torch.arange(12, device=device).view(3, 4)
    other = torch.zeros(9, device=device)
    held = {"lines": torch.zeros(2**29, dtype=torch.uint8, device=device)}  # some 10 ms
    Parked.put(pool, held)  # pinned, for the next one
    gc.collect()
    torch.cuda.synchronize()
    parked = Parked.put(pool, held)
    copied = host.copy_stream(device).record_event()
    told = Told(numbers)
    other += 1
    torch.cuda.current_stream().synchronize()
    assert not copied.query()
    assert told.wait().tolist() == numbers.tolist()
    assert parked.nbytes == 2**29


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pieces_are_pinned_ahead():
    pool = HostMemory(2**30, pinned=True)
    pool.prepare(4 * host.SLAB)
    for _ in range(1000):
        if pool.held >= 4 * host.SLAB:
            break
        threading.Event().wait(0.01)
    assert pool.held == 4 * host.SLAB
    assert pool.used == 0
    buffer = pool.take(3 * host.SLAB)
    assert pool.held == 4 * host.SLAB
    assert pool.used == 3 * host.SLAB
    assert all(part.is_pinned() for part in buffer.spans(0, buffer.size))


def test_there_is_memory():
    assert host.available_memory() > 2**20
